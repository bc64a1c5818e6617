"""Reading and checking drafter checkpoints without loading their weights.

Knows the published dense layout (``Qwen3DSparkModel``: ``fc``, ``hidden_norm``, ``norm``,
``layers.N.*``, ``markov_head.*``, ``confidence_head.*``) with its configuration keys at the top
level or nested under ``dflash_config`` / ``dspark_config``, its Gemma 4 sibling
(``Gemma4DSparkModel``), and recognises drafters bundled in a target checkpoint (``dspark_*`` keys),
which SGLang loads itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.errors import CheckpointError
from dspark_sglang.safetensors import Tensor, read_header

BUNDLED_KEYS = (
    "dspark_block_size",
    "dspark_markov_rank",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
)
MARKOV_HEADS = ("vanilla", "gated", "rnn")
GEMMA4 = "Gemma4DSparkModel"
_HEAD_TENSORS = ("markov_head.", "confidence_head.")


class DrafterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a drafter's ``config.json`` says about drafting."""

    gamma: int
    markov_rank: int
    markov_head: str
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    confidence_head: bool
    confidence_with_markov: bool
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_target_layers: int | None
    bundled: bool
    sample_from_anchor: bool = True
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    #: Layers as Gemma 4's: sandwich norms, normed values, tanh-GELU, attention scale 1.
    gemma4: bool = False
    #: Gemma 4: values are the key projection, normed; there is no ``v_proj``.
    shared_kv: bool = False
    #: Gemma 4: share of each head that RoPE turns (its "proportional" type).
    rope_share: float = 1.0
    #: Stored norm gains are one less than what multiplies (``use_gemma_norm``).
    gain_minus_one: bool = False


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist.",
            expected=f"{what}",
            fix="Check the path, or download the model first with `hf download`.",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not JSON: {error}.", expected=what, fix="Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a {type(value).__name__}.",
            expected=f"a JSON object ({what})",
            fix="Download the file again.",
        )
    return value


def read_config(directory: Path, *, role: str) -> dict[str, Any]:
    """``config.json`` of a model directory; ``role`` ("drafter", "target") names it in errors."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{role} path {directory} is not a directory.",
            expected="a model directory with config.json and safetensors weights",
            fix="Check the path, or download the model first with `hf download`.",
        )
    return read_json(directory / "config.json", what=f"the {role}'s config.json")


def _lookup(config: Mapping[str, Any], key: str, bundled_key: str | None = None) -> Any:
    if bundled_key and config.get(bundled_key) is not None:
        return config[bundled_key]
    for section in ("dspark_config", "dflash_config"):
        nested = config.get(section)
        if isinstance(nested, Mapping) and nested.get(key) is not None:
            return nested[key]
    return config.get(key)


def _require(config: Mapping[str, Any], key: str, bundled_key: str | None = None) -> Any:
    value = _lookup(config, key, bundled_key)
    if value is None:
        raise CheckpointError(
            f"The drafter's config.json has no {key}.",
            expected="a DSpark drafter (block_size, markov_rank, mask_token_id, target_layer_ids)",
            fix="Use a DSpark checkpoint; DFlash or EAGLE drafters need their own algorithm.",
        )
    return value


def parse_drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """Read the DSpark fields of a configuration in any published layout.

    Raises:
        CheckpointError: a field is missing, of the wrong type or out of range.
    """
    try:
        return _parse(config)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(
            f"The drafter's config.json holds a value of the wrong type: {error}.",
            expected="integers for sizes and a list of integers for target_layer_ids",
            fix="Download the drafter's config.json again.",
        ) from error


def _parse(config: Mapping[str, Any]) -> DrafterConfig:
    rank = int(_require(config, "markov_rank", "dspark_markov_rank"))
    head = str(_lookup(config, "markov_head_type", "dspark_markov_head_type") or "vanilla").lower()
    if head not in MARKOV_HEADS:
        raise CheckpointError(
            f"markov_head_type is {head!r}.",
            expected=" or ".join(MARKOV_HEADS),
            fix="Use a drafter with one of these heads.",
        )
    hidden = int(_require(config, "hidden_size"))
    parsed = DrafterConfig(
        gamma=int(_require(config, "block_size", "dspark_block_size")),
        markov_rank=rank,
        markov_head=head,
        mask_token_id=int(_require(config, "mask_token_id", "dspark_noise_token_id")),
        target_layer_ids=tuple(
            int(i) for i in _require(config, "target_layer_ids", "dspark_target_layer_ids")
        ),
        confidence_head=bool(config.get("enable_confidence_head", True)),
        confidence_with_markov=bool(config.get("confidence_head_with_markov", rank > 0)),
        hidden_size=hidden,
        vocab_size=int(_require(config, "vocab_size")),
        num_layers=int(_require(config, "num_hidden_layers")),
        intermediate_size=int(config.get("intermediate_size", 0)),
        num_target_layers=config.get("num_target_layers"),
        bundled=is_bundle(config),
        sample_from_anchor=bool(config.get("sample_from_anchor", True)),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        gain_minus_one=bool(config.get("use_gemma_norm", False)),
        **attention_shape(config),
    )
    if parsed.gamma < 1 or parsed.markov_rank < 1 or not parsed.target_layer_ids:
        raise CheckpointError(
            f"The drafter says block_size {parsed.gamma}, markov_rank {parsed.markov_rank}, "
            f"target_layer_ids {list(parsed.target_layer_ids)}.",
            expected="a block size and rank of at least 1 and at least one target layer",
            fix="Use a DSpark checkpoint.",
        )
    return parsed


def is_bundle(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds its own drafter."""
    return any(config.get(key) is not None for key in BUNDLED_KEYS)


