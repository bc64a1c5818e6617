"""What a million output tokens cost at a speed that every user gets: arithmetic on a frontier and on prices.

A GPU decodes an output token in ``1 / r`` seconds; the frontier says ``r`` at the speed that is asked for. It computes
the prompt's share in ``i (1 - h) / p`` seconds: ``i`` input tokens an output token, a share ``h`` of them cached, and
``p`` input tokens a second. Of the hours paid for, a share ``u`` is busy. So a paid hour gives
``3600 u / (1 / r + i (1 - h) / p)`` output tokens. Computed, not run.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from dspark_loadtests import frontier
from dspark_loadtests.frontier import Frontier, Point, Series
from dspark_sglang.artifacts import SCHEMA_VERSION
from dspark_sglang.errors import ConfigError

UNITS = {
    "gpu_hour": "$/GPU-hour",
    "output": "$/M output tokens",
    "input_miss": "$/M input tokens, not cached",
    "input_hit": "$/M input tokens, cached",
    "input_per_output": "input tokens an output token",
    "cache_hit": "share of input tokens",
    "prefill": "input tokens/s/GPU",
    "utilisation": "share of paid hours",
    "throughput": "times the frontier",
}
_SHARES, _MAY_BE_ZERO = ("cache_hit", "utilisation"), ("cache_hit", "input_per_output")


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A middle value, the range it may lie in (its ends are the value where it is known), and where it is from."""

    value: float
    low: float
    high: float
    date: str
    source: str


_BUSY = Quantity(value=1, low=1, high=1, date="", source="always busy: nothing was said")
_FRONTIER = Quantity(value=1, low=0.9, high=1.1, date="", source="off by a tenth: assumed")


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prices and workload in the units of ``UNITS``. What is None is left out of the account.

    Attributes:
        gpu_hour: rent of a GPU, or of a machine without one.
        output, input_miss, input_hit: what users pay.
        prefill: what a GPU computes when it does nothing else.
        utilisation: share of paid hours at the frontier's load.
    """

    about: str
    gpu_hour: Quantity
    output: Quantity | None = None
    input_miss: Quantity | None = None
    input_hit: Quantity | None = None
    input_per_output: Quantity | None = None
    cache_hit: Quantity | None = None
    prefill: Quantity | None = None
    utilisation: Quantity = _BUSY
    throughput: Quantity = _FRONTIER

    def quantities(self) -> dict[str, Quantity]:
        """Those that are there, by name."""
        found = {name: getattr(self, name) for name in UNITS}
        return {name: quantity for name, quantity in found.items() if quantity is not None}


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """A paid hour of one GPU.

    Attributes:
        tokens: output tokens.
        prefill_share: of busy time.
        cost_per_million: dollars of rent a million output tokens; nothing is credited for input.
        revenue: dollars that users pay; None without a price of output.
        margin: share of revenue that is left after the rent.
    """

    tokens: float
    prefill_share: float
    cost_per_million: float
    revenue: float | None = None
    margin: float | None = None


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One way of serving at the speed asked for.

    Attributes:
        tok_s_per_gpu: output tokens a second and GPU, as the frontier says; 0 where it is never that fast.
        fastest: output tokens a second and user of its fastest point.
        hour: None where it is never that fast.
        times_first: its cost a million over that of the frontier's first way; None where either has none.
    """

    name: str
    tok_s_per_gpu: float
    fastest: float
    hour: Hour | None
    times_first: float | None


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="price", tag_field="kind"):
    """Every way of serving of a frontier, priced at a speed (see :func:`answer`).

    Attributes:
        sensitivity: dollars a million output tokens with one input at its low and at its high end, all others at their
            middle value, by input and way of serving. Inputs without a range, or without a part in it, are left out.
    """

    schema_version: int = SCHEMA_VERSION
    source: str
    model: str
    hardware: str
    sla: float
    max_ttft_ms: float | None
    prices: Prices
    sides: list[Side]
    sensitivity: dict[str, dict[str, tuple[float, float]]]
    notes: list[str]


