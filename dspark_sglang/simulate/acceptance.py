"""What a drafted block is worth: its confidences, and the chance that each token is accepted.

A *law* is a table of blocks that a simulated round draws from. Confidence ``c`` of a fitted model is a Beta variable and its token is
accepted with chance ``c``: confidences are right on average (calibrated) and tell as much apart as
the measured area under their ROC curve says. More noise in the truth would not show, since an
acceptance is a coin either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from scipy.special import betaincinv, expit, logit  # type: ignore[import-untyped]

from dspark_sglang.core.round import Float64, Int64
from dspark_sglang.core.sts import area_under_curve
from dspark_sglang.errors import ArtifactError, ConfigError

#: Rows of a fitted table, and of those that an area under a curve is computed from.
_ROWS, _FIT_ROWS = 1 << 14, 1 << 11
#: Concentrations of a Beta variable that are tried: from two points to hardly any spread.
_SMALLEST, _LARGEST = 0.05, 500.0


class Law(NamedTuple):
    """Blocks of one domain; ``N`` rows."""

    name: str
    #: ``[N, gamma]`` stated confidence, and chance of acceptance given that those before were accepted.
    confidence: Float64
    chance: Float64

    @property
    def gamma(self) -> int:
        """Drafted tokens a block."""
        return int(self.confidence.shape[1])

    @property
    def accept_length(self) -> float:
        """Tokens a round with everything verified, bonus included."""
        return 1.0 + float(np.cumprod(self.chance, axis=1).mean(axis=0).sum())


class Mixture:
    """Several domains' laws in one table."""

    def __init__(self, laws: Sequence[Law], weights: Sequence[float] | None = None) -> None:
        """Args:
            laws: one a domain, of the same gamma.
            weights: share of each domain's requests; None: all alike.

        Raises:
            ConfigError: no laws, different gammas, or weights that are no shares.
        """
        shares = np.asarray([1.0] * len(laws) if weights is None else weights, dtype=np.float64)
        gammas = {law.gamma for law in laws}
        if (
            len(gammas) != 1
            or len(shares) != len(laws)
            or not (shares >= 0).all()
            or not shares.sum()
        ):
            raise ConfigError(
                f"{len(laws)} domains of gamma {sorted(gammas)} with weights {shares.tolist()}.",
                expected="at least one domain, one gamma, and a weight of at least 0 for each",
                fix="Leave --domains out for equal weights.",
            )
        self.names = [law.name for law in laws]
        self.weights = shares / shares.sum()
        self.gamma = laws[0].gamma
        self._size = np.array([len(law.confidence) for law in laws])
        self._first = np.concatenate([[0], np.cumsum(self._size)[:-1]])
        self.confidence = np.concatenate([law.confidence for law in laws])
        self.chance = np.concatenate([law.chance for law in laws])
        #: ``[N, gamma]`` logits of the confidences, as the drafter's head would state them.
        self.logits = logit(np.clip(self.confidence, 1e-6, 1 - 1e-6))
        self.accept_length = float(self.weights @ [law.accept_length for law in laws])

    def rows(self, rng: np.random.Generator, domain: Int64) -> Int64:
        """A block for each of ``domain`` ``[R]``: rows of the tables."""
        within = (rng.random(len(domain)) * self._size[domain]).astype(np.int64)
        found: Int64 = self._first[domain] + within
        return found


def fitted(
    name: str,
    means: Sequence[float],
    *,
    auc: Sequence[float] | None = None,
    spread: float | Sequence[float] = 4.0,
    shift: Sequence[float] | None = None,
    seed: int = 0,
) -> Law:
    """A law from the mean acceptance of each position.

    Args:
        means: ``[gamma]`` chance to accept each position given that those before were.
        auc: ``[gamma]`` area under the ROC curve of survival up to each position (``dspark eval``).
        spread: concentration of the Beta variables, of all or of each position, where ``auc`` is not
            known; smaller tells more apart.
        shift: ``[gamma]`` means of another law (greedy text) that the same confidences meet.

    Raises:
        ConfigError: a mean outside 0 to 1.
    """
    known = np.asarray(means, dtype=np.float64)
    if known.ndim != 1 or not known.size or not ((known > 0) & (known < 1)).all():
        raise ConfigError(
            f"Acceptance by position is {list(means)}.",
            expected="at least one number, each above 0 and below 1",
            fix="Take per_position of `dspark eval --json`.",
        )
    rng = np.random.default_rng(seed)
    if auc is not None:
        spread = _spreads(known, auc)
    spreads = [float(value) for value in np.broadcast_to(spread, known.shape)]
    confidence = _blocks(known, spreads, _ROWS, rng)
    chance = confidence
    if shift is not None:
        chance = np.stack([_moved(c, m) for c, m in zip(confidence.T, shift, strict=True)], axis=1)
    return Law(name, confidence, chance)


