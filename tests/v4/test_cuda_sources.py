"""SGLang's CUDA and Triton sources of the leaves of V4 compile for Hopper, on a machine without a GPU.

Our torch leaves were written from these sources (``sources.json``). Nothing runs here: what is shown is that the
pinned release builds them with V4's arguments, and what they take. ``make v4-cuda`` prints the table.

Every leaf is called in a process of its own with V4's shapes, on torch's ``meta`` device, and stopped where SGLang
would start the compiler. So the source, the template arguments and the flags are those that SGLang chooses.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# Modules took 11 to 97 seconds each, and four times that on a machine that did much else.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = frozenset(json.loads((ROOT / "tests/v4/sources.json").read_text(encoding="utf-8")))

# What both published sizes share, and what they do not.
HEAD, ROPE, HEADS, STREAMS = 512, 64, 64, 4
INDEXER_HEAD, INDEXER_HEADS, CHOSEN = 128, 64, 512
PAGE, PAGE_4, PAGE_128 = 256, 256 // 4, 256 // 128
HIDDEN = {"Flash": 4096, "Pro": 7168}
EPS = 1e-6
#: Clusters that can be resident, by their size and blocks a multiprocessor. SGLang asks the device. A kernel is built
#: if the number is not 0. The first is SGLang's own figure for an H200, the second only has to be positive.
CLUSTERS = {(8, 2): 30, (16, 1): 7}

_CUDA = "kernels/jit/csrc/deepseek_v4"
_OPS = "sglang.kernels.ops"
_DSV4 = f"{_OPS}.attention.dsv4"
_BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend.DeepseekV4AttnBackend"


def _empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _ints(*size: int) -> torch.Tensor:
    return _empty(*size, dtype=torch.int32)


def _longs(*size: int) -> torch.Tensor:
    return _empty(*size, dtype=torch.int64)


def _floats(*size: int) -> torch.Tensor:
    return _empty(*size, dtype=torch.float32)


def _bytes(*size: int) -> torch.Tensor:
    return _empty(*size, dtype=torch.uint8)


def _turns() -> torch.Tensor:
    return _empty(8, ROPE // 2, dtype=torch.complex64)


def _leaf(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{_OPS}.{module}"), name)


def _rope() -> None:
    call = _leaf("attention.dsv4.norm_rope", "fused_rope_inplace")
    call(_empty(1, HEADS, ROPE), None, _turns(), _longs(1))


def _norm_rope() -> None:
    call = _leaf("attention.dsv4.norm_rope", "fused_norm_rope_inplace")
    call(_empty(1, HEAD), _empty(HEAD), EPS, _turns(), _longs(1))


def _queries() -> None:
    call = _leaf("attention.dsv4.norm_rope", "fused_q_norm_rope")
    q = _empty(1, HEADS, HEAD)
    call(q, q, EPS, _turns(), _longs(1))


def _keys() -> None:
    call = _leaf("attention.dsv4.norm_rope", "fused_k_norm_rope_flashmla")
    call(
        _empty(1, HEAD), _empty(HEAD), EPS, _turns(), _longs(1), _ints(1), _bytes(1, 1), PAGE
    )  # fmt: skip


def _indexer_queries() -> None:
    call = _leaf("attention.dsv4.norm_rope", "fused_q_indexer_rope_hadamard_quant")
    call(
        _empty(1, INDEXER_HEADS, INDEXER_HEAD), _empty(1, INDEXER_HEADS), 1.0, _turns(), _longs(1)
    )  # fmt: skip


def _store(width: int, slots: torch.Tensor, page: int, kind: str) -> Callable[[], None]:
    def ask() -> None:
        call = _leaf("attention.dsv4.attn", "fused_store_cache")
        call(_empty(1, width), _bytes(1, 1), slots, page_size=page, type=kind)

    return ask


def _plan() -> None:
    cls = _leaf("attention.dsv4.compress", "CompressorDecodePlan")
    cls.generate(4, _longs(1), _ints(1, 8), _longs(8), _longs(1), PAGE, 8)


def _compress(ratio: int, width: int) -> Callable[[], None]:
    """Decoding and prefill are one module. States are float32, SGLang's default."""

    def ask() -> None:
        call = _leaf("attention.dsv4.compress", "compress_forward")
        plan = _leaf("attention.dsv4.compress", "CompressorDecodePlan")(ratio, _bytes(1, 16))
        row = 2 * width * (2 if ratio == 4 else 1)
        states, ape = _floats(1, ratio, row), _floats(ratio, width)
        call(states, _floats(1, row), ape, plan, head_dim=width, compress_ratio=ratio)

    return ask


