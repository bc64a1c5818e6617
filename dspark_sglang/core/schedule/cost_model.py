"""What a step costs, learned from the steps a server runs.

A *round* drafts and verifies; a *decode* step does neither. Each kind has its own model: an affine
function of the requests, those of them that sample, the drafted tokens verified, the cached context and the
rows beyond some numbers of them (a few rows cost what one does, many cost each their share), over it
a small grid of what that misses (kernels whose time rises in stairs), and a level for each
number of requests, soon learned: in service, clients and other processes take their part of the
machine. A factor common to both kinds follows the machine: a neighbour that slows it down slows both
alike, and what decides is their ratio.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression, nnls  # type: ignore[import-untyped]

from dspark_sglang.core.round import Float64
from dspark_sglang.errors import ConfigError


class StepCost(Protocol):
    """Predicts the duration of a round."""

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        """Seconds of a round whose verify forward holds ``tokens`` tokens; non-decreasing."""
        ...


class FlatCost:
    """Every round costs the same, so verifying everything always pays."""

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        return np.ones(len(tokens))


class TableCost:
    """Measured seconds at some numbers of tokens, linear in between and beyond the last."""

    def __init__(self, tokens: npt.ArrayLike, seconds: npt.ArrayLike) -> None:
        """Args:
            tokens: ``[n]`` ascending integers, the first at least 1; ``n`` of at least 2.
            seconds: ``[n]`` a round's seconds there.

        Raises:
            ConfigError: out of order, not positive and finite, or a round with more tokens is
                faster than one with fewer.
        """
        self._tokens = np.asarray(tokens, dtype=np.float64)
        self._seconds = np.asarray(seconds, dtype=np.float64)
        flat = self._tokens.ndim == 1 and self._tokens.shape == self._seconds.shape
        problem = ""
        if not flat or len(self._tokens) < 2:
            problem = "does not pair at least two numbers of tokens with seconds"
        elif self._tokens[0] < 1 or not np.all(np.diff(self._tokens) > 0):
            problem = "has tokens that do not ascend from at least 1"
        elif not (np.all(self._seconds > 0) and np.all(np.isfinite(self._seconds))):
            problem = "has seconds that are not positive and finite"
        elif np.any(np.diff(self._seconds) < 0):
            at = int(self._tokens[1:][np.diff(self._seconds) < 0][0])
            problem = f"is faster at {at} tokens than at fewer"
        if problem:
            raise ConfigError(
                f"The cost table {problem}.",
                expected="seconds that never fall as tokens rise, without gaps",
                fix="Measure it again.",
            )

    def seconds(self, tokens: npt.NDArray[np.int64]) -> Float64:
        inside = np.interp(tokens, self._tokens, self._seconds)
        slope = np.diff(self._seconds[-2:])[0] / np.diff(self._tokens[-2:])[0]
        beyond = np.maximum(0.0, tokens - self._tokens[-1])
        result: Float64 = inside + slope * beyond
        return result

    def smoothed(self) -> TableCost:
        """The largest convex cost that nowhere exceeds this one.

        Early stopping cannot cross a step of a staircase; along a convex cost its first maximum is
        the only one.
        """
        hull: list[tuple[float, float]] = []
        for point in zip(self._tokens.tolist(), self._seconds.tolist(), strict=True):
            while len(hull) >= 2 and _turns_right(hull[-2], hull[-1], point):
                hull.pop()
            hull.append(point)
        return TableCost([x for x, _ in hull], [y for _, y in hull])


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether ``b`` lies on or above the line from ``a`` to ``c``."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


#: Rows of the grid: requests in powers of two, from 1 to 2**(n-1).
_DOUBLINGS = 12
_KTOKENS = 1024.0
#: Rows of the target's forward from which each costs more than before.
_KNEES = (8.0, 64.0)
#: Coefficients of the affine part, and of the one before it knew of knees.
_TERMS, _TERMS_BEFORE = 7, 5
#: Largest believed ratio of a measured to a predicted step, either way.
_OUTLIER = 3.0
#: Steps after a change of kind from which the kind's own cost is learned, not the machine's.
_AFTER_SWITCH = 3
#: How much of a later step is believed to be the kind's own cost, and the mean error below which
#: the machine's speed counts as followed.
_TRUST, _SETTLED = 0.3, 0.06
#: Steps at a point of the grid that the affine part is worth there, and the least weight of a new one.
_DOUBT, _PACE = 6.0, 0.04
#: Steps of a number of requests that what was known before them is worth to its level, and the least weight of a new one.
_LEVEL_DOUBT, _LEVEL_PACE = 1.5, 0.02
#: Largest level either way.
_FARTHEST_LEVEL = 1.5
#: Largest errors (logarithms of a ratio) that are learned from one step, slower and faster: a slower one is a stall, but
#: no step is much faster than usual by chance.
_SURPRISE, _FASTER = 0.15, 0.7
#: Fits to a measurement in a row, and the error from which a step weighs less in the next one.
_FITS, _LATE = 6, 0.03
#: Steps of a kind before which nothing is known well enough to call one a stall.
_YOUNG = 64
_ERRORS_KEPT = 512
#: Limits of what is taken for a cost model: seconds, and logarithms of ratios.
_LARGEST = {
    "theta": 1e6,
    "moments": 1e30,
    "products": 1e30,
    "grid": 0.7,
    "level": _FARTHEST_LEVEL,
    "seen": 1e12,
}
_LARGEST_SLOWDOWN = 7.0
#: Steps after which curves are made anew.
_CURVE_AGE = 16


class Step(NamedTuple):
    """One step of a server."""

    requests: int
    #: Drafted tokens in the verify forward, over all requests; 0 in a decode step.
    drafted: int
    #: Cached tokens that all requests attend to.
    context: int
    #: Whether a block was drafted.
    round: bool
    #: Requests that sample.
    sampled: int = 0


class _Kind:
    """One kind of step.

    ``theta . (1, R, S, D, C / 1024, (R + D - 8)+, (R + D - 64)+) * exp(level(R) + grid(R, D / R))``.
    """

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma
        self.theta = np.zeros(_TERMS)
        self.moments = np.zeros((_TERMS, _TERMS))
        self.products = np.zeros(_TERMS)
        self.grid = np.zeros((_DOUBLINGS, gamma + 1))
        self.seen = np.zeros((_DOUBLINGS, gamma + 1))
        self.level = np.zeros(_DOUBLINGS)
        #: Steps of each level since the server started.
        self.served = np.zeros(_DOUBLINGS)
        self.observations = 0

    @property
    def known(self) -> bool:
        return self.observations > 0

    @staticmethod
    def _features(step: Step) -> Float64:
        context = step.context / _KTOKENS
        beyond = [max(0.0, step.requests + step.drafted - knee) for knee in _KNEES]
        return np.array([1.0, step.requests, step.sampled, step.drafted, context, *beyond])

    def _nodes(self, step: Step) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Float64]:
        """Rows, columns and weights of the four grid points around a step."""
        row = min(math.log2(max(1, step.requests)), _DOUBLINGS - 1.0)
        column = min(step.drafted / max(1, step.requests), float(self.gamma))
        r, c = min(int(row), _DOUBLINGS - 2), min(int(column), max(0, self.gamma - 1))
        a, b = row - r, column - c
        weights = np.array([(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b])
        return np.array([r, r, r + 1, r + 1]), np.array([c, c + 1, c, c + 1]), weights

    def near(self, step: Step) -> tuple[npt.NDArray[np.int64], Float64]:
        """The two levels around a step and their weights."""
        rows, _, weights = self._nodes(step)
        return rows[[0, 2]], weights[[0, 2]] + weights[[1, 3]]

    def predict(self, step: Step) -> float:
        rows, columns, weights = self._nodes(step)
        known = weights * (self.seen[rows, columns] > 0)
        total = known.sum()
        # Points nobody has seen take the value of those beside them.
        log = float(known @ self.grid[rows, columns] / total) if total > 1e-9 else 0.0
        log += float(weights @ self.level[rows])
        return self._affine(step) * math.exp(log)

    def _affine(self, step: Step) -> float:
        return max(1e-9, float(self._features(step) @ self.theta))

    @property
    def young(self) -> bool:
        return self.observations < _YOUNG

    def learn(self, step: Step, predicted: float, wrong: float, *, own: bool, trust: float) -> None:
        """Take in a step that would have lasted ``predicted * exp(wrong)`` on a machine of ordinary speed.

        Args:
            predicted: what :meth:`predict` said of it.
            own: the machine's speed has been the same just before, in a step of the other kind.
            trust: how much of it is believed, in 0..1.
        """
        seconds, young = predicted * math.exp(wrong), self.young
        if young:
            self._weigh(step, seconds, 1.0, trust)
        else:
            # To first order the fit's errors are logarithms, too: where those are 0 on average, it stays as it is.
            # Relative to the step, errors would draw it to the fast ones, for ever.
            self._weigh(step, predicted, 1.0 + wrong, trust)
        if young or self.observations % 16 == 0:
            self._fit(step, seconds)
        self._correct(step, seconds, trust, own=own)

    def begin(self, step: Step, seconds: float) -> None:
        """Take in the first step of its kind."""
        self._weigh(step, seconds, 1.0, 1.0)
        self._fit(step, seconds)
        self._correct(step, seconds, 1.0, own=False)

    def _weigh(self, step: Step, scale: float, value: float, trust: float) -> None:
        """Add a step of ``scale * value`` seconds to what the affine part is fitted to, its error relative to ``scale``."""
        features = self._features(step) / scale
        forget = 1.0 - 0.002 * trust
        self.moments = forget * self.moments + trust * np.outer(features, features)
        self.products = forget * self.products + trust * value * features
        self.observations += 1

    def _correct(self, step: Step, seconds: float, trust: float, *, own: bool) -> None:
        """Note in the grid, and where an error is the kind's own in the levels, what the affine part misses."""
        rows, columns, weights = self._nodes(step)
        error = math.log(seconds / self.predict(step))
        error = min(max(error, -_FASTER), _SURPRISE)
        if own:
            near, share = self.near(step)
            pace = np.maximum(_LEVEL_PACE, 1.0 / (_LEVEL_DOUBT + self.served[near]))
            self.served[near] += share
            moved = pace * share / float(share @ share) * error
            self.level[near] = np.clip(self.level[near] + moved, -_FARTHEST_LEVEL, _FARTHEST_LEVEL)
            error -= float(share @ moved)
        # A step says little about what the affine part misses: most of it is chance, and what decides how much to verify
        # are differences between neighbours.
        pace = trust * np.maximum(_PACE, 1.0 / (_DOUBT + self.seen[rows, columns]))
        self.seen[rows, columns] += weights
        self.grid[rows, columns] = np.clip(
            self.grid[rows, columns] + pace * weights * error, -0.7, 0.7
        )

    def _fit(self, step: Step, seconds: float) -> None:
        # A weak prior decides what steps have not varied yet: 64 requests, 128 drafted tokens and as many rows
        # beyond the first knee, 256 sampled requests or 64 x 1024 cached tokens double an empty step.
        base = seconds / (1.0 + (step.requests + step.drafted) / 64.0)
        prior = base / np.array([1.0, 64.0, 256.0, 128.0, 64.0, 128.0, 512.0])
        weight = 0.05 * np.diag(1.0 / np.maximum(prior, 1e-12) ** 2)
        factor = np.linalg.cholesky(self.moments + weight)
        target = np.linalg.solve(factor, self.products + weight @ prior)
        self.theta, _ = nnls(factor.T, target)

    def refit(self, steps: list[tuple[Step, float]]) -> None:
        """Learn from these steps and their seconds alone, all of them at once, those that stalled hardly."""
        weights = np.ones(len(steps))
        for _ in range(_FITS):
            self.moments[:], self.products[:] = 0.0, 0.0
            for (step, seconds), weight in zip(steps, weights, strict=True):
                self._weigh(step, seconds, 1.0, weight)
            self._fit(*steps[-1])
            late = np.array([math.log(seconds / self._affine(step)) for step, seconds in steps])
            weights = np.minimum(1.0, _LATE / np.maximum(late, _LATE))
        self.observations = len(steps)
        for part in (self.grid, self.seen, self.level, self.served):
            part[:] = 0.0
        for (step, seconds), weight in zip(steps, weights, strict=True):
            self._correct(step, seconds, weight, own=False)

    def state(self) -> dict[str, Any]:
        return {
            "theta": self.theta.tolist(),
            "moments": self.moments.tolist(),
            "products": self.products.tolist(),
            "grid": self.grid.tolist(),
            "seen": self.seen.tolist(),
            "level": self.level.tolist(),
            "observations": self.observations,
        }

    def restore(self, state: dict[str, Any]) -> None:
        state = {"level": [0.0] * _DOUBLINGS, **state}  # as written before there were levels
        if state.keys() != self.state().keys():
            raise KeyError(*(state.keys() ^ self.state().keys()))
        for name, most in _LARGEST.items():
            values, shape = np.array(state[name], dtype=np.float64), getattr(self, name).shape
            if values.shape == (_TERMS_BEFORE,) * len(shape):
                values = np.pad(values, (0, _TERMS - _TERMS_BEFORE))
            if values.shape != shape or not (np.abs(values) <= most).all():
                raise ConfigError(
                    f"The cost model's {name} has shape {values.shape} or numbers beyond {most:g}.",
                    expected=f"finite numbers of shape {shape}, at most {most:g}",
                    fix="Measure it again with `dspark calibrate --cost`.",
                )
            setattr(self, name, values)
        falls = (self.theta < 0).any() or (self.seen < 0).any()
        # Features that always rise together leave an eigenvalue of 0, rounded either way.
        indefinite = np.linalg.eigvalsh(self.moments).min() < -1e-9 * max(1.0, self.moments.trace())
        if falls or not self.theta.any() or indefinite:
            raise ConfigError(
                "The cost model says that steps take no time, or what no steps can have taught.",
                expected="coefficients that are not negative, one above 0",
                fix="Measure it again with `dspark calibrate --cost`.",
            )
        self.observations = int(state["observations"])


