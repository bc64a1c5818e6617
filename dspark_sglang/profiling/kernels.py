"""What every kernel costs, in one summary: resources, bytes next to floor and builtin, times if any.

Nothing here runs kernels itself: children do (:mod:`dspark_sglang.profiling.children`), compiled
ahead of time, in Triton's interpreter, and on the GPU of a machine that has one.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.artifacts import Provenance
from dspark_sglang.core.draft import FOLLOWING, SHORTLIST
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.profiling import round as rounds
from dspark_sglang.profiling.children import MeasurementError, results

SCHEMA_VERSION = 1
#: Bytes a second of an H100's memory, by its data sheet.
BANDWIDTH = 3.35e12
#: Batch of the roofline and of times.
BATCH = rounds.BATCH
BATCHES = (1, 4, 16, 64, 256)
#: Where ``dspark eval --shortlist-loss`` is expected to have written.
SHORTLIST_LOSS = Path("docs/results/shortlist.json")
LABELS = {
    "registers, spills, shared_bytes": "of the largest kernel, compiled ahead of time for sm_90; never run there",
    "counted_bytes": "unmasked lanes of every load and store in Triton's interpreter at batches 1 and 4, "
    "by batch; the others on the line through them (above 64 requests markov_step reads W2 again for every 64: "
    "formula_bytes has that, the line does not)",
    "floor_bytes": "each needed input read once, each output written once",
    "builtin_bytes, builtin_optin_bytes": "SGLang's own code counted in the same way, torch operations by their "
    "inputs and outputs; null where it was not, see note",
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
    builtin_bytes: dict[str, int] | None
    builtin_optin_bytes: dict[str, int] | None
    launches: int
    max_error: float
    roofline_us: float
    timed_us: float | None = None
    #: Why the builtin's bytes are not there.
    note: str = ""


class PartBytes(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the round of :data:`LABELS`, at its batch, half of the drafts kept."""

    counted_bytes: int
    floor_bytes: int | None
    launches: int
    #: Torch operations that move anything: at least one more launch each.
    torch_operations: int
    roofline_us: float
    timed_us: float | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What ``dspark bench-kernels`` writes; None where it was not measured."""

    schema_version: int
    ops: dict[str, dict[str, Config]]
    #: Gigabytes (1e9) of a round of 64 requests, gamma 5, V 129280, rank 256, temperature 1, half of
    #: the drafts kept, bfloat16 logits: acceptance of a dense and of a listed drafted law; drafting
    #: over the whole vocabulary and from a shortlist with the base tail, each with the acceptance of
    #: its law, which is dense; and SGLang's.
    accept_gb: float | None
    accept_shortlist_gb: float | None
    draft_accept_gb: float | None
    draft_accept_shortlist_gb: float | None
    builtin_accept_gb: float | None
    builtin_optin_accept_gb: float | None
    builtin_draft_accept_gb: float | None
    builtin_optin_draft_accept_gb: float | None
    #: Accepted length that the shortlist loses against the whole vocabulary, percent.
    shortlist_tau_loss_pct: float | None
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


#: Ops that take seconds; the others take minutes.
_SMALL = frozenset({"admit", "confidence", "kv_inject"})


class Measured(NamedTuple):
    """What the children found."""

    #: ``{op: {configuration: entry}}`` of :func:`dspark_kernels.support.report.summarise`.
    report: Mapping[str, Mapping[str, Mapping[str, Any]]]
    #: Sizes of each configuration by ``op/configuration``.
    sizes: Mapping[str, Mapping[str, int]]
    #: Counts of parts by ``name:gamma:rank:kept``.
    parts: Mapping[str, rounds.Counts]
    #: Median microseconds by ``op/configuration`` and ``name:gamma:rank:kept``; empty without CUDA.
    times: Mapping[str, float]
    device: str | None
    #: Launches and torch operations of a served step, :mod:`dspark_sglang.profiling.served`.
    step: tuple[int, int] | None = None


class Step(NamedTuple):
    """One piece of work of a measurement."""

    name: str
    run: Callable[[], None]


# --- measuring ---------------------------------------------------------------------------------


def known_ops() -> list[str]:
    """Ops that can be measured."""
    from dspark_kernels.support import report

    return report.ops()


def choose(text: str) -> tuple[str, ...]:
    """The ops named, comma-separated; ``all``.

    Raises:
        ConfigError: no such op.
    """
    known = known_ops()
    if text == "all":
        return tuple(known)
    wanted = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"--ops is {text!r}" + (f"; there is no {', '.join(unknown)}." if unknown else "."),
            expected=f"all, or some of {', '.join(known)}, comma-separated",
            fix="Correct --ops.",
        )
    return wanted


def text_of(name: str, gamma: int, rank: int, kept: int) -> str:
    """A part and its sizes as :func:`dspark_sglang.profiling.round.count_parts` takes them."""
    return f"{name}:{gamma}:{rank}:{kept}"


def round_parts() -> list[str]:
    """The parts of the round that the headline is of."""
    found = []
    for name in rounds.PARTS:
        kept = rounds.KEPT if "accept" in name else rounds.KEPT[:1]
        found += [text_of(name, rounds.GAMMA, rounds.RANK, k) for k in kept]
    return found


class Counterpart(NamedTuple):
    """SGLang's parts that do what a configuration does, and why one is missing."""

    default: str | None
    optin: str | None
    note: str


