"""Random numbers and constants of a round, made for many rounds at once.

Each would else be a launch of its own, for a few numbers a request.
"""

from __future__ import annotations

import torch

#: Numbers drawn at once: 8 bytes each, for hundreds of rounds of one request or a few of a large batch.
_DRAWN = 1 << 15
#: Elements of 8 bytes at which an operand may begin: kernels are compiled for addresses divisible by 16.
_ALIGNED = 2
#: Budgets known in advance, four times each for the same reason: they are int32.
_APART = 4


class Supply:
    """Hands out numbers no earlier call was given; views, so a call launches nothing most of the time."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._uniforms = self._seeds = torch.empty(0, device=generator.device)
        self._budgets = torch.empty(0, device=generator.device)

    def uniforms(self, requests: int, width: int) -> torch.Tensor:
        """``[requests, width]`` float64 in [0, 1)."""
        count = _padded(requests * width)
        if count > len(self._uniforms):
            self._uniforms = torch.rand(
                max(count, _DRAWN),
                dtype=torch.float64,
                device=self._generator.device,
                generator=self._generator,
            )
        taken, self._uniforms = self._uniforms[: requests * width], self._uniforms[count:]
        return taken.view(requests, width)

    def seeds(self, requests: int) -> torch.Tensor:
        """``[requests]`` int64 seeds from 0 to 2^62 - 1."""
        count = _padded(requests)
        if count > len(self._seeds):
            self._seeds = torch.randint(
                1 << 62,
                (max(count, _DRAWN),),
                dtype=torch.int64,
                device=self._generator.device,
                generator=self._generator,
            )
        taken, self._seeds = self._seeds[:requests], self._seeds[count:]
        return taken

    def budget(self, tokens: int, device: torch.device) -> torch.Tensor:
        """``[1]`` int32 ``tokens``, which is 0 or more; not to be written."""
        if tokens >= len(self._budgets) // _APART or self._budgets.device != device:
            known = torch.arange(max(1024, 2 * tokens), dtype=torch.int32, device=device)
            self._budgets = known.repeat_interleave(_APART)
        return self._budgets[_APART * tokens :][:1]


def _padded(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