def bundle_at(directory: Path) -> Path | None:
    """``directory`` where it is a model's and holds its own drafter; else None.

    Raises:
        CheckpointError: its ``config.json`` is damaged.
    """
    path = directory / "config.json"
    if path.is_file() and is_bundle(read_json(path, what="a model's config.json")):
        return directory
    return None


def is_gemma4(config: Mapping[str, Any]) -> bool:
    """Whether a drafter's configuration says its layers are Gemma 4's."""
    return GEMMA4 in (config.get("architectures") or ())


def attention_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and RoPE as fields of :class:`DrafterConfig`, from a drafter's configuration."""
    heads = int(_require(config, "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not is_gemma4(config):
        return {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            "rope_theta": float(theta),
        }
    shared = bool(config.get("attention_k_eq_v", False))
    proportional = rope.get("rope_type", "proportional") == "proportional"
    return {
        "num_heads": heads,
        "num_kv_heads": int(config["num_global_key_value_heads"]) if shared else kv_heads,
        "head_dim": int(config["global_head_dim"]),
        "rope_theta": float(theta if rope else 1e6),
        "rope_share": float(rope.get("partial_rotary_factor", 0.25)) if proportional else 1.0,
        "gemma4": True,
        "shared_kv": shared,
    }


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


def dense_tensors(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
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


def check_served(config: DrafterConfig, target: Mapping[str, Any] | None = None) -> None:
    """Check that SGLang 0.5.23 can run a stand-alone drafter of this kind at all.

    Args:
        config: the drafter.
        target: the target's ``config.json``, where it is known.

    Raises:
        CheckpointError: Gemma 4 layers, for which it has no class, the target's embedding among
            the layers read, which its loader refuses, or the target's last layer, whose output it
            never captures (the first request would end the server).
    """
    layers = None if target is None else text_config(target).get("num_hidden_layers")
    if layers is not None and max(config.target_layer_ids) == int(layers) - 1:
        raise CheckpointError(
            f"The drafter reads target layers {list(config.target_layer_ids)}.",
            expected=f"layers up to {int(layers) - 2}: SGLang does not capture the last one",
            fix="Train one with other drafter.target_layer_ids.",
        )
    if min(config.target_layer_ids) < 0:
        raise CheckpointError(
            f"The drafter reads target layers {list(config.target_layer_ids)}.",
            expected="outputs of decoder layers (0 and up): SGLang cannot capture the embedding",
            fix="Train one with other drafter.target_layer_ids.",
        )
    if config.gemma4:
        raise CheckpointError(
            f"The drafter is a {GEMMA4}.",
            expected="an architecture that SGLang has (Qwen3DSparkModel, DSparkDraftModel, ...)",
            fix="Train one for this target with drafter.layout qwen3, or serve this one with vLLM.",
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in name order."""
    return sorted(directory.glob("*.safetensors"))


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor, from the files' headers.

    Raises:
        CheckpointError: no safetensors file, or a damaged one.
    """
    files = weight_files(directory)
    if not files:
        raise CheckpointError(
            f"{directory} holds no .safetensors file.",
            expected="safetensors weights (pickled .bin or .pt files are not read)",
            fix="Download the model again with `hf download`.",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= {name: tensor.shape for name, tensor in read_header(path).tensors.items()}
    return shapes


def check_tensors(directory: Path, config: DrafterConfig) -> None:
    """Compare the stored tensors of a dense drafter with what its configuration implies.

    Raises:
        CheckpointError: damaged file, missing head, missing tensor or wrong shape.
    """
    stored = {name.removeprefix("model."): s for name, s in read_shapes(directory).items()}
    if not config.confidence_head or "confidence_head.proj.weight" not in stored:
        said = "says" if config.confidence_head else "turns off (enable_confidence_head)"
        raise CheckpointError(
            f"{directory} holds no confidence head (its config.json {said} one).",
            expected="confidence_head.proj.weight, which scheduling reads",
            fix="Use a drafter trained with a confidence head, or SGLang's builtin in static "
            "mode (DSPARK_PLUGIN=off SGLANG_RAGGED_VERIFY_MODE=static).",
        )
    for name, shape in dense_tensors(config).items():
        if name not in stored:
            raise CheckpointError(
                f"{directory} has no tensor {name}.",
                expected=f"{name} of shape {list(shape)}",
                fix="Download the drafter again; it is incomplete or of another architecture.",
            )
        if stored[name] != shape:
            raise CheckpointError(
                f"{name} in {directory} has shape {list(stored[name])}.",
                expected=f"{list(shape)} (from config.json)",
                fix="The weights and config.json belong to different drafters; download both.",
            )


def text_config(target: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a ``config.json``, nested or not."""
    text = target.get("text_config")
    return text if isinstance(text, Mapping) else target


def check_fits(config: DrafterConfig, target: Mapping[str, Any], *, name: str = "target") -> None:
    """Check that a drafter was made for a target of this shape.

    Args:
        config: the drafter.
        target: the target's ``config.json`` (text configuration nested or not).
        name: how to call the target in messages.

    Raises:
        CheckpointError: hidden size, vocabulary, layer ids or mask token do not fit.
    """
    shape = text_config(target)
    fix = f"Use a drafter made for {name}, at the same revision."
    for ours, theirs, what in (
        (config.hidden_size, shape.get("hidden_size"), "hidden_size"),
        (config.vocab_size, shape.get("vocab_size"), "vocab_size"),
        (config.num_target_layers, shape.get("num_hidden_layers"), "num_target_layers"),
    ):
        if ours is not None and theirs is not None and int(ours) != int(theirs):
            raise CheckpointError(
                f"The drafter's {what} is {ours}.", expected=f"{theirs}, as in {name}", fix=fix
            )
    layers = shape.get("num_hidden_layers")
    if layers is not None:
        outside = [i for i in config.target_layer_ids if not -1 <= i < int(layers)]
        if outside:
            raise CheckpointError(
                f"The drafter reads target layers {outside}.",
                expected=f"layers -1 to {int(layers) - 1} of {name}",
                fix=fix,
            )
    vocab = shape.get("padded_vocab_size") or shape.get("vocab_size")
    if vocab is not None and not 0 <= config.mask_token_id < int(vocab):
        raise CheckpointError(
            f"The drafter's mask_token_id is {config.mask_token_id}.",
            expected=f"a token below {vocab}",
            fix=fix,
        )


def weights_digest(directory: Path) -> str:
    """SHA-256 that is a drafter's identity in artifacts.

    Over its weight files in name order; of a bundle, whose files hold hundreds of gigabytes of target, over the
    names, types and shapes of all ``mtp.*`` tensors and the values of those that are not routed experts'.

    Raises:
        CheckpointError: a damaged file of a bundle.
    """
    if bundle_at(directory) is not None:
        return _bundle_digest(directory)
    digest = hashlib.sha256()
    for path in weight_files(directory):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _bundle_digest(directory: Path) -> str:
    found: dict[str, tuple[Path, int, Tensor]] = {}
    for path in weight_files(directory):
        header = read_header(path)
        own = ((name, t) for name, t in header.tensors.items() if name.startswith("mtp."))
        found |= {name: (path, header.start, tensor) for name, tensor in own}
    digest = hashlib.sha256()
    for name, (path, start, tensor) in sorted(found.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if ".experts." in name:
            continue
        with path.open("rb") as stream:
            stream.seek(start + tensor.data_offsets[0])
            digest.update(stream.read(tensor.nbytes))
    return digest.hexdigest()
