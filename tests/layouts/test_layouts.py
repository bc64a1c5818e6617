"""Drafter layouts: what is trained is what is stored, and what others stored can be gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention

from dspark_sglang.checkpoint import read_config
from dspark_sglang.errors import CheckpointError, ConfigError
from dspark_sglang.layouts.dense.config import DrafterSpec, parse_drafter_config
from dspark_sglang.layouts.dense.layout import DENSE
from dspark_sglang.layouts.dense.read import read_drafter, read_existing
from dspark_sglang.layouts.dense.reference import DenseDrafter
from dspark_sglang.layouts.dense.tensors import check_tensors, dense_tensors
from dspark_sglang.layouts.dense.write import WEIGHTS, drafter_config, write_drafter
from dspark_sglang.training.config import DataSpec, TrainConfig, check
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.start import from_target, initialise
from dspark_sglang.training.target import Target
from tests.layouts.layouts_samples import (
    HIDDEN,
    LAYOUTS,
    TOKENIZER,
    VOCAB,
    blocks,
    gemma4_config,
    make,
    stored,
    text_config,
)
from tests.training.tiny_training import write_target, write_tokenizer

# --- the forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 5, 7])
@pytest.mark.parametrize("name", ["vanilla", "more-key-heads", "from-masks", "gemma4", "gemma4-v"])
@torch.no_grad()
def test_the_trained_model_is_the_reference(gamma: int, name: str) -> None:
    spec, target = LAYOUTS.get(name, (DrafterSpec(kv_heads=4, markov_rank=4), None))
    _, model = make(msgspec.structs.replace(spec, gamma=gamma), target)
    given = blocks(model.config, model.rows)
    embedding = torch.zeros(VOCAB, HIDDEN)
    embedding[model.config.mask_token_id] = given["mask_embedding"]
    reference = DenseDrafter(model.state_dict(), model.config, embedding)
    context = reference.context(given["states"][0])
    wanted = reference.hidden(context, given["anchors"][0], given["embedded"][0])
    found = model(**given)
    assert found.shape == (1, 3, gamma, HIDDEN)
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)


def test_without_the_anchor_the_mask_rows_predict_their_own_positions() -> None:
    """gamma + 1 rows run, and the last gamma are what comes out."""
    _, model = make(DrafterSpec(gamma=4, sample_from_anchor=False, markov_rank=4))
    assert model.rows == 5
    given = blocks(model.config, 5)
    _, wider = make(DrafterSpec(gamma=5, markov_rank=4))
    wider.load(model.state_dict())
    torch.testing.assert_close(model(**given), wider(**given)[:, :, 1:])


def gemma4_reference(model: Drafter, hf: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """One pass with Hugging Face's Gemma 4 norms, MLP and RoPE, block by block."""
    from transformers.models.gemma4 import modeling_gemma4 as gemma

    config, tensors = model.config, model.state_dict()
    rotary = gemma.Gemma4TextRotaryEmbedding(hf)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        module = gemma.Gemma4RMSNorm(x.shape[-1], hf.rms_norm_eps, with_scale=bool(name))
        if name:
            module.load_state_dict({"weight": tensors[f"{name}.weight"]})
        return module(x)

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ tensors[f"{name}.weight"].T).unflatten(-1, (-1, config.head_dim))

    context = norm(given["states"][0] @ tensors["fc.weight"].T, "hidden_norm")
    made = []
    for block, anchor in enumerate(given["anchors"][0].tolist()):
        x = given["mask_embedding"].repeat(model.rows, 1)
        x[0] = given["embedded"][0, block]
        places = torch.arange(anchor + model.rows)[None]
        for layer in range(config.num_layers):
            p = f"layers.{layer}"
            h = norm(x, f"{p}.input_layernorm")
            source = torch.cat([context[:anchor], h])
            cos, sin = rotary(h, places, "full_attention")
            raw = heads(source, f"{p}.self_attn.k_proj")
            value = raw if config.shared_kv else heads(source, f"{p}.self_attn.v_proj")
            query = norm(heads(h, f"{p}.self_attn.q_proj"), f"{p}.self_attn.q_norm")[None]
            key = norm(raw, f"{p}.self_attn.k_norm")[None]
            turned = slice(anchor, None)
            query = gemma.apply_rotary_pos_emb(query, cos[:, turned], sin[:, turned], 2)
            key = gemma.apply_rotary_pos_emb(key, cos, sin, 2)
            q, k, v = (t.transpose(1, 2) for t in (query, key, norm(value, "")[None]))
            out = scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)
            out = out[0].transpose(0, 1).flatten(1) @ tensors[f"{p}.self_attn.o_proj.weight"].T
            x = x + norm(out, f"{p}.post_attention_layernorm")
            mlp = gemma.Gemma4TextMLP(hf, 0)
            names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
            mlp.load_state_dict({name: tensors[f"{p}.mlp.{name}"] for name in names})
            out = mlp(norm(x, f"{p}.pre_feedforward_layernorm"))
            x = x + norm(out, f"{p}.post_feedforward_layernorm")
            x = x * tensors[f"{p}.layer_scalar"]
        made.append(norm(x, "norm"))
    return torch.stack(made)


