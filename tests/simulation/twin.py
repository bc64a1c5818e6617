"""A real server as the simulator sees it: fitted at some loads, kept in a file, used at others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance, read_artifact
from dspark_sglang.core.schedule.cost_model import CostModel
from dspark_sglang.core.sts import BINS
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.provenance import machine
from dspark_sglang.simulate.acceptance import Law, Mixture
from dspark_sglang.simulate.arrivals import Requests
from dspark_sglang.simulate.costs import Measured, Overheads
from dspark_sglang.simulate.engine import Replica, Setting
from dspark_sglang.simulate.summary import Summary, summarise

_FIX = "Make one with `make simulate-fit`."
#: Simulated seconds of one load.
_SECONDS = 300.0
#: Rows of a table of blocks.
_ROWS = 1 << 14


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """One block of load on the real server."""

    users: int
    tok_s: float
    tpot_s: float
    ttft_s: float
    budget: float
    accept_length: float
    drafting: float
    #: Wall seconds of the block, those the worker spent in steps, steps, requests that began.
    wall_s: float
    step_s: float
    steps: int
    began: int
    #: Seconds a token that a lone plain request took before and after the block: how fast the machine was.
    #: 0: not measured.
    reference_s: float = 0.0

    def on(self, reference_s: float) -> Observed:
        """The block as it would have been on a machine whose plain tokens take ``reference_s``."""
        slow = self.reference_s / reference_s if self.reference_s and reference_s else 1.0
        return msgspec.structs.replace(
            self,
            tok_s=self.tok_s * slow,
            tpot_s=self.tpot_s / slow,
            ttft_s=self.ttft_s / slow,
            wall_s=self.wall_s / slow,
            step_s=self.step_s / slow,
            reference_s=reference_s,
        )


class Parameters(msgspec.Struct, frozen=True, kw_only=True, tag="simulation", tag_field="kind"):
    """What ``make simulate-fit`` found of one server; frozen before anything is compared with it."""

    schema_version: int = SCHEMA_VERSION
    machine: str
    target: str
    drafter_sha256: str
    dtype: str
    temperature: float
    speculation: str
    #: Most requests at once, and most tokens of an answer.
    slots: int
    max_tokens: int
    #: State of the server's own cost model, and fingerprint of what it is valid for.
    cost: dict[str, Any]
    fingerprint: dict[str, str]
    #: Confidences and acceptance by position and bin, everything verified.
    reliability: dict[str, Any]
    overheads: Overheads
    #: Seconds a token of a lone plain request on the machine that ``cost`` is of.
    reference_s: float
    #: Tokens of answers and of prompts that were seen.
    answer_tokens: list[int]
    prompt_tokens: list[int]
    #: Loads that were used, and what was seen there.
    fitted: list[Observed]
    provenance: Provenance

    @property
    def sampled(self) -> bool:
        """Whether requests sample."""
        return self.temperature > 0


def read(path: Path, *, here: bool = False) -> Parameters:
    """Parameters from a file.

    Args:
        here: they have to be of this machine.

    Raises:
        ArtifactError: missing, damaged, or of another machine.
    """
    found = read_artifact(path, Parameters, "parameters of the simulator", _FIX)
    if here and found.machine != machine():
        raise ArtifactError(
            f"{path} was fitted on {found.machine}.",
            expected=f"{machine()}, this machine",
            fix="Fit this machine with `make simulate-fit`.",
        )
    return found


def overheads(blocks: Sequence[Observed]) -> Overheads:
    """What the wall clock holds beside steps: prefills, and a share for every step and request in it.

    A prefill lasts what a lone request waits for its first token; requests of a block's beginning share
    one, later ones come singly. The rest is divided by least squares without negative seconds, relative
    to each block's length.

    Raises:
        ConfigError: no block of one request, or no other: shares cannot be told apart.
    """
    alone = [block.ttft_s for block in blocks if block.users == 1]
    if not alone or len(alone) == len(blocks):
        raise ConfigError(
            f"Blocks of {', '.join(map(str, sorted({b.users for b in blocks})))} requests.",
            expected="1, where prefill is timed, and more",
            fix="As in 1,8,32.",
        )
    prefill = float(np.median(alone))
    rows = [[b.steps, b.steps * b.users] for b in blocks]
    scale = np.array([b.wall_s for b in blocks])
    prefills = np.array([b.began - b.users + 1 for b in blocks])
    left = np.array([b.wall_s - b.step_s for b in blocks]) - prefill * prefills
    (step, request), _ = nnls(np.array(rows) / scale[:, None], np.maximum(left, 0.0) / scale)
    return Overheads(step=float(step), request=float(request), prefill_step=prefill)


def from_reliability(table: Mapping[str, Any], *, sampled: bool) -> Law:
    """A law from what a server counted: ``reliability`` of its ``dspark_info_record``.

    Each position draws a bin as often as it was seen, states the bin's mean confidence and is accepted
    as often as the bin's tokens were. Serve with everything verified (``dspark_budget`` 1), or bins
    that were left out are missing.

    Raises:
        ArtifactError: nothing was counted.
    """
    seen, predicted, kept = (
        np.asarray(table[part], dtype=np.float64)[int(sampled)]
        for part in ("seen", "predicted", "kept")
    )
    if seen.shape[-1] != BINS or not (seen.sum(axis=1) > 0).all():
        raise ArtifactError(
            f"The server counted {seen.sum(axis=1).round(1).tolist()} tokens by position.",
            expected="some of every position",
            fix="Let it serve longer with everything verified.",
        )
    rng, grid = np.random.default_rng(0), (np.arange(_ROWS) + 0.5) / _ROWS
    confidence, chance = [], []
    for total, stated, right in zip(seen, predicted, kept, strict=True):
        shares = np.cumsum(total) / total.sum()
        bins = np.minimum(np.searchsorted(shares, rng.permutation(grid)), BINS - 1)
        weight = np.maximum(total, 1e-9)
        confidence.append(np.clip((stated / weight)[bins], 0.0, 1.0))
        chance.append(np.clip((right / weight)[bins], 0.0, 1.0))
    return Law("served", np.stack(confidence, axis=1), np.stack(chance, axis=1))


class Server(NamedTuple):
    """The simulated twin of a fitted server."""

    times: Measured
    blocks: Mixture
    cost: CostModel


def twin(given: Parameters) -> Server:
    """What parameters stand for.

    Raises:
        ArtifactError: they hold no cost or no acceptance.
    """
    gamma = given.cost.get("gamma")
    if not isinstance(gamma, int):
        raise ArtifactError("The parameters hold no step cost.", expected="gamma", fix=_FIX)
    truth, known = CostModel(gamma=gamma), CostModel(gamma=gamma)
    truth.restore(given.cost)
    known.restore(given.cost)
    law = from_reliability(given.reliability, sampled=given.sampled)
    return Server(Measured(truth, given.overheads), Mixture([law]), known)


def predict(given: Parameters, users: int, *, seconds: float = _SECONDS, seed: int = 0) -> Summary:
    """A closed loop of ``users`` on the twin, as :mod:`dspark_loadtests.closed_loop` runs it."""
    server, rng = twin(given), np.random.default_rng(seed)
    count = max(64, 4 * users, int(40 * seconds))
    output = rng.choice(given.answer_tokens, count)
    # As in the real loop, the first answers are shorter: users start out of step.
    firsts = rng.integers(max(1, given.max_tokens // 4), given.max_tokens + 1, users)
    output[:users] = np.minimum(output[:users], firsts)
    prompt = rng.choice(given.prompt_tokens, count)
    zeros = np.zeros(count, dtype=np.int64)
    requests = Requests(np.zeros(count), zeros + 1, prompt, output, zeros)
    warm = min(10.0, seconds / 5)
    setting = Setting(
        mode="adaptive",
        speculation="on" if given.speculation == "on" else "auto",
        slots=given.slots,
        sampled=given.sampled,
        users=users,
        warm=warm,
        until=seconds,
        seed=seed,
    )
    result = Replica(
        setting, requests, times=server.times, blocks=server.blocks, cost=server.cost
    ).run()
    if result.interrupted:
        raise KeyboardInterrupt
    return summarise([result], load=float(users), warm=warm)


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One load: what was simulated first, and what the server then did."""

    users: int
    simulated: dict[str, float]
    measured: dict[str, float]
    #: Per cent by which the simulation is off, by metric.
    error_pct: dict[str, float]
    #: How long a plain token took around these blocks, over what it took when the simulator was fitted;
    #: ``measured`` is corrected for it.
    slowdown: float


