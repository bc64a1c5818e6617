"""Seconds of simulated steps: measured ones, and what the scheduler knows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from dspark_sglang.artifacts import CostArtifact, read_artifact
from dspark_sglang.core.schedule.cost_model import CostModel, Step
from dspark_sglang.errors import ArtifactError, ConfigError

_FIX = "Measure one with `dspark calibrate --cost`."


class StepTimes(Protocol):
    """The machine that is simulated."""

    gamma: int

    def plain(self, requests: int, context: int, sampled: int) -> float:
        """Seconds of a step without drafting; ``context`` cached tokens over all requests."""
        ...

    def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
        """Seconds of a round that verifies ``drafted`` tokens over all requests, drafting included."""
        ...

    def prefill(self, tokens: int, requests: int) -> float:
        """Seconds of a step that computes ``tokens`` of ``requests`` prompts."""
        ...

    def between(self, requests: int) -> float:
        """Seconds from one step to the next: what the server does beside its forwards."""
        ...


class Overheads(msgspec.Struct, frozen=True, kw_only=True):
    """What a step cost does not hold; seconds."""

    #: A prefill step, each of its requests, each of its tokens.
    prefill_step: float = 0.0
    prefill_request: float = 0.0
    prefill_token: float = 0.0
    #: Between steps, and more for each request.
    step: float = 0.0
    request: float = 0.0


class Measured:
    """Steps as long as a server's own cost model says (``dspark calibrate --cost``)."""

    def __init__(self, model: CostModel, overheads: Overheads) -> None:
        self.gamma, self._model, self._overheads = model.gamma, model, overheads

    def plain(self, requests: int, context: int, sampled: int) -> float:
        return self._model.plain_seconds(requests, context, sampled)

    def round(self, requests: int, drafted: int, context: int, sampled: int) -> float:
        return self._model.round_seconds(requests, drafted, context, sampled)

    def prefill(self, tokens: int, requests: int) -> float:
        own = self._overheads
        return own.prefill_step + own.prefill_request * requests + own.prefill_token * tokens

    def between(self, requests: int) -> float:
        return self._overheads.step + self._overheads.request * requests


def read_cost(path: Path) -> tuple[CostModel, CostArtifact]:
    """The step cost in ``cost.json``, or in a directory that holds one.

    Raises:
        ArtifactError: missing, damaged, of another kind, or without one of the two kinds of step.
    """
    path = path / "cost.json" if path.is_dir() else path
    found = read_artifact(path, CostArtifact, "a cost file of this plugin", _FIX)
    gamma = found.model.get("gamma")
    if not isinstance(gamma, int) or not 1 <= gamma <= 64:
        raise ArtifactError(f"{path} has gamma {gamma!r}.", expected="1 to 64", fix=_FIX)
    model = CostModel(gamma=gamma)
    try:
        model.restore(found.model)
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}", expected="a cost file", fix=_FIX) from error
    return model, found


def learned(times: StepTimes, *, requests: int, context: int) -> CostModel:
    """What a scheduler knows of a machine after trying every kind of step on it.

    Args:
        requests: most at once.
        context: cached tokens of each; half and twice as many are tried, too.
    """
    model = CostModel(gamma=times.gamma)
    loads = [1 << n for n in range(requests.bit_length())]
    if loads[-1] != requests:
        loads.append(requests)
    for share in (1.0, 0.5, 2.0, 1.0):
        for count in loads:
            cached = int(count * context * share)
            for depth in range(times.gamma + 1):
                drafted = count * depth
                # In turn: what follows a change of kind is learned as that kind's own cost.
                for sampled in (count, 0):
                    step = Step(count, drafted, cached, round=True, sampled=sampled)
                    model.observe(step, times.round(count, drafted, cached, sampled))
                    step = Step(count, 0, cached, round=False, sampled=sampled)
                    model.observe(step, times.plain(count, cached, sampled))
    return model
