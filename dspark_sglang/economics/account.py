"""The account of one hour of one GPU.

A GPU spends ``1 / r`` seconds decoding an output token (``r`` from the frontier) and ``i (1 − h) / p`` seconds
prefilling for it: ``i`` input tokens an output token, a share ``h`` of them cached, ``p`` input tokens a second. Of
the hours paid for, a share ``u`` is busy. So an hour gives ``3600 u / (1/r + i (1 − h) / p)`` output tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from dspark_sglang.economics.prices import Assumptions

#: One value, or one for each draw.
Value = float | NDArray[np.float64]


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """A paid hour of one GPU. Money in dollars; what has no price is None.

    Attributes:
        decode_tokens: output tokens of an hour spent on decoding alone: what the frontier says.
        tokens: output tokens of a paid hour.
        prefill_share: of busy time.
        cost_per_million: the GPU's cost, nothing credited for input, a million output tokens.
        margin: share of revenue that is left after the GPU.
    """

    decode_tokens: float
    tokens: float
    prefill_share: float
    cost: float
    cost_per_million: float
    output_revenue: float | None
    input_revenue: float | None
    revenue: float | None
    profit: float | None
    margin: float | None


#: What sensitivity is about, in the order of preference.
METRICS = ("margin", "cost_per_million", "profit", "tokens")


def evaluate(rate: Value, values: Mapping[str, Value]) -> dict[str, Value]:
    """Fields of :class:`Hour` that there is a price for.

    Args:
        rate: output tokens a second and GPU while it decodes.
        values: of :class:`~dspark_sglang.economics.prices.Assumptions`, by name; arrays broadcast.
    """
    decode = 3600.0 * rate * values["throughput"]
    inputs = values.get("input_per_output", 0.0)
    missed = inputs * (1.0 - values.get("cache_hit", 0.0))
    decoding = 1.0 / (rate * values["throughput"])
    prefilling = missed / values["prefill"] if "prefill" in values else 0.0 * missed
    tokens = 3600.0 * values["utilisation"] / (decoding + prefilling)
    millions = tokens / 1e6
    cost = values["gpu_hour"]
    found: dict[str, Value] = {
        "decode_tokens": decode,
        "tokens": tokens,
        "prefill_share": prefilling / (decoding + prefilling),
        "cost": cost,
        "cost_per_million": cost / millions,
    }
    if "output" in values:
        found["output_revenue"] = millions * values["output"]
        hits = (inputs - missed) * values.get("input_hit", 0.0)
        found["input_revenue"] = millions * (missed * values.get("input_miss", 0.0) + hits)
        found["revenue"] = found["output_revenue"] + found["input_revenue"]
        found["profit"] = found["revenue"] - cost
        found["margin"] = found["profit"] / found["revenue"]
    return found


def hour(rate: float, values: Mapping[str, float]) -> Hour:
    """The account at one value of everything."""
    found = evaluate(rate, dict(values))
    return Hour(**{name: _float(found.get(name)) for name in Hour.__struct_fields__})  # type: ignore[arg-type]


def _float(value: Value | None) -> float | None:
    return None if value is None else float(value)


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """The account with one more thing counted than in the stage before."""

    counted: str
    hour: Hour


def stages(rate: float, assumptions: Assumptions, fitting: float | None = None) -> list[Stage]:
    """From the bare product to the whole account, one thing left out after the other.

    Args:
        rate: output tokens a second and GPU from the frontier, whatever memory says.
        fitting: the same with as many requests as memory holds beside the drafter; None: not known.
    """
    everything = assumptions.values()
    values = {"gpu_hour": everything["gpu_hour"], "utilisation": 1.0, "throughput": everything["throughput"]}  # fmt: skip
    if "output" in everything:
        values["output"] = everything["output"]
    found = [Stage(counted="decoding and output alone", hour=hour(rate, values))]
    if fitting is not None:
        rate = fitting
        found.append(Stage(counted="requests that fit beside the drafter", hour=hour(rate, values)))
    if "prefill" in everything:
        values |= {n: everything[n] for n in ("prefill", "input_per_output")} | {"cache_hit": 0.0}
        found.append(Stage(counted="time for prefill, nothing cached", hour=hour(rate, values)))
        if everything["cache_hit"]:
            values["cache_hit"] = everything["cache_hit"]
            found.append(Stage(counted="cache hits", hour=hour(rate, values)))
    values["utilisation"] = everything["utilisation"]
    found.append(Stage(counted="idle hours", hour=hour(rate, values)))
    if "input_miss" in everything or "input_hit" in everything:
        found.append(Stage(counted="what input is paid", hour=hour(rate, everything)))
    return found