class CostModel:
    """Seconds of rounds and decode steps. Memory and the time of an update are constant."""

    def __init__(self, *, gamma: int) -> None:
        """Args:
        gamma: drafted tokens a request.
        """
        self.gamma = gamma
        self._round, self._plain = _Kind(gamma), _Kind(gamma)
        #: Logarithm of how much slower the machine is now than when it was learned.
        self._slower = 0.0
        self._drift = 0.0
        self._since_switch = 0
        self._last: bool | None = None
        self._errors: deque[float] = deque(maxlen=_ERRORS_KEPT)
        self._curves: dict[tuple[int, int, int], TableCost] = {}
        self._age = 0

    @property
    def observations(self) -> int:
        """Steps learned from."""
        return self._round.observations + self._plain.observations

    @property
    def comparable(self) -> bool:
        """Whether both kinds of step have been seen."""
        return self._round.known and self._plain.known

    @property
    def error(self) -> float | None:
        """Median relative error of the last predictions, each made before its step was learned."""
        return float(np.median(self._errors)) if self._errors else None

    @property
    def slowdown(self) -> float:
        """How much slower steps are now than when the model was learned."""
        return math.exp(self._slower)

    def observe(self, step: Step, seconds: float) -> None:
        """Learn from one step. Durations that are not positive and finite are ignored."""
        if not (0.0 < seconds < math.inf) or step.requests < 1:
            return
        kind = self._round if step.round else self._plain
        switched = step.round != self._last
        self._since_switch = 0 if switched else self._since_switch + 1
        self._last = step.round
        if not kind.known:
            kind.begin(step, seconds / self.slowdown)
            return
        predicted = kind.predict(step)
        limit = math.log(_OUTLIER)
        wrong = math.log(seconds / (predicted * self.slowdown))
        self._errors.append(abs(math.expm1(min(wrong, 10.0))))
        wrong = min(max(wrong, -limit), limit)
        own = self._since_switch < _AFTER_SWITCH
        settled = abs(self._drift) < _SETTLED
        if settled and not kind.young:
            wrong = min(max(wrong, -_FASTER), _SURPRISE)
        # Right after a change of kind an error is the kind's own. Later it is the machine's, and
        # what stays once that has been followed is how this step differs from others of its kind.
        if own:
            kind.learn(step, predicted, wrong, own=True, trust=1.0)
            self._balance(step)
        else:
            self._drift += 0.15 * (wrong - self._drift)
            self._slower += 0.1 * wrong
            kind.learn(step, predicted, 0.9 * wrong, own=False, trust=_TRUST if settled else 0.0)
        self._age += 1
        if self._age >= _CURVE_AGE:
            self._age = 0
            self._curves.clear()

    def _balance(self, step: Step) -> None:
        """Leave to the machine's speed what the levels have in common: nothing else would keep them from running apart."""
        near, share = self._round.near(step)
        levels = self._round.level[near] + self._plain.level[near]
        common = 0.5 * float(share @ levels)
        self._slower += common
        for kind in (self._round, self._plain):
            kind.level[near] -= common * share / float(share @ share)

    def refit(self, steps: Sequence[tuple[Step, float]]) -> None:
        """Learn from a measurement alone: its steps and their seconds, of which some are of each kind.

        All at once tells better than one after the other which of them stalled.
        """
        for kind in (self._round, self._plain):
            own = [
                (step, seconds) for step, seconds in steps if step.round == (kind is self._round)
            ]
            if own:
                kind.refit(own)
        self._slower = self._drift = 0.0
        self._curves.clear()

    def plain_seconds(self, requests: int, context: int, sampled: int = 0) -> float:
        """Seconds of a step without drafting; infinite while none has been seen."""
        if not self._plain.known:
            return math.inf
        step = Step(requests, 0, context, round=False, sampled=sampled)
        return self._plain.predict(step) * self.slowdown

    def round_seconds(self, requests: int, drafted: int, context: int, sampled: int = 0) -> float:
        """Seconds of a round, drafting included; infinite while none has been seen."""
        if not self._round.known:
            return math.inf
        step = Step(requests, drafted, context, round=True, sampled=sampled)
        return self._round.predict(step) * self.slowdown

    def curve(self, requests: int, context: int, sampled: int = 0) -> TableCost:
        """Cost of a round of some requests by the tokens in its verify forward, convex.

        Early stopping must not meet a stair, and a round with more tokens is not faster.
        """
        key = (requests, context // 512, sampled)
        if key not in self._curves:
            depths = range(self.gamma + 1)
            tokens = [requests * (1 + depth) for depth in depths]
            if self._round.known:
                seconds = [
                    self.round_seconds(requests, requests * depth, context, sampled)
                    for depth in depths
                ]
            else:  # nothing is known: 64 tokens double a round
                seconds = [1.0 + count / 64.0 for count in tokens]
            # Chance is shared among neighbours: one slow point must not raise all above it.
            table = TableCost(tokens, isotonic_regression(seconds).x)
            self._curves[key] = table.smoothed() if self.gamma > 1 else table
        return self._curves[key]

    def state(self) -> dict[str, Any]:
        """A JSON-ready copy of what was learned."""
        return {
            "gamma": self.gamma,
            "slower": self._slower,
            "round": self._round.state(),
            "plain": self._plain.state(),
        }

    def forget(self) -> None:
        """Start anew."""
        self.__init__(gamma=self.gamma)  # type: ignore[misc]

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave.

        Raises:
            ConfigError: another gamma, or numbers that are no cost model.
        """
        if state.get("gamma") != self.gamma:
            raise ConfigError(
                f"The cost model was measured for gamma {state.get('gamma')}.",
                expected=f"gamma {self.gamma}",
                fix="Measure it again with `dspark calibrate --cost`.",
            )
        fresh = CostModel(gamma=self.gamma)
        try:
            for name, kind in (("round", fresh._round), ("plain", fresh._plain)):
                kind.restore(state[name])
            fresh._slower = float(state["slower"])
            if not abs(fresh._slower) <= _LARGEST_SLOWDOWN:
                raise ValueError(f"slower, {fresh._slower}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"The cost model lacks or garbles {error}.",
                expected="what `dspark calibrate --cost` writes",
                fix="Measure it again with `dspark calibrate --cost`.",
            ) from error
        self.__dict__.update(fresh.__dict__)
