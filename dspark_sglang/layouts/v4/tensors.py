"""Names and shapes of a V4 drafter's tensors, checks, and tiny random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.v4.shape import V4Shape

if TYPE_CHECKING:  # names and shapes are asked for where torch would take seconds to import
    import torch

Tensors = Mapping[str, "torch.Tensor"]

#: How the Markov head's matrices may also be called.
ALIASES = {
    ".markov_head.embed.": ".markov_head.markov_w1.",
    ".markov_head.head.": ".markov_head.markov_w2.",
}
_SCALES = (".scale", "_scale_inv", "weight_scale")


def v4_tensors(shape: V4Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor under ``mtp.*`` and its shape."""
    hidden, streams = shape.hidden, shape.streams
    shapes: dict[str, tuple[int, ...]] = {
        "mtp.0.main_proj.weight": (hidden, shape.layers * hidden),
        "mtp.0.main_norm.weight": (hidden,),
    }
    for layer in range(shape.layers):
        own = _attention(shape) | _experts(shape)
        for part in ("attn", "ffn"):
            mixes = (2 + streams) * streams
            own |= {
                f"{part}_norm.weight": (hidden,),
                f"hc_{part}_fn": (mixes, streams * hidden),
                f"hc_{part}_base": (mixes,),
                f"hc_{part}_scale": (3,),
            }
        shapes |= {f"mtp.{layer}.{name}": size for name, size in own.items()}
    features = hidden + (shape.rank if shape.confidence_with_markov else 0)
    last = {
        "norm.weight": (hidden,),
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
        "markov_head.markov_w1.weight": (shape.vocab, shape.rank),
        "markov_head.markov_w2.weight": (shape.vocab, shape.rank),
        "confidence_head.proj.weight": (1, features),
    }
    return shapes | {f"mtp.{shape.layers - 1}.{name}": size for name, size in last.items()}


def _attention(shape: V4Shape) -> dict[str, tuple[int, ...]]:
    width, grouped = shape.heads * shape.head_dim, shape.o_groups * shape.o_rank
    return {
        "attn.wq_a.weight": (shape.q_rank, shape.hidden),
        "attn.q_norm.weight": (shape.q_rank,),
        "attn.wq_b.weight": (width, shape.q_rank),
        "attn.wkv.weight": (shape.head_dim, shape.hidden),
        "attn.kv_norm.weight": (shape.head_dim,),
        "attn.attn_sink": (shape.heads,),
        "attn.wo_a.weight": (grouped, width // shape.o_groups),
        "attn.wo_b.weight": (shape.hidden, grouped),
    }


def _experts(shape: V4Shape) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "ffn.gate.weight": (shape.experts, shape.hidden),
        "ffn.gate.bias": (shape.experts,),
    }
    widths = {f"experts.{expert}": shape.expert_width for expert in range(shape.experts)}
    widths["shared_experts"] = shape.shared * shape.expert_width
    for name, width in widths.items():
        shapes |= {
            f"ffn.{name}.w1.weight": (width, shape.hidden),
            f"ffn.{name}.w2.weight": (shape.hidden, width),
            f"ffn.{name}.w3.weight": (width, shape.hidden),
        }
    return shapes


def check_tensors(tensors: Tensors, shape: V4Shape) -> dict[str, torch.Tensor]:
    """The drafter's tensors under their usual names; others of the checkpoint are left out.

    Raises:
        CheckpointError: quantised storage, a missing or unknown ``mtp.*`` tensor, or a wrong shape.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if not name.startswith("mtp."):
            continue
        _check_plain(name, value)
        for alias, usual in ALIASES.items():
            name = name.replace(alias, usual)
        found[name] = value
    wanted = v4_tensors(shape)
    for name, size in wanted.items():
        if name not in found:
            raise CheckpointError(
                f"The checkpoint has no tensor {name}.",
                expected=f"{name} of shape {list(size)}",
                fix="Download the checkpoint again; it is incomplete or carries no DSpark drafter.",
            )
        if tuple(found[name].shape) != size:
            raise CheckpointError(
                f"{name} has shape {list(found[name].shape)}.",
                expected=f"{list(size)} (from config.json)",
                fix="The weights and config.json belong to different checkpoints; download both.",
            )
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise CheckpointError(
            f"The checkpoint has {len(unknown)} mtp tensors more, the first {unknown[0]}.",
            expected=f"the {len(wanted)} tensors of the drafter that config.json describes",
            fix="Use the config.json of the same checkpoint.",
        )
    return found


def _check_plain(name: str, value: torch.Tensor) -> None:

    if name.endswith(_SCALES) or not value.is_floating_point() or value.element_size() < 2:
        raise CheckpointError(
            f"{name} ({value.dtype}) belongs to quantised storage (fp8 or mxfp4).",
            expected="plain tensors of 16 bits or more: the reference reads no scales",
            fix="Dequantise the mtp.* tensors first (weight times scale, block by block).",
        )


def random_tensors(shape: V4Shape, seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights under which every part of the drafter matters; for tiny shapes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, size in v4_tensors(shape).items():
        value = torch.randn(size, generator=generator)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.1 * value
        elif len(size) == 2 and "markov_w1" not in name:
            value = value / size[-1] ** 0.5
        made[name] = value
    return made
