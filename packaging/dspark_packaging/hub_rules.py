"""The Hub's rules for a card's front matter and for results, checked offline.

``ModelCard.validate()`` of huggingface_hub posts the card to the Hub, which a build without
network cannot do. These are the Hub's documented rules for the keys that a drafter's card
uses; any other key is refused, so that a misspelt one is not ignored silently. Accepted lengths
are written in the Hub's format for results (https://huggingface.co/docs/hub/eval-results).
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import EVAL_FILE, EVAL_RESULTS, RESULTS_FILE
from dspark_packaging.records import EvalArtifact, Package
from dspark_sglang.artifacts import write_bytes

#: https://huggingface.co/docs/hub/repositories-licenses
_LICENSE_IDS = """
    apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m
    bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause
    bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc
    h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSE_IDS.split())
#: No value means "draft module"; the card's text says what ``finetune`` stands for here.
RELATIONS = ("finetune", "adapter", "merge", "quantized")
#: Tasks of the Hub that a speculatively decoded target can have.
TASKS = ("text-generation", "image-text-to-text", "video-text-to-text", "any-to-any")
DRAFT_TAG = "draft-model"
REQUIRED_TAGS = ("speculative-decoding", "dspark", DRAFT_TAG, "sglang")
_REQUIRED = ("license", "base_model", "base_model_relation", "pipeline_tag", "library_name", "tags")
_OPTIONAL = ("language", "license_name", "license_link")
_FENCE = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_REPO_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_MAX_REPO_ID = 96
_FIX = "Correct provenance.json and run `dspark package DIR --card write`."


class UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; the Hub refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"repeated key {', '.join(sorted(repeated))}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _refuse(found: str, expected: str) -> PackageError:
    return PackageError(f"The card's front matter {found}.", expected=expected, fix=_FIX)


def read_front_matter(card: str) -> dict[str, Any]:
    """The YAML mapping at the top of a card.

    Raises:
        PackageError: no front matter at the first byte, or YAML that the Hub would refuse.
    """
    match = _FENCE.match(card)
    if match is None:
        raise _refuse("is missing", "a YAML block between --- lines at the very top")
    try:
        # A subclass of SafeLoader: builds plain values only.
        value = yaml.load(match[1], Loader=UniqueKeys)
    except yaml.YAMLError as error:
        raise _refuse(f"is not YAML ({' '.join(str(error).split())})", "valid YAML") from error
    if not isinstance(value, dict):
        raise _refuse(f"is a {type(value).__name__}", "a YAML mapping")
    return value


def is_repo_id(value: object) -> bool:
    """Whether ``value`` can name a model on the Hub (``owner/name``)."""
    if not isinstance(value, str) or len(value) > _MAX_REPO_ID or value.count("/") != 1:
        return False
    if "--" in value or ".." in value or value.endswith(".git"):
        return False
    return all(_REPO_NAME.fullmatch(part) for part in value.split("/"))


def check_front_matter(card: str, *, bundle: bool = False) -> dict[str, Any]:
    """Check the front matter of a drafter's card, or of a bundle's, and return it.

    Raises:
        PackageError: the first rule that is broken.
    """
    meta = read_front_matter(card)
    for key in _REQUIRED:
        if meta.get(key) in (None, "", []):
            raise _refuse(f"has no {key}", f"{key} to be set")
    unknown = [str(key) for key in meta if key not in (*_REQUIRED, *_OPTIONAL)]
    if unknown:
        raise _refuse(f"has {', '.join(unknown)}", "only " + ", ".join((*_REQUIRED, *_OPTIONAL)))
    _check_license(meta)
    for key, allowed in (("base_model_relation", RELATIONS), ("pipeline_tag", TASKS)):
        if meta[key] not in allowed:
            raise _refuse(f"has {key} {meta[key]!r}", " or ".join(allowed))
    if not is_repo_id(meta["base_model"]):
        raise _refuse(f"has base_model {meta['base_model']!r}", "a Hub model id, owner/name")
    if not isinstance(meta["library_name"], str) or not _SLUG.fullmatch(meta["library_name"]):
        raise _refuse(f"has library_name {meta['library_name']!r}", "one lower-case word")
    _check_list(meta["tags"], "tags", _SLUG)
    # A bundle is served by itself: it is no draft model.
    needed = [tag for tag in REQUIRED_TAGS if tag != DRAFT_TAG or not bundle]
    missing = [tag for tag in needed if tag not in meta["tags"]]
    if missing:
        raise _refuse(f"lacks the tags {', '.join(missing)}", ", ".join(needed))
    if "language" in meta:
        _check_list(meta["language"], "language", _LANGUAGE)
    return meta


