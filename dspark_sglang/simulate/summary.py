"""What a simulated system delivered, in the figures a load test reports."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from dspark_loadtests.frontier import Point
from dspark_sglang.core.round import Float64
from dspark_sglang.errors import ConfigError
from dspark_sglang.simulate.costs import StepTimes
from dspark_sglang.simulate.engine import Result


class Sla(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds a request may take to its first token, and for each token after it."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def check(self, times: StepTimes, *, context: int, drafts: bool, sampled: bool) -> None:
        """Refuse what no load can meet.

        Args:
            context: cached tokens of a request.
            drafts: whether the system drafts at all.

        Raises:
            ConfigError: not above 0, or below what a lone request whose every token is accepted takes.
        """
        for name, value in (("--sla-ttft-ms", self.ttft_ms), ("--sla-tpot-ms", self.tpot_ms)):
            if value is not None and not 0.0 < value < np.inf:
                raise ConfigError(f"{name} is {value:g}.", expected="above 0", fix="Raise it.")
        if self.tpot_ms is None:
            return
        fastest = times.plain(1, context, int(sampled))
        if drafts:
            whole = times.round(1, times.gamma, context, int(sampled)) / (times.gamma + 1)
            fastest = min(fastest, whole)
        fastest = 1e3 * (fastest + times.between(1) / (times.gamma + 1 if drafts else 1))
        if self.tpot_ms < fastest:
            raise ConfigError(
                f"No load meets {self.tpot_ms:g} ms a token: a lone request takes {fastest:.3g} ms "
                "even if every drafted token is accepted.",
                expected=f"--sla-tpot-ms of at least {fastest:.3g}",
                fix="Raise it, or simulate another machine.",
            )


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One load; rates are per second, of the time after warm-up. None: nothing to tell it from."""

    load: float
    replicas: int
    requests: int
    tok_s: float
    requests_s: float
    #: Mean, median and 99th percentile over requests.
    ttft_ms: list[float] | None
    tpot_ms: list[float] | None
    e2e_ms: list[float] | None
    #: Tokens a round (bonus included), drafted tokens verified a request and step, share of steps
    #: that drafted; as ``make bench-load`` counts them.
    accept_length: float | None
    budget: float
    drafting: float
    #: Share of requests that met the SLA, and those a second.
    sla_share: float | None
    goodput: float | None
    #: Share of time spent in prefill.
    prefill_share: float
    #: Simulated seconds.
    seconds: float
    events: int
    interrupted: bool = False


def summarise(
    results: Sequence[Result], *, load: float, warm: float = 0.0, sla: Sla | None = None
) -> Summary:
    """Sum up the replicas of one load.

    Raises:
        ConfigError: no request was answered after warm-up.
    """
    parts = [_answered(result, warm) for result in results]
    came, first, ended, output = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(came):
        raise ConfigError(
            "No request was answered after warm-up.",
            expected="at least one",
            fix="Raise --seconds or --requests.",
        )
    several = output > 1
    tpot = (ended[several] - first[several]) / (output[several] - 1)
    counts = [result.counts for result in results]
    rounds, plain = sum(c.rounds for c in counts), sum(c.plain_rounds for c in counts)
    every = max(1, rounds + plain)
    met = _met(sla, first - came, ended - first, output)
    seconds = max(c.seconds for c in counts)
    return Summary(
        load=load,
        replicas=len(results),
        requests=len(came),
        tok_s=sum(c.tokens / c.seconds for c in counts if c.seconds > 0),
        requests_s=len(came) / seconds,
        ttft_ms=_spread(first - came),
        tpot_ms=_spread(tpot),
        e2e_ms=_spread(ended - came),
        accept_length=sum(c.committed for c in counts) / rounds if rounds else None,
        budget=sum(c.verified for c in counts) / every,
        drafting=rounds / every,
        sla_share=None if met is None else float(met.mean()),
        goodput=None if met is None else float(met.sum()) / seconds,
        prefill_share=sum(c.prefill_s for c in counts) / max(1e-12, sum(c.seconds for c in counts)),
        seconds=seconds,
        events=sum(result.events for result in results),
        interrupted=any(result.interrupted for result in results),
    )


def _answered(result: Result, warm: float) -> tuple[Float64, Float64, Float64, Float64]:
    own = result.ended >= warm
    return (
        result.came[own], result.first[own], result.ended[own], result.output[own].astype(np.float64)
    )  # fmt: skip


def _spread(values: Float64) -> list[float] | None:
    if not values.size:
        return None
    median, high = np.percentile(values, [50, 99])
    return [round(1e3 * float(value), 4) for value in (values.mean(), median, high)]


def _met(
    sla: Sla | None, wait: Float64, after: Float64, output: Float64
) -> npt.NDArray[np.bool_] | None:
    if sla is None or (sla.ttft_ms is None and sla.tpot_ms is None):
        return None
    met = np.ones(len(wait), dtype=bool)
    if sla.ttft_ms is not None:
        met &= 1e3 * wait <= sla.ttft_ms
    if sla.tpot_ms is not None:
        met &= 1e3 * after <= sla.tpot_ms * np.maximum(1, output - 1)
    return met


def point(summary: Summary, *, gpus: int) -> Point | None:
    """``summary`` as a point of a frontier; None where no answer had two tokens."""
    if summary.tpot_ms is None:
        return None
    return Point(
        load=summary.load,
        tok_s_per_gpu=summary.tok_s / gpus,
        tok_s_per_user=1e3 / summary.tpot_ms[0],
        ttft_ms=None if summary.ttft_ms is None else summary.ttft_ms[0],
        accept_length=summary.accept_length,
        budget=summary.budget,
    )
