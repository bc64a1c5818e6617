"""Requests to serve: when they come, how long their prompts and answers are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from dspark_sglang.core.round import Float64, Int64
from dspark_sglang.errors import ArtifactError, ConfigError

_FIX = 'Write one JSON object a line: {"timestamp": 0, "input_length": 512, "output_length": 128}.'


class Requests(NamedTuple):
    """``N`` requests in the order in which they come."""

    #: ``[N]`` seconds, never falling; a closed loop takes the next one whenever a user is free.
    at: Float64
    #: ``[N]`` tokens to prefill (those in no cache), tokens of context they bring, tokens to answer.
    fresh: Int64
    prompt: Int64
    output: Int64
    #: ``[N]`` domain of each.
    domain: Int64

    def take(self, chosen: npt.NDArray[np.bool_]) -> Requests:
        """Those of them that ``chosen`` ``[N]`` marks."""
        return Requests(*(field[chosen] for field in self))  # type: ignore[arg-type]


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of prompts and answers, and the share of prompts that caches hold."""

    prompt: float
    output: float
    #: Coefficient of variation of both (lognormal); 0: all alike.
    variation: float = 0.0
    cached: float = 0.0


def _positive(name: str, value: float, *, zero: bool = False) -> None:
    if not (0.0 <= value < np.inf) or (value == 0.0 and not zero):
        raise ConfigError(
            f"{name} is {value:g}.",
            expected="a finite number of at least 0" if zero else "a finite number above 0",
            fix="See `dspark simulate --help`.",
        )


def _drawn(rng: np.random.Generator, mean: float, variation: float, count: int) -> Int64:
    if not variation:
        return np.full(count, max(1, round(mean)), dtype=np.int64)
    sigma = np.sqrt(np.log1p(variation**2))
    values = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    found: Int64 = np.maximum(1, np.rint(values)).astype(np.int64)
    return found


def _sized(at: Float64, lengths: Lengths, weights: Float64, rng: np.random.Generator) -> Requests:
    _positive("The prompt's length", lengths.prompt)
    _positive("The answer's length", lengths.output)
    _positive("The variation of lengths", lengths.variation, zero=True)
    if not 0.0 <= lengths.cached <= 1.0:
        raise ConfigError(
            f"The cached share of prompts is {lengths.cached:g}.",
            expected="0 to 1",
            fix="As in 0.5.",
        )
    count = len(at)
    prompt = _drawn(rng, lengths.prompt, lengths.variation, count)
    output = _drawn(rng, lengths.output, lengths.variation, count)
    # A prompt's last token is always computed: its state gives the first answer token.
    fresh = np.maximum(1, np.rint(prompt * (1.0 - lengths.cached))).astype(np.int64)
    return Requests(at, fresh, prompt, output, rng.choice(len(weights), count, p=weights))


def poisson(
    rate: float, count: int, lengths: Lengths, *, weights: Float64, rng: np.random.Generator
) -> Requests:
    """``count`` requests that come independently, ``rate`` a second on average."""
    _positive("The rate of requests", rate)
    at = np.cumsum(rng.exponential(1.0 / rate, count))
    return _sized(at, lengths, weights, rng)


def waiting(
    count: int, lengths: Lengths, *, weights: Float64, rng: np.random.Generator
) -> Requests:
    """``count`` requests that are there from the beginning: for a closed loop."""
    return _sized(np.zeros(count), lengths, weights, rng)


class _Line(msgspec.Struct):
    """A line of Mooncake's traces; other fields are left alone."""

    timestamp: float
    input_length: int
    output_length: int


def _read(path: Path) -> list[_Line]:
    what = "a trace of requests in Mooncake's format"
    found = []
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}.", expected=what, fix=_FIX
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(msgspec.json.decode(line, type=_Line))
            except msgspec.DecodeError as error:
                raise ArtifactError(
                    f"Line {number} of {path} is wrong: {error}.", expected=what, fix=_FIX
                ) from error
    if not found:
        raise ArtifactError(f"{path} is empty.", expected=what, fix=_FIX)
    return found


def trace(
    path: Path,
    *,
    weights: Float64,
    rng: np.random.Generator,
    cached: float = 0.0,
    speed: float = 1.0,
) -> Requests:
    """Requests of a trace file (Mooncake's JSON lines; milliseconds).

    Args:
        speed: 2 replays it twice as fast.

    Raises:
        ArtifactError: missing, empty, going back in time, or with lengths that no request has.
    """
    _positive("The speed of replay", speed)
    lines = _read(path)
    at = np.array([line.timestamp for line in lines]) / (1000.0 * speed)
    prompt = np.array([line.input_length for line in lines], dtype=np.int64)
    output = np.array([line.output_length for line in lines], dtype=np.int64)
    back = np.flatnonzero(np.diff(at) < 0)
    if back.size:
        row = int(back[0]) + 1
        raise ArtifactError(
            f"{path} goes back in time at request {row + 1} "
            f"(from {lines[row - 1].timestamp:g} to {lines[row].timestamp:g} ms).",
            expected="timestamps that never fall",
            fix="Sort it by timestamp.",
        )
    bad = np.flatnonzero((prompt < 1) | (output < 1) | ~np.isfinite(at))
    if bad.size:
        row = int(bad[0])
        raise ArtifactError(
            f"Request {row + 1} of {path} has {prompt[row]} prompt and {output[row]} answer tokens.",
            expected="at least 1 of both, and a finite timestamp",
            fix=_FIX,
        )
    fresh = np.maximum(1, np.rint(prompt * (1.0 - cached))).astype(np.int64)
    return Requests(at - at[0], fresh, prompt, output, rng.choice(len(weights), len(at), p=weights))