@pytest.mark.parametrize("gamma", [1, 5])
@pytest.mark.parametrize("shared_kv", [True, False], ids=["k=v", "v_proj"])
@torch.no_grad()
def test_gemma4_layers_are_hugging_faces(gamma: int, shared_kv: bool) -> None:
    hf = gemma4_config(shared_kv=shared_kv)
    _, model = make(DrafterSpec(gamma=gamma, layout="gemma4", markov_rank=4), hf)
    assert model.config.shared_kv == shared_kv
    assert (model.config.head_dim, model.config.rope_share) == (16, 0.25)
    given = blocks(model.config, gamma)
    wanted = gemma4_reference(model, hf, given)
    torch.testing.assert_close(model(**given)[0], wanted, rtol=1e-5, atol=1e-5)


def write_gemma4(folder: Path) -> Target:
    """A random Gemma 4 target."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(gemma4_config()).save_pretrained(folder)
    write_tokenizer(folder)
    return Target(str(folder), bf16=False)


# --- target states --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "gemma4"])
@torch.no_grad()
def test_captured_states_are_the_models_own(kind: str, tmp_path: Path) -> None:
    if kind == "gemma4":
        target = write_gemma4(tmp_path)
    else:
        target = Target(str(write_target(tmp_path, kind)), bf16=False)
    tokens, last = torch.randint(4, 90, (2, 9)), len(target.layers) - 1
    found = target.states(tokens, [-1, 0, 2, last])
    out = target.decoder(tokens, output_hidden_states=True)
    layers = found.layers.split(32, dim=-1)
    for layer, place in ((0, 0), (1, 1), (2, 3)):
        torch.testing.assert_close(layers[layer], out.hidden_states[place])
    # Hugging Face norms the last layer's output before it lists it; the drafter reads it raw.
    torch.testing.assert_close(target.decoder.norm(layers[3]), out.hidden_states[last + 1])
    assert not torch.allclose(layers[3], out.hidden_states[last + 1])
    torch.testing.assert_close(found.final, out.last_hidden_state)
    logits = target.model(tokens).logits
    torch.testing.assert_close(found.final @ target.head.T, logits)


@torch.no_grad()
def test_gemmas_embedding_is_scaled(tmp_path: Path) -> None:
    """As SGLang's DSPARK embeds: through the target's own module."""
    target = Target(str(write_target(tmp_path, "gemma")), bf16=False)
    tokens = torch.tensor([5, 9])
    weight = target.model.get_input_embeddings().weight
    torch.testing.assert_close(target.embed(tokens), weight[tokens] * 32**0.5)


# --- from the target ------------------------------------------------------------------------------


@torch.no_grad()
def test_a_gemma_targets_norms_and_scale_are_copied_as_they_act(tmp_path: Path) -> None:
    """Gains are one more than Gemma 3 stores; the norm before its MLP has another name."""
    target = Target(str(write_target(tmp_path, "gemma")), bf16=False)
    for parameter in target.model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=0.1)
    model = Drafter(
        parse_drafter_config(drafter_config(DrafterSpec(layers=1), target.config, TOKENIZER))
    )
    initialise(model, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = from_target(model, target)
    theirs: Any = target.layers[-1]
    own = model.state_dict()
    pairs = {
        "layers.0.input_layernorm": theirs.input_layernorm.weight + 1,
        "layers.0.post_attention_layernorm": theirs.pre_feedforward_layernorm.weight + 1,
        "layers.0.self_attn.k_norm": theirs.self_attn.k_norm.weight + 1,
        "layers.0.self_attn.q_norm": (theirs.self_attn.q_norm.weight + 1) * (8 / 256) ** 0.5,
        "layers.0.self_attn.v_proj": theirs.self_attn.v_proj.weight,
        "norm": target.decoder.norm.weight + 1,
    }
    for name, wanted in pairs.items():
        torch.testing.assert_close(own[f"{name}.weight"], wanted.float())
        assert f"{name}.weight" in done
    # Behind these, Gemma has norms that a dense layer has not.
    for name in ("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"):
        assert name not in done
        torch.testing.assert_close(own[name], before[name])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_a_plain_targets_layers_are_copied_whole(kind: str, tmp_path: Path) -> None:
    target = Target(str(write_target(tmp_path, kind)), bf16=False)
    model = Drafter(
        parse_drafter_config(drafter_config(DrafterSpec(layers=2), target.config, TOKENIZER))
    )
    done = from_target(model, target)
    own = model.state_dict()
    for index, layer in enumerate(target.layers[-2:]):
        for name, value in layer.named_parameters():
            torch.testing.assert_close(own[f"layers.{index}.{name}"], value)
            assert f"layers.{index}.{name}" in done
    torch.testing.assert_close(own["norm.weight"], target.decoder.norm.weight)


@torch.no_grad()
def test_a_gemma4_drafter_copies_the_full_attention_layers(tmp_path: Path) -> None:
    target = write_gemma4(tmp_path)
    raw = drafter_config(DrafterSpec(layout="gemma4"), target.config, TOKENIZER)
    model = Drafter(parse_drafter_config(raw))
    done = from_target(model, target)
    own = model.state_dict()
    for index, layer in enumerate((target.layers[3], target.layers[5])):
        for name, value in layer.named_parameters():
            torch.testing.assert_close(own[f"layers.{index}.{name}"], value)
            assert f"layers.{index}.{name}" in done


# --- configurations -------------------------------------------------------------------------------


def test_a_gemma_target_with_dense_layers_keeps_the_full_attention_rope(tmp_path: Path) -> None:
    target = Target(str(write_target(tmp_path, "gemma")), bf16=False)
    raw = drafter_config(DrafterSpec(), target.config, TOKENIZER)
    assert raw["architectures"] == ["Qwen3DSparkModel"] and raw["hidden_act"] == "silu"
    assert raw["rope_parameters"]["rope_theta"] == 1e6


def test_a_gemma4_target_with_dense_layers() -> None:
    """Some of its widths differ between layers; a dense drafter takes the sliding ones'."""
    config = parse_drafter_config(drafter_config(DrafterSpec(), gemma4_config(), TOKENIZER))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 8)
    assert not config.gemma4 and config.rope_theta == 1e6
    DENSE.check_served(drafter_config(DrafterSpec(), gemma4_config(), TOKENIZER))


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"target_layer_ids": (-1, 2)}, "[-1, 2]"),
        ({"target_layer_ids": (2, 6)}, "[2, 6]"),
        ({"mask_token_id": VOCAB}, f"mask_token_id {VOCAB}"),
        ({"kv_heads": 3}, "kv_heads is 3"),
        ({"layout": "gemma4"}, "model_type is llama"),
    ],
    ids=["embedding", "layer", "mask", "kv_heads", "gemma4"],
)
def test_what_the_target_has_not(spec: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        drafter_config(DrafterSpec(**spec), text_config(), TOKENIZER)
    assert found in caught.value.found and caught.value.expected and caught.value.fix


@pytest.mark.parametrize("other", [{"sample_from_anchor": True}, {"layout": "gemma4"}])
def test_what_could_not_be_exported_is_not_trained(other: dict[str, Any]) -> None:
    spec = DrafterSpec(markov_head="none", **other)
    with pytest.raises(ConfigError, match="markov_head none"):
        check(TrainConfig(target="t", out="o", data=DataSpec(files=("f",)), drafter=spec))


def test_serving_refuses_what_sglang_has_no_class_for() -> None:
    raw, _ = make(DrafterSpec(layout="gemma4"), gemma4_config())
    with pytest.raises(CheckpointError) as caught:
        DENSE.check_served(raw)
    assert "Gemma4DSparkModel" in caught.value.found and "qwen3" in caught.value.fix
    raw, _ = make(DrafterSpec())
    with pytest.raises(CheckpointError, match="embedding"):
        DENSE.check_served(raw | {"target_layer_ids": [-1, 2]})
    last = raw | {"target_layer_ids": [1, 3]}
    DENSE.check_served(last, {"num_hidden_layers": 5})
    with pytest.raises(CheckpointError, match="last") as caught:
        DENSE.check_served(last, {"text_config": {"num_hidden_layers": 4}})
    assert "layers up to 2" in caught.value.expected


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"architectures": ["DSparkMiniMaxDraftModel"]}, "DSparkMiniMaxDraftModel"),
        ({"enable_confidence_head": False}, "no confidence head"),
        (
            {
                "has_embed_tokens": True,
                "quantization_config": {"quant_algo": "W4A16_NVFP4"},
            },
            "Nemotron 3.5",
        ),
    ],
)
def test_what_only_the_builtin_serves_is_refused_before_weights(
    fields: dict[str, Any], found: str
) -> None:
    raw, _ = make(DrafterSpec())
    for name in ("Qwen3DSparkModel", "LingDSparkModel", "DSparkDraftModel"):
        DENSE.check_served(raw | {"architectures": [name]})
    with pytest.raises(CheckpointError, match=found) as caught:
        DENSE.check_served(raw | fields)
    assert "DSPARK_PLUGIN=off" in caught.value.fix


