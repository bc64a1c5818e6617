"""Where a drafter's weights start: a given drafter, or the target."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.dense.config import DenseConfig
from dspark_sglang.layouts.dense.read import Existing, read_existing
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.target import Target

_KV = re.compile(r"self_attn\.[kv]_proj\.weight$")
_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
#: Where a target's layers have norms behind attention and MLP, and ours do not: the norm before
#: the MLP goes by another name, and what those norms rescale starts small instead.
_SANDWICH = {
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "self_attn.o_proj": None,
    "mlp.down_proj": None,
}
#: Fields that must agree for weights to mean the same, and the setting that decides each.
_SAME = {
    "hidden_size": "target",
    "vocab_size": "target",
    "num_heads": "",
    "head_dim": "",
    "intermediate_size": "",
    "rope_theta": "",
    "rope_share": "",
    "rms_norm_eps": "",
    "gemma4": "drafter.layout",
    "shared_kv": "drafter.layout",
    "target_layer_ids": "drafter.target_layer_ids",
    "mask_token_id": "drafter.mask_token_id",
    "sample_from_anchor": "drafter.sample_from_anchor",
}


class Copied(NamedTuple):
    """What came of copying a drafter."""

    #: Layers of it that were used, and layers it has.
    layers: int
    of: int
    #: Names of parameters that it has not, and of its tensors that were of no use.
    new: list[str]
    unused: list[str]

    def __str__(self) -> str:
        parts = [f"{self.layers} of its {self.of} layers"]
        if self.new:
            parts.append(f"{len(self.new)} tensors new ({', '.join(self.new[:3])}, ...)")
        if self.unused:
            parts.append(f"{len(self.unused)} of its tensors unused")
        return ", ".join(parts)


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
    as that layer's features. Norm gains are copied as they multiply, whatever the target stores,
    and a target's own attention scale goes into ``q_norm``.

    Returns:
        Names of the parameters that were set.
    """
    own: dict[str, nn.Parameter] = dict(drafter.named_parameters())
    config = drafter.config
    done = []

    def copy(name: str, value: torch.Tensor | None) -> None:
        if value is not None and name in own and value.shape == own[name].shape:
            own[name].copy_(value)
            done.append(name)

    scale = 1.0 if config.gemma4 else config.head_dim**-0.5
    for index, layer in enumerate(_last_layers(target, config)):
        sandwich = not config.gemma4 and _part(layer, "pre_feedforward_layernorm") is not None
        for part in _PARTS:
            theirs = _SANDWICH.get(part, part) if sandwich else part
            value = None if theirs is None else _weight(_part(layer, theirs))
            if part == "self_attn.q_norm" and value is not None:
                value = value * (float(getattr(layer.self_attn, "scaling", scale)) / scale)
            copy(f"layers.{index}.{part}.weight", value)
    copy("norm.weight", _weight(getattr(target.decoder, "norm", None)))
    width = config.hidden_size
    fc = own["fc.weight"]
    fc.normal_(std=0.002, generator=torch.Generator().manual_seed(0))
    fc[:, -width:] += torch.eye(width)
    return [*done, "fc.weight"]


def _last_layers(target: Target, config: DenseConfig) -> list[nn.Module]:
    """The target's last layers; for Gemma 4 drafters, those with full attention."""
    layers = target.layers
    if config.gemma4:
        full = [x for x in layers if not getattr(_part(x, "self_attn"), "is_sliding", False)]
        layers = full or layers
    return layers[-config.num_layers :]