def _compressed(ratio: int, width: int, page: int) -> Callable[[], None]:
    def ask() -> None:
        call = _leaf("attention.dsv4.compress", "compress_norm_rope_store")
        plan = _leaf("attention.dsv4.compress", "CompressorDecodePlan")(ratio, _bytes(1, 16))
        call(
            _floats(1, width), plan, norm_weight=_empty(width), norm_eps=EPS, freq_cis=_turns(),
            out_loc=_longs(1), kvcache=_bytes(1, 1), page_size=page,
        )  # fmt: skip

    return ask


def _topk(version: str) -> Callable[[], None]:
    def ask() -> None:
        call = _leaf("attention.dsv4.topk", f"topk_transform_paged{version}")
        plan = (_ints(2, 2),) if version else ()
        call(_floats(1, 1024), _ints(1), _ints(1, 16), _ints(1, CHOSEN), PAGE_4, *plan)

    return ask


def _clamped() -> None:
    call = _leaf("activation.silu_and_mul_clamp", "silu_and_mul_clamp")
    call(_empty(1, 4096), _empty(1, 2048), 10.0)


class Cuda(NamedTuple):
    """A module that SGLang builds for a leaf."""

    #: Calls the leaf as V4 does.
    ask: Callable[[], None]
    #: Names in ``sources.json`` that it compiles.
    covers: frozenset[str]
    #: Kernels that must be in it.
    kernels: frozenset[str]


def _cuda(ask: Callable[[], None], covers: str, kernels: str) -> Cuda:
    return Cuda(ask, frozenset(covers.split()), frozenset(kernels.split()))


_NORM_ROPE = f"{_DSV4}.norm_rope"
_STORED = f"{_CUDA}/store.cuh {_DSV4}.attn.fused_store_cache"
_COMPRESS = f"{_DSV4}.compress.compress_forward"
_COMPRESSED = f"{_CUDA}/fused_norm_rope_v2.cuh {_DSV4}.compress.compress_norm_rope_store"

