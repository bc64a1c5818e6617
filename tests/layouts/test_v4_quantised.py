"""The published quantised forms: exact both ways, and the tiny bundle the same model in either form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from dspark_sglang.checkpoint import read_header, weight_files
from dspark_sglang.layouts.v4 import tiny
from dspark_sglang.layouts.v4.drafter import load as load_drafter
from dspark_sglang.layouts.v4.drafter import load_tensors
from dspark_sglang.layouts.v4.storage import (
    EXACT,
    STORED,
    dequantise_fp4,
    dequantise_fp8,
    quantise_fp4,
    quantise_fp8,
    round_fp4,
    round_index,
    round_latents,
)
from dspark_sglang.layouts.v4.tensors import published_bundle


@pytest.mark.parametrize("shape", [(128, 128), (130, 260), (1, 1), (64, 512)], ids=str)
def test_fp8_is_within_half_a_step_and_exact_the_second_time(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 6, shape[0])[:, None]
    values, scale = quantise_fp8(weight)
    assert values.dtype is torch.float8_e4m3fn
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    found = dequantise_fp8(values, scale)
    wide = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    # Half of the last bit of three, or of the smallest step (2^-9) of a block.
    assert ((found - weight).abs() <= torch.maximum(weight.abs() / 16, wide * 2.0**-10)).all()
    assert torch.equal(dequantise_fp8(*quantise_fp8(found)), found)
    assert torch.equal(dequantise_fp8(values, scale, torch.bfloat16).float(), found)


def test_fp4_takes_the_nearest_and_packs_the_even_column_low() -> None:
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(round_fp4(torch.cat([grid, -grid])), torch.cat([grid, -grid]))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5])
    assert round_fp4(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -2.0]
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([6.0, -0.5, 0.0, 3.0])
    values, scale = quantise_fp4(row)
    assert values.view(torch.uint8)[0, :2].tolist() == [0x97, 0x50]
    assert scale.float().tolist() == [[1.0]]
    assert torch.equal(dequantise_fp4(values, scale), row)


def test_fp4_is_exact_the_second_time() -> None:
    weight = torch.randn(6, 96) * torch.logspace(-4, 4, 6)[:, None]
    values, scale = quantise_fp4(weight)
    found = dequantise_fp4(values, scale)
    assert values.shape == (6, 48)
    assert scale.shape == (6, 3)
    assert ((found - weight).abs() <= scale.float().repeat_interleave(32, 1)).all()
    assert torch.equal(dequantise_fp4(*quantise_fp4(found)), found)
    assert torch.equal(dequantise_fp4(values, scale, torch.bfloat16).float(), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_come_back_as_a_cache_keeps_them(dtype: torch.dtype) -> None:
    latents = torch.randn(5, 512, dtype=dtype)
    latents[:, :64] *= 1e-3
    found = round_latents(latents, 64)
    assert found.dtype is dtype
    assert torch.equal(found[:, 448:], latents[:, 448:].bfloat16().to(dtype))
    for tile in range(7):
        part = slice(tile * 64, tile * 64 + 64)
        largest = latents[:, part].abs().amax(1)
        scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))[:, None]
        wanted = (latents[:, part] / scale).to(torch.float8_e4m3fn).to(dtype) * scale
        assert torch.equal(found[:, part], wanted)
    assert torch.equal(round_latents(found, 64), found)


def test_the_indexers_rows_are_rounded_in_either_form() -> None:
    x = torch.randn(3, 128)
    coarse, fine = (round_index(x, form) for form in ("fp4", "fp8"))
    assert (fine - x).abs().max() < (coarse - x).abs().max() < 1.0
    assert torch.equal(round_index(coarse, "fp4"), coarse)
    assert EXACT.index(x) is x
    assert torch.equal(STORED.index(x), fine)


# --- the tiny bundle ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Plain bfloat16, and published."""
    root = tmp_path_factory.mktemp("v4")
    tiny.write(root / "plain")
    tiny.write(root / "published", published=True)
    return root / "plain", root / "published"


def test_both_forms_are_the_same_model(bundles: tuple[Path, Path]) -> None:
    plain, published = (load_tensors(folder)[1] for folder in bundles)
    assert plain.keys() == published.keys()
    assert [name for name in plain if not torch.equal(plain[name], published[name])] == []
    assert load_drafter(bundles[1], torch.float64).gamma == 5


def test_the_published_form_has_the_published_types(bundles: tuple[Path, Path]) -> None:
    folder = bundles[1]
    tensors = {n: t for path in weight_files(folder) for n, t in read_header(path).tensors.items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    config = json.loads((folder / "config.json").read_text())
    assert found == published_bundle(config)
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert len(weight_files(folder)) == 4
    last = weight_files(folder)[-1]
    with safe_open(last, "pt") as held:
        assert all(name.startswith("mtp.") for name in held.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for path in weight_files(folder) for value in _values(path)
    )


def _values(path: Path) -> list[torch.Tensor]:
    with safe_open(path, "pt") as held:
        return [held.get_tensor(name) for name in held.keys()]  # noqa: SIM118


def test_the_seed_decides() -> None:
    one, again, other = (tiny.tensors(tiny.CONFIG, seed) for seed in (3, 3, 4))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])


def test_the_tokenizer_takes_any_text(bundles: tuple[Path, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundles[0], local_files_only=True)
    assert len(tokenizer) == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.convert_tokens_to_ids("<｜noise｜>") == 511
    for text in ("The heat, then rain.", "Zürich 東京 \n\t{}", "etet"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 511
    assert len(tokenizer.encode("etet")) == 2
    assert isinstance(tokenizer.decode(list(range(512))), str)
    said = [{"role": "user", "content": "hi"}]
    assert (
        tokenizer.apply_chat_template(said, tokenize=False) == "<｜begin▁of▁sentence｜>user: hi\n"
    )