def test_every_reason_against_serving_at_once() -> None:
    raw, _ = make(DrafterSpec())
    wrong = {"architectures": ["Other"], "enable_confidence_head": False, "target_layer_ids": [-1]}
    assert len(DENSE.unserved(raw | wrong)) == 3
    with pytest.raises(CheckpointError, match=r"Other.*no confidence head.*\[-1\]"):
        DENSE.check_served(raw | wrong)


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    folder, model = stored(tmp_path / "drafter", *LAYOUTS[name])
    config, tensors = read_drafter(folder)
    assert config == model.config
    check_tensors(folder, config)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == dense_tensors(config)
    other = Drafter(config)
    assert other.load(tensors) == []
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0)


def test_copies_of_the_targets_matrices_are_not_read(tmp_path: Path) -> None:
    """DeepSpec's checkpoints carry them; names may start with ``model.``."""
    folder, model = stored(tmp_path / "drafter", LAYOUTS["vanilla"][0])
    path = folder / WEIGHTS
    tensors = {f"model.{name}": value for name, value in load_file(path).items()}
    tensors |= {"embed_tokens.weight": torch.ones(VOCAB, HIDDEN)}
    tensors |= {"lm_head.weight": torch.ones(VOCAB, HIDDEN)}
    save_file(tensors, path)
    _, read = read_drafter(folder)
    assert read.keys() == model.state_dict().keys()


