"""The operations of a round outside the models, behind one interface: PyTorch here, kernels on CUDA."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.draft import DraftBlock
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.serving.ops.rows import Admitted, SampledRows, Verified

__all__ = ["Admitted", "Ops", "SampledRows", "Verified"]


class Ops(Protocol):
    """What drafting and verification compute between two forwards."""

    #: ``torch`` or ``triton``: what runs, in logs, counters and metrics.
    name: str
    markov: MarkovHead

    @property
    def launches(self) -> dict[str, int]:
        """Kernel launches of this process, by kernel."""

    def draft(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
        vocabulary: torch.Tensor | None,
    ) -> DraftBlock:
        """Draft a block a request.

        Args:
            base: ``[R, gamma, V]`` base logits, of the ``vocabulary`` if given.
            hidden: ``[R, gamma, d]`` draft hidden states.
            anchors: ``[R]`` int64 last committed tokens.
            positions: ``[R]`` int64 positions of those.
            rows: the requests that sample; None: all are greedy.
            vocabulary: int64 token of each base logit; None: every token in order.
        """

    def nothing(self, rows: SampledRows | None, requests: int, depth: int = 1) -> DraftBlock:
        """A block of ``depth`` tokens that no sampled request sends to verification: for steps that do not draft.

        Args:
            rows: the requests that sample, of ``requests``.
        """

    def confidence(
        self, features: torch.Tensor, previous: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Calibrated confidences and their raw logits, ``[R, gamma]`` float32.

        Args:
            features: ``[R, gamma, d]`` draft hidden states.
            previous: ``[R, gamma]`` int64 token before each drafted one.
        """

    def renew(self, markov: MarkovHead, confidence: ConfidenceHead) -> None:
        """Work with heads whose weights have changed; only where every rank has all of them."""

    @property
    def confidence_head(self) -> ConfidenceHead:
        """The confidence head with the temperatures in use."""

    @property
    def temperatures(self) -> list[float]:
        """STS temperatures in use."""

    def set_temperatures(self, temperatures: torch.Tensor) -> None:
        """Calibrate with other STS temperatures, ``[gamma]`` float32, from now on."""

    def admit(
        self,
        survival: npt.NDArray[np.float64],
        order: npt.NDArray[np.int64],
        budget: int,
        device: torch.device,
    ) -> Admitted:
        """Admit the ``budget`` likeliest drafted tokens and lay out the rows to verify.

        Args:
            survival: ``[R, gamma]``, non-increasing along each row.
            order: its admission order.
            budget: tokens over all requests.
            device: where the result is needed.
        """

    def admit_there(self, survival: torch.Tensor, budget: int) -> Admitted:
        """:meth:`admit` where the survivals are, without a wait for the device.

        Args:
            survival: ``[R, gamma]`` float64, non-increasing along each row.
            budget: tokens over all requests, no more than have a survival above 0.
        """

    def accept(self, given: Verified) -> Accepted:
        """Decide how much of each block is kept, and the token after it."""
