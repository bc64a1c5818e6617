"""Drafters that start from another drafter: the same function, or an error that says what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_sglang.checkpoint import read_config
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.dense.config import DrafterSpec, parse_drafter_config
from dspark_sglang.layouts.dense.read import read_existing
from dspark_sglang.layouts.dense.write import WEIGHTS, drafter_config
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.start import Copied, from_drafter, initialise, prepare
from tests.layouts.layouts_samples import HIDDEN, LAYOUTS, TOKENIZER, blocks, stored, text_config

# --- starting from another drafter ----------------------------------------------------------------


def start_from(folder: Path, spec: DrafterSpec, target: Any = None) -> tuple[Drafter, Copied]:
    raw = drafter_config(spec, target or text_config(), TOKENIZER, str(folder))
    model = Drafter(parse_drafter_config(raw), markov=spec.markov_head != "none")
    initialise(model, 0)
    return model, from_drafter(model, folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fine_tuning_starts_as_the_same_function(name: str, tmp_path: Path) -> None:
    spec, target = LAYOUTS[name]
    folder, model = stored(tmp_path / "drafter", spec, target)
    again, copied = start_from(folder, spec, target)
    assert copied == Copied(layers=2, of=2, new=[], unused=[])
    given = blocks(model.config, model.rows)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)
    begun = prepare(
        again,
        SimpleNamespace(),  # type: ignore[arg-type]
        start=str(folder),
        use_target=True,
        seed=0,
    )
    assert "2 of its 2 layers" in begun.text
    assert begun.markov


@pytest.mark.parametrize("name", ["vanilla", "gemma4"])
def test_more_layers_start_as_no_ops(name: str, tmp_path: Path) -> None:
    spec, target = LAYOUTS[name]
    folder, model = stored(tmp_path / "drafter", spec, target)
    longer = DrafterSpec(layers=3, markov_rank=4, layout=spec.layout)
    again, copied = start_from(folder, longer, target)
    assert (copied.layers, copied.of) == (2, 2)
    assert copied.new and all(n.startswith("layers.2.") for n in copied.new)
    assert f"{len(copied.new)} tensors new (layers.2." in str(copied)
    given = blocks(model.config, model.rows)
    torch.testing.assert_close(again(**given), model(**given))


def test_fewer_layers_keep_the_first(tmp_path: Path) -> None:
    folder, model = stored(tmp_path / "drafter", LAYOUTS["vanilla"][0])
    again, copied = start_from(folder, DrafterSpec(layers=1, markov_rank=4))
    assert (copied.layers, copied.of, copied.new) == (1, 2, [])
    assert copied.unused and all(n.startswith("layers.1.") for n in copied.unused)
    assert str(copied) == f"1 of its 2 layers, {len(copied.unused)} of its tensors unused"
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0)


def test_more_key_and_value_heads_are_the_same_function(tmp_path: Path) -> None:
    folder, model = stored(tmp_path / "drafter", LAYOUTS["vanilla"][0])
    again, copied = start_from(folder, DrafterSpec(kv_heads=4, markov_rank=4))
    assert copied.new == []
    given = blocks(model.config, model.rows)
    torch.testing.assert_close(again(**given), model(**given))


def test_fewer_tokens_a_block_may_be_trained(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path / "drafter", DrafterSpec(gamma=7, markov_rank=4))
    again, copied = start_from(folder, DrafterSpec(gamma=3, markov_rank=4))
    assert again.rows == 3 and copied.new == []


def test_a_confidence_head_that_reads_less_is_the_same_function(tmp_path: Path) -> None:
    folder, model = stored(
        tmp_path / "drafter", DrafterSpec(markov_rank=4), confidence_head_with_markov=False
    )
    path = folder / WEIGHTS
    tensors = load_file(path)
    tensors["confidence_head.proj.weight"] = tensors["confidence_head.proj.weight"][:, :HIDDEN]
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    again, copied = start_from(folder, DrafterSpec(markov_rank=4))
    assert copied.new == []
    proj = again.confidence_head.proj.weight
    torch.testing.assert_close(proj[:, :HIDDEN], model.confidence_head.proj.weight[:, :HIDDEN])
    assert not proj[:, HIDDEN:].any()


# z-lab's DFlash: nested keys, the mask's id and the layers there, no heads.
@pytest.mark.parametrize("named", [True, False], ids=["layers-named", "layers-implied"])
def test_a_dflash_start_brings_the_backbone_and_its_convention(named: bool, tmp_path: Path) -> None:
    spec = DrafterSpec(gamma=7, markov_head="none", target_layer_ids=(1, 3), mask_token_id=9)
    nested = {"mask_token_id": 9} | ({"target_layer_ids": [1, 3]} if named else {})
    folder, model = stored(tmp_path / "drafter", spec, dflash_config=nested, block_size=8)
    again, copied = start_from(folder, DrafterSpec(gamma=5, markov_rank=4))
    assert not again.config.sample_from_anchor and again.rows == 6
    assert (again.config.mask_token_id, again.config.target_layer_ids) == (9, (1, 3))
    assert sorted(copied.new) == sorted(n for n in again.state_dict() if "_head." in n)
    assert copied.unused == []
    wider = Drafter(again.config)
    wider.load(model.state_dict())
    given = blocks(again.config, 6)
    torch.testing.assert_close(again(**given), wider(**given), rtol=0, atol=0)
    # Heads that add nothing yet: the first drafts are DFlash's.
    assert again.markov_head is not None and not again.markov_head.markov_w2.weight.any()


def test_deepspecs_dflash_predicts_from_the_anchor(tmp_path: Path) -> None:
    """Its architecture is DSpark's with rank 0, and gamma rows."""
    folder, model = stored(tmp_path / "drafter", DrafterSpec(gamma=7, markov_rank=4))
    path = folder / WEIGHTS
    save_file({n: t for n, t in load_file(path).items() if "_head." not in n}, path)
    raw = read_config(folder, role="drafter") | {"markov_rank": 0, "enable_confidence_head": False}
    del raw["sample_from_anchor"], raw["markov_head_type"], raw["confidence_head_with_markov"]
    (folder / "config.json").write_text(json.dumps(raw))
    again, copied = start_from(folder, DrafterSpec(gamma=7, markov_rank=4))
    assert again.config == model.config
    assert copied.new and all("_head." in name for name in copied.new)


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "hidden": ({}, {"hidden_size": 64}, "hidden_size 32"),
    "vocab": ({}, {"vocab_size": 90}, "vocab_size 97"),
    "gamma": ({"gamma": 7}, {}, "5 tokens"),
    "layers": ({"target_layer_ids": (1, 2)}, {}, "target_layer_ids"),
    "same-count": ({"target_layer_ids": (1, 2, 3)}, {}, "target_layer_ids"),
    "mask": ({"mask_token_id": 8}, {}, "mask_token_id 3"),
    "convention": ({"sample_from_anchor": False}, {}, "sample_from_anchor True"),
    "rank": ({"markov_rank": 6}, {}, "markov_head.markov_w1.weight"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_start_that_does_not_fit_is_an_error(case: str, tmp_path: Path) -> None:
    changes, target, found = MISFITS[case]
    given = {"target_layer_ids": (0, 2, 4), "markov_rank": 4}
    folder, _ = stored(tmp_path / "drafter", DrafterSpec(**given))
    spec = DrafterSpec(**({"markov_rank": 4} | changes))
    with pytest.raises(CheckpointError) as caught:
        start_from(folder, spec, text_config(**target))
    assert found in caught.value.found and caught.value.expected and caught.value.fix


def test_without_the_start_the_configuration_must_still_agree(tmp_path: Path) -> None:
    """Heads, RoPE and epsilon are the start's; a run that was not told is refused."""
    folder, _ = stored(tmp_path / "drafter", LAYOUTS["vanilla"][0])
    other = text_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    raw = drafter_config(DrafterSpec(markov_rank=4), other, TOKENIZER)
    with pytest.raises(CheckpointError, match="rope_theta"):
        from_drafter(Drafter(parse_drafter_config(raw)), folder)
    told = drafter_config(DrafterSpec(markov_rank=4), other, TOKENIZER, str(folder))
    from_drafter(Drafter(parse_drafter_config(told)), folder)


def test_a_start_of_the_other_layout_is_an_error(tmp_path: Path) -> None:
    folder, _ = stored(tmp_path / "drafter", *LAYOUTS["gemma4"])
    with pytest.raises(CheckpointError) as caught:
        start_from(folder, DrafterSpec(markov_rank=4))
    assert "gemma4" in caught.value.found and "gemma4" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash2DraftModel"),
        ({"hidden_act": "swigluoai"}, "swigluoai"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial"),
        ({"rope_is_neox_style": False}, "interleaved"),
        ({"is_causal": True}, "causal"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "quantised"),
        ({"dflash_config": {"attention_value_scale": 0.5}}, "attention_value_scale"),
        ({"dflash_config": {"projector_type": "domino"}}, "projector_type"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_layers_of_another_kind_are_refused(
    changes: dict[str, Any], found: str, tmp_path: Path
) -> None:
    """They would load, and compute something else."""
    folder, _ = stored(tmp_path / "drafter", LAYOUTS["vanilla"][0], **changes)
    with pytest.raises(CheckpointError) as caught:
        read_existing(folder)
    assert found in caught.value.found


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_are_not_the_configurations_are_refused(change: str, tmp_path: Path) -> None:
    folder, _ = stored(tmp_path / "drafter", LAYOUTS["vanilla"][0])
    path = folder / WEIGHTS
    tensors = load_file(path)
    if change == "missing":
        del tensors["layers.1.mlp.up_proj.weight"]
    elif change == "unknown":
        tensors["layers.1.self_attn.sinks"] = torch.zeros(4)
    else:
        tensors["layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\."):
        read_existing(folder)
