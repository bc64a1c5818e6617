"""Muon for the matrices that transform features, AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch

from dspark_sglang.errors import NumericsError
from dspark_sglang.training.config import OptimSpec
from dspark_sglang.training.model import Drafter


def learning_rate(spec: OptimSpec, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero over the last ``decay`` of the steps."""
    warm = min(1.0, (step + 1) / max(1, spec.warmup))
    last = spec.decay * spec.steps
    left = min(1.0, (spec.steps - step) / last) if last > 0 else 1.0
    return spec.lr * warm * left


class Optimizer:
    """Both optimisers behind one interface."""

    def __init__(self, model: Drafter, spec: OptimSpec) -> None:
        self._spec = spec
        matrices: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inside = name.startswith(("fc.", "layers.")) and parameter.ndim == 2
            (matrices if inside and spec.muon else rest).append(parameter)
        decay = spec.weight_decay
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=spec.lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)
        ]
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices, lr=spec.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self._parameters = matrices + rest

    def step(self, step: int) -> float:
        """Clip, apply and clear the gradients; returns their norm before clipping.

        Raises:
            NumericsError: the norm is not finite; nothing was applied.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._spec.clip)
        if not torch.isfinite(norm):
            raise NumericsError(
                f"The gradient norm of step {step + 1} is {float(norm)}.",
                expected="finite gradients",
                fix="Lower optim.lr and run again; the run's folder keeps the last good state.",
            )
        rate = self.rate(step)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self._spec, step)

    def state_dict(self) -> list[dict[str, Any]]:
        """State of each optimiser."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore :meth:`state_dict`."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)
