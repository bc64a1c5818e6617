"""The STS temperatures of a confidence head, the same for every kind of operations."""

from __future__ import annotations

import dataclasses

import torch

from dspark_sglang.core.heads import ConfidenceHead


class Calibrated:
    """The part of :class:`dspark_sglang.serving.ops.Ops` that reads and changes temperatures."""

    _confidence: ConfidenceHead

    @property
    def confidence_head(self) -> ConfidenceHead:
        """See :attr:`dspark_sglang.serving.ops.Ops.confidence_head`."""
        return self._confidence

    @property
    def temperatures(self) -> list[float]:
        """See :attr:`dspark_sglang.serving.ops.Ops.temperatures`."""
        return [round(float(value), 4) for value in self._confidence.temperatures]

    def set_temperatures(self, temperatures: torch.Tensor) -> None:
        """See :meth:`dspark_sglang.serving.ops.Ops.set_temperatures`."""
        own = self._confidence.temperatures
        self._confidence = dataclasses.replace(self._confidence, temperatures=temperatures.to(own))