def _part(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _weight(module: nn.Module | None) -> torch.Tensor | None:
    """A module's weight; of a norm, the gain that multiplies (Gemma 3 stores one less)."""
    stored = getattr(module, "weight", None)
    if module is None or not isinstance(stored, torch.Tensor):
        return None
    weight = stored.float()
    if weight.ndim != 1:
        return weight
    gain = module(torch.ones(1, len(weight), dtype=stored.dtype, device=stored.device))[0]
    return weight + 1.0 if float((gain.float() - weight).mean()) > 0.5 else weight


def _more_kv_heads(weight: torch.Tensor, config: DenseConfig) -> torch.Tensor:
    """Give every group of query heads copies of its key or value head: the same function."""
    heads = weight.shape[0] // config.head_dim
    copies, rest = divmod(config.num_kv_heads, heads)
    if rest or copies <= 1:
        return weight
    split = weight.view(heads, config.head_dim, -1).repeat_interleave(copies, dim=0)
    return split.reshape(-1, weight.shape[1])


def _check_fits(found: Existing, config: DenseConfig) -> None:
    for name, setting in _SAME.items():
        theirs, ours = getattr(found.config, name), getattr(config, name)
        if theirs != ours:
            shown = list(theirs) if isinstance(theirs, tuple) else theirs
            fix = "Give a drafter made for this target, or leave start empty."
            if setting.startswith("drafter."):
                fix = f"Set {setting} to the start's, or give another start."
            raise CheckpointError(
                f"{found.directory} has {name} {shown}.",
                expected=f"{list(ours) if isinstance(ours, tuple) else ours}, as this run's drafter",
                fix=fix,
            )
    if config.num_kv_heads % found.config.num_kv_heads:
        raise CheckpointError(
            f"{found.directory} has {found.config.num_kv_heads} key and value heads.",
            expected=f"a divisor of this run's {config.num_kv_heads}",
            fix=f"Set drafter.kv_heads to a multiple of {found.config.num_kv_heads}.",
        )
    if found.config.gamma < config.gamma:
        raise CheckpointError(
            f"{found.directory} drafts {found.config.gamma} tokens a block.",
            expected=f"at least this run's drafter.gamma, {config.gamma}",
            fix=f"Set drafter.gamma to {found.config.gamma} or less, or give another start.",
        )


@torch.no_grad()
def from_drafter(drafter: Drafter, directory: Path) -> Copied:
    """Copy another drafter: DSpark to fine-tune, or DFlash, which brings no heads.

    Layers that it lacks start as no-ops; its further layers are left out; heads that it lacks stay
    as initialised. A confidence head that does not read the Markov embedding gets zeros for it.

    Raises:
        CheckpointError: it cannot be read, or its weights would mean something else here.
    """
    found = read_existing(directory)
    _check_fits(found, drafter.config)
    own = drafter.state_dict()
    tensors = {
        name: _more_kv_heads(value, drafter.config) if _KV.search(name) else value
        for name, value in found.tensors.items()
    }
    probe = "confidence_head.proj.weight"
    if probe in tensors and tensors[probe].shape[1] < own[probe].shape[1]:
        missing = own[probe].shape[1] - tensors[probe].shape[1]
        tensors[probe] = torch.nn.functional.pad(tensors[probe], (0, missing))
    for name, value in tensors.items():
        if name in own and value.shape != own[name].shape:
            raise CheckpointError(
                f"{name} in {directory} has shape {list(value.shape)}.",
                expected=f"{list(own[name].shape)}, as in this run's drafter",
                fix="Set drafter.markov_rank and drafter.markov_head as in the start.",
            )
    new = drafter.load(tensors)
    for name in new:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            dict(drafter.named_parameters())[name].zero_()
    return Copied(
        layers=min(found.config.num_layers, drafter.config.num_layers),
        of=found.config.num_layers,
        new=new,
        unused=sorted(tensors.keys() - own.keys()),
    )


class Begun(NamedTuple):
    """How a drafter's weights were made."""

    #: For the log.
    text: str
    #: Whether its Markov head, if any, came from another drafter.
    markov: bool


def prepare(drafter: Drafter, target: Target, *, start: str, use_target: bool, seed: int) -> Begun:
    """Set the weights training begins with."""
    initialise(drafter, seed)
    if start:
        copied = from_drafter(drafter, Path(start))
        new_head = any(name.startswith("markov_head.") for name in copied.new)
        return Begun(f"weights from {start}: {copied}", not new_head)
    if use_target:
        return Begun(f"{len(from_target(drafter, target))} tensors from the target", False)
    return Begun("random weights", False)
