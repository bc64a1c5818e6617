"""What the leaves were written from: the sources of SGLang, by hash, so that a changed one is named at an upgrade.

``python -m tests.v4.sources`` prints the table of the installed release, to be written to
``sources.json`` once the leaves fit it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import textwrap
from pathlib import Path

_CUDA = "kernels/jit/csrc/deepseek_v4"
#: Whole files, below ``sglang``: those of which the leaves hold most, and one that needs a GPU's library to import.
FILES = (
    "kernels/ops/attention/flash_mla_interface.py",
    f"{_CUDA}/c128_v2.cuh",
    f"{_CUDA}/c4_v2.cuh",
    f"{_CUDA}/c_plan.cuh",
    f"{_CUDA}/fused_norm_rope.cuh",
    f"{_CUDA}/fused_norm_rope_v2.cuh",
    f"{_CUDA}/main_norm_rope.cuh",
    f"{_CUDA}/rope.cuh",
    f"{_CUDA}/store.cuh",
    f"{_CUDA}/topk_v1.cuh",
    f"{_CUDA}/topk_v2.cuh",
)
#: Functions and methods beside those of ``install.LEAVES``.
ALSO = (
    "sglang.kernels.ops.attention.dsv4.compress.CompressorDecodePlan",
    "sglang.kernels.ops.attention.dsv4.compress.CompressorPrefillPlan",
    "sglang.kernels.ops.attention.dsv4.kv_layout.KVLayout",
    "sglang.kernels.ops.attention.dsv4.metadata_kernel._init_compressed_attn_metadata_kernel",
    "sglang.srt.layers.attention.deepseek_v4_backend.DeepseekV4AttnBackend.forward",
    "sglang.srt.layers.attention.deepseek_v4_backend.DeepseekV4AttnBackend._move_to_device",
    "sglang.srt.layers.attention.deepseek_v4_backend.DeepseekV4AttnBackend._use_sparse_prefill",
    "sglang.srt.layers.attention.dsv4.compressor_v2.CompressorBackendMixin._forward_compress_all_in_one",
    "sglang.srt.models.deepseek_v4.MqaAttentionBase._kernel_num_heads",
    "sglang.srt.mem_cache.kv_cache_configurator.reject_out_of_tree_path",
    "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
)
RECORDED = Path(__file__).with_name("sources.json")


def _text(name: str) -> str:
    """Source of a dotted name, without its indentation; a Triton kernel's is its function's."""
    parts, value = name.split("."), None
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = inspect.getattr_static(value, part)
        break
    value = getattr(value, "fn", value)
    value = getattr(value, "__func__", value)
    return textwrap.dedent(inspect.getsource(inspect.unwrap(value)))  # type: ignore[arg-type]


def found() -> dict[str, str]:
    """Name to SHA-256 of every source, as SGLang is installed; before anything is replaced.

    Raises:
        AttributeError: a function that this release does not have.
        FileNotFoundError: a file that it does not have.
    """
    import sglang

    from dspark_sglang.serving.cpu.v4 import install

    names = [f"{module}.{name}" for module, name, _ in install.LEAVES] + list(ALSO)
    texts = {name: _text(name).encode() for name in names}
    folder = Path(str(sglang.__file__)).parent
    texts |= {name: (folder / name).read_bytes() for name in FILES}
    return {name: hashlib.sha256(text).hexdigest() for name, text in sorted(texts.items())}


def changed() -> list[str]:
    """Names whose source is not the one that the leaves were written from."""
    recorded, now = json.loads(RECORDED.read_text()), found()
    return sorted(
        name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name)
    )


if __name__ == "__main__":
    print(json.dumps(found(), indent=1))