def counterpart(op: str, name: str, sizes: Mapping[str, int]) -> Counterpart:
    """What SGLang runs instead of a configuration.

    Args:
        op: the op.
        name: of the configuration.
        sizes: of the configuration.
    """
    if op == "accept":
        return _counterpart_accept(sizes)
    if op == "markov_step":
        if "vanilla" not in name or not name.endswith("sampled"):
            return Counterpart(None, None, "counted for sampled requests and vanilla heads only")
        part = text_of("builtin_draft", sizes["gamma"], sizes["r"], rounds.KEPT[0])
        return Counterpart(part, None, "no opt-in path")
    if op == "vocab_parallel_accept":
        return Counterpart(None, None, "not counted: it gathers logits over processes")
    return Counterpart(None, None, "not counted: small beside the logits")


def _counterpart_accept(sizes: Mapping[str, int]) -> Counterpart:
    if any(sizes.get(key) for key in ("coupled", "filtered", "adjusted", "joint")):
        return Counterpart(None, None, "counted for sampled requests without further options only")
    if not sizes.get("bfloat16", 1):
        return Counterpart(None, None, "counted for bfloat16 logits only")
    gamma = sizes["gamma"]
    names = ("builtin_accept", "builtin_accept_optin")
    default, optin = (text_of(name, gamma, rounds.RANK, (gamma + 1) // 2) for name in names)
    return Counterpart(default, optin, "")


def case_sizes(op: str) -> Iterator[dict[str, Any]]:
    """Sizes of an op's configurations; runs in a child process, since it imports kernels."""
    from dspark_kernels.support import report

    for case in report.bench(op).cases():
        yield {"name": case.name, "sizes": dict(case.sizes)}


class Measurement:
    """A measurement in steps, so that a progress bar can follow it."""

    def __init__(self, ops: tuple[str, ...]) -> None:
        self.ops = ops
        self._report: dict[str, Any] = {}
        self._sizes: dict[str, dict[str, int]] = {}
        self._parts: dict[str, rounds.Counts] = {}
        self._times: dict[str, float] = {}
        self._device: str | None = None
        self._step: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        """Pieces of work, as far as known: the parts of SGLang follow from the sizes."""
        return 2 * len(self.ops) + len(self._wanted()) + 2

    def stages(self) -> Iterator[list[Step]]:
        """The work in stages; pieces of one stage may run at once, a stage after those before it."""
        yield [Step(f"{op}: sizes", partial(self._read_sizes, op)) for op in self.ops]
        counted = [Step(f"round: {text}", partial(self._count, text)) for text in self._wanted()]
        compiled = [Step(f"{op}: kernels", partial(self._summarise, op)) for op in self.ops]
        # The longest first, so that nothing long is left over for the end.
        last = Step("launches of a served step", self._count_step)
        yield (
            sorted(compiled, key=lambda step: step.name.split(":")[0] in _SMALL) + counted + [last]
        )
        # Alone: nothing else may run beside it.
        yield [Step("timing, if there is a CUDA device", self._time)]

    def measured(self) -> Measured:
        """What was found so far."""
        report = {op: self._report[op] for op in self.ops if op in self._report}
        return Measured(report, self._sizes, self._parts, self._times, self._device, self._step)

    def _read_sizes(self, op: str) -> None:
        for found in results(f"{__name__}.case_sizes", op, interpret=False):
            self._sizes[f"{op}/{found['name']}"] = found["sizes"]

    def _summarise(self, op: str) -> None:
        from dspark_kernels.support import report

        try:
            self._report[op] = report.summarise((op,))[op]
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            raise MeasurementError(
                f"{op}: {lines[0]} {lines[-1] if len(lines) > 1 else ''}".strip(),
                expected="kernels that compile, run in the interpreter and agree with the reference",
                fix=f"Run pytest tests/kernels/test_{op}.py.",
            ) from error

    def _wanted(self) -> list[str]:
        wanted = []
        if {"accept", "markov_step"} <= set(self.ops):
            wanted += round_parts()
        for key, sizes in self._sizes.items():
            op, _, name = key.partition("/")
            wanted += [text for text in counterpart(op, name, sizes)[:2] if text]
        return list(dict.fromkeys(wanted))

    def _count(self, text: str) -> None:
        for found in results(f"{rounds.__name__}.count_parts", text, interpret=True):
            self._parts[found["part"]] = rounds.read_counts(found)

    def _count_step(self) -> None:
        for found in results("dspark_sglang.profiling.served.count_step", interpret=True):
            self._step = found["launches"], sum(found["operations"].values())

    def _time(self) -> None:
        import torch

        if not torch.cuda.is_available():
            return
        self._device = torch.cuda.get_device_name()
        keys = [*self._sizes, *self._parts]
        for found in results("dspark_sglang.profiling.timing.times", *keys, interpret=False):
            self._times[found["key"]] = found["us"]


# --- the summary -------------------------------------------------------------------------------


def summary(
    measured: Measured,
    *,
    shortlist_tau_loss_pct: float | None,
    machine: str,
    commit: str,
    provenance: Provenance,
) -> Summary:
    """Put together what was found."""
    ops = {
        op: {name: _config(measured, op, name, entry) for name, entry in entries.items()}
        for op, entries in measured.report.items()
    }
    parts = _round(measured)

    def gigabytes(*names: str) -> float | None:
        if not all(name in parts for name in names):
            return None
        return round(sum(parts[name].counted_bytes for name in names) / 1e9, 4)

    return Summary(
        schema_version=SCHEMA_VERSION,
        ops=ops,
        accept_gb=gigabytes("accept"),
        accept_shortlist_gb=gigabytes("accept_shortlist"),
        draft_accept_gb=gigabytes("draft", "accept"),
        draft_accept_shortlist_gb=gigabytes("draft_shortlist", "accept"),
        builtin_accept_gb=gigabytes("builtin_accept"),
        builtin_optin_accept_gb=gigabytes("builtin_accept_optin"),
        builtin_draft_accept_gb=gigabytes("builtin_draft", "builtin_accept"),
        builtin_optin_draft_accept_gb=gigabytes("builtin_draft", "builtin_accept_optin"),
        shortlist_tau_loss_pct=shortlist_tau_loss_pct,
        launches_per_step=_launches(ops, measured.step),
        torch_operations_per_step=measured.step[1] if measured.step else None,
        round=parts,
        labels=LABELS,
        not_counted=NOT_COUNTED,
        machine=machine,
        triton=importlib.metadata.version("triton"),
        device=measured.device,
        commit=commit,
        provenance=provenance,
    )


def _microseconds(bytes_: int) -> float:
    return round(bytes_ / BANDWIDTH * 1e6, 2)


def _config(measured: Measured, op: str, name: str, entry: Mapping[str, Any]) -> Config:
    sizes = measured.sizes[f"{op}/{name}"]
    default, optin, note = counterpart(op, name, sizes)
    return Config(
        **{key: entry[key] for key in ("registers", "spills", "shared_bytes", "launches")},
        counted_bytes=dict(entry["counted_bytes"]),
        formula_bytes=dict(entry["formula_bytes"]),
        floor_bytes=dict(entry["floor_bytes"]),
        builtin_bytes=_by_batch(measured, default, sizes),
        builtin_optin_bytes=_by_batch(measured, optin, sizes),
        max_error=float(entry["max_error"]),
        roofline_us=_microseconds(entry["counted_bytes"][str(BATCH)]),
        timed_us=measured.times.get(f"{op}/{name}"),
        note=note,
    )


def _by_batch(
    measured: Measured, part: str | None, sizes: Mapping[str, int]
) -> dict[str, int] | None:
    if part is None or part not in measured.parts:
        return None
    columns = sizes["V"] if "V" in sizes else sizes["width"]
    return {str(batch): measured.parts[part].at(batch, columns) for batch in BATCHES}


def _round(measured: Measured) -> dict[str, PartBytes]:
    """The parts of the round, those that depend on it at half of the drafts kept."""
    grouped: dict[str, list[str]] = {}
    for text in round_parts():
        grouped.setdefault(text.partition(":")[0], []).append(text)
    found = {}
    for name, texts in grouped.items():
        if not all(text in measured.parts for text in texts):
            continue
        counts = [measured.parts[text] for text in texts]
        place = BATCH, rounds.VOCABULARY
        bytes_ = round(sum(c.at(*place) for c in counts) / len(counts))
        floors = [
            rounds.floor(name, rounds.Sizes(*map(int, text.split(":")[1:])), *place)
            for text in texts
        ]
        timed = [measured.times[text] for text in texts if text in measured.times]
        found[name] = PartBytes(
            counted_bytes=bytes_,
            floor_bytes=None if rounds.PARTS[name].builtin else round(sum(floors) / len(floors)),
            launches=counts[0].launches,
            torch_operations=counts[0].operations,
            roofline_us=_microseconds(bytes_),
            timed_us=round(sum(timed) / len(timed), 2) if len(timed) == len(texts) else None,
        )
    return found


def _launches(ops: Mapping[str, Mapping[str, Config]], step: tuple[int, int] | None) -> int | None:
    """Launches of a served step: of the server's operations, and of writing KV."""
    if step is None or not ops.get("kv_inject"):
        return None
    return step[0] + max(config.launches for config in ops["kv_inject"].values())


class _Entry(msgspec.Struct, frozen=True):
    candidates: int
    following: int


class _Loss(msgspec.Struct, frozen=True):
    tau_loss_pct: float
    by_temperature: list[_Entry]


def read_shortlist_loss(path: Path) -> float | None:
    """What ``dspark eval --shortlist-loss`` wrote; None where it never ran.

    Raises:
        ArtifactError: the file is damaged, or of another shortlist than the bytes are.
    """
    if not path.is_file():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Loss)
    except msgspec.MsgspecError as error:
        raise ArtifactError(
            f"{path}: {error}.",
            expected="what dspark eval --shortlist-loss writes",
            fix="Run that command again, or remove the file.",
        ) from error
    sizes = {(entry.candidates, entry.following) for entry in found.by_temperature}
    if sizes != {(SHORTLIST, FOLLOWING)}:
        shown = " and ".join(f"{best} + {following}" for best, following in sorted(sizes))
        raise ArtifactError(
            f"{path} is of {shown} candidates a position.",
            expected=f"{SHORTLIST} + {FOLLOWING}, as the kernels draft and their bytes are counted",
            fix=f"Run dspark eval --shortlist {SHORTLIST} --shortlist-loss {path}.",
        )
    return found.tau_loss_pct


def read_summary(path: Path) -> Summary:
    """A summary written before.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except (OSError, msgspec.MsgspecError) as error:
        raise ArtifactError(
            f"{path}: {error}.",
            expected="a summary.json of dspark bench-kernels",
            fix="Pass another --summary, or run dspark bench-kernels without it.",
        ) from error


def commit() -> str:
    """The commit of the source tree, with ``+`` where it was changed since; empty outside a clone."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if not done.returncode else ""

    try:
        found = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "kernels", "dspark_sglang")
    except FileNotFoundError:
        return ""
    return found + ("+" if found and changed else "")
