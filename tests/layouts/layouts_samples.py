"""Small targets and drafters of every layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dspark_sglang.layouts.dense.config import DenseConfig, DrafterSpec, parse_drafter_config
from dspark_sglang.layouts.dense.write import drafter_config, write_drafter
from dspark_sglang.training.batches import Packed, visible
from dspark_sglang.training.model import Drafter

TOKENIZER = SimpleNamespace(added_tokens_encoder={"<mask>": 3}, pad_token_id=0)


HIDDEN, VOCAB = 32, 97


def text_config(**changes: Any) -> Any:
    """A target's configuration, as Hugging Face gives it."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    }
    return LlamaConfig(**(sizes | changes))


def gemma4_config(*, shared_kv: bool = True) -> Any:
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=shared_kv,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )


def randomise(drafter: Drafter) -> Drafter:
    """Every parameter random, norm gains around one."""
    with torch.no_grad():
        for name, value in drafter.state_dict().items():
            noise = torch.randn_like(value)
            value.copy_(1 + 0.1 * noise if value.ndim == 1 and "head" not in name else 0.2 * noise)
    return drafter


def make(spec: DrafterSpec, target: Any = None, start: str = "") -> tuple[dict[str, Any], Drafter]:
    raw = drafter_config(spec, target or text_config(), TOKENIZER, start)
    model = Drafter(parse_drafter_config(raw), markov=spec.markov_head != "none")
    return raw, randomise(model)


def stored(
    folder: Path, spec: DrafterSpec, target: Any = None, **changes: Any
) -> tuple[Path, Drafter]:
    """A drafter on disk, its configuration changed afterwards, and the same in memory."""
    raw, model = make(spec, target)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(value.bfloat16())
    write_drafter(folder, raw, model.state_dict())
    if changes:
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in raw.items() if value is not None})
        )
    return folder, model


def blocks(config: DenseConfig, rows: int) -> dict[str, torch.Tensor]:
    """Random inputs of one sequence: 11 positions, blocks at three anchors."""
    anchors = torch.tensor([[2, 7, 10]])
    packed = Packed(torch.zeros(1, 11), anchors, *[torch.empty(0)] * 4, source=(0,))
    return {
        "states": torch.randn(1, 11, len(config.target_layer_ids) * HIDDEN),
        "anchors": anchors,
        "embedded": torch.randn(1, 3, HIDDEN),
        "mask_embedding": torch.randn(HIDDEN),
        "mask": visible(packed.anchors, packed.tokens.shape[1], rows),
    }


LAYOUTS = {
    "vanilla": (DrafterSpec(markov_rank=4), None),
    "gated": (DrafterSpec(markov_head="gated", markov_rank=4), None),
    "rnn": (DrafterSpec(markov_head="rnn", markov_rank=4), None),
    "from-masks": (DrafterSpec(sample_from_anchor=False, markov_rank=4), None),
    "gemma4": (DrafterSpec(layout="gemma4", markov_rank=4), gemma4_config()),
    "gemma4-v": (DrafterSpec(layout="gemma4", markov_rank=4), gemma4_config(shared_kv=False)),
}
