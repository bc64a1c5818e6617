"""The model card, generated from the files beside it.

Every number comes from a file in the folder; where the file is missing the card says "not
measured". The template holds no number at all (a test counts its digits).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dspark_packaging import hub_rules
from dspark_packaging.contents import Package, open_package
from dspark_packaging.errors import PackageError
from dspark_packaging.layout import (
    CARD_FILE,
    CONFIG_FILE,
    COST_FILE,
    DRAFT_FOLDER,
    EVAL_RESULTS,
    LICENSE_FILE,
    PLOT_FILE,
)
from dspark_packaging.manifest import MANIFEST_FILE
from dspark_packaging.published import FACTS_FILE, render_published
from dspark_packaging.rendering import GENERATED_MARK, PAPER, environment
from dspark_packaging.schemas import (
    EVAL_FILE,
    PROVENANCE_FILE,
    TARGET_FILE,
    THROUGHPUT_FILE,
    DrafterProvenance,
    Kind,
)
from dspark_packaging.weights import Sizes, shared_bytes, sizes_of
from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, STS_FILE, write_bytes

KINDS: tuple[Kind, ...] = ("chat", "math", "code", "instructions")
_INTERVAL = "95% interval"
#: Digits of a digest on the card; the file beside it has all.
_KEPT = 16


#: A figure in an author's prose: it has no command and no machine, so it may not be on the card.
_FIGURE = re.compile(
    r"\d[\d.,]*\s*(?:×|x\b|times\b|%|ms\b|(?:tok(?:en)?s?)\s*(?:/|per|a)\s*s|GB\b|GiB\b)",
    re.IGNORECASE,
)


def front_matter(provenance: DrafterProvenance, *, bundle: bool = False) -> str:
    """The YAML block of the card, without its fences."""
    tags = list(hub_rules.REQUIRED_TAGS)
    if bundle:
        tags.remove(hub_rules.DRAFT_TAG)
    meta: dict[str, Any] = {
        "license": provenance.license,
        "base_model": provenance.target.repo_id,
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        # Any word is allowed; SGLang is what loads these weights, and published DSpark drafters
        # say the same. "transformers" would make the Hub print a snippet that cannot work.
        "library_name": "sglang",
        "tags": [*tags, provenance.target.family],
    }
    if provenance.license == "other":
        meta |= {"license_name": provenance.license_name, "license_link": LICENSE_FILE}
    if provenance.language:
        meta["language"] = provenance.language
    return yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)


def _memory(package: Package, sizes: Sizes) -> dict[str, Any]:
    """What a server holds more than one without speculation, and than the original target."""
    config = package.drafter.config
    replaced = package.bundle.replaced_bytes if package.bundle else 0
    copies = shared_bytes(package.drafter.tensors.items())
    kv_elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return {
        "gross": sizes.nbytes - copies,
        "copies": copies,
        "replaced": replaced,
        "net": sizes.nbytes - copies - replaced,
        "kv": None if config.bundled else round(kv_elements * sizes.element_bytes),
    }


def _shape(package: Package) -> dict[str, Any]:
    """Sizes that dense and V4 configurations name differently."""
    config, raw = package.drafter.config, package.drafter.raw
    if not config.bundled:
        return {
            "layers": config.num_layers,
            "feed_forward": config.intermediate_size,
            "experts": None,
        }
    return {
        "layers": len(config.target_layer_ids),
        "feed_forward": raw.get("moe_intermediate_size", 0),
        "experts": raw.get("dspark_n_routed_experts") or raw.get("n_routed_experts"),
    }


def _refuse_figures(provenance: DrafterProvenance) -> None:
    """Refuse a figure typed into prose: results come from what measured them."""
    for limit in provenance.limits:
        found = _FIGURE.search(limit)
        if found:
            raise PackageError(
                f'{PROVENANCE_FILE} says "{found[0]}" in its limits, with no measurement behind it.',
                expected=f"figures in {EVAL_FILE} or {THROUGHPUT_FILE}, with command and hardware",
                fix="Measure it (`dspark eval --record`, `dspark bench-load`), or say it without "
                "a figure.",
            )


def render_card(directory: Path) -> str:
    """Render the card of a drafter's folder, of a bundle, or of a folder with ``facts.yaml``.

    Raises:
        PackageError: not a package, a figure with no measurement behind it, or front matter that
            the Hub would refuse.
        CheckpointError: weights or configuration missing or damaged.
        ArtifactError: a JSON file is malformed or belongs to other weights.
    """
    if (directory / FACTS_FILE).is_file():
        return render_published(directory)
    package = open_package(directory)
    records, drafter = package.records, package.drafter
    _refuse_figures(records.provenance)
    sizes = sizes_of(drafter.tensors)
    inside = f"{DRAFT_FOLDER}/" if package.home != directory else ""
    named = {
        "sts": STS_FILE,
        "cost": COST_FILE,
        "vocabulary": DRAFT_VOCAB_FILE,
        "eval": EVAL_FILE,
        "throughput": THROUGHPUT_FILE,
        "target": TARGET_FILE,
        "provenance": PROVENANCE_FILE,
        "plot": PLOT_FILE,
        "results": EVAL_RESULTS,
    }
    plot = (package.home / PLOT_FILE).is_file()
    card = (
        environment()
        .get_template("card.md.jinja")
        .render(
            front_matter=front_matter(records.provenance, bundle=package.bundle is not None),
            mark=GENERATED_MARK,
            p=records.provenance,
            architecture=drafter.architecture,
            config=drafter.config,
            shape=_shape(package),
            sizes=sizes,
            memory=_memory(package, sizes),
            digest=drafter.digest,
            sts=records.sts,
            cost=records.cost,
            vocabulary=records.vocabulary,
            eval=records.eval,
            throughput=records.throughput,
            target=records.target,
            bundle=package.bundle,
            total=package.shards,
            plot=plot,
            kept=_KEPT,
            kinds=KINDS,
            interval=_INTERVAL,
            paper=PAPER,
            files={key: inside + name for key, name in named.items()}
            | {"manifest": MANIFEST_FILE, "config": CONFIG_FILE, "license": LICENSE_FILE},
        )
    )
    hub_rules.check_front_matter(card, bundle=package.bundle is not None)
    return card


def write_card(directory: Path) -> bool:
    """Write the card of a folder; returns whether it changed.

    Raises:
        DSparkError: as :func:`render_card`; or the card there was written by hand.
    """
    card = render_card(directory)
    path = directory / CARD_FILE
    if path.exists():
        old = path.read_text(encoding="utf-8", errors="replace")
        if old == card:
            return False
        refuse_foreign_card(path)
    write_bytes(path, card.encode())
    return True


def refuse_foreign_card(path: Path) -> None:
    """Refuse to overwrite a card that was not generated.

    Raises:
        PackageError: ``path`` exists and lacks the mark of a generated card.
    """
    if path.exists() and GENERATED_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise PackageError(
            f"{path} was not generated by this tool.",
            expected="no card, or a generated one",
            fix=f"Move {path.name} away, then run the command again.",
        )


def check_card(directory: Path) -> None:
    """Check that the card says what the files beside it say.

    Raises:
        PackageError: missing or not current.
    """
    card = render_card(directory)
    path = directory / CARD_FILE
    found = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if found != card:
        state = "does not exist" if found is None else "differs from what the files beside it say"
        raise PackageError(
            f"{path} {state}.", expected="the generated card", fix=f"Run `dspark card {directory}`."
        )
