"""The V4 target's reference: against Hugging Face's model, and against planted mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.config import TargetShape, V4Shape
from dspark_sglang.layouts.v4.drafter import V4Drafter
from dspark_sglang.layouts.v4.reference import Forward, Reference
from dspark_sglang.layouts.v4.storage import EXACT, STORED
from tests.v4.planted import BEYOND_TOP_K, MISTAKES, gaps

#: The largest gap that a float32 server left at 400 tokens: it rounds to fp8 too, but not always alike.
SERVER_NOISE = 3.5e-3


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny.tensors(tiny.CONFIG, seed=0)


def made(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Reference:
    """With an indexer that leaves blocks out from token 128 on."""
    shape = replace(TargetShape.from_config(tiny.CONFIG), index_topk=32)
    held = {n: v.to(dtype) if v.is_floating_point() else v for n, v in weights.items()}
    return Reference(held, shape)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 510, (300,), generator=generator).tolist()


def own(forward: Forward, tokens: list[int]) -> list[float]:
    rows = forward.logprobs()[:-1]
    return rows.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def noise(weights: dict[str, torch.Tensor], tokens: list[int]) -> float:
    """What float32 loses of float64, without the storage's rounding, which magnifies it."""
    single, double = made(weights), made(weights, torch.float64)
    single.rounding = double.rounding = EXACT
    return gaps(double, tokens, own(single(tokens), tokens)).largest


@pytest.fixture(scope="module")
def exact(weights: dict[str, torch.Tensor], tokens: list[int]) -> list[float]:
    return own(made(weights)(tokens), tokens)


def test_float32_is_near_float64(noise: float) -> None:
    assert noise < 5e-5


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_moves_the_log_probabilities(
    name: str, weights: dict[str, torch.Tensor], tokens: list[int], exact: list[float], noise: float
) -> None:
    """By 50 times what float32 loses, and by 50 times what a server was off."""
    reference = made(weights)
    with MISTAKES[name](reference):
        wrong = gaps(reference, tokens, exact)
    assert wrong.largest > 50 * max(noise, SERVER_NOISE)
    assert gaps(reference, tokens, exact).largest == 0.0  # and it is undone


def test_one_mistake_needs_an_indexer_that_leaves_blocks_out(
    weights: dict[str, torch.Tensor], tokens: list[int]
) -> None:
    reference = made(weights)
    reference.shape = replace(reference.shape, index_topk=512)
    right = own(reference(tokens), tokens)
    for name in BEYOND_TOP_K:
        with MISTAKES[name](reference):
            assert gaps(reference, tokens, right).largest == 0.0


# --- against Hugging Face's model -----------------------------------------------------------------


@pytest.mark.parametrize("topk", [512, 32], ids=["every-block", "blocks-left-out"])
def test_the_whole_target_is_hugging_faces(topk: int, tmp_path: Path, tokens: list[int]) -> None:
    """Its own code, its own mapping of the published names; nothing is rounded in either."""
    from transformers import AutoModelForCausalLM

    tiny.write(tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text()) | {"index_topk": topk}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "mismatched_keys"))
    streams: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: streams.append(out))
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    reference = Reference.load(tmp_path, rounding=EXACT)
    ours = reference(tokens)
    assert (theirs - ours.logprobs()).abs().max() < 5e-5
    for found, wanted in zip(ours.states, streams, strict=True):
        torch.testing.assert_close(found, wanted[0].mean(dim=1), rtol=1e-4, atol=1e-5)
    left_out = [border for border in ours.borders if border.what == "blocks"]
    assert bool(left_out) == (topk == 32)


def test_borders_are_where_something_was_left_out(
    weights: dict[str, torch.Tensor], tokens: list[int]
) -> None:
    forward = made(weights)(tokens)
    blocks = [border for border in forward.borders if border.what == "blocks"]
    # Layers of ratio 4, positions at which a 33rd block of 4 has ended.
    assert {(border.layer, border.position) for border in blocks} == {
        (layer, position) for layer in (2, 4) for position in range(131, len(tokens))
    }
    experts = {(b.layer, b.position) for b in forward.borders if b.what == "experts"}
    assert experts == {(layer, at) for layer in range(2, 6) for at in range(len(tokens))}
    assert all(border.gap >= 0 for border in forward.borders)
    near = forward.near_ties(1e-3)
    assert near[0].gap == 0.0  # blocks of score 0, all of whose products ReLU has cut
    assert [border.gap for border in near] == sorted(b.gap for b in forward.borders if b.gap < 1e-3)


def test_a_later_token_changes_nothing_before_it(
    weights: dict[str, torch.Tensor], tokens: list[int]
) -> None:
    reference = made(weights, torch.float64)
    reference.rounding = EXACT
    # Blocks whose products are all negative score 0 exactly: which of them is chosen is anybody's.
    reference.shape = replace(reference.shape, index_topk=512)
    whole, part = reference(tokens), reference(tokens[:201])
    torch.testing.assert_close(whole.logits[:201], part.logits, rtol=1e-9, atol=1e-9)


def test_what_the_drafter_reads(weights: dict[str, torch.Tensor], tokens: list[int]) -> None:
    """Of this target, with latents as stored: near what exact ones draft, and not the same."""
    forward = made(weights)(tokens)
    shape = V4Shape.from_config(tiny.CONFIG)
    read = forward.read_by(shape)
    assert torch.equal(read[:, :128], forward.states[3])
    found = []
    for rounding in (EXACT, STORED):
        drafter = V4Drafter.load(weights, shape, weights["embed.weight"], rounding)
        anchors = torch.arange(140, 300)
        rows = weights["embed.weight"][torch.tensor(tokens)[anchors]]
        hidden = drafter.hidden(drafter.context(read), anchors, rows)
        found.append(drafter.base_logits(hidden, weights["head.weight"]))
    assert not torch.equal(*found)
    same = (found[0].argmax(dim=-1) == found[1].argmax(dim=-1)).float().mean()
    assert same > 0.9


@pytest.mark.parametrize("length", [1, 3, 4, 127, 128])
def test_a_prefix_says_what_the_whole_text_says(length: int, tmp_path: Path) -> None:
    """Shorter than a block of either ratio, too: no position sees what comes after it."""
    tiny.write(tmp_path, dtype=torch.float32)
    reference = Reference.load(tmp_path)
    tokens = torch.randint(2, 500, (140,), generator=torch.Generator().manual_seed(4)).tolist()
    whole, part = reference(tokens), reference(tokens[:length])
    torch.testing.assert_close(part.logits, whole.logits[:length], rtol=0, atol=2e-2)
    assert float((part.logits - whole.logits[:length]).abs().mean()) < 1e-3
