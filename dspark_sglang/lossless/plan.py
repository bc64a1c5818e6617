"""Host time of planning one round: ours and SGLang's builtin, the same inputs, in turns."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_sglang.core.cost import TableCost
from dspark_sglang.core.schedule import admission_order, early_stop_budget, lengths
from dspark_sglang.core.survival import survival
from dspark_sglang.lossless import store
from dspark_sglang.lossless.store import Planned

REQUESTS = (64, 1024)
GAMMA = 5
REPEATS = 200
#: Seconds of a step of ``B`` tokens: a base and a slope at which admission stops part of the way.
_BASE, _SLOPE = 40e-3, 40e-6
#: Measured batch sizes in the builtin's cost table.
_BUILTIN_PROBES = 32
_DC = "sglang.srt.speculative.dspark_components"


def _confidence(requests: int, seed: int) -> torch.Tensor:
    """``[R, gamma]`` float32 in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((requests, GAMMA), generator=generator).mul_(0.9).add_(0.05)


def _probes(requests: int, count: int) -> list[int]:
    """``count`` numbers of tokens from nothing admitted to everything."""
    spaced = np.linspace(requests, requests * (GAMMA + 1), count)
    return sorted({int(tokens) for tokens in spaced})


def _ours(confidence: torch.Tensor, cost: Any) -> np.ndarray[Any, Any]:
    """What ``serving.planner`` does between confidences and lengths."""
    values = survival(confidence.numpy())
    order = admission_order(values)
    budget = early_stop_budget(values, order, cost)
    return lengths(order, budget, requests=len(confidence))


def _builtin(requests: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """SGLang's budget from carried survivals and its admission, as its CPU path runs them.

    Looked up by name when it is timed: the kit itself does not depend on SGLang.
    """
    planner = importlib.import_module(f"{_DC}.dspark_planner")
    sps = importlib.import_module(f"{_DC}.dspark_sps")
    schedule = importlib.import_module("sglang.kernels.ops.speculative.dspark.dspark_schedule")
    config = planner.DSparkScheduleConfig(gamma=GAMMA)
    tokens = _probes(requests, _BUILTIN_PROBES)
    table = sps.SpsCostTable(
        sample_batch_tokens=tokens,
        sample_steps_per_sec=[1.0 / (_BASE + _SLOPE * b) for b in tokens],
        max_batch_tokens=tokens[-1],
    )

    def run(confidence: torch.Tensor) -> torch.Tensor:
        budget = planner.compute_verify_token_budget(
            history_survival_probs=schedule.compute_sort_survival(confidence),
            sps_table=table,
            cfg=config,
        )
        found: torch.Tensor = schedule.ScheduleVerifyLensTopk.execute(
            confidence=confidence, budget=budget.budget, cfg=config
        )
        return found

    return run


def measure(requests: int) -> tuple[float, float]:
    """Median microseconds of ours and of the builtin, taking turns on the same confidences."""
    last = requests * (GAMMA + 1)
    cost = TableCost([1, last], [_BASE + _SLOPE, _BASE + _SLOPE * last])
    builtin = _builtin(requests)
    spent: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 10):
        confidence = _confidence(requests, repeat)
        for ours, times in zip((True, False), spent, strict=True):
            began = time.perf_counter_ns()
            if ours:
                _ours(confidence, cost)
            else:
                builtin(confidence)
            times.append((time.perf_counter_ns() - began) / 1e3)
    first, second = (statistics.median(times[10:]) for times in spent)
    return round(first, 1), round(second, 1)


def plan_times(out: Path) -> Planned:
    """Measure, or read what this code measured before."""
    wanted = store.key("plan", REQUESTS, GAMMA, REPEATS, _BASE, _SLOPE)
    known = store.load(out / "plan.json", Planned, wanted)
    if known is not None:
        return known
    found: dict[str, dict[str, float]] = {"ours": {}, "builtin": {}}
    for requests in REQUESTS:
        found["ours"][str(requests)], found["builtin"][str(requests)] = measure(requests)
    planned = Planned(key=wanted, plan_us=found)
    store.save(out / "plan.json", planned)
    return planned
