"""Prices and workload: one typed file, every value with its date and source."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.errors import ConfigError

#: The file that comes with the package.
BUILTIN = "prices.toml"


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A value, the range it may lie in, and where it is from."""

    value: float
    low: float | None = None
    high: float | None = None
    date: str
    source: str

    @property
    def range(self) -> tuple[float, float]:
        """Low and high; the value itself where nothing was said."""
        low = self.value if self.low is None else self.low
        return low, self.value if self.high is None else self.high


def _one() -> Quantity:
    return Quantity(value=1.0, date="", source="always busy: nothing was said")


def _frontier() -> Quantity:
    return Quantity(value=1.0, low=0.9, high=1.1, date="", source="frontier off by a tenth: assumed")  # fmt: skip


class Assumptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything but the frontier. What is None is left out of the account.

    Attributes:
        gpu_hour: dollars an hour for a GPU (or for a machine without one).
        output, input_miss, input_hit: dollars a million tokens.
        input_per_output: input tokens for each output token.
        cache_hit: share of input tokens found in the cache.
        prefill: input tokens a second that a GPU computes when it does nothing else. None where the frontier's
            throughput already pays for prefill, as a measured one does.
        utilisation: share of paid hours at the frontier's load.
        throughput: the frontier's throughput is multiplied with this.
    """

    about: str
    gpu_hour: Quantity
    output: Quantity | None = None
    input_miss: Quantity | None = None
    input_hit: Quantity | None = None
    input_per_output: Quantity | None = None
    cache_hit: Quantity | None = None
    prefill: Quantity | None = None
    utilisation: Quantity = msgspec.field(default_factory=_one)
    throughput: Quantity = msgspec.field(default_factory=_frontier)

    def quantities(self) -> dict[str, Quantity]:
        """Those that are there, by name."""
        found = {name: getattr(self, name) for name in NAMES}
        return {name: quantity for name, quantity in found.items() if quantity is not None}

    def values(self) -> dict[str, float]:
        """The likeliest value of each."""
        return {name: quantity.value for name, quantity in self.quantities().items()}


NAMES = tuple(name for name in Assumptions.__struct_fields__ if name != "about")
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
_SHARES = ("cache_hit", "utilisation")
#: May be 0: nothing cached, no input.
_MAY_BE_ZERO = ("cache_hit", "input_per_output")


def load(preset: str | None, file: Path | None, changes: Sequence[str] = ()) -> Assumptions:
    """A preset with changes.

    Args:
        preset: its name; None: the only one of ``file``, else ``quoted``.
        file: a file of the user's, beside the built-in presets.
        changes: ``NAME=VALUE`` or ``NAME=VALUE:LOW:HIGH``.

    Raises:
        ConfigError: unknown preset or name, a damaged file, or a value that cannot be one.
    """
    own = _read(file) if file is not None else {}
    known = _builtin() | own
    if preset is None:
        preset = next(iter(own)) if len(own) == 1 else "quoted"
    merged = _merged(preset, known)
    for change in changes:
        name, quantity = _change(change, merged)
        merged[name] = quantity
    return _checked(merged, f"preset {preset}")


def presets() -> dict[str, str]:
    """Names of the built-in presets and what they are."""
    return {name: str(table["about"]) for name, table in _builtin().items()}


def _builtin() -> dict[str, dict[str, Any]]:
    text = resources.files(__package__).joinpath(BUILTIN).read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = tomllib.loads(text)["preset"]
    return found


def _read(path: Path) -> dict[str, dict[str, Any]]:
    expected = "TOML with [preset.NAME] and [preset.NAME.gpu_hour] as in dspark_sglang/economics/prices.toml"
    fix = "See docs/economics.md."
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", expected=expected, fix=fix) from error
    tables = found.get("preset")
    if not isinstance(tables, dict) or not tables or set(found) != {"preset"}:
        raise ConfigError(f"{path} holds {', '.join(found) or 'nothing'}.", expected=expected, fix=fix)  # fmt: skip
    if not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{path} has a preset that is no table.", expected=expected, fix=fix)
    return tables


def _merged(name: str, known: Mapping[str, Mapping[str, Any]], seen: tuple[str, ...] = ()) -> dict[str, Any]:  # fmt: skip
    if name not in known or name in seen:
        raise ConfigError(
            f"There is no preset {name!r}." if name not in known else f"{name!r} extends itself.",
            expected="one of: " + ", ".join(known),
            fix="Name one of these, or put it into a file and pass --prices FILE.",
        )
    own = dict(known[name])
    base = own.pop("extends", None)
    return (_merged(str(base), known, (*seen, name)) if base is not None else {}) | own


def _change(text: str, merged: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """``NAME=VALUE[:LOW:HIGH]``; a range that still holds the new value is kept."""
    name, _, right = text.partition("=")
    try:
        numbers = [float(part) for part in right.split(":")]
    except ValueError:
        numbers = []
    if name not in NAMES or len(numbers) not in (1, 3):
        raise ConfigError(
            f"--set {text}.",
            expected="NAME=VALUE or NAME=VALUE:LOW:HIGH, NAME one of " + ", ".join(NAMES),
            fix="For example: --set gpu_hour=2.10 --set utilisation=0.7:0.5:0.9",
        )
    value, *bounds = numbers
    if not bounds and isinstance(merged.get(name), Mapping):
        low, high = merged[name].get("low"), merged[name].get("high")
        if low is not None and high is not None and low <= value <= high:
            bounds = [low, high]
    low, high = bounds or (None, None)
    source = {"date": "", "source": "the command line"}
    return name, {"value": value, "low": low, "high": high, **source}


def _checked(merged: Mapping[str, Any], where: str) -> Assumptions:
    try:
        found = msgspec.convert(merged, Assumptions)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{where}: {error}.",
            expected="gpu_hour at least, each value as {value, low, high, date, source}",
            fix="Known names: " + ", ".join(NAMES) + ". See docs/economics.md.",
        ) from error
    for name, quantity in found.quantities().items():
        _check(name, quantity, where)
    given = [name for name in ("input_per_output", "cache_hit") if getattr(found, name) is None]
    priced = [n for n in ("input_miss", "input_hit", "prefill") if getattr(found, n) is not None]
    if given and priced:
        raise ConfigError(
            f"{where} has {', '.join(priced)} but no {', '.join(given)}.",
            expected="how many input tokens there are, and how many of them are cached",
            fix=f"Add {' and '.join(f'--set {name}=...' for name in given)}.",
        )
    return found


def _check(name: str, quantity: Quantity, where: str) -> None:
    low, high = quantity.range
    least = "at least 0" if name in _MAY_BE_ZERO else "above 0"
    most = " and at most 1" if name in _SHARES else ""
    for number in (quantity.value, low, high):
        good = math.isfinite(number) and (number >= 0 if name in _MAY_BE_ZERO else number > 0)
        if not good or (name in _SHARES and number > 1):
            raise ConfigError(
                f"{where}: {name} is {number:g} ({UNITS[name]}).",
                expected=f"a finite number {least}{most}",
                fix=f"Change it, for example with --set {name}=VALUE.",
            )
    if not low <= quantity.value <= high:
        raise ConfigError(
            f"{where}: {name} is {quantity.value:g}, its range {low:g} to {high:g}.",
            expected="a value within its range",
            fix=f"Give all three: --set {name}=VALUE:LOW:HIGH.",
        )