CUDA = {
    "rope": _cuda(
        _rope, f"{_CUDA}/rope.cuh {_NORM_ROPE}.fused_rope_inplace", "deepseek_rope_kernel"
    ),
    "norm and rope in place": _cuda(
        _norm_rope,
        f"{_CUDA}/fused_norm_rope.cuh {_NORM_ROPE}.fused_norm_rope_inplace",
        "fused_norm_rope",
    ),
    "queries": _cuda(
        _queries,
        f"{_CUDA}/main_norm_rope.cuh {_NORM_ROPE}.fused_q_norm_rope",
        "fused_q_norm_rope",
    ),
    "keys to pages of 256": _cuda(
        _keys,
        f"{_CUDA}/main_norm_rope.cuh {_NORM_ROPE}.fused_k_norm_rope_flashmla",
        "fused_k_norm_rope_flashmla",
    ),
    "indexer's queries": _cuda(
        _indexer_queries,
        f"{_CUDA}/main_norm_rope.cuh {_NORM_ROPE}.fused_q_indexer_rope_hadamard_quant",
        "fused_q_indexer_rope_hadamard_quant",
    ),
    "store in pages of 256": _cuda(
        _store(HEAD, _ints(1), PAGE, "flashmla"), _STORED, "fused_store_flashmla_cache"
    ),
    "store in pages of 64": _cuda(
        _store(HEAD, _longs(1), PAGE_4, "flashmla"), _STORED, "fused_store_flashmla_cache"
    ),
    "store in pages of 2": _cuda(
        _store(HEAD, _longs(1), PAGE_128, "flashmla"), _STORED, "fused_store_flashmla_cache"
    ),
    "store of the indexer": _cuda(
        _store(INDEXER_HEAD, _longs(1), PAGE_4, "indexer"), _STORED, "fused_store_indexer_cache"
    ),
    "plans": _cuda(
        _plan,
        f"{_CUDA}/c_plan.cuh {_DSV4}.compress.CompressorDecodePlan "
        f"{_DSV4}.compress.CompressorPrefillPlan",
        "plan_compress_decode_kernel plan_compress_prefill_kernel0 plan_compress_prefill_kernel_1",
    ),
    "compress 4": _cuda(
        _compress(4, HEAD),
        f"{_CUDA}/c4_v2.cuh {_COMPRESS}",
        "flash_c4_decode flash_c4_prefill write_c4_prefill",
    ),
    "compress 4, indexer": _cuda(
        _compress(4, INDEXER_HEAD),
        f"{_CUDA}/c4_v2.cuh {_COMPRESS}",
        "flash_c4_decode flash_c4_prefill write_c4_prefill",
    ),
    "compress 128": _cuda(
        _compress(128, HEAD),
        f"{_CUDA}/c128_v2.cuh {_COMPRESS}",
        "flash_c128_decode flash_c128_prefill write_c128_prefill",
    ),
    "compressed 4 to pages": _cuda(
        _compressed(4, HEAD, PAGE_4), _COMPRESSED, "fused_norm_rope_flashmla"
    ),
    "compressed 128 to pages": _cuda(
        _compressed(128, HEAD, PAGE_128), _COMPRESSED, "fused_norm_rope_flashmla"
    ),
    "indexer's keys to pages": _cuda(
        _compressed(4, INDEXER_HEAD, PAGE_4),
        _COMPRESSED,
        "fused_norm_rope_indexer fused_norm_rope_indexer_fp4",
    ),
    "top-k, version 1": _cuda(
        _topk(""),
        f"{_CUDA}/topk_v1.cuh {_DSV4}.topk.topk_transform_paged",
        "topk_transform_kernel",
    ),
    "top-k, version 2": _cuda(
        _topk("_v2"),
        f"{_CUDA}/topk_v2.cuh {_DSV4}.topk.topk_transform_paged_v2 {_DSV4}.topk.plan_topk_v2",
        "topk_main_kernel topk_small_batch_cluster_kernel topk_persistent_cluster_kernel "
        "topk_plan_cluster",
    ),
    "clamped SwiGLU": _cuda(
        _clamped,
        f"{_OPS}.activation.silu_and_mul_clamp.silu_and_mul_clamp",
        "silu_mul_clamp_kernel",
    ),
}
#: A page that is no power of two: the compiler has to refuse it.
WRONG = {"store in pages of 48": _store(HEAD, _ints(1), 48, "flashmla")}


class Asked(Exception):
    """Raised in place of a build: what SGLang was about to compile."""


