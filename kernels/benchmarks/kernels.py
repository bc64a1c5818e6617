"""What every kernel costs: resources on sm_90, bytes beside floor and builtin, times where there is a GPU.

Triton decides whether a kernel is interpreted when its module is imported. So kernels are compiled, counted and
timed in processes of their own (:func:`worker`), and this module imports none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import ops as benches
from dspark_sglang.artifacts import Provenance, write_json
from dspark_sglang.cli.main import run
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.provenance import commit, machine, provenance

SCHEMA_VERSION = 1
#: Requests of the round that the targets are set for: temperature 1, gamma 5, V 129280, a vanilla head of rank 256,
#: bfloat16 logits, three of five drafts kept. SGLang's parts of it are in :mod:`benchmarks.builtin`.
BATCH = 64
#: Our parts of it: op and configuration.
OURS = {
    "draft": ("markov_step", "full-vanilla-gamma5-V129280-r256-sampled"),
    "draft_shortlist": ("markov_step", "shortlist128+128-vanilla-gamma5-V129280-r256-sampled"),
    "accept": ("accept", "gamma5-V129280-fp32-dense"),
    "accept_shortlist": ("accept", "gamma5-V129280-fp32-listed128"),
}
BUILTIN = ("builtin_draft", "builtin_accept", "builtin_accept_optin")
#: Gigabytes of the summary: the parts they are of. A shortlist with the base tail has a dense distribution.
GIGABYTES = {
    "accept_gb": ("accept",),
    "accept_shortlist_gb": ("accept_shortlist",),
    "draft_accept_gb": ("draft", "accept"),
    "draft_accept_shortlist_gb": ("draft_shortlist", "accept"),
    "builtin_accept_gb": ("builtin_accept",),
    "builtin_optin_accept_gb": ("builtin_accept_optin",),
    "builtin_draft_accept_gb": ("builtin_draft", "builtin_accept"),
    "builtin_optin_draft_accept_gb": ("builtin_draft", "builtin_accept_optin"),
}
#: What must not be exceeded.
TARGETS = {
    "accept_gb": 0.28,
    "accept_shortlist_gb": 0.26,
    "draft_accept_gb": 0.85,
    "draft_accept_shortlist_gb": 0.40,
    "launches_per_step": 13,
}
#: Bytes a second of an H100's memory, by its data sheet.
BANDWIDTH = 3.35e12
LABELS = {
    "registers, spills, shared_bytes": "of the largest kernel, compiled ahead of time for sm_90; never run there",
    "counted_bytes": "unmasked lanes of every load and store in Triton's interpreter at batches 1 and 2, by batch; "
    "the others on the line through them (above 64 requests markov_step reads W2 again for every 64, the line does not)",
    "floor_bytes": "each needed input read once, each output written once",
    "builtin_*": "SGLang's own code counted in the same way, torch operations by their inputs and outputs",
    "max_error": "against the float64 reference, in the interpreter; 0 where decisions are compared exactly",
    "roofline_us": f"computed, not timed: counted bytes at batch {BATCH} / 3.35 TB/s",
    "timed_us": "median on the device named; null where nothing was timed",
    "launches_per_step": "of our kernels outside the models in a served step",
    "torch_operations_per_step": "around them, on a few numbers a request; at least a launch each",
}
#: SGLang's code that no number stands for, and why.
NOT_COUNTED = {
    "flashinfer.sampling.softmax": "CUDA C++: not interpreted. SGLang's own Triton fallback is counted instead",
    "MarkovLoop of gated and rnn heads, and of greedy requests": "a vanilla head that samples is counted",
    "acceptance with top-k, top-p or block verification": "the sampled default and its opt-in are counted",
    "confidence, admission, writing KV": "small beside the logits",
    "acceptance over ranks": "it gathers logits over processes",
}


class MeasurementError(DSparkError):
    """A kernel could not be compiled, run or counted."""


class Measured(NamedTuple):
    """What the workers found."""

    #: By op and configuration, of :mod:`benchmarks.measure`.
    resources: Mapping[str, Mapping[str, list[Any]]]
    traffic: Mapping[str, Mapping[str, Any]]
    #: SGLang's parts of the round.
    parts: Mapping[str, Any]
    #: Traffic of a served step, :mod:`benchmarks.served`.
    step: Any
    #: Median microseconds by ``op/configuration`` and by part; empty without CUDA.
    times: Mapping[str, float] = {}
    device: str | None = None


# --- measuring ---------------------------------------------------------------------------------


def choose(text: str) -> tuple[str, ...]:
    """The ops named, comma-separated; ``all``.

    Raises:
        ConfigError: no such op.
    """
    every = benches.names()
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


def worker(*, interpret: bool, processes: int = 1) -> ProcessPoolExecutor:
    """Processes that have Triton's interpreter, or do not."""
    return ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(interpret,)
    )


