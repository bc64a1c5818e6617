"""Published figures that plans have to come to, from shapes alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.artifacts import write_json
from dspark_sglang.layouts.dense.tensors import COPIES
from dspark_sglang.layouts.memory import SIZES, Loading, Ranks, by_part, disk_bytes
from dspark_sglang.layouts.v4.config import V4Shape
from dspark_sglang.planning import plan as planning
from dspark_sglang.planning import published
from dspark_sglang.planning.hardware import read
from dspark_sglang.planning.model import Model, load

_GB, _GIB = 1e9, 2**30
_FLASH, _PRO = "deepseek-v4-flash-dspark", "deepseek-v4-pro-dspark"


class Anchor(msgspec.Struct, frozen=True, kw_only=True):
    """A published figure and what a plan makes of it."""

    expected: float
    computed: float
    unit: str
    #: What is counted, and why the two differ where they do.
    note: str


def anchors() -> dict[str, Anchor]:
    """Every anchor by name."""
    found: dict[str, Anchor] = {}
    for name, key, gross, net, disk in (
        (_FLASH, "flash", 10.3, 7.0, 167.0),
        (_PRO, "pro", 40.4, 27.0, 893.0),
    ):
        model = load(name, None, Loading())
        found |= _drafter(model, key, gross, net)
        found[f"{key}_on_disk"] = Anchor(
            expected=disk,
            computed=_round(disk_bytes([*model.tensors, *model.draft_tensors]) / _GB),
            unit="GB",
            note="the DSpark checkpoint with all shards",
        )
    return found | _layouts() | _dense()


def _round(value: float) -> float:
    return round(value, 2)


def _drafter(model: Model, key: str, gross: float, net: float) -> dict[str, Anchor]:
    """What drafting adds to a server: memory, which SGLang's logs print in GiB as "GB"."""
    whole = sum(by_part(model.draft_tensors, Ranks()).values())
    replaced = sum(by_part(model.mtp_tensors, Ranks()).values())
    experts = [tensor for tensor in model.draft_tensors if tensor.part == "experts"]
    stages = V4Shape.from_config(model.target.config).layers
    routed = disk_bytes(experts) / _GB
    note = "all weights of the drafter, in the GiB that SGLang's logs call GB"
    return {
        f"{key}_drafter_gross": _anchor(gross, whole / _GIB, note),
        f"{key}_drafter_net": _anchor(
            net, (whole - replaced) / _GIB, note + ", less the MTP layer"
        ),
        f"{key}_drafter_experts": _anchor(gross, routed, "its routed experts alone", "GB"),
        f"{key}_drafter_experts_net": _anchor(
            net, routed * (stages - 1) / stages, "its routed experts but one layer of them", "GB"
        ),
    }


def _anchor(expected: float, computed: float, note: str, unit: str = "GiB") -> Anchor:
    return Anchor(expected=expected, computed=_round(computed), unit=unit, note=note)


def _layouts() -> dict[str, Anchor]:
    pro = load(_PRO, None, Loading())
    eight = Ranks(tp=8)
    base = sum(by_part([*pro.tensors, *pro.mtp_tensors], eight).values())
    small = planning.make(_FLASH, None, read("h100-80x8"))
    wide = planning.make(_PRO, None, read("2xh100-80x8"))
    return {
        "pro_h200_weights": _anchor(
            112, base / _GB, "one GPU of TP 8, the base model with its MTP layer", "GB"
        ),
        "flash_h100_tp": Anchor(
            expected=8,
            computed=small.tp,
            unit="GPUs",
            note="recommended on 8 × H100: the whole node",
        ),
        "flash_fp8_experts_h100_smallest_tp": Anchor(
            expected=8,
            computed=_smallest_fp8(),
            unit="GPUs",
            note="fewest H100s that hold the experts in fp8",
        ),
        "flash_h100_smallest_tp": Anchor(
            expected=8,
            computed=small.smallest_tp or 0,
            unit="GPUs",
            note="fewest H100s that hold the experts in fp4, as SGLang 0.5.23 keeps them on Hopper: "
            "by memory 4 would do; the published layout says 8 and that it is unverified",
        ),
        "pro_h100_gpus": Anchor(
            expected=16,
            computed=wide.smallest_tp or 0,
            unit="GPUs",
            note="fewest H100s, with shorter prompt steps and fewer requests than SGLang's defaults",
        ),
    }


def _smallest_fp8() -> int:
    """Fewest H100s for Flash with its routed experts converted to fp8."""
    config = _config(_FLASH) | {"expert_dtype": "fp8"}
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config)
        return planning.make(folder, None, read("h100-80x8"), config_only=True).smallest_tp or 0


def _config(name: str) -> dict[str, Any]:
    found = published.find(name)
    assert found is not None, name
    return found.config


def _dense() -> dict[str, Anchor]:
    """The drafter for Qwen3-8B: on disk it carries the target's embedding and head too."""
    name = "dspark_qwen3_8b_block7"
    model = load("qwen3-8b", name, Loading())
    config = _config(name)
    copies = len(COPIES) * config["vocab_size"] * config["hidden_size"] * SIZES["BF16"]
    return {
        "qwen3_8b_drafter_on_disk": _anchor(
            4.7,
            (disk_bytes(model.draft_tensors) + copies) / _GB,
            "with copies of the target's embedding and head, which SGLang does not load",
            "GB",
        )
    }