def _asked() -> dict[str, dict[str, str]]:
    """Every build as SGLang describes it. To be called in a process that replaced no leaf."""
    import sglang
    from sglang.kernels.jit.utils import occupancy
    from sglang.kernels.jit.utils.arch import override_jit_cuda_arch
    from sglang.kernels.jit.utils.compile import ninja

    def stop(*, spec: Any, build_dir: Path, build_file: str) -> None:
        raise Asked(spec, build_file)

    ninja.build = stop
    occupancy.get_max_active_clusters = lambda size, occupancy: CLUSTERS[size, occupancy]
    folder = Path(str(sglang.__file__)).parent
    found = {}
    with override_jit_cuda_arch(9, 0, "a"):
        for name, ask in [*((name, case.ask) for name, case in CUDA.items()), *WRONG.items()]:
            try:
                ask()
            except Asked as asked:
                spec, build_file = asked.args
            else:
                raise AssertionError(f"{name}: nothing was built")
            (unit,), (file,) = spec.translation_units(), spec.cuda_files
            found[name] = {
                "file": str(Path(file).relative_to(folder)),
                "unit": unit.filename,
                "source": unit.source,
                "build_file": build_file,
            }
    return found


class Triton(NamedTuple):
    """One configuration of a Triton kernel of a leaf."""

    module: str
    kernel: str
    covers: frozenset[str]
    #: Triton's types of the parameters that are not constant.
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()


_METADATA = f"{_DSV4}.metadata_kernel"
_INT32 = (
    "seq_lens positions page_table c4_positions c4_seq_lens_raw c4_seq_lens_clamp1 c128_positions "
    "c128_seq_lens_raw c128_seq_lens_clamp1 c128_page_indices"
)


def _combine(dtype: str) -> Triton:
    return Triton(
        f"{_OPS}.layernorm.mhc",
        "_mhc_combine_kernel",
        frozenset({f"{_OPS}.layernorm.mhc.mhc_combine"}),
        {"x_ptr": dtype, "pre_ptr": "*fp32", "y_ptr": "*bf16"}
        | dict.fromkeys(("H", "x_stride_m", "pre_stride_m", "y_stride_m"), "i32"),
        {"pre_stride_k": 1, "HC": STREAMS, "BLOCK_H": 1024},
        ("H", "x_stride_m", "y_stride_m"),
    )


def _head(hidden: int) -> Triton:
    return Triton(
        f"{_OPS}.layernorm.mhc_head",
        "_hc_head_kernel",
        frozenset({f"{_OPS}.layernorm.mhc_head.fused_hc_head"}),
        {"x_ptr": "*bf16", "y_ptr": "*bf16"}
        | dict.fromkeys(("fn_ptr", "scale_ptr", "base_ptr"), "*fp32"),
        {
            "hidden_size": hidden, "HC_MULT": STREAMS, "K_TOTAL": STREAMS * hidden,
            "BLOCK_K": 512, "BLOCK_D": 512, "norm_eps": EPS, "hc_eps": EPS,
        },
    )  # fmt: skip


TRITON = {
    "metadata of compression": Triton(
        _METADATA,
        "_init_compressed_attn_metadata_kernel",
        frozenset(
            f"{_METADATA}.{name}"
            for name in ("_init_compressed_attn_metadata_kernel", "init_compression_metadata")
        ),
        {f"{name}_ptr": "*i32" for name in _INT32.split()}
        | {f"{name}_ptr": "*i64" for name in ("raw_out_loc", "c4_out_loc", "c128_out_loc")}
        | dict.fromkeys(("bs", "num_write_tokens", "max_pages", "c128_cur_max_seq_len"), "i32"),
        {"c128_page_size": PAGE_128, "BLOCK_SIZE": 64, "COMPUTE_PAGE_INDICES": True},
    ),
    "streams combined, float32": _combine("*fp32"),
    "streams combined, bfloat16": _combine("*bf16"),
    **{f"streams to the head, {name}": _head(hidden) for name, hidden in HIDDEN.items()},
}


