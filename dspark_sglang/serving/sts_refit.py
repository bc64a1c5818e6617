"""A new STS fit from the blocks a server verified."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dspark_sglang.core.reliability import Blocks
from dspark_sglang.core.sts import fit_sts
from dspark_sglang.errors import ConfigError

#: Blocks of one kind from which a fit is made.
FEWEST = 256


class Refit(NamedTuple):
    """Fitted temperatures."""

    temperatures: list[float]
    blocks: int
    #: Mean calibration error of survival over positions, on these blocks.
    before: float
    after: float


def fit(blocks: Blocks) -> Refit:
    """Fit one temperature a position.

    To sampled requests where there are enough: theirs is the acceptance STS is defined by.

    Raises:
        ConfigError: too few blocks were verified yet.
    """
    chosen = blocks.sampled if blocks.sampled.sum() >= FEWEST else np.ones_like(blocks.sampled)
    count = int(chosen.sum())
    if count < FEWEST:
        raise ConfigError(
            f"{count} blocks were verified since the last fit.",
            expected=f"at least {FEWEST}",
            fix="Wait for more requests.",
        )
    position = np.arange(blocks.logits.shape[1])
    lens, counts = blocks.lens[chosen], blocks.counts[chosen]
    found = fit_sts(
        blocks.logits[chosen],
        (position < counts[:, None]).astype(np.float64),
        verified=position < lens[:, None],
    )
    return Refit(
        temperatures=[round(float(t), 4) for t in found.temperatures],
        blocks=count,
        before=float(found.before.mean()),
        after=float(found.after.mean()),
    )
