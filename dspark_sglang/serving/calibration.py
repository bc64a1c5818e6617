"""The STS temperatures that a server calibrates confidences with: at start, and changed while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from sglang.srt.runtime_context import get_spec

from dspark_sglang.artifacts import STS_FILE, read_sts
from dspark_sglang.config import Settings
from dspark_sglang.core.reliability import Blocks
from dspark_sglang.core.sts import fit_sts
from dspark_sglang.errors import ConfigError

#: Blocks of one kind from which a fit is made.
FEWEST = 256


class Calibration:
    """Where a server's temperatures come from."""

    def __init__(self, settings: Settings, *, gamma: int, drafter_sha256: str | None) -> None:
        """Args:
        gamma: drafted tokens a request.
        drafter_sha256: digest of the drafter's weights; None where they are not in a local directory.
        """
        self._settings = settings
        self._gamma = gamma
        self._drafter_sha256 = drafter_sha256

    def read(self) -> tuple[torch.Tensor, str]:
        """``[gamma]`` float32 temperatures of the STS file as it is now, and its path; or ones and ``"none"``.

        SGLang's own flag for the file goes before ours.

        Raises:
            ArtifactError: the file named, or the one beside the weights, is damaged or belongs to
                another drafter.
        """
        given = get_spec().speculative_dspark_confidence_sts_path
        settings = msgspec.structs.replace(self._settings, sts=str(given or self._settings.sts))
        drafter = str(get_spec().speculative_draft_model_path)
        return load_temperatures(settings, drafter, self._gamma, self._drafter_sha256)

    def none(self) -> tuple[torch.Tensor, str]:
        """What serves without calibration."""
        return torch.ones(self._gamma), "none"

    def fitted(self, blocks: Blocks) -> tuple[torch.Tensor, str]:
        """What serves with STS fitted to what was verified lately.

        Raises:
            ConfigError: too little was verified yet.
        """
        found = fit(blocks)
        return torch.tensor(found.temperatures), f"fitted in service to {found.blocks} blocks"


def load_temperatures(
    settings: Settings, drafter: str, gamma: int, drafter_sha256: str | None
) -> tuple[torch.Tensor, str]:
    """STS temperatures for the running drafter and where they came from.

    Args:
        drafter: its directory or name.
        gamma: tokens it drafts.
        drafter_sha256: digest of its weights; None where they are not in a local directory.

    Returns:
        ``[gamma]`` float32 and the file's path, or ones and ``"none"``.

    Raises:
        ArtifactError: the file named by ``DSPARK_STS``, or the one beside the weights, is damaged
            or belongs to another drafter.
    """
    path = Path(settings.sts) if settings.sts else Path(drafter) / STS_FILE
    if not settings.sts and not path.is_file():
        return torch.ones(gamma), "none"
    artifact = read_sts(path, gamma=gamma, drafter_sha256=drafter_sha256)
    return torch.tensor(artifact.temperatures), str(path)


class Refit(NamedTuple):
    """Fitted temperatures."""

    temperatures: list[float]
    blocks: int
    #: Mean calibration error of survival over positions, on these blocks.
    before: float
    after: float


def fit(blocks: Blocks) -> Refit:
    """Fit one temperature a position to blocks that a server has verified.

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