def geometric(name: str, *, accept_length: float, of: int, gamma: int, spread: float) -> Law:
    """A law of one chance at every position, from a published accepted length.

    Args:
        accept_length: tokens a round, bonus included, of blocks of ``of`` drafted tokens.
        gamma: drafted tokens of the law that is made.
    """
    if not 1.0 < accept_length < 1.0 + of:
        raise ConfigError(
            f"An accepted length of {accept_length} with {of} drafted tokens.",
            expected=f"above 1 and below {1 + of}",
            fix="Count the bonus token, and name the block size it was measured with.",
        )
    chance = _bisect(lambda chance: sum(chance**k for k in range(of + 1)) < accept_length, 0.0, 1.0)
    return fitted(name, [chance] * gamma, spread=spread)


def _blocks(
    means: Float64, spreads: Sequence[float], rows: int, rng: np.random.Generator
) -> Float64:
    """``[rows, gamma]`` Beta quantiles, each position in an order of its own."""
    grid = (np.arange(rows) + 0.5) / rows
    columns = [
        betaincinv(mean * k, (1 - mean) * k, rng.permutation(grid))
        for mean, k in zip(means, spreads, strict=True)
    ]
    return np.stack(columns, axis=1)


def _spreads(means: Float64, auc: Sequence[float]) -> list[float]:
    """Concentrations that give the area under the curve of survival at each position."""
    found: list[float] = []
    rng, before = np.random.default_rng(0), np.ones(_FIT_ROWS)
    grid = (np.arange(_FIT_ROWS) + 0.5) / _FIT_ROWS
    for mean, wanted in zip(means, auc, strict=True):
        low, high, order = _SMALLEST, _LARGEST, rng.permutation(grid)
        for _ in range(18):
            middle = float(np.sqrt(low * high))
            survival = before * betaincinv(mean * middle, (1 - mean) * middle, order)
            # The more a variable spreads the more it tells apart.
            if area_under_curve(survival, survival) > wanted:
                low = middle
            else:
                high = middle
        found.append(middle)
        before = survival
    return found


def _moved(confidence: Float64, mean: float) -> Float64:
    """Chances that rise with ``confidence`` and have another mean."""
    scores = logit(np.clip(confidence, 1e-9, 1 - 1e-9))
    shift = _bisect(lambda shift: expit(scores + shift).mean() < mean, -20.0, 20.0)
    moved: Float64 = expit(scores + shift)
    return moved


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    """The largest number that is ``below`` what is looked for, to 60 halvings."""
    for _ in range(60):
        middle = (low + high) / 2
        if below(middle):
            low = middle
        else:
            high = middle
    return low


class _Known(msgspec.Struct):
    """What is read of ``dspark eval --json``."""

    class Lengths(msgspec.Struct):
        temperature: float
        per_position: list[float]
        accept_length: float
        by_domain: dict[str, float] = {}

    class Calibration(msgspec.Struct):
        per_position_auc: list[float] | None = None

    lengths: list[Lengths]
    calibration: Calibration | None = None


def from_evaluation(path: Path, *, temperature: float) -> Mixture:
    """Laws of the domains in a result of ``dspark eval --json``.

    Each domain has the positions' measured profile, moved to its own accepted length.

    Raises:
        ArtifactError: missing, not such a result, or without that temperature.
    """
    fix = "Make one with `dspark eval --json`, at this temperature."
    try:
        known = msgspec.json.decode(path.read_bytes(), type=_Known)
    except (OSError, msgspec.DecodeError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}.", expected="a result of `dspark eval`", fix=fix
        ) from error
    own = [entry for entry in known.lengths if entry.temperature == temperature]
    sampled = [entry for entry in known.lengths if entry.temperature > 0]
    if not own:
        have = sorted({entry.temperature for entry in known.lengths})
        raise ArtifactError(
            f"{path} holds temperatures {have}.", expected=f"{temperature:g} among them", fix=fix
        )
    auc = known.calibration.per_position_auc if known.calibration else None
    # The head is trained for sampled acceptance: greedy text meets the same confidences.
    base = (sampled or own)[0].per_position
    spread = _spreads(np.asarray(base), auc) if auc is not None else 4.0
    laws = [
        fitted(name, base, spread=spread, shift=_scaled(own[0].per_position, length), seed=number)
        for number, (name, length) in enumerate(
            sorted((own[0].by_domain or {"all": own[0].accept_length}).items())
        )
    ]
    return Mixture(laws)


def _scaled(profile: Sequence[float], length: float) -> list[float]:
    """``profile`` with its logits moved so that a whole block gives ``length`` tokens."""
    scores = logit(np.asarray(profile))
    shift = _bisect(lambda s: 1.0 + np.cumprod(expit(scores + s)).sum() < length, -10.0, 10.0)
    return [float(value) for value in expit(scores + shift)]