def _resources() -> dict[str, dict[str, int]]:
    """What each Triton kernel takes. To be called in a process without Triton's interpreter."""
    from benchmarks.aot import compile_sm90

    types = {
        "*bf16": torch.bfloat16,
        "*fp32": torch.float32,
        "*i32": torch.int32,
        "*i64": torch.int64,
    }

    def warm(case: Triton) -> None:
        kernel = getattr(importlib.import_module(case.module), case.kernel)
        # Whole numbers that Triton specializes for, and that it does not.
        known = dict.fromkeys(case.signature, 17) | dict.fromkeys(case.aligned, 16) | case.constants
        known |= {name: types[kind] for name, kind in case.signature.items() if kind in types}
        kernel.warmup(*(known[name] for name in kernel.arg_names), grid=(1,))

    return {
        name: compile_sm90(lambda case=case: warm(case))[0]._asdict()  # type: ignore[misc]
        for name, case in TRITON.items()
    }


_PYTHON = "Python that launches nothing itself"
#: What is not compiled here, and why.
LISTED = {
    "kernels/ops/attention/flash_mla_interface.py": (
        "FlashMLA: the wheel sgl-flash-mla holds it compiled, without sources"
    ),
    "sglang.srt.layers.attention.dsv4.indexer.fp8_paged_mqa_logits_torch": (
        "torch; on Hopper DeepGEMM takes its place, of the wheel sgl-deep-gemm, which the CPU "
        "requirements leave out and whose sources are not in SGLang"
    ),
    f"{_OPS}.gemm.bf16_fp32.linear_bf16_fp32": "torch.mm: cuBLAS, a binary",
    "sglang.srt.models.deepseek_v4._apply_wo_a_bf16_matmul": "torch.einsum: cuBLAS, a binary",
    f"{_OPS}.layernorm.mhc.hc_split_sinkhorn": (
        "TileLang on Hopper, whose compiler the CPU requirements leave out; the Triton version in "
        "the same file serves AMD's gfx1250 only"
    ),
    f"{_DSV4}.kv_layout.KVLayout": "Python that names a template argument of the builds above",
    f"{_BACKEND}.forward": "Python that calls FlashMLA",
    f"{_BACKEND}._move_to_device": _PYTHON,
    f"{_BACKEND}._use_sparse_prefill": _PYTHON,
    "sglang.srt.layers.attention.dsv4.compressor_v2.CompressorBackendMixin."
    "_forward_compress_all_in_one": "Python that calls two leaves compiled here",
    "sglang.srt.mem_cache.kv_cache_configurator.reject_out_of_tree_path": _PYTHON,
    "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp": _PYTHON,
    "sglang.srt.models.deepseek_v4.MqaAttentionBase._kernel_num_heads": _PYTHON,
}


def _missing() -> str | None:
    """What a build needs that this machine lacks; nvcc is looked for where SGLang does."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc: neither below CUDA_HOME nor on PATH"
    return None if shutil.which("ninja") else "no ninja on PATH: SGLang builds with it"


needs_nvcc = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def _python(*arguments: str, **environment: str) -> Any:
    """The last line that this module prints when run, as JSON. Leaves and interpreter are as SGLang has them there."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), *filter(None, [kept.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.v4.test_cuda_sources", *arguments],
        env=kept | environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Every build, with the compiler's report of resources asked for; by an empty cache."""
    found: dict[str, dict[str, str]] = _python(
        "builds",
        SGLANG_JIT_CACHE_DIR=str(tmp_path_factory.mktemp("cache")),
        SGLANG_JIT_LOG_RESOURCE_USAGE="1",
    )
    return found


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, int]]:
    """What every Triton kernel takes; compiled anew, whatever Triton's cache holds."""
    found: dict[str, dict[str, int]] = _python("triton", TRITON_ALWAYS_COMPILE="1")
    return found


