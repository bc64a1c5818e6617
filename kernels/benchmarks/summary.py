"""The summary of the kernels: what it holds, and its tables for ``docs/explanation/kernels.md`` and the terminal."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks import round as rounds
from dspark_sglang.artifacts import Provenance
from dspark_sglang.core.draft import FOLLOWING, SHORTLIST
from dspark_sglang.errors import ArtifactError, ConfigError

SCHEMA_VERSION = 1
#: Batch of the roofline and of times.
BATCH = rounds.BATCH
LABELS = {
    "registers, spills, shared_bytes": "of the largest kernel, compiled ahead of time for sm_90; never run there",
    "counted_bytes": "unmasked lanes of every load and store in Triton's interpreter at batches 1 and 4, "
    "by batch; the others on the line through them (above 64 requests markov_step reads W2 again for every 64: "
    "formula_bytes has that, the line does not)",
    "floor_bytes": "each needed input read once, each output written once",
    "builtin_*": "SGLang's own code counted in the same way, torch operations by their inputs and outputs",
    "max_error": "against the float64 reference, in the interpreter; 0 where decisions are compared exactly",
    "roofline_us": f"computed, not timed: counted bytes at batch {BATCH} / 3.35 TB/s",
    "timed_us": "median on the device named; null where nothing was timed",
}
#: SGLang's code that no number stands for, and why.
NOT_COUNTED = {
    "flashinfer.sampling.softmax": "CUDA C++: not interpreted. SGLang's own Triton fallback is counted instead",
    "MarkovLoop of gated and rnn heads, and of greedy requests": "a vanilla head that samples is counted",
    "acceptance with top-k, top-p or block verification": "the sampled default and its opt-in are counted",
    "confidence, admission, writing KV": "small beside the logits",
    "acceptance over ranks": "it gathers logits over processes",
}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration of an op. Bytes are by batch, as text."""

    registers: int
    spills: int
    shared_bytes: int
    counted_bytes: dict[str, int]
    formula_bytes: dict[str, int]
    floor_bytes: dict[str, int]
    launches: int
    max_error: float
    roofline_us: float
    timed_us: float | None = None


