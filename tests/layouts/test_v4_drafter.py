"""The V4 drafter: published names and shapes, what a block sees, and every part against its equation.

The whole forward pass is compared with one put together from Hugging Face's DeepSeek-V4 modules.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dspark_sglang.layouts.v4.config import V4Shape
from dspark_sglang.layouts.v4.drafter import V4Drafter
from dspark_sglang.layouts.v4.layers import (
    Collapse,
    HyperConnection,
    MixtureOfExperts,
    frequencies,
    read,
    sinkhorn,
    turn,
    write,
)
from tests.layouts.v4_samples import TINY, make


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
    found = turn(x, positions, frequencies(6, 100.0))
    assert torch.equal(found[:, :4], x[:, :4])
    for row, position in enumerate(positions.tolist()):
        for pair in range(3):
            at = 4 + 2 * pair
            spun = complex(
                math.cos(position / 100 ** (pair / 3)), math.sin(position / 100 ** (pair / 3))
            )
            wanted = complex(x[row, at], x[row, at + 1]) * spun
            assert complex(found[row, at], found[row, at + 1]) == pytest.approx(wanted, abs=1e-5)
    back = turn(found, positions, frequencies(6, 100.0), inverse=True)
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