def load(preset: str | None, file: Path | None, **given: float | None) -> Prices:
    """A preset, with values of the command line in it.

    Args:
        preset: its name; None: the only one of ``file``, else ``quoted``.
        file: presets of the user's own (TOML), beside the built-in ones.
        given: values by name, taken as known; None leaves the preset's.

    Raises:
        ConfigError: an unknown preset, a damaged file, or a value that cannot be one.
    """
    own = _presets(file) if file is not None else {}
    name = preset or (next(iter(own)) if len(own) == 1 else "quoted")
    merged = _merged(name, builtin() | own)
    for key, value in given.items():
        if value is not None:
            merged[key] = {"value": value, "low": value, "high": value, "date": "", "source": "the command line"}  # fmt: skip
    try:
        found = msgspec.convert(merged, Prices)
    except msgspec.ValidationError as error:
        raise _wrong(f"Preset {name}: {error}", "gpu_hour at least, each value as {value, low, high, date, source}") from error  # fmt: skip
    known = found.quantities()
    for key, quantity in known.items():
        _check(key, quantity, name)
    lacking = [key for key in ("input_per_output", "cache_hit") if key not in known]
    if lacking and {"input_miss", "input_hit", "prefill"} & set(known):
        raise _wrong(f"Preset {name} has no {' and no '.join(lacking)}", "both where input is priced or takes time")  # fmt: skip
    return found