def _begin(interpret: bool) -> None:
    os.environ["TRITON_INTERPRET"] = str(int(interpret))
    warnings.simplefilter("ignore")


def call(module: str, function: str, *arguments: Any) -> Any:
    """Runs in a worker: a function by its name, so that the parent need not import it.

    Raises:
        RuntimeError: what went wrong, whatever it was.
    """
    try:
        return getattr(importlib.import_module(module), function)(*arguments)
    except Exception as error:  # one that needs keywords could not be sent back
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def measure(ops: tuple[str, ...]) -> Measured:
    """Compile and count side by side; then time, alone, where there is a CUDA device.

    Raises:
        MeasurementError: a kernel is wrong, or could not be run.
    """
    parts = BUILTIN if {"accept", "markov_step"} <= set(ops) else ()
    processes = max(1, min(4, len(os.sched_getaffinity(0)) - 1))
    with (
        worker(interpret=False) as compiling,
        worker(interpret=True, processes=processes) as counting,
    ):
        jobs: dict[tuple[str, str], Future[Any]] = {}

        def submit(pool: ProcessPoolExecutor, *task: str) -> None:
            jobs[task[-2], task[-1]] = pool.submit(call, *task)

        for op in ops:
            submit(compiling, "benchmarks.measure", "compile_op", op)
            submit(counting, "benchmarks.measure", "count_op", op)
        for part in parts:
            submit(counting, "benchmarks.measure", "count_builtin", part)
        jobs["count_step", ""] = counting.submit(call, "benchmarks.served", "count_step")
        names = {job: name for name, job in jobs.items()}
        for done in as_completed(names):
            function, of = names[done]
            try:
                done.result()
            except Exception as error:
                for pool in (compiling, counting):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise MeasurementError(
                    f"{function} {of}: {error}",
                    expected="kernels that compile, run in the interpreter and agree with the reference",
                    fix=f"Run pytest tests/kernels{f'/test_{of}.py' if of in ops else ''}.",
                ) from error
            print(function, of, flush=True)
    found = {name: job.result() for name, job in jobs.items()}
    device, times = _times(ops, parts)
    return Measured(
        resources={op: found["compile_op", op] for op in ops},
        traffic={op: found["count_op", op] for op in ops},
        parts={part: found["count_builtin", part] for part in parts},
        step=found["count_step", ""],
        times=times,
        device=device,
    )


def _times(ops: Sequence[str], parts: Sequence[str]) -> tuple[str | None, dict[str, float]]:
    import torch

    if not torch.cuda.is_available():
        return None, {}
    with worker(interpret=False) as alone:
        times = alone.submit(call, "benchmarks.measure", "times", ops, parts).result()
    return torch.cuda.get_device_name(), times


# --- the summary -------------------------------------------------------------------------------


def summarise(
    found: Measured, *, machine: str, commit: str, provenance: Provenance
) -> dict[str, Any]:
    """What is written; None where something was not measured.

    Raises:
        MeasurementError: a configuration launches other kernels interpreted than compiled.
    """
    ops = {
        op: {
            name: _config(f"{op}/{name}", resources, found.traffic[op][name], found.times)
            for name, resources in configs.items()
        }
        for op, configs in found.resources.items()
    }
    parts = _round(ops, found)

    def gigabytes(names: Sequence[str]) -> float | None:
        if not all(name in parts for name in names):
            return None
        return round(float(sum(parts[name]["counted_bytes"] for name in names)) / 1e9, 4)

    # Writing KV is in the draft model's own step.
    writing = [config["launches"] for config in ops.get("kv_inject", {}).values()]
    return {
        "schema_version": SCHEMA_VERSION,
        "ops": ops,
        **{field: gigabytes(names) for field, names in GIGABYTES.items()},
        "launches_per_step": found.step.launches + max(writing) if writing else None,
        "torch_operations_per_step": sum(found.step.operations.values()),
        "targets": TARGETS,
        "round": parts,
        "labels": LABELS,
        "not_counted": NOT_COUNTED,
        "machine": machine,
        "triton": importlib.metadata.version("triton"),
        "device": found.device,
        "commit": commit,
        "provenance": provenance,
    }


