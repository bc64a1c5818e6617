"""What people read, generated from the files beside it: the card and ``calibration.png``.

Every number comes from a file in the folder; where the file is missing the card says "not
measured". The templates hold no number at all (a test counts their digits). Cards of published
checkpoints come from ``facts.yaml``: values, each with the source it was taken from.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import msgspec
import yaml

from dspark_packaging import hub_rules, layout
from dspark_packaging.drafter import Sizes, shared_bytes, sizes_of
from dspark_packaging.errors import PackageError
from dspark_packaging.records import (
    Calibration,
    DrafterProvenance,
    Kind,
    Package,
    Reliability,
    RepoId,
    Strict,
    Text,
    open_package,
)
from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, STS_FILE, write_bytes

PAPER = {
    "arxiv": "2607.05147",
    "year": "2026",
    "title": "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation",
    "author": "{DeepSeek-AI} and {Peking University}",
}
_MIB = 1 << 20


def _cell(value: object) -> str:
    """Text that cannot break out of a table cell or a list item."""
    return " ".join(str(value).split()).replace("|", "\\|")


def environment() -> jinja2.Environment:
    """Templates of cards, with the filters that print numbers."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("dspark_packaging", "templates"),
        undefined=jinja2.StrictUndefined,
        # Markdown, not HTML; the text comes from the author's own files.
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {
        "cell": _cell,
        "thousands": lambda value: f"{value:,}",
        "error": lambda value: f"{value:.4f}",
        "tokens": lambda value: f"{value:.2f}",
        "mib": lambda value: f"{value / _MIB:.2f} MiB",
        "plain": lambda value: f"{value:g}",
        "share": lambda value: f"{value:.3f}",
        "ratio": lambda value: f"{value:.2f}×",
        "rate": lambda value: f"{value:.1f}",
    }
    return found


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
        meta |= {"license_name": provenance.license_name, "license_link": layout.LICENSE_FILE}
    if provenance.language:
        meta["language"] = provenance.language
    return yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)


def _memory(package: Package, sizes: Sizes) -> dict[str, Any]:
    """What a server holds more than one without speculation, and than the original target."""
    replaced = package.bundle.replaced_bytes if package.bundle else 0
    copies = shared_bytes(package.drafter.tensors.items())
    kv = package.drafter.layout.kv_values(package.drafter.raw)
    return {
        "gross": sizes.nbytes - copies,
        "copies": copies,
        "replaced": replaced,
        "net": sizes.nbytes - copies - replaced,
        "kv": None if kv is None else round(kv * sizes.element_bytes),
    }


def _shape(package: Package) -> dict[str, Any]:
    config = package.drafter.config
    return {
        "layers": config.num_layers,
        "feed_forward": config.intermediate_size,
        "experts": config.experts,
    }


def _refuse_figures(provenance: DrafterProvenance) -> None:
    """Refuse a figure typed into prose: results come from what measured them."""
    for limit in provenance.limits:
        found = _FIGURE.search(limit)
        if found:
            raise PackageError(
                f'{layout.PROVENANCE_FILE} says "{found[0]}" in its limits, with no measurement behind it.',
                expected=f"figures in {layout.EVAL_FILE} or {layout.THROUGHPUT_FILE}, with command and hardware",
                fix="Measure it (`dspark eval --record`, `make bench-load`), or say it without "
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
    return card_of(open_package(directory))


def card_of(package: Package) -> str:
    """Render the card of an opened package; whether there is a figure is looked up in its folder.

    Raises:
        PackageError: as :func:`render_card`.
    """
    records, drafter = package.records, package.drafter
    _refuse_figures(records.provenance)
    sizes = sizes_of(drafter)
    inside = f"{layout.DRAFT_FOLDER}/" if package.home != package.directory else ""
    named = {
        "sts": STS_FILE,
        "cost": layout.COST_FILE,
        "vocabulary": DRAFT_VOCAB_FILE,
        "eval": layout.EVAL_FILE,
        "throughput": layout.THROUGHPUT_FILE,
        "target": layout.TARGET_FILE,
        "provenance": layout.PROVENANCE_FILE,
        "plot": layout.PLOT_FILE,
        "results": layout.EVAL_RESULTS,
    }
    card = (
        environment()
        .get_template("card.md.jinja")
        .render(
            front_matter=front_matter(records.provenance, bundle=package.bundle is not None),
            mark=layout.CARD_MARK,
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
            plot=(package.home / layout.PLOT_FILE).is_file(),
            kept=_KEPT,
            kinds=KINDS,
            interval=_INTERVAL,
            paper=PAPER,
            files={key: inside + name for key, name in named.items()}
            | {
                "manifest": layout.MANIFEST_FILE,
                "config": layout.CONFIG_FILE,
                "license": layout.LICENSE_FILE,
            },
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
    path = directory / layout.CARD_FILE
    if path.exists():
        old = path.read_text(encoding="utf-8", errors="replace")
        if old == card:
            return False
        layout.refuse_foreign_card(path)
    write_bytes(path, card.encode())
    return True


def check_card(directory: Path) -> None:
    """Check that the card says what the files beside it say.

    Raises:
        PackageError: missing or not current.
    """
    card = render_card(directory)
    path = directory / layout.CARD_FILE
    found = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if found != card:
        state = "does not exist" if found is None else "differs from what the files beside it say"
        raise PackageError(
            f"{path} {state}.",
            expected="the generated card",
            fix=f"Run `dspark package {directory}`.",
        )


def calibration_plot(measured: Calibration | None) -> bytes | None:
    """``calibration.png``: predicted against observed survival; None where that was not measured."""
    if measured is None or not measured.reliability_before:
        return None
    curves = {"before": measured.reliability_before}
    if measured.reliability_after is not None:
        curves["after STS"] = measured.reliability_after
    return reliability_plot(curves)


def reliability_plot(curves: Mapping[str, Sequence[Reliability]]) -> bytes:
    """A panel a position; the same numbers give the same bytes.

    Args:
        curves: at most two, by name; of each a reliability a position.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gamma = len(next(iter(curves.values())))
    figure = Figure(figsize=(2.3 * gamma, 2.9), layout="constrained")
    axes = figure.subplots(1, gamma, sharey=True, squeeze=False)[0]
    for k, panel in enumerate(axes):
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=":")
        for (label, points), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=False):
            panel.plot(
                points[k].predicted,
                points[k].observed,
                marker="o",
                markersize=3,
                linewidth=1.2,
                color=colour,
                label=label,
            )
        panel.set(title=f"position {k + 1}", xlim=(0, 1), ylim=(0, 1))
        panel.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("observed survival")
    figure.supxlabel("predicted survival", fontsize="medium")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    FigureCanvasAgg(figure)
    # Without the library's version in the file the same numbers give the same bytes.
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()


FACTS_FILE = "facts.yaml"
_FIX = "Name the source of every value in facts.yaml, or list what is unknown under missing."


class Fact(Strict, frozen=True, kw_only=True):
    """One published value."""

    what: Text
    value: str | int | float
    #: A key of ``sources``, and where in it.
    source: Text


class Named(Strict, frozen=True, kw_only=True):
    """A name with its source."""

    value: Text
    source: Text


class Base(Strict, frozen=True, kw_only=True):
    """The target's name on the Hub."""

    value: RepoId
    source: Text


class Length(Strict, frozen=True, kw_only=True):
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
            mark=layout.CARD_MARK,
            f=facts,
            facts_file=FACTS_FILE,
            paper=PAPER,
        )
    )
    hub_rules.check_front_matter(card, bundle=facts.shape == "bundle")
    return card
