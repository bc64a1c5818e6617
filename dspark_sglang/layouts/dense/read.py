"""Drafters that others trained: DeepSpec's layouts, and DFlash's backbone without heads.

DFlash counts rows: a block of ``block_size`` rows is the anchor and ``block_size - 1`` masks, and
each mask row predicts the token at its own position (SGLang's DFLASH worker reads rows 1 and up).
That is DSpark's ``sample_from_anchor: false`` with ``gamma = block_size - 1``, and is kept: weights
start as the function they were trained to be. DSpark's own convention predicts one position
further from every row, the anchor's included, so weights of one mean nothing in the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from dspark_sglang.checkpoint import Tensor, read_config, weight_files
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import Stored, compare
from dspark_sglang.layouts.dense.config import DenseConfig, is_gemma4, parse_drafter_config
from dspark_sglang.layouts.dense.tensors import check_tensors, dense_tensors

#: Architectures whose layers :mod:`dspark_sglang.training.model` computes.
DSPARK = ("Qwen3DSparkModel", "LingDSparkModel", "DSparkDraftModel", "Gemma4DSparkModel")
DFLASH = "DFlashDraftModel"
#: Copies of the target's, and what is computed.
_SKIPPED = ("embed_tokens.", "lm_head.", "rotary_emb.")
_ALIASES = {
    "encoder.fc.weight": "fc.weight",
    "encoder.output_norm_enc.weight": "hidden_norm.weight",
}


class Existing(msgspec.Struct, frozen=True, kw_only=True):
    """A drafter on disk."""

    directory: Path
    config: DenseConfig
    #: Whether it has a Markov head.
    markov: bool
    #: Published names, float32, norm gains as they multiply.
    tensors: dict[str, torch.Tensor]


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """What a drafter's configuration asks for that our layers do not compute."""
    nested: dict[str, Any] = {}
    for section in ("dflash_config", "dspark_config"):
        nested |= config.get(section) or {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    gemma = is_gemma4(config)
    activation = config.get("hidden_activation" if gemma else "hidden_act")
    usual = "gelu_pytorch_tanh" if gemma else "silu"
    architectures = config.get("architectures") or []
    turned = float(config.get("partial_rotary_factor") or 1.0)
    checks = {
        f"architectures {architectures}": bool(architectures)
        and not {*DSPARK, DFLASH}.intersection(architectures),
        f"activation {activation}": (activation or usual) != usual,
        f"RoPE of type {kind}": kind not in ("default", *(["proportional"] if gemma else [])),
        "partial or interleaved RoPE": not gemma
        and (turned != 1.0 or config.get("rope_is_neox_style") is False or "rope_dim" in rope),
        "causal attention": config.get("is_causal") is True,
        "sliding-window layers": "sliding_attention" in (config.get("layer_types") or ()),
        "quantised weights": bool(config.get("quantization_config")),
        "mixture-of-experts layers": bool(config.get("enable_moe_block")),
        **{
            key: bool(nested.get(key) or config.get(key))
            for key in (
                *("attention_bias", "attention_sink_bias", "attention_value_scale"),
                *("conv_kernel_size", "selector_rank", "projector_type"),
            )
        },
    }
    return [name for name, found in checks.items() if found]


def read_existing(directory: Path) -> Existing:
    """Read a complete DSpark or DFlash drafter.

    Raises:
        CheckpointError: damaged, incomplete, or with layers of another kind.
    """
    raw = read_config(directory, role="drafter")
    odd = unsupported(raw)
    if (directory / "mask_embedding.pt").exists():
        odd.append("a mask embedding of its own")
    if odd:
        raise CheckpointError(
            f"{directory} has {', '.join(odd)}.",
            expected=f"plain layers of {', '.join(DSPARK)} or {DFLASH}",
            fix="Give another drafter as start, or leave it empty.",
        )
    nested = raw.get("dspark_config") or raw.get("dflash_config") or {}
    rank = nested.get("markov_rank", raw.get("markov_rank"))
    if DFLASH in (raw.get("architectures") or ()) or not rank:
        config = _dflash_config(raw)
    else:
        config = parse_drafter_config(raw)
    tensors = read_tensors(directory)
    markov = "markov_head.markov_w1.weight" in tensors
    wanted = {
        name: Stored("", shape)
        for name, shape in dense_tensors(config).items()
        if markov or "_head." not in name
    }
    held = {name: Tensor("", tuple(value.shape), (0, 0)) for name, value in tensors.items()}
    compare(held, wanted, where=directory)
    if config.gain_minus_one:
        tensors = {
            name: value + 1.0 if name.endswith("norm.weight") else value
            for name, value in tensors.items()
        }
    return Existing(directory=directory, config=config, markov=markov, tensors=tensors)


def _dflash_config(raw: Mapping[str, Any]) -> DenseConfig:
    """A DFlash configuration in DSpark's terms, with heads that the checkpoint has not.

    DeepSpec's own DFlash runs (``Qwen3DSparkModel`` with ``markov_rank`` 0) count gamma rows and
    predict from the anchor.
    """
    plain = {**raw, **(raw.get("dflash_config") or {})}
    from_anchor = DFLASH not in (raw.get("architectures") or (DFLASH,))
    rows, layers = plain.get("block_size"), plain.get("num_hidden_layers")
    if plain.get("target_layer_ids") is None and plain.get("num_target_layers") and layers:
        plain["target_layer_ids"] = _default_layers(int(plain["num_target_layers"]), int(layers))
    plain |= {
        "markov_rank": 1,
        "enable_confidence_head": False,
        "confidence_head_with_markov": False,
        "sample_from_anchor": plain.get("sample_from_anchor", from_anchor),
    }
    if rows is not None:
        plain["block_size"] = int(rows) - (0 if plain["sample_from_anchor"] else 1)
    plain.pop("dflash_config", None)
    return parse_drafter_config(plain)


def _default_layers(target: int, draft: int) -> list[int]:
    """The target layers a DFlash drafter reads where its configuration names none."""
    if draft == 1:
        return [target // 2]
    return [round(1 + i * (target - 4) / (draft - 1)) for i in range(draft)]


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a drafter's own under its published name, in float32.

    Raises:
        CheckpointError: no weights, or damaged ones.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in weight_files(directory):
            with safe_open(path, framework="pt") as handle:
                for stored in handle.keys():  # noqa: SIM118 - not a dict
                    name = _ALIASES.get(stored, stored.removeprefix("model."))
                    if not name.startswith(_SKIPPED):
                        tensors[name] = handle.get_tensor(stored).float()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} cannot be read: {error}.",
            expected="complete safetensors weights",
            fix="Download the drafter again with `hf download`.",
        ) from error
    missing = [n for n in ("fc", "hidden_norm", "norm") if f"{n}.weight" not in tensors]
    if missing:
        raise CheckpointError(
            f"{directory} holds no {missing[0]}.weight.",
            expected="a DSpark or DFlash drafter (fc, hidden_norm, norm, layers.N.*)",
            fix="Give a drafter's directory as start, or leave it empty.",
        )
    return tensors


def read_drafter(directory: Path) -> tuple[DenseConfig, dict[str, torch.Tensor]]:
    """Configuration and float32 tensors of a complete DSpark drafter.

    Raises:
        CheckpointError: damaged, incomplete, or of another architecture.
    """
    check_tensors(directory, parse_drafter_config(read_config(directory, role="drafter")))
    found = read_existing(directory)
    return found.config, found.tensors