def test_gains_stored_one_less_are_read_as_they_multiply(tmp_path: Path) -> None:
    folder, model = stored(tmp_path / "drafter", LAYOUTS["vanilla"][0], use_gemma_norm=True)
    path = folder / WEIGHTS
    tensors = {
        name: value.float() - 1 if name.endswith("norm.weight") else value.float()
        for name, value in load_file(path).items()
    }
    save_file(tensors, path)
    _, read = read_drafter(folder)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(read[name], value)


def test_without_heads_a_dflash_drafter_is_written(tmp_path: Path) -> None:
    folder, model = stored(tmp_path / "drafter", DrafterSpec(gamma=4, markov_head="none"))
    raw = read_config(folder, role="drafter")
    assert raw["architectures"] == ["DFlashDraftModel"]
    assert raw["block_size"] == 5  # rows: the anchor and four masks
    assert raw["dflash_config"]["target_layer_ids"] == list(model.config.target_layer_ids)
    found = read_existing(folder)
    assert not found.markov and not found.config.sample_from_anchor
    assert found.config.gamma == 4
    backbone = {name for name in model.state_dict() if "_head." not in name}
    assert found.tensors.keys() == backbone
    with pytest.raises(CheckpointError):
        read_drafter(folder)  # not a DSpark drafter


@pytest.mark.parametrize(
    "spec",
    [
        DrafterSpec(markov_head="none", sample_from_anchor=True),
        DrafterSpec(markov_head="none", layout="gemma4"),
    ],
    ids=["from-anchor", "gemma4"],
)
def test_without_heads_only_what_dflash_runs_is_written(spec: DrafterSpec, tmp_path: Path) -> None:
    raw, model = make(spec, gemma4_config() if spec.layout == "gemma4" else None)
    with pytest.raises(CheckpointError, match="DFLASH"):
        write_drafter(tmp_path, raw, model.state_dict())
    assert not list(tmp_path.iterdir())