def _config(
    key: str, resources: list[Any], traffic: Any, times: Mapping[str, float]
) -> dict[str, Any]:
    if traffic.launches != len(resources):
        raise MeasurementError(
            f"{key} launched {traffic.launches} kernels interpreted and {len(resources)} compiled.",
            expected="the same launches whatever the data and the batch",
            fix=f"Correct kernels/dspark_kernels/{key.partition('/')[0]}.",
        )
    return {
        **{name: max(getattr(each, name) for each in resources) for name in (
            "registers", "spills", "shared_bytes")},
        "counted_bytes": {str(batch): size for batch, size in traffic.kernels.items()},
        "floor_bytes": {str(batch): size for batch, size in traffic.floor.items()},
        "launches": traffic.launches,
        "max_error": traffic.max_error,
        "roofline_us": _microseconds(traffic.kernels[BATCH]),
        "timed_us": times.get(key),
    }  # fmt: skip


def _microseconds(size: int) -> float:
    return round(size / BANDWIDTH * 1e6, 2)


def _round(ops: Mapping[str, Mapping[str, Any]], found: Measured) -> dict[str, dict[str, Any]]:
    """The parts of the round, ours and SGLang's."""
    key, parts = str(BATCH), {}
    for part, (op, name) in OURS.items():
        config = ops.get(op, {}).get(name)
        if config is not None:
            parts[part] = {
                "counted_bytes": config["counted_bytes"][key],
                "floor_bytes": config["floor_bytes"][key],
                "launches": config["launches"],
                "torch_operations": 0,
                "roofline_us": config["roofline_us"],
                "timed_us": config["timed_us"],
            }
    for part, traffic in found.parts.items():
        size = traffic.kernels[BATCH] + traffic.torch[BATCH]
        parts[part] = {
            "counted_bytes": size,
            "floor_bytes": None,
            "launches": traffic.launches,
            "torch_operations": traffic.operations,
            "roofline_us": _microseconds(size),
            "timed_us": found.times.get(part),
        }
    return parts


# --- tables ------------------------------------------------------------------------------------


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the round and every configuration, bytes at batch 64."""
    device = summary["device"]
    console.print(f"Timed on {device}." if device else "Nothing was timed: no CUDA device.")
    reached = _table("a round of 64 requests", "reached", "value", "at most")
    for field, most in TARGETS.items():
        value = summary[field]
        reached.add_row(field, "not measured" if value is None else f"{value:g}", f"{most:g}")
    console.print(reached)
    for title, configs in {"parts of it": summary["round"], **summary["ops"]}.items():
        if configs:
            _show_configs(title, configs, console, timed=bool(device))


def _show_configs(
    title: str, configs: Mapping[str, Mapping[str, Any]], console: Console, *, timed: bool
) -> None:
    table = _table(
        *(title, "", "registers", "spills", "shared, kB", "launches", "torch", "counted, MB"),
        *("÷ floor", "largest error", "µs (computed)"),
        *(["µs (timed)"] if timed else []),
    )
    for name, config in configs.items():
        size, floor = (config[f"{kind}_bytes"] for kind in ("counted", "floor"))
        if isinstance(size, Mapping):
            size, floor = size[str(BATCH)], floor[str(BATCH)]
        shared, error, spent = (config.get(f) for f in ("shared_bytes", "max_error", "timed_us"))
        row = [
            *(config.get("registers"), config.get("spills")),
            None if shared is None else f"{shared / 1e3:.1f}",
            *(config["launches"], config.get("torch_operations"), f"{size / 1e6:,.3f}"),
            f"{size / floor:.2f}" if floor else None,
            None if error is None else f"{error:.1e}",
            f"{config['roofline_us']:,.1f}",
            *(["not measured" if spent is None else f"{spent:,.1f}"] if timed else []),
        ]
        table.add_row(name, *("" if cell is None else str(cell) for cell in row))
    console.print(table)


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/kernels"), help="folder for summary.json"
    )
    parser.add_argument("--ops", default="all", help="comma-separated ops, or all")
    given = parser.parse_args(arguments)
    found = summarise(
        measure(choose(given.ops)),
        machine=machine(),
        commit=commit("kernels", "dspark_sglang"),
        provenance=provenance(["make", "bench-kernels"]),
    )
    write_json(given.out / "summary.json", found)
    show(found, Console(width=max(160, Console().width)))
    print(f"Written: {given.out / 'summary.json'}")
    return 0


if __name__ == "__main__":
    run(main)
