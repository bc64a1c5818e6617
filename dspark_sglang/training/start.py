"""Where a drafter's weights start: a given drafter, or the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dspark_sglang.training.layouts import read_tensors
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.states import Target

_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


@torch.no_grad()
def initialise(drafter: Drafter, seed: int) -> None:
    """Random weights: scaled normals, heads that add nothing, layers that start small."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * drafter.config.num_layers) ** 0.5
    for name, parameter in drafter.named_parameters():
        if parameter.ndim < 2 or "confidence" in name:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            continue
        std = 0.02 if "markov" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= depth
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    if drafter.markov_head is not None:
        drafter.markov_head.markov_w2.weight.zero_()


@torch.no_grad()
def from_target(drafter: Drafter, target: Target) -> list[str]:
    """Copy what fits from the target: its last layers, its norm, and the last layer read.

    ``fc`` starts as the identity on the last target layer that is read, so that context rows start
    as that layer's features.

    Returns:
        Names of the parameters that were set.
    """
    own: dict[str, nn.Parameter] = dict(drafter.named_parameters())
    done = []

    def copy(name: str, value: Any) -> None:
        parameter = own[name]
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            parameter.copy_(value)
            done.append(name)

    layers = target.layers[-drafter.config.num_layers :]
    for index, layer in enumerate(layers):
        for part in _PARTS:
            module = layer.get_submodule(part) if _has(layer, part) else None
            copy(f"layers.{index}.{part}.weight", getattr(module, "weight", None))
    copy("norm.weight", getattr(getattr(target.decoder, "norm", None), "weight", None))
    width = drafter.config.hidden_size
    fc = own["fc.weight"]
    fc.normal_(std=0.002, generator=torch.Generator().manual_seed(0))
    fc[:, -width:] += torch.eye(width)
    return [*done, "fc.weight"]


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


@torch.no_grad()
def from_drafter(drafter: Drafter, directory: Path) -> list[str]:
    """Copy every tensor of another drafter that fits; layers it lacks start as no-ops.

    A DFlash drafter brings the backbone; its heads stay as initialised.

    Returns:
        Names of the parameters that were not in it.
    """
    left = drafter.load(read_tensors(directory))
    for name in left:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            dict(drafter.named_parameters())[name].zero_()
    return left


def prepare(drafter: Drafter, target: Target, *, start: str, use_target: bool, seed: int) -> str:
    """Set the weights training begins with; returns what was done, for the log."""
    initialise(drafter, seed)
    if start:
        left = from_drafter(drafter, Path(start))
        return f"weights from {start}" + (f", {len(left)} tensors new" if left else "")
    if use_target:
        return f"{len(from_target(drafter, target))} tensors from the target"
    return "random weights"