def compare(simulated: Summary, measured: Sequence[Observed], reference_s: float) -> Compared:
    """Put a prediction next to the blocks measured at its load; TPOT is the median over requests.

    Args:
        reference_s: seconds of a plain token on the machine that is simulated.
    """
    assert simulated.tpot_ms is not None
    slowdown = float(np.mean([block.reference_s for block in measured])) / reference_s
    measured = [block.on(reference_s) for block in measured]
    ours = {
        "throughput": simulated.tok_s, "tpot": simulated.tpot_ms[1] / 1e3, "budget": simulated.budget
    }  # fmt: skip
    theirs = {
        "throughput": float(np.mean([block.tok_s for block in measured])),
        "tpot": float(np.mean([block.tpot_s for block in measured])),
        "budget": float(np.mean([block.budget for block in measured])),
    }
    error = {
        name: round(100.0 * (ours[name] / theirs[name] - 1.0), 2) if theirs[name] else float("inf")
        for name in ours
    }
    rounded = ({name: round(value, 5) for name, value in side.items()} for side in (ours, theirs))
    first, second = rounded
    return Compared(
        users=int(simulated.load),
        simulated=first,
        measured=second,
        error_pct=error,
        slowdown=round(slowdown, 3),
    )


def worst(compared: Sequence[Compared]) -> dict[str, float]:
    """Largest error of each metric, in per cent, without its sign."""
    names = ("throughput", "tpot", "budget")
    return {name: max(abs(one.error_pct[name]) for one in compared) for name in names}
