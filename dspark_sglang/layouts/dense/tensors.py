"""Every tensor of a dense drafter by name and shape, and whether a directory holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dspark_sglang.checkpoint import Tensor, read_headers
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import Stored, compare
from dspark_sglang.layouts.dense.config import DenseConfig

#: Copies of the target's that drafters may carry; servers use the target's own.
COPIES = ("embed_tokens.weight", "lm_head.weight")


def dense_layer(
    *, hidden: int, wide: int, heads: int, kv_heads: int, head_dim: int, gemma4: bool
) -> dict[str, tuple[int, ...]]:
    """Every tensor of one dense layer, by the name in it, and its shape.

    Args:
        wide: width of the MLP.
        gemma4: with the norms and the scalar that Gemma's layers have more.
    """
    width, kv_width = heads * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, width),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if gemma4:
        shapes |= {
            "pre_feedforward_layernorm.weight": (hidden,),
            "post_feedforward_layernorm.weight": (hidden,),
            "layer_scalar": (1,),
        }
    return shapes


def dense_tensors(config: DenseConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the dense layout and its shape."""
    hidden, rank, vocab = config.hidden_size, config.markov_rank, config.vocab_size
    features = hidden + (rank if config.confidence_with_markov else 0)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(config.target_layer_ids) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "markov_head.markov_w1.weight": (vocab, rank),
        "markov_head.markov_w2.weight": (vocab, rank),
    }
    if config.markov_head == "gated":
        shapes["markov_head.gate_proj.weight"] = (rank, hidden + rank)
        shapes["markov_head.gate_proj.bias"] = (rank,)
    elif config.markov_head == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + hidden)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if config.confidence_head:
        shapes["confidence_head.proj.weight"] = (1, features)
        shapes["confidence_head.proj.bias"] = (1,)
    own = dense_layer(
        hidden=hidden,
        wide=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        gemma4=config.gemma4,
    )
    if config.shared_kv:
        del own["self_attn.v_proj.weight"]
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def check_tensors(directory: Path, config: DenseConfig) -> None:
    """Compare the stored tensors of a dense drafter with what its configuration implies.

    Raises:
        CheckpointError: damaged file, missing head, missing tensor or wrong shape.
    """
    check_headers(read_headers(directory), config, where=directory)


def check_headers(
    headers: Mapping[str, Tensor], config: DenseConfig, *, where: object, strict: bool = False
) -> None:
    """As :func:`check_tensors`, of headers by stored name; ``where`` holds them, in messages.

    Args:
        strict: refuse tensors that nothing reads, and weights that are no plain floats.
    """
    stored = {name.removeprefix("model."): header for name, header in headers.items()}
    if not config.confidence_head or "confidence_head.proj.weight" not in stored:
        said = "says" if config.confidence_head else "turns off (enable_confidence_head)"
        raise CheckpointError(
            f"{where} holds no confidence head (its config.json {said} one).",
            expected="confidence_head.proj.weight, which scheduling reads",
            fix="Use a drafter trained with a confidence head, or SGLang's builtin in static "
            "mode (DSPARK_PLUGIN=off SGLANG_RAGGED_VERIFY_MODE=static).",
        )
    dtype = "BF16" if strict else ""
    wanted = {name: Stored(dtype, shape) for name, shape in dense_tensors(config).items()}
    if strict:
        copy = Stored(dtype, (config.vocab_size, config.hidden_size))
        wanted |= {name: copy for name in COPIES if name in stored and not config.gemma4}
    compare(stored, wanted, where=where, leave=COPIES if strict else None)