def _compiled(build: dict[str, str], folder: Path) -> tuple[str | None, str]:
    """Compile a build's one object, device and host code. Returns what went wrong, if anything, and all output."""
    (folder / build["unit"]).write_text(build["source"], encoding="utf-8")
    (folder / "build.ninja").write_text(build["build_file"], encoding="utf-8")
    target = f"{Path(build['unit']).stem}_0.o"
    done = subprocess.run(["ninja", target], cwd=folder, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode:
        return f"exit status {done.returncode}", output
    return (None if (folder / target).stat().st_size else "an empty object"), output


class Kernel(NamedTuple):
    """What ``ptxas`` said of one kernel."""

    name: str
    arch: str
    registers: int
    #: Bytes a thread spilled to local memory, stores and loads together. Version 2 of top-k allows the compiler to
    #: spill into shared memory instead: nothing is counted here then, but ``shared`` is larger.
    spills: int
    #: Bytes of static shared memory a block.
    shared: int


def _kernels(report: str) -> list[Kernel]:
    parts = re.split(r"Compiling entry function '([^']+)' for '([^']+)'", report)[1:]
    return [
        Kernel(
            _plain(symbol),
            arch,
            int(re.findall(r"Used (\d+) registers", text)[0]),
            sum(int(value) for value in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)),
            sum(int(value) for value in re.findall(r"(\d+) bytes smem", text)),
        )
        for symbol, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


def _row(name: str, kernels: list[Kernel]) -> str:
    """One line for all instances of a kernel: lowest and highest of each number."""
    spans = [
        f"{low} to {high}" if low < high else str(low)
        for low, high in (
            (min(values), max(values))
            for values in zip(*((k.registers, k.spills, k.shared) for k in kernels), strict=True)
        )
    ]
    return (
        f"{name} x {len(kernels)}: {spans[0]} registers, {spans[1]} bytes spilled, "
        f"{spans[2]} bytes shared"
    )


def _plain(symbol: str) -> str:
    """The name of a function, from its symbol, without namespaces and arguments."""
    rest, name = re.sub(r"^_ZN?", "", symbol), symbol
    while found := re.match(r"\d+", rest):
        end = found.end() + int(found[0])
        name, rest = rest[found.end() : end], rest[end:]
    return name


def test_every_source_is_compiled_or_listed() -> None:
    cuda = frozenset[str]().union(*(case.covers for case in CUDA.values()))
    compiled = cuda.union(*(case.covers for case in TRITON.values()))
    assert compiled | LISTED.keys() == SOURCES
    assert not compiled & LISTED.keys()
    assert {name for name in SOURCES if name.endswith(".cuh")} <= cuda


@needs_nvcc
@pytest.mark.parametrize("name", CUDA)
def test_a_cuda_source_compiles(
    name: str, builds: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    build, started = builds[name], time.monotonic()
    wrong, output = _compiled(build, tmp_path)
    seconds = time.monotonic() - started
    assert wrong is None, output
    # A file is claimed by the builds that compile it; one outside sources.json needs none.
    files = {cover for cover in CUDA[name].covers if cover.endswith(".cuh")}
    assert files == {build["file"]} & SOURCES
    kernels = _kernels(output)
    print(f"\n{name} ({Path(build['file']).name}, {seconds:.0f} s)")
    for kernel, same in groupby(sorted(kernels), key=lambda kernel: kernel.name):
        print(f"  {_row(kernel, list(same))}")
    assert {kernel.arch for kernel in kernels} == {"sm_90a"}
    assert {kernel.name for kernel in kernels} >= CUDA[name].kernels


@needs_nvcc
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_does_not_compile(
    name: str, builds: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    wrong, output = _compiled(builds[name], tmp_path)
    assert wrong is not None
    assert "must be a power of 2" in output


@pytest.mark.parametrize("name", TRITON)
def test_a_triton_source_compiles(name: str, resources: dict[str, dict[str, int]]) -> None:
    took = resources[name]
    kernel = Kernel(
        TRITON[name].kernel, "sm_90a", took["registers"], took["spills"], took["shared_bytes"]
    )
    print(f"\n{name} (Triton)\n  {_row(kernel.name, [kernel])}")
    assert kernel.registers > 0


if __name__ == "__main__":
    print(json.dumps(_asked() if sys.argv[1] == "builds" else _resources()))
