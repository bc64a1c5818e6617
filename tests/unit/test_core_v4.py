"""The V4 drafter: published names and shapes, what a block sees, and every part against its equation.

The whole forward pass is compared with one put together from Hugging Face's DeepSeek-V4 modules.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dspark_sglang.core.v4 import V4Drafter, V4Shape, random_tensors, v4_tensors
from dspark_sglang.core.v4.attention import rotate_pairs
from dspark_sglang.core.v4.hyper import Collapse, HyperConnection, read, sinkhorn, write
from dspark_sglang.core.v4.moe import MixtureOfExperts
from dspark_sglang.errors import CheckpointError

FLASH: dict[str, Any] = {
    "hidden_size": 4096,
    "vocab_size": 129280,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "sliding_window": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
}
PRO = FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "dspark_markov_rank": 512,
    "dspark_target_layer_ids": [58, 59, 60],
}
TINY = FLASH | {
    "hidden_size": 16,
    "vocab_size": 13,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 6,
    "o_lora_rank": 5,
    "o_groups": 2,
    "sliding_window": 6,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "swiglu_limit": 0.5,
    "hc_mult": 3,
    "hc_sinkhorn_iters": 2,  # few enough that one more would show
    "dspark_block_size": 3,
    "dspark_markov_rank": 4,
    "dspark_noise_token_id": 11,
    "dspark_target_layer_ids": [3, 4, 5],
}


def make(seed: int = 0, **changes: Any) -> tuple[V4Shape, dict[str, torch.Tensor], V4Drafter]:
    """A tiny drafter with random weights and embedding."""
    shape = V4Shape.from_config(TINY | changes)
    tensors = random_tensors(shape, seed)
    return shape, tensors, V4Drafter.load(tensors, shape, torch.randn(shape.vocab, shape.hidden))


def says(error: CheckpointError, said: str) -> None:
    """The message holds some words and a way out."""
    assert said in str(error)
    assert error.fix


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- configuration and tensors ------------------------------------------------------------------


def test_the_published_flash_drafter() -> None:
    shape = V4Shape.from_config(FLASH)
    assert (shape.gamma, shape.rank, shape.window, shape.layers) == (5, 256, 128, 3)
    assert shape.target_layers == (40, 41, 42)
    found = v4_tensors(shape)
    layer = {
        "attn_norm.weight": (4096,),
        "ffn_norm.weight": (4096,),
        "attn.wq_a.weight": (1024, 4096),
        "attn.q_norm.weight": (1024,),
        "attn.wq_b.weight": (32768, 1024),
        "attn.wkv.weight": (512, 4096),
        "attn.kv_norm.weight": (512,),
        "attn.attn_sink": (64,),
        "attn.wo_a.weight": (8192, 4096),
        "attn.wo_b.weight": (4096, 8192),
        "hc_attn_fn": (24, 16384),
        "hc_attn_base": (24,),
        "hc_attn_scale": (3,),
        "hc_ffn_fn": (24, 16384),
        "hc_ffn_base": (24,),
        "hc_ffn_scale": (3,),
        "ffn.gate.weight": (256, 4096),
        "ffn.gate.bias": (256,),
    }
    for expert in ["shared_experts", *(f"experts.{i}" for i in range(256))]:
        layer |= {f"ffn.{expert}.w{i}.weight": (2048, 4096) for i in (1, 3)}
        layer[f"ffn.{expert}.w2.weight"] = (4096, 2048)
    expected = {f"mtp.{i}.{name}": size for i in range(3) for name, size in layer.items()}
    expected |= {
        "mtp.0.main_proj.weight": (4096, 12288),
        "mtp.0.main_norm.weight": (4096,),
        "mtp.2.norm.weight": (4096,),
        "mtp.2.hc_head_fn": (4, 16384),
        "mtp.2.hc_head_base": (4,),
        "mtp.2.hc_head_scale": (1,),
        "mtp.2.markov_head.markov_w1.weight": (129280, 256),
        "mtp.2.markov_head.markov_w2.weight": (129280, 256),
        "mtp.2.confidence_head.proj.weight": (1, 4352),
    }
    assert found == expected


def test_the_published_pro_drafter() -> None:
    shape = V4Shape.from_config(PRO)
    assert (shape.gamma, shape.rank, shape.mask_token) == (5, 512, 128799)
    found = v4_tensors(shape)
    assert len(found) == 2 + 3 * (18 + 3 * 385) + 7
    for name, size in {
        "mtp.0.main_proj.weight": (7168, 21504),
        "mtp.1.attn.wq_b.weight": (65536, 1536),
        "mtp.1.attn.wo_a.weight": (16384, 4096),
        "mtp.1.attn.wo_b.weight": (7168, 16384),
        "mtp.1.hc_ffn_fn": (24, 28672),
        "mtp.2.ffn.experts.383.w2.weight": (7168, 3072),
        "mtp.2.markov_head.markov_w2.weight": (129280, 512),
        "mtp.2.confidence_head.proj.weight": (1, 7680),
    }.items():
        assert found[name] == size, name


@pytest.mark.parametrize(
    ("config", "published"), [(FLASH, 10.3), (PRO, 40.4)], ids=["flash", "pro"]
)
def test_the_sizes_give_the_published_memory(config: dict[str, Any], published: float) -> None:
    """Routed experts at mxfp4 (4.25 bits a weight) are nearly all of the extra memory."""
    sizes = v4_tensors(V4Shape.from_config(config))
    experts = sum(math.prod(size) for name, size in sizes.items() if ".experts." in name)
    assert experts * 4.25 / 8e9 == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"o_lora_rank": None}, "o_lora_rank"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor"),
        ({"dspark_target_layer_ids": None}, "dspark_target_layer_ids"),
        ({"dspark_target_layer_ids": [4, 6]}, "0..5"),
        ({"dspark_target_layer_ids": []}, "list of layers"),
        ({"dspark_block_size": 0}, "at least 1"),
        ({"dspark_block_size": "5"}, "integer"),
        ({"dspark_markov_rank": True}, "integer"),
        ({"dspark_noise_token_id": 13}, "below 13"),
        ({"qk_rope_head_dim": 3}, "even number"),
        ({"qk_rope_head_dim": 10}, "head_dim 8"),
        ({"o_groups": 3}, "divisor of 4"),
        ({"num_experts_per_tok": 6}, "at most 5"),
        ({"hc_eps": -1.0}, "positive"),
        ({"norm_topk_prob": 1}, "true or false"),
        ({"scoring_func": "sigmoid"}, "sqrtsoftplus"),
        ({"dspark_markov_head_type": "rnn"}, "vanilla"),
        ({"hc_pre_from_prev_sublayer": True}, "False"),
        ({"enable_confidence_head": False}, "True"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        V4Shape.from_config(TINY | changes)
    says(caught.value, said)


def test_defaults_and_other_spellings() -> None:
    spelled = {
        k: v for k, v in TINY.items() if k not in ("sliding_window", "rope_theta", "head_dim")
    }
    spelled |= {"window_size": 6, "qk_nope_head_dim": 4}
    nested = {"rope_parameters": {"main": {"rope_theta": 10000}, "compress": {"rope_theta": 4e4}}}
    assert V4Shape.from_config(spelled | nested) == V4Shape.from_config(TINY)
    fewer = V4Shape.from_config(TINY | {"dspark_n_routed_experts": 3})
    assert (fewer.experts, fewer.active) == (3, 2)
    assert V4Shape.from_config(TINY).rows == 3
    assert V4Shape.from_config(TINY | {"sample_from_anchor": False}).rows == 4


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): value for name, value in tensors.items()}


def test_tensors_that_do_not_fit_are_errors() -> None:
    shape, tensors, _ = make()
    one = "mtp.1.attn.wkv.weight"
    fp8 = tensors[one].to(torch.float8_e4m3fn)
    for given, said in (
        ({k: v for k, v in tensors.items() if k != one}, one),
        (tensors | {one: tensors[one].T}, "[8, 16]"),
        (tensors | {"mtp.1.e_proj.weight": torch.ones(2)}, "mtp.1.e_proj.weight"),
        (tensors | {"mtp.1.attn.wkv.scale": torch.ones(1, 1)}, "quantised"),
        (tensors | {"mtp.1.attn.wkv.weight_scale_inv": torch.ones(1, 1)}, "quantised"),
        (tensors | {one: fp8}, "quantised"),
        (tensors | {one: torch.ones(8, 16, dtype=torch.int8)}, "quantised"),
    ):
        with pytest.raises(CheckpointError) as caught:
            V4Drafter.load(given, shape, torch.randn(13, 16))
        says(caught.value, said)


def test_the_targets_own_tensors_and_the_heads_other_names_are_accepted() -> None:
    shape, tensors, drafter = make()
    given = rename(tensors, "markov_w1", "embed") | {"embed.weight": torch.ones(1)}
    given = rename(given, "markov_w2", "head") | {"layers.0.attn.wkv.scale": torch.ones(1)}
    loaded = V4Drafter.load(given, shape, torch.randn(13, 16))
    assert loaded.markov.w1 is drafter.markov.w1
    assert loaded.markov.w2 is drafter.markov.w2


def test_random_tensors_repeat() -> None:
    shape, tensors, _ = make(seed=3)
    assert all(torch.equal(a, tensors[n]) for n, a in random_tensors(shape, 3).items())
    assert not torch.equal(
        random_tensors(shape, 4)["mtp.0.hc_attn_fn"], tensors["mtp.0.hc_attn_fn"]
    )


# --- hyper-connections ----------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 4])
def test_sinkhorn_gives_doubly_stochastic_matrices(m: int) -> None:
    logits = 1.5 * torch.randn(50, m, m, dtype=torch.float64)
    made = sinkhorn(logits, 500, 1e-15)
    assert made.min() > 0
    torch.testing.assert_close(made.sum(-1), torch.ones(50, m).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(made.sum(-2), torch.ones(50, m).double(), rtol=0, atol=1e-6)
    # After V4's 20 iterations columns already sum to one: they are normalised last.
    columns = sinkhorn(logits, 20, 1e-6).sum(-2)
    torch.testing.assert_close(columns, torch.ones(50, m).double(), rtol=0, atol=1e-5)
    # Scaling rows and columns is all that Sinkhorn does: 2x2 minors keep their ratios.
    if m > 1:
        before, after = logits.exp(), made
        minor = before[:, 0, 0] * before[:, 1, 1] / (before[:, 0, 1] * before[:, 1, 0])
        kept = after[:, 0, 0] * after[:, 1, 1] / (after[:, 0, 1] * after[:, 1, 0])
        torch.testing.assert_close(kept, minor, rtol=1e-4, atol=1e-4)


def test_the_streams_are_mixed_as_written() -> None:
    """Every output stream by hand, with a comb that is far from symmetric."""
    m, d = 3, 2
    streams, out = torch.randn(m, d), torch.randn(d)
    link = HyperConnection(torch.randn(15, 6), torch.randn(15), torch.randn(3), 20, 1e-6, 1e-6)
    found = link.mappings(streams)
    made = write(out, streams, found)
    for i in range(m):
        mixed = sum(found.comb[j, i] * streams[j] for j in range(m))
        torch.testing.assert_close(made[i], found.post[i] * out + mixed)
    wanted = sum(found.pre[j] * streams[j] for j in range(m))
    torch.testing.assert_close(read(streams, found.pre), wanted)


def identity(tensors: dict[str, torch.Tensor], shape: V4Shape) -> dict[str, torch.Tensor]:
    """Mappings that read the mean of the streams, write to all alike and mix none."""
    m = shape.streams
    pre = torch.full((m,), 1.0 / m).logit()
    comb = torch.where(torch.eye(m).bool(), 100.0, 0.0).view(-1)
    changed = dict(tensors)
    for name, value in tensors.items():
        if ".hc_" in name and name.endswith("_scale"):
            changed[name] = torch.zeros_like(value)
        elif ".hc_" in name and name.endswith("_base"):
            changed[name] = torch.cat([pre, torch.zeros(m), comb])[: len(value)]
    return changed


@pytest.mark.parametrize("whole", [True, False], ids=["anchor", "no-anchor"])
def test_with_identity_mappings_the_layers_are_a_plain_residual(whole: bool) -> None:
    shape, tensors, _ = make(sample_from_anchor=whole)
    embedding = torch.randn(13, 16)
    drafter = V4Drafter.load(identity(tensors, shape), shape, embedding)
    context = drafter.context(torch.randn(9, 48))
    found = drafter.hidden(context, torch.tensor([7]), embedding[2][None])

    x = embedding[[2] + [11] * (shape.rows - 1)][None]
    own = 7 + torch.arange(shape.rows)[None]
    seen = ((torch.arange(9) >= 1) & (torch.arange(9) < 7))[None]
    for layer in range(3):
        attention, experts = drafter._attention[layer], drafter._experts[layer]
        latents = attention.latents(context, torch.arange(9))
        x = x + attention(drafter._norm(x, f"mtp.{layer}.attn_norm"), own, latents, seen)
        x = x + experts(drafter._norm(x, f"mtp.{layer}.ffn_norm"))
    torch.testing.assert_close(found, x[:, shape.rows - 3 :], rtol=1e-4, atol=1e-4)


# --- experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("limit", [0.5, None], ids=["clamped", "free"])
def test_the_experts_equal_a_loop_over_tokens(normalise: bool, limit: float | None) -> None:
    shape, tensors, _ = make(norm_topk_prob=normalise, swiglu_limit=limit, n_shared_experts=2)
    bias = tensors["mtp.1.ffn.gate.bias"]
    assert bias.abs().max() > 0.5  # it decides some choices

    def expert(x: torch.Tensor, name: str) -> torch.Tensor:
        w1, w2, w3 = (tensors[f"mtp.1.ffn.{name}.w{i}.weight"] for i in (1, 2, 3))
        made = []
        for gate, up in zip(w1 @ x, w3 @ x, strict=True):
            gate, up = float(gate), float(up)
            if limit is not None:
                gate, up = min(gate, limit), max(-limit, min(up, limit))
            made.append(gate / (1.0 + math.exp(-gate)) * up)
        return w2 @ torch.tensor(made)

    rows = torch.randn(2, 6, 16)
    found = MixtureOfExperts(tensors, "mtp.1.ffn.", shape)(rows)
    for x, got in zip(rows.view(-1, 16), found.view(-1, 16), strict=True):
        logits = (tensors["mtp.1.ffn.gate.weight"] @ x).tolist()
        scores = [math.sqrt(math.log1p(math.exp(value))) for value in logits]
        order = sorted(range(5), key=lambda e: -(scores[e] + float(bias[e])))[:2]
        total = sum(scores[e] for e in order) if normalise else 1.0
        wanted = expert(x, "shared_experts")
        for e in order:
            wanted = wanted + 1.5 * scores[e] / total * expert(x, f"experts.{e}")
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# --- attention ------------------------------------------------------------------------------------


def test_rope_turns_adjacent_pairs_of_the_last_dimensions() -> None:
    x, positions = torch.randn(7, 10, dtype=torch.float64), torch.arange(7) * 5
    found = rotate_pairs(x, positions, 100.0, 6)
    assert torch.equal(found[:, :4], x[:, :4])
    for row, position in enumerate(positions.tolist()):
        for pair in range(3):
            at = 4 + 2 * pair
            turn = complex(
                math.cos(position / 100 ** (pair / 3)), math.sin(position / 100 ** (pair / 3))
            )
            wanted = complex(x[row, at], x[row, at + 1]) * turn
            assert complex(found[row, at], found[row, at + 1]) == pytest.approx(wanted, abs=1e-5)
    back = rotate_pairs(found, positions, 100.0, 6, inverse=True)
    torch.testing.assert_close(back, x)


def states_and_anchors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(14, 48), torch.tensor([3, 9, 14]), torch.randn(3, 16)


@pytest.mark.parametrize("whole", [True, False], ids=["anchor", "no-anchor"])
def test_a_block_sees_its_window_of_context_and_nothing_else(whole: bool) -> None:
    """Anchor 9 with a window of 6 sees context 3..8."""
    _, _, drafter = make(sample_from_anchor=whole)
    states, anchors, rows = states_and_anchors()
    plain = drafter.hidden(drafter.context(states), anchors, rows)
    assert plain.shape == (3, 3, 16)
    for position in range(14):
        changed = states.clone()
        changed[position] += 1.0
        made = drafter.hidden(drafter.context(changed), anchors, rows)
        for block, anchor in enumerate(anchors.tolist()):
            moved = float((made[block] - plain[block]).abs().max())
            seen = anchor - 6 <= position < anchor
            assert moved > 1e-3 if seen else moved < 1e-5, (anchor, position, moved)
    # What is hidden may even be absent.
    alone = drafter.hidden(drafter.context(states[:9]), anchors[1:2], rows[1:2])
    torch.testing.assert_close(alone[0], plain[1])


def test_rows_of_a_block_see_each_other_and_no_other_block() -> None:
    shape, tensors, drafter = make()
    states, anchors, rows = states_and_anchors()
    context = drafter.context(states)
    plain = drafter.hidden(context, anchors, rows)
    moved = rows.clone()
    moved[1] += 1.0
    made = drafter.hidden(context, anchors, moved)
    torch.testing.assert_close(made[[0, 2]], plain[[0, 2]])
    assert ((made[1] - plain[1]).abs().amax(-1) > 1e-3).all()  # later rows see the anchor's
    # The first row sees the rows after it: their mask embedding reaches its output.
    embedding = torch.randn(13, 16)
    other = V4Drafter.load(tensors, shape, embedding).hidden(context, anchors, rows)
    assert ((other[:, 0] - plain[:, 0]).abs().amax(-1) > 1e-3).all()


def test_without_the_anchors_row_the_mask_rows_predict_their_own_positions() -> None:
    """gamma + 1 rows run, and the last gamma are what comes out."""
    shape, tensors, _ = make(sample_from_anchor=False)
    wider = V4Shape.from_config(TINY | {"dspark_block_size": 4})
    embedding = torch.randn(13, 16)
    states, anchors, rows = states_and_anchors()
    made = []
    for used in (shape, wider):
        drafter = V4Drafter.load(tensors, used, embedding)
        made.append(drafter.hidden(drafter.context(states), anchors, rows))
    assert made[0].shape == (3, 3, 16)
    torch.testing.assert_close(made[0], made[1][:, 1:])


def test_the_heads() -> None:
    """Confidence reads the rows before the last norm, base logits are made after it."""
    shape, tensors, drafter = make()
    hidden, head = torch.randn(2, 3, 16), torch.randn(13, 16)
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    wanted = (normed * tensors["mtp.2.norm.weight"]) @ head.T
    torch.testing.assert_close(drafter.base_logits(hidden, head), wanted)
    previous = torch.randint(13, (2, 3))
    weight = tensors["mtp.2.confidence_head.proj.weight"][0]
    features = torch.cat([hidden, tensors["mtp.2.markov_head.markov_w1.weight"][previous]], dim=-1)
    found = drafter.confidence.logits(hidden, previous, drafter.markov)
    torch.testing.assert_close(found, features @ weight)
    assert drafter.markov.kind == "vanilla"
    assert drafter.gamma == shape.gamma == 3
    alone = make(confidence_head_with_markov=False)[2].confidence
    assert not alone.with_markov
    assert alone.weight.shape == (16,)


# --- against Hugging Face's modules -----------------------------------------------------------------


def hf_layer(config: Any, tensors: dict[str, torch.Tensor], layer: int) -> Any:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

    t = {n.removeprefix(f"mtp.{layer}."): v for n, v in tensors.items() if f"mtp.{layer}." in n}
    named = {
        "input_layernorm.weight": t["attn_norm.weight"],
        "post_attention_layernorm.weight": t["ffn_norm.weight"],
        "self_attn.sinks": t["attn.attn_sink"],
        "self_attn.q_a_norm.weight": t["attn.q_norm.weight"],
        "self_attn.kv_norm.weight": t["attn.kv_norm.weight"],
        "mlp.gate.weight": t["ffn.gate.weight"],
        "mlp.gate.e_score_correction_bias": t["ffn.gate.bias"],
    }
    for ours, theirs in (
        ("wq_a", "q_a"),
        ("wq_b", "q_b"),
        ("wkv", "kv"),
        ("wo_a", "o_a"),
        ("wo_b", "o_b"),
    ):
        named[f"self_attn.{theirs}_proj.weight"] = t[f"attn.{ours}.weight"]
    for part in ("attn", "ffn"):
        for name in ("fn", "base", "scale"):
            named[f"{part}_hc.{name}"] = t[f"hc_{part}_{name}"]
    for ours, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        named[f"mlp.shared_experts.{theirs}_proj.weight"] = t[f"ffn.shared_experts.{ours}.weight"]
    stacked = {
        w: torch.stack([t[f"ffn.experts.{e}.{w}.weight"] for e in range(5)])
        for w in ("w1", "w2", "w3")
    }
    named["mlp.experts.gate_up_proj"] = torch.cat([stacked["w1"], stacked["w3"]], dim=1)
    named["mlp.experts.down_proj"] = stacked["w2"]
    made = hf.DeepseekV4DecoderLayer(config, layer)
    made.load_state_dict(named, strict=False)
    missing = set(made.state_dict()) - set(named)
    assert not missing, missing
    return made.eval()


@torch.no_grad()
def hf_hidden(
    tensors: dict[str, torch.Tensor], context: torch.Tensor, anchor: int, rows: torch.Tensor
) -> torch.Tensor:
    """One block through Hugging Face's modules: rows ``[n, d]`` at ``anchor``."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    keys = ("hidden_size", "head_dim", "q_lora_rank", "o_lora_rank", "o_groups", "sliding_window")
    keys += ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "swiglu_limit")
    keys += (
        "hc_mult",
        "hc_sinkhorn_iters",
        "num_attention_heads",
        "qk_rope_head_dim",
        "vocab_size",
    )
    config = DeepseekV4Config(
        **{key: TINY[key] for key in keys},
        num_hidden_layers=3,
        layer_types=["sliding_attention"] * 3,
        mlp_layer_types=["moe"] * 3,
    )
    config._attn_implementation = "eager"
    rotary = hf.DeepseekV4RotaryEmbedding(config)
    count, length = len(rows), len(context)
    positions = torch.cat([torch.arange(length), anchor + torch.arange(count)])[None]
    turned = {"main": rotary(rows, positions, layer_type="main")}
    hidden = (positions < anchor - 6) | (
        (positions >= anchor) & (torch.arange(length + count) < length)
    )
    mask = torch.zeros(1, 1, 1, length + count).masked_fill_(hidden, float("-inf"))
    streams = rows[None, :, None].repeat(1, 1, 3, 1)
    for number in range(3):
        layer = hf_layer(config, tensors, number)
        post, comb, x = layer.attn_hc(streams)
        joined = torch.cat([context[None], layer.input_layernorm(x)], dim=1)
        out = layer.self_attn(joined, turned, positions, mask)[0][:, length:]
        streams = post[..., None] * out[..., None, :] + comb.transpose(-1, -2) @ streams
        post, comb, x = layer.ffn_hc(streams)
        out = layer.mlp(layer.post_attention_layernorm(x))
        streams = post[..., None] * out[..., None, :] + comb.transpose(-1, -2) @ streams
    head = hf.DeepseekV4HyperHead(config)
    head.load_state_dict(
        {f"hc_{n}": tensors[f"mtp.2.hc_head_{n}"] for n in ("fn", "base", "scale")}
    )
    return head(streams)[0]


