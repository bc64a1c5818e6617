"""What every kernel costs, in one summary: resources, bytes next to floor and builtin, times if any.

Nothing here runs kernels itself: children do (:mod:`benchmarks.children`), compiled
ahead of time, in Triton's interpreter, and on the GPU of a machine that has one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks import round as rounds
from benchmarks import summary as known
from benchmarks.children import MeasurementError, results
from benchmarks.summary import BATCH, Config, PartBytes, Summary
from dspark_sglang.artifacts import Provenance, write_json
from dspark_sglang.cli.main import run
from dspark_sglang.errors import ConfigError
from dspark_sglang.provenance import commit, machine, provenance

#: Bytes a second of an H100's memory, by its data sheet.
BANDWIDTH = 3.35e12

#: Ops that take seconds; the others take minutes.
_SMALL = frozenset({"admit", "confidence", "kv_inject"})


class Measured(NamedTuple):
    """What the children found."""

    #: ``{op: {configuration: entry}}`` of :func:`benchmarks.report.summarise`.
    report: Mapping[str, Mapping[str, Mapping[str, Any]]]
    #: Counts of SGLang's parts of the round.
    parts: Mapping[str, rounds.Counts]
    #: Median microseconds by ``op/configuration`` and by part; empty without CUDA.
    times: Mapping[str, float]
    device: str | None
    #: Launches and torch operations of a served step, :mod:`benchmarks.served`.
    step: tuple[int, int] | None = None


# --- measuring ---------------------------------------------------------------------------------


def choose(text: str) -> tuple[str, ...]:
    """The ops named, comma-separated; ``all``.

    Raises:
        ConfigError: no such op.
    """
    every = report.ops()
    if text == "all":
        return tuple(every)
    wanted = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in every]
    if unknown or not wanted:
        raise ConfigError(
            f"--ops is {text!r}" + (f"; there is no {', '.join(unknown)}." if unknown else "."),
            expected=f"all, or some of {', '.join(every)}, comma-separated",
            fix="Correct --ops.",
        )
    return wanted


def _summarise(op: str) -> dict[str, Any]:
    try:
        return report.summarise(op)
    except (MeasurementError, RuntimeError) as error:
        raise MeasurementError(
            f"{op}: {error}",
            expected="kernels that compile, run in the interpreter and agree with the reference",
            fix=f"Run pytest tests/kernels/test_{op}.py.",
        ) from error


def _count(part: str) -> rounds.Counts:
    (found,) = results(f"{rounds.__name__}.count_part", part, interpret=True)
    return rounds.read_counts(found)


def _count_step() -> tuple[int, int]:
    (found,) = results("benchmarks.served.count_step", interpret=True)
    return found["launches"], sum(found["operations"].values())


def measure(ops: tuple[str, ...]) -> Measured:
    """Compile and count, two processes at a time; then time, alone, where there is a CUDA device.

    Raises:
        MeasurementError: a kernel is wrong, or could not be run.
    """
    wanted = list(rounds.PARTS) if {"accept", "markov_step"} <= set(ops) else []
    with ThreadPoolExecutor(max_workers=2) as pool:
        # The longest first, so that nothing long is left over for the end.
        compiled = {
            op: pool.submit(_summarise, op) for op in sorted(ops, key=lambda op: op in _SMALL)
        }
        counted = {part: pool.submit(_count, part) for part in wanted}
        step = pool.submit(_count_step)
        names: dict[Future[Any], str] = {step: "a served step"}
        names |= {job: name for name, job in compiled.items()}
        names |= {job: name for name, job in counted.items()}
        try:
            for done in as_completed(names):
                done.result()
                print(names[done], flush=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    entries = {op: compiled[op].result() for op in ops}
    parts = {part: job.result() for part, job in counted.items()}
    device, times = _times(entries, parts)
    return Measured(entries, parts, times, device, step.result())


def _times(
    entries: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Any]
) -> tuple[str | None, dict[str, float]]:
    import torch

    if not torch.cuda.is_available():
        return None, {}
    keys = [f"{op}/{name}" for op, configs in entries.items() for name in configs]
    found = results("benchmarks.timing.times", *keys, *parts, interpret=False)
    return torch.cuda.get_device_name(), {entry["key"]: entry["us"] for entry in found}


# --- the summary -------------------------------------------------------------------------------


def summarise(
    measured: Measured,
    *,
    machine: str,
    commit: str,
    provenance: Provenance,
) -> Summary:
    """Put together what was found."""
    ops = {
        op: {name: _config(measured, op, name, entry) for name, entry in entries.items()}
        for op, entries in measured.report.items()
    }
    parts = _round(ops, measured)

    def gigabytes(*names: str) -> float | None:
        if not all(name in parts for name in names):
            return None
        return round(sum(parts[name].counted_bytes for name in names) / 1e9, 4)

    return Summary(
        schema_version=known.SCHEMA_VERSION,
        ops=ops,
        accept_gb=gigabytes("accept"),
        accept_shortlist_gb=gigabytes("accept_shortlist"),
        draft_accept_gb=gigabytes("draft", "accept"),
        draft_accept_shortlist_gb=gigabytes("draft_shortlist", "accept"),
        builtin_accept_gb=gigabytes("builtin_accept"),
        builtin_optin_accept_gb=gigabytes("builtin_accept_optin"),
        builtin_draft_accept_gb=gigabytes("builtin_draft", "builtin_accept"),
        builtin_optin_draft_accept_gb=gigabytes("builtin_draft", "builtin_accept_optin"),
        launches_per_step=_launches(ops, measured.step),
        torch_operations_per_step=measured.step[1] if measured.step else None,
        round=parts,
        labels=known.LABELS,
        not_counted=known.NOT_COUNTED,
        machine=machine,
        triton=importlib.metadata.version("triton"),
        device=measured.device,
        commit=commit,
        provenance=provenance,
    )


def _microseconds(bytes_: int) -> float:
    return round(bytes_ / BANDWIDTH * 1e6, 2)


def _config(measured: Measured, op: str, name: str, entry: Mapping[str, Any]) -> Config:
    return Config(
        **entry,
        roofline_us=_microseconds(entry["counted_bytes"][str(BATCH)]),
        timed_us=measured.times.get(f"{op}/{name}"),
    )


def _round(ops: Mapping[str, Mapping[str, Config]], measured: Measured) -> dict[str, PartBytes]:
    """The parts of the round, ours and SGLang's."""
    key, found = str(BATCH), {}
    for name, (op, configuration) in rounds.OURS.items():
        config = ops.get(op, {}).get(configuration)
        if config is not None:
            found[name] = PartBytes(
                counted_bytes=config.counted_bytes[key],
                floor_bytes=config.floor_bytes[key],
                launches=config.launches,
                torch_operations=0,
                roofline_us=config.roofline_us,
                timed_us=config.timed_us,
            )
    for name, counts in measured.parts.items():
        bytes_ = counts.at(BATCH, rounds.VOCABULARY)
        found[name] = PartBytes(
            counted_bytes=bytes_,
            floor_bytes=None,
            launches=counts.launches,
            torch_operations=counts.operations,
            roofline_us=_microseconds(bytes_),
            timed_us=measured.times.get(name),
        )
    return found


def _launches(ops: Mapping[str, Mapping[str, Config]], step: tuple[int, int] | None) -> int | None:
    """Launches of a served step: of the server's operations, and of writing KV."""
    if step is None or not ops.get("kv_inject"):
        return None
    return step[0] + max(config.launches for config in ops["kv_inject"].values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/kernels"), help="folder for summary.json")
    add("--ops", default="all", help="comma-separated ops, or all")
    add("--summary", type=Path, help="show this summary.json; measure nothing")
    add("--docs", type=Path, help="a document whose generated tables are replaced")
    given = parser.parse_args(arguments)
    if given.summary is not None:
        found = known.read(given.summary)
    else:
        found = summarise(
            measure(choose(given.ops)),
            machine=machine(),
            commit=commit("kernels", "dspark_sglang"),
            provenance=provenance(["make", "bench-kernels"]),
        )
        write_json(given.out / "summary.json", found)
        print(f"Written: {given.out / 'summary.json'}")
    if given.docs is not None:
        known.insert(given.docs, found)
        print(f"Written: {given.docs}")
    print(known.text(found))
    return 0


if __name__ == "__main__":
    run(main)
