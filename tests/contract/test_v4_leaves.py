"""The torch leaves of DeepSeek-V4 stand where SGLang's functions do, and nothing reaches a kernel unnoticed."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sglang")
from dspark_sglang.serving.cpu.v4 import install
from tests.v4 import sources

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.mark.parametrize(
    ("module", "name", "leaf"), install.LEAVES, ids=[name for _, name, _ in install.LEAVES]
)
def test_a_leaf_takes_what_the_function_takes(
    module: str, name: str, leaf: Callable[..., Any]
) -> None:
    original = inspect.signature(inspect.unwrap(getattr(importlib.import_module(module), name)))
    own = inspect.signature(leaf).parameters
    open_ended = any(p.kind in VARIABLE for p in own.values())
    for given, parameter in original.parameters.items():
        assert given in own or open_ended, f"{name} does not take {given}"
        if given in own and parameter.default is inspect.Parameter.empty:
            continue
        if given in own:
            assert own[given].default is not inspect.Parameter.empty, f"{given} became required"
    # In the same order where they may be given by place.
    places = [n for n, p in original.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    mine = [n for n, p in own.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert mine == places[: len(mine)]


def test_the_sources_are_those_that_the_leaves_were_written_from() -> None:
    assert sources.changed() == []


def test_a_changed_source_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    recorded = json.loads(sources.RECORDED.read_text())
    store, topk = (f"kernels/jit/csrc/deepseek_v4/{name}.cuh" for name in ("store", "topk_v1"))
    recorded[store] = "0" * 64
    del recorded[topk]
    path = tmp_path / "sources.json"
    path.write_text(json.dumps(recorded))
    monkeypatch.setattr(sources, "RECORDED", path)
    assert sources.changed() == [store, topk]


INSTALLED = """
import torch
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.cpu.v4 import install
install.install()
install.install()
import sglang.srt.layers.attention.deepseek_v4_backend as backend
from dspark_sglang.serving.cpu.v4 import compressor, rotary
from sglang.kernels.ops.attention import dsv4
assert backend._init_compression_metadata_triton is compressor.init_compression_metadata
assert dsv4.fused_q_norm_rope is rotary.fused_q_norm_rope
"""
REACHED = {
    "a CUDA kernel": "from sglang.kernels.ops.attention.dsv4 import attn\nattn._jit_metadata_module()",
    "a Triton kernel": (
        "from sglang.kernels.ops.layernorm import mhc\n"
        "mhc._mhc_stream_mean_kernel[(1,)](torch.ones(4), torch.ones(4), 4, 1, 1, 1, HC=4, BLOCK_H=4)"
    ),
    "another layout": (
        "rotary.fused_store_cache(torch.ones(1, 512), torch.ones(1), torch.zeros(1), page_size=1, "
        "type='flashmla', layout='v41')"
    ),
    "the online compressor": (
        "compressor.compress_forward(torch.ones(1), torch.ones(1), torch.ones(1), None, head_dim=1, "
        "compress_ratio=128, is_online=True)"
    ),
}


@pytest.fixture(scope="module")
def said() -> dict[str, str | None]:
    """The error that reaching each gives, all in one process; None: there was none."""
    code = f"""{INSTALLED}
import json
said = {{}}
for what, reaching in {REACHED!r}.items():
    try:
        exec(reaching)
    except CompatibilityError as error:
        said[what] = str(error)
    else:
        said[what] = None
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.costly
@pytest.mark.parametrize("what", REACHED)
def test_a_leaf_that_is_not_replaced_and_is_reached_is_named(
    what: str, said: dict[str, str | None]
) -> None:
    error = said[what]
    assert error is not None
    assert "DeepSeek-V4 reached" in error and "no torch form on the CPU platform" in error


@pytest.mark.costly
def test_nothing_of_it_is_loaded_for_another_target() -> None:
    code = """
import sys
from types import SimpleNamespace
from dspark_sglang.serving.cpu import patches
config = SimpleNamespace(model_type="llama", quantization_config={"a": 1})
assert patches._served_config(lambda: config) is config and config.quantization_config
assert not any(name.startswith("dspark_sglang.serving.cpu.v4") for name in sys.modules)
config = SimpleNamespace(model_type="deepseek_v4", quantization_config={"a": 1})
served = patches._served_config(lambda: config)
assert served.quantization_config is None and config.quantization_config
from dspark_sglang.serving.cpu.v4 import install
assert install.installed()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