def builtin() -> dict[str, dict[str, Any]]:
    """The presets of ``prices.toml``, as they are written there."""
    text = resources.files(__package__).joinpath("prices.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = tomllib.loads(text)["preset"]
    return found


def _wrong(found: str, expected: str) -> ConfigError:
    return ConfigError(f"{found}.", expected=expected, fix="See docs/explanation/economics.md.")


def _presets(path: Path) -> dict[str, dict[str, Any]]:
    expected = "TOML with [preset.NAME] and [preset.NAME.gpu_hour], as in simulate/prices.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("preset")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _wrong(f"{path} cannot be read: {error}", expected) from error
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise _wrong(f"{path} holds no preset", expected)
    return found


def _merged(name: str, known: Mapping[str, Mapping[str, Any]], seen: tuple[str, ...] = ()) -> dict[str, Any]:  # fmt: skip
    if name not in known:
        raise _wrong(f"There is no preset {name!r}", "one of: " + ", ".join(known))
    if name in seen:
        raise _wrong(f"Preset {name!r} extends itself", "a preset that ends somewhere")
    own = dict(known[name])
    base = own.pop("extends", None)
    return (_merged(str(base), known, (*seen, name)) if base is not None else {}) | own


def _check(name: str, quantity: Quantity, preset: str) -> None:
    low, middle, high = quantity.low, quantity.value, quantity.high
    least = "at least 0" if name in _MAY_BE_ZERO else "above 0"
    most = " and at most 1" if name in _SHARES else ""
    for number in (low, middle, high):
        good = number >= 0 if name in _MAY_BE_ZERO else number > 0
        if not good or not math.isfinite(number) or (most and number > 1):
            raise _wrong(f"Preset {preset}: {name} is {number:g} ({UNITS[name]})", f"a finite number {least}{most}")  # fmt: skip
    if not low <= middle <= high:
        raise _wrong(f"Preset {preset}: {name} is {middle:g}, its range {low:g} to {high:g}", "a value within its range")  # fmt: skip


def account(rate: float, values: Mapping[str, float]) -> Hour:
    """A paid hour of one GPU.

    Args:
        rate: output tokens a second and GPU while it decodes.
        values: of :class:`Prices`, by name; ``gpu_hour`` has to be there.
    """
    inputs = values.get("input_per_output", 0.0)
    hits = inputs * values.get("cache_hit", 0.0)
    decoding = 1.0 / (rate * values.get("throughput", 1.0))
    prefilling = (inputs - hits) / values["prefill"] if "prefill" in values else 0.0
    tokens = 3600.0 * values.get("utilisation", 1.0) / (decoding + prefilling)
    millions, cost = tokens / 1e6, values["gpu_hour"]
    revenue = None
    if "output" in values:
        paid = (inputs - hits) * values.get("input_miss", 0.0) + hits * values.get("input_hit", 0.0)
        revenue = millions * (values["output"] + paid)
    return Hour(
        tokens=tokens,
        prefill_share=prefilling / (decoding + prefilling),
        cost_per_million=cost / millions,
        revenue=revenue,
        margin=None if revenue is None else (revenue - cost) / revenue,
    )


def answer(found: Frontier, prices: Prices, *, sla: float, max_ttft_ms: float | None = None) -> Answer:  # fmt: skip
    """Price every way of serving of a frontier.

    Args:
        sla: output tokens a second that every user gets at least.
        max_ttft_ms: points that take longer to the first token do not count; None: all count.

    Raises:
        ConfigError: a speed that is none or that no way of serving has, or points without a time to hold against.
    """
    if not 0 < sla < math.inf:
        raise _wrong(f"--sla is {sla:g} tokens/s/user", "a speed above 0")
    values = {name: quantity.value for name, quantity in prices.quantities().items()}
    if found.source == "measured":  # its throughput was delivered with prefill in it
        values.pop("prefill", None)
    points = {one.name: _in_time(one, max_ttft_ms) for one in found.series}
    rates = {name: frontier.throughput_at(some, sla) or 0.0 for name, some in points.items()}
    fastest = {name: max((p.tok_s_per_user for p in some), default=0.0) for name, some in points.items()}  # fmt: skip
    hours = {name: account(rate, values) for name, rate in rates.items() if rate > 0}
    if not hours:
        raise _wrong(
            f"Nothing gives a user {sla:g} tokens/s" + (f" within {max_ttft_ms:g} ms to the first token" if max_ttft_ms else ""),
            ", ".join(f"at most {most:.4g} of {name}" for name, most in fastest.items()) or "a way of serving",
        )  # fmt: skip
    first = hours.get(found.series[0].name)
    sides = []
    for name, rate in rates.items():
        hour = hours.get(name)
        times = hour.cost_per_million / first.cost_per_million if hour and first else None
        sides.append(Side(name=name, tok_s_per_gpu=rate, fastest=fastest[name], hour=hour, times_first=times))  # fmt: skip
    return Answer(
        source=found.source,
        model=found.model,
        hardware=found.hardware,
        sla=sla,
        max_ttft_ms=max_ttft_ms,
        prices=prices,
        sides=sides,
        sensitivity=_sensitivity({name: rates[name] for name in hours}, prices, values),
        notes=list(_notes(found, prices)),
    )


def _in_time(series: Series, limit: float | None) -> list[Point]:
    if limit is None:
        return series.points
    if not limit > 0 or all(point.ttft_ms is None for point in series.points):
        raise _wrong(
            f"--max-ttft-ms is {limit:g}, and {series.name} has {len(series.points)} points",
            "a time above 0, and points that say their time to the first token",
        )
    return [point for point in series.points if point.ttft_ms is not None and point.ttft_ms <= limit]  # fmt: skip


def _sensitivity(rates: Mapping[str, float], prices: Prices, values: Mapping[str, float]) -> dict[str, dict[str, tuple[float, float]]]:  # fmt: skip
    def cost(rate: float, **instead: float) -> float:
        return account(rate, {**values, **instead}).cost_per_million

    found = {}
    for name, one in prices.quantities().items():
        ends = {way: (cost(rate, **{name: one.low}), cost(rate, **{name: one.high})) for way, rate in rates.items()}  # fmt: skip
        if name in values and any(low != high for low, high in ends.values()):
            found[name] = ends
    return found


def _notes(found: Frontier, prices: Prices) -> Iterator[str]:
    """What the answer leaves out."""
    if found.source == "measured":
        yield "The frontier is measured: its throughput pays for prefill already, so no prefill rate is used."
    else:
        yield "The frontier is simulated, not measured: see its assumptions."
        if prices.prefill is None:
            yield "Time for prefill is left out: the preset has no prefill rate."
        else:
            yield "Prefill is added at the preset's rate. A simulation with prefill in it pays twice: use a preset without."
    if prices.output is None:
        yield "No price of output is given: there is no revenue, and cost stands alone."
    elif prices.input_miss is None and prices.input_hit is None:
        yield "What users pay for input is left out: the preset has no price of it."
    if prices.utilisation.value == 1.0:
        yield "Idle hours are left out: every paid hour is at the frontier's load."
    yield "Memory is left out: all requests of the frontier are taken to fit. `dspark plan` counts those that do."
    yield "Only GPUs are paid for: no staff, network, storage, licences, retries or unpaid use."
