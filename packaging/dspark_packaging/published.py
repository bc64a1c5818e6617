"""Cards of published checkpoints, generated from facts that others published.

``facts.yaml`` holds values, each with the source it was taken from; what is not known is listed as
missing. A value without a source cannot be written: the schema refuses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from dspark_packaging import hub_rules
from dspark_packaging.errors import PackageError
from dspark_packaging.rendering import GENERATED_MARK, PAPER, environment
from dspark_packaging.schemas import RepoId, Text

FACTS_FILE = "facts.yaml"
_FIX = "Name the source of every value in facts.yaml, or list what is unknown under missing."


class Fact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One published value."""

    what: Text
    value: str | int | float
    #: A key of ``sources``, and where in it.
    source: Text


class Named(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name with its source."""

    value: Text
    source: Text


class Base(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The target's name on the Hub."""

    value: RepoId
    source: Text


class Length(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Accepted length as it was published, with what it is compared with."""

    definition: Text
    conditions: Text
    source: Text
    values: dict[str, float]


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of ``facts.yaml``."""

    schema_version: Literal[1]
    name: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+$")]
    shape: Literal["bundle", "drafter"]
    family: Annotated[str, msgspec.Meta(pattern="^[a-z0-9.-]+$")]
    base_model: Base
    #: Identifier of the Hub; "unknown" where no source says it.
    license: Named
    #: Short name of a source and its citation.
    sources: dict[str, Text]
    #: Additional flags of the serve command.
    flags: list[Fact] = []
    #: Why SGLang cannot serve it, where it cannot.
    not_served: Fact | None = None
    compatibility: list[Fact]
    architecture: list[Fact]
    memory: list[Fact] = []
    accepted_length: Length | None = None
    calibration: list[Fact] = []
    throughput: list[Fact] = []
    limits: list[Fact] = []
    #: What a card should say and no source did.
    missing: list[Text]


def read_facts(path: Path) -> Facts:
    """Read ``facts.yaml`` and check that every source it refers to is cited.

    Raises:
        PackageError: unreadable, a value without a source, or a source that is not cited.
    """
    try:
        # A subclass of SafeLoader: builds plain values only.
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=hub_rules.UniqueKeys)
        facts = msgspec.convert(raw, Facts)
    except (OSError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise PackageError(
            f"{path} cannot be used: {' '.join(str(error).split())}.",
            expected="published facts, each with what, value and source",
            fix=_FIX,
        ) from error
    cited: list[Fact | Base | Named | Length]
    cited = [*_facts(facts), facts.base_model, facts.license]
    cited += [facts.accepted_length] if facts.accepted_length else []
    for fact in cited:
        key = fact.source.split(":", 1)[0]
        if key not in facts.sources:
            raise PackageError(
                f"{path} names the source {fact.source!r}.",
                expected="one of " + ", ".join(facts.sources),
                fix=_FIX,
            )
    return facts


def _facts(facts: Facts) -> list[Fact]:
    lists = (
        facts.flags,
        facts.compatibility,
        facts.architecture,
        facts.memory,
        facts.calibration,
        facts.throughput,
        facts.limits,
    )
    found = [fact for part in lists for fact in part]
    return found + ([facts.not_served] if facts.not_served else [])


def _front_matter(facts: Facts) -> str:
    tags = [tag for tag in hub_rules.REQUIRED_TAGS if tag != hub_rules.DRAFT_TAG]
    tags += [hub_rules.DRAFT_TAG] if facts.shape == "drafter" else []
    meta: dict[str, Any] = {
        "license": facts.license.value,
        "base_model": facts.base_model.value,
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "library_name": "sglang",
        "tags": [*tags, facts.family],
    }
    return yaml.safe_dump(meta, sort_keys=False)


def render_published(directory: Path) -> str:
    """Render the card of a published checkpoint from ``facts.yaml``.

    Raises:
        PackageError: facts without a source, or front matter that the Hub would refuse.
    """
    facts = read_facts(directory / FACTS_FILE)
    card = (
        environment()
        .get_template("published.md.jinja")
        .render(
            front_matter=_front_matter(facts),
            mark=GENERATED_MARK,
            f=facts,
            facts_file=FACTS_FILE,
            paper=PAPER,
        )
    )
    hub_rules.check_front_matter(card, bundle=facts.shape == "bundle")
    return card