@pytest.mark.parametrize("whole", [True, False], ids=["anchor", "no-anchor"])
def test_the_forward_pass_is_hugging_faces(whole: bool) -> None:
    shape, tensors, _ = make(sample_from_anchor=whole)
    embedding = torch.randn(13, 16)
    drafter = V4Drafter.load(tensors, shape, embedding)
    states, anchors, rows = states_and_anchors()
    context = drafter.context(states)
    projected = states @ tensors["mtp.0.main_proj.weight"].T
    scale = torch.rsqrt(projected.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(context, projected * scale * tensors["mtp.0.main_norm.weight"])
    found = drafter.hidden(context, anchors, rows)
    for block, anchor in enumerate(anchors.tolist()):
        first = [rows[block : block + 1], embedding[[11] * (shape.rows - 1)]]
        wanted = hf_hidden(tensors, context, anchor, torch.cat(first))[shape.rows - 3 :]
        torch.testing.assert_close(found[block], wanted, rtol=1e-3, atol=1e-4)


def test_the_collapse_is_a_weighted_sum() -> None:
    streams = torch.randn(5, 3, 2)
    collapse = Collapse(
        torch.zeros(3, 6), torch.tensor([0.0, 1.0, -1.0]), torch.ones(1), 1e-6, 1e-6
    )
    weights = torch.tensor([0.0, 1.0, -1.0]).sigmoid()
    torch.testing.assert_close(
        collapse(streams), (weights[:, None] * streams).sum(1), rtol=1e-4, atol=1e-5
    )