def _check_license(meta: dict[str, Any]) -> None:
    if not isinstance(meta["license"], str) or meta["license"] not in LICENSES:
        raise _refuse(
            f"has license {meta['license']!r}",
            "an identifier of the Hub's list, such as apache-2.0",
        )
    named = isinstance(meta.get("license_name"), str) and isinstance(meta.get("license_link"), str)
    if (meta["license"] == "other") != named:
        raise _refuse(
            f"has license {meta['license']!r}, license_name {meta.get('license_name')!r} and "
            f"license_link {meta.get('license_link')!r}",
            "license_name and license_link with license other, and only then",
        )


def _check_list(value: object, key: str, pattern: re.Pattern[str]) -> None:
    items = value if isinstance(value, list) else [None]
    # YAML reads an unquoted no as false and 1.0 as a number: both arrive here as non-strings.
    if not all(isinstance(item, str) and pattern.fullmatch(item) for item in items):
        raise _refuse(f"has {key} {value!r}", f"a list of strings like {pattern.pattern}")
    if len(set(items)) != len(items):
        raise _refuse(f"repeats a value in {key}: {value!r}", "each once")


#: An entry has to name a dataset of the Hub. Prompts that are none get the name of ours, and the notes say so.
_DATASET = "dspark-sglang/packaged-prompts"


def entries(measured: EvalArtifact) -> list[EvalResultEntry]:
    """One entry for each temperature and kind of prompt, and for all prompts together."""
    made = []
    date = measured.provenance.created
    for row in measured.accepted_length:
        values: list[tuple[str, float]] = [("all", row.overall), *row.by_kind.items()]
        for kind, value in values:
            made.append(
                EvalResultEntry(
                    dataset_id=_DATASET,
                    task_id=f"accepted-length-{kind}-temperature-{row.temperature:g}",
                    value=value,
                    date=date if "T" in date else None,
                    notes=f"{measured.prompts}; not a dataset of the Hub. {measured.definition} "
                    f"Hardware: {measured.hardware}. Command: {measured.provenance.command}",
                )
            )
    return made


def results_yaml(measured: EvalArtifact) -> str:
    """The file's content."""
    return yaml.safe_dump(
        eval_result_entries_to_yaml(entries(measured)), sort_keys=False, allow_unicode=True
    )


def check_results(package: Package) -> None:
    """Check that the results file says what ``eval.json`` says, and that the Hub's client reads it.

    Raises:
        PackageError: it differs, holds more, or is there without a measurement.
    """
    folder, measured = package.directory / EVAL_RESULTS, package.records.eval
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    fix = f"Run `dspark package {package.directory} {package.directory}`."
    if not present:  # packages made before there was one, and partial downloads
        return
    if measured is None or present != [RESULTS_FILE]:
        raise PackageError(
            f"{folder} holds {', '.join(present)}.",
            expected=f"nothing: there is no {EVAL_FILE}" if measured is None else RESULTS_FILE,
            fix=fix,
        )
    text = (folder / RESULTS_FILE).read_text(encoding="utf-8", errors="replace")
    if text != results_yaml(measured):
        raise PackageError(
            f"{folder / RESULTS_FILE} is not what {EVAL_FILE} says.",
            expected="the results generated from it",
            fix=fix,
        )
    parse_eval_result_entries(yaml.safe_load(text))


def write_results(package: Package) -> None:
    """Write the results file at the top of a package, where the Hub looks for it, if there are any."""
    if package.records.eval is not None:
        content = results_yaml(package.records.eval).encode()
        write_bytes(package.directory / EVAL_RESULTS / RESULTS_FILE, content)
