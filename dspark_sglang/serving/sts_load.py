"""The STS temperatures a server starts with."""

from __future__ import annotations

from pathlib import Path

import torch

from dspark_sglang.artifacts import STS_FILE, read_sts
from dspark_sglang.config import Settings


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
    directory = Path(drafter)
    path = Path(settings.sts) if settings.sts else directory / STS_FILE
    if not settings.sts and not path.is_file():
        return torch.ones(gamma), "none"
    artifact = read_sts(path, gamma=gamma, drafter_sha256=drafter_sha256)
    return torch.tensor(artifact.temperatures), str(path)