class PartBytes(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the round of :mod:`benchmarks.round`."""

    counted_bytes: int
    floor_bytes: int | None
    launches: int
    #: Torch operations that move anything: at least one more launch each.
    torch_operations: int
    roofline_us: float
    timed_us: float | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What this module writes; None where it was not measured."""

    schema_version: int
    ops: dict[str, dict[str, Config]]
    #: Gigabytes (1e9) of a round of 64 requests, gamma 5, V 129280, rank 256, temperature 1, three of
    #: five drafts kept, bfloat16 logits: acceptance of a dense and of a listed drafted distribution; drafting
    #: over the whole vocabulary and from a shortlist with the base tail, each with the acceptance of
    #: its distribution, which is dense; and SGLang's.
    accept_gb: float | None
    accept_shortlist_gb: float | None
    draft_accept_gb: float | None
    draft_accept_shortlist_gb: float | None
    builtin_accept_gb: float | None
    builtin_optin_accept_gb: float | None
    builtin_draft_accept_gb: float | None
    builtin_optin_draft_accept_gb: float | None
    #: Launches of our kernels outside the models in a served step, and torch operations around them
    #: that move anything (a few numbers a request; at least a launch each).
    launches_per_step: int | None
    torch_operations_per_step: int | None
    #: The parts of that round.
    round: dict[str, PartBytes]
    labels: dict[str, str]
    #: What of SGLang is not counted, and why.
    not_counted: dict[str, str]
    machine: str
    triton: str
    #: The CUDA device that times are of; None: nothing was timed.
    device: str | None
    commit: str
    provenance: Provenance


def read(path: Path) -> Summary:
    """A summary written before.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except (OSError, msgspec.MsgspecError) as error:
        raise ArtifactError(
            f"{path}: {error}.",
            expected="a summary.json of make bench-kernels",
            fix="Pass another --summary, or leave it out.",
        ) from error


BEGIN, END = "<!-- generated: kernels -->", "<!-- end -->"
_PARTS = {
    "draft": "draft, whole vocabulary",
    "draft_shortlist": f"draft, {SHORTLIST} best + {FOLLOWING} successors, base tail (served)",
    "accept": "acceptance, dense drafted distribution (served)",
    "accept_shortlist": f"acceptance, listed drafted distribution of {SHORTLIST}",
    "builtin_draft": "SGLang: Markov loop",
    "builtin_accept": "SGLang: acceptance, default",
    "builtin_accept_optin": "SGLang: acceptance, blockwise (opt-in)",
}
#: Fields of the summary that are targets, with what each must not exceed.
_REACH = {
    "accept_gb": ("acceptance, GB", 0.20),
    "accept_shortlist_gb": ("acceptance of a listed distribution, GB", 0.20),
    "draft_accept_gb": ("draft and acceptance, whole vocabulary, GB", 0.65),
    "draft_accept_shortlist_gb": ("draft and acceptance, shortlist, GB", 0.40),
    "launches_per_step": ("launches of our kernels a step, outside the models (gamma 5)", 9),
}


def _megabytes(bytes_: int) -> str:
    return f"{bytes_ / 1e6:,.3f}" if bytes_ < 1e6 else f"{bytes_ / 1e6:,.1f}"


def _number(value: float | None, form: str = "{:g}") -> str:
    return "not measured" if value is None else form.format(value)


def headline_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """What was reached: name, value, target."""
    rows = [
        (name, _number(getattr(summary, field)), f"≤ {most:g}")
        for field, (name, most) in _REACH.items()
    ]
    around = _number(summary.torch_operations_per_step)
    return [*rows, ("PyTorch operations around them, a launch or more each", around, "")]


def round_headings(summary: Summary) -> list[str]:
    """Headings of :func:`round_rows`."""
    timed = ["timed, µs"] if summary.device else []
    return ["part", "counted, MB", "÷ floor", "launches", "at 3.35 TB/s, µs (computed)", *timed]


def round_rows(summary: Summary) -> list[list[str]]:
    """The parts of the round."""
    return [
        _part_row(_PARTS[name], part, timed=bool(summary.device))
        for name, part in summary.round.items()
    ]


def _part_row(name: str, part: PartBytes, *, timed: bool) -> list[str]:
    over = f"{part.counted_bytes / part.floor_bytes:.2f}" if part.floor_bytes else ""
    others = f" + {part.torch_operations} torch" if part.torch_operations else ""
    row = [name, _megabytes(part.counted_bytes), over, f"{part.launches}{others}"]
    row.append(f"{part.roofline_us:,.0f}")
    return [*row, _number(part.timed_us, "{:,.0f}")] if timed else row


def config_headings(summary: Summary) -> list[str]:
    """Headings of :func:`config_rows`."""
    timed = ["timed, µs"] if summary.device else []
    return [
        *("configuration", "registers", "spills", "shared, kB", "launches", "counted, MB"),
        *("÷ floor", "largest error", "µs (computed)", *timed),
    ]


def config_rows(summary: Summary, op: str) -> list[list[str]]:
    """The configurations of an op, bytes at batch 64."""
    return [
        _config_row(name, config, timed=bool(summary.device))
        for name, config in summary.ops[op].items()
    ]


def _config_row(name: str, config: Config, *, timed: bool) -> list[str]:
    key = str(BATCH)
    counted, floor = config.counted_bytes[key], config.floor_bytes[key]
    row = [name, str(config.registers), str(config.spills), f"{config.shared_bytes / 1e3:.1f}"]
    row += [str(config.launches), _megabytes(counted), f"{counted / floor:.2f}"]
    row += [f"{config.max_error:.1e}" if config.max_error else "0", f"{config.roofline_us:,.1f}"]
    return [*row, _number(config.timed_us, "{:,.1f}")] if timed else row


# --- documents ---------------------------------------------------------------------------------


def markdown(summary: Summary) -> str:
    """The generated part of ``docs/explanation/kernels.md``, between the markers."""
    timed = (
        f"Timed on {summary.device}." if summary.device else "Nothing was timed: no CUDA device."
    )
    lines = [
        f"{timed} Commit {summary.commit or 'unknown'}, {summary.machine}; "
        f"`{summary.provenance.command}`, {summary.provenance.created}; "
        f"torch {summary.provenance.versions.get('torch', '?')}, triton {summary.triton}, "
        f"SGLang {summary.provenance.versions.get('sglang', '?')}.",
        "",
    ]
    if summary.round:
        lines += _grid(["reached", "value", "target"], [list(r) for r in headline_rows(summary)])
        lines += ["", *_grid(round_headings(summary), round_rows(summary))]
    return "\n".join(lines)


def text(summary: Summary) -> str:
    """All of it: also every configuration, bytes at batch 64."""
    lines = [markdown(summary)]
    for op in summary.ops:
        lines += ["", f"## {op}", "", *_grid(config_headings(summary), config_rows(summary, op))]
    return "\n".join(lines)


def _grid(headings: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (headings, rule, *rows)]


def insert(path: Path, summary: Summary) -> None:
    """Replace the generated part of a document.

    Raises:
        ConfigError: the document is missing or has no markers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}.",
            expected="a document with the two markers",
            fix="Pass --docs docs/explanation/kernels.md.",
        ) from error
    path.write_text(replaced(text, markdown(summary), str(path)), encoding="utf-8")


def replaced(text: str, generated: str, name: str) -> str:
    """``text`` with ``generated`` between the markers.

    Raises:
        ConfigError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(
            f"{name} has no generated part.",
            expected=f"the lines {BEGIN} and {END}",
            fix="Add them where the tables belong.",
        )
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"
