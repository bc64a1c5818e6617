"""What of SGLang is replaced for a DeepSeek-V4 on the CPU platform, and by what."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.environ import envs

from dspark_sglang.layouts.v4.storage import dequantised
from dspark_sglang.serving.cpu.v4 import attention, compressor, indexer, layers, refusal, rotary
from dspark_sglang.serving.sglang_types import ModelConfig

_DSV4 = "sglang.kernels.ops.attention.dsv4"
_BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend"

#: SGLang's own switches that select its torch paths; what a user has set stays.
SWITCHES = {
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": False,
    "SGLANG_OPT_USE_TILELANG_MHC_POST": False,
    "SGLANG_OPT_DEEPGEMM_HC_PRENORM": False,
    "SGLANG_OPT_USE_FUSED_HASH_TOPK": False,
    "SGLANG_OPT_FP8_WO_A_GEMM": False,
    "SGLANG_OPT_FLASHMLA_SPARSE_PREFILL": False,
    "SGLANG_FP8_PAGED_MQA_LOGITS_TORCH": True,
    "SGLANG_OPT_USE_MULTI_STREAM_OVERLAP": False,
}

#: Functions by the module that defines them; copies that other modules imported are replaced with them.
LEAVES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (f"{_DSV4}.norm_rope", "fused_rope_inplace", rotary.fused_rope_inplace),
    (f"{_DSV4}.norm_rope", "fused_norm_rope_inplace", rotary.fused_norm_rope_inplace),
    (f"{_DSV4}.norm_rope", "fused_q_norm_rope", rotary.fused_q_norm_rope),
    (f"{_DSV4}.norm_rope", "fused_k_norm_rope_flashmla", rotary.fused_k_norm_rope_flashmla),
    (
        f"{_DSV4}.norm_rope",
        "fused_q_indexer_rope_hadamard_quant",
        indexer.fused_q_indexer_rope_hadamard_quant,
    ),
    (f"{_DSV4}.attn", "fused_store_cache", rotary.fused_store_cache),
    (f"{_DSV4}.topk", "topk_transform_paged", indexer.topk_transform_paged),
    (f"{_DSV4}.topk", "topk_transform_paged_v2", indexer.topk_transform_paged),
    (f"{_DSV4}.topk", "plan_topk_v2", indexer.plan_topk),
    (
        "sglang.srt.layers.attention.dsv4.indexer",
        "fp8_paged_mqa_logits_torch",
        indexer.fp8_paged_mqa_logits,
    ),
    (f"{_DSV4}.compress", "compress_forward", compressor.compress_forward),
    (f"{_DSV4}.compress", "compress_norm_rope_store", compressor.compress_norm_rope_store),
    (
        f"{_DSV4}.metadata_kernel",
        "init_compression_metadata",
        compressor.init_compression_metadata,
    ),
    ("sglang.kernels.ops.layernorm.mhc", "hc_split_sinkhorn", layers.hc_split_sinkhorn),
    ("sglang.kernels.ops.layernorm.mhc", "mhc_combine", layers.mhc_combine),
    ("sglang.kernels.ops.layernorm.mhc_head", "fused_hc_head", layers.fused_hc_head),
    ("sglang.kernels.ops.gemm.bf16_fp32", "linear_bf16_fp32", layers.linear_bf16_fp32),
    (
        "sglang.kernels.ops.activation.silu_and_mul_clamp",
        "silu_and_mul_clamp",
        layers.silu_and_mul_clamp,
    ),
    ("sglang.srt.models.deepseek_v4", "_apply_wo_a_bf16_matmul", layers.wo_a_matmul),
)

_installed = False


def installed() -> bool:
    """Whether this process serves a DeepSeek-V4."""
    return _installed


def replace(module: str, name: str, new: Callable[..., object]) -> None:
    """Set ``module.name``, and every copy of it that a loaded module of SGLang has imported."""
    old = getattr(importlib.import_module(module), name)
    for key, loaded in list(sys.modules.items()):
        if key.startswith("sglang") and loaded is not None and vars(loaded).get(name) is old:
            setattr(loaded, name, new)
    # Under another name, as the V4 backend has its metadata kernel.
    for key, loaded in list(sys.modules.items()):
        if key.startswith("sglang.srt.layers.attention") and loaded is not None:
            for other, value in list(vars(loaded).items()):
                if value is old:
                    setattr(loaded, other, new)


def served_config(config: Any) -> Any:
    """A DeepSeek-V4's configuration as it is served here; this process is made ready for it.

    Published weights are dequantised while they are loaded, so the model is built without quantisation.
    """
    install()
    if getattr(config, "quantization_config", None):
        config = copy.deepcopy(config)
        config.quantization_config = None
    return config


def install() -> None:
    """Replace everything, once a process."""
    global _installed
    if _installed:
        return
    _installed = True
    for name, value in SWITCHES.items():
        switch = getattr(envs, name)
        if not switch.is_set():
            switch.set(value)
    for module, name, new in LEAVES:
        replace(module, name, new)
    _plans()
    _attention_backend()
    _models()
    _pools()
    _routed_experts()
    _refuse_kernels()


def _plans() -> None:
    from sglang.kernels.ops.attention.dsv4 import compress

    compress.CompressorDecodePlan.generate = staticmethod(compressor.decode_plan)
    compress.CompressorPrefillPlan.generate = staticmethod(compressor.prefill_plan)


def _attention_backend() -> None:
    backend = importlib.import_module(_BACKEND)
    cls: Any = backend.DeepseekV4AttnBackend

    def move(self: object, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)  # there is no pinned memory

    def dense(self: object, forward_batch: object, *, num_qo_tokens: int) -> bool:
        return False

    cls._flash_mla_with_kvcache = staticmethod(attention.flash_mla_with_kvcache)
    cls._use_sparse_prefill = dense
    cls._move_to_device = move
    backend._create_flashmla_metadata = lambda: None  # type: ignore[attr-defined]


def _models() -> None:
    from sglang.srt.models import deepseek_v4, deepseek_v4_dspark

    # Read on ROCm and NPU only; everybody else uses ``freqs_cis``.
    deepseek_v4.get_rope_wrapper = lambda **_: None
    # FlashMLA wants 64 heads or more; torch does not.
    deepseek_v4_dspark._PAD_NUM_HEADS = 0
    deepseek_v4.MqaAttentionBase._kernel_num_heads = lambda self, rows: self.n_local_heads
    for model in (
        deepseek_v4.DeepseekV4ForCausalLM,
        deepseek_v4_dspark.DeepseekV4ForCausalLMDSpark,
    ):
        model.load_weights = _dequantised(model.load_weights)


def _dequantised(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_weights(
        self: object, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any
    ) -> Any:
        return load(self, dequantised(weights), *args, **kwargs)

    return load_weights


def _pools() -> None:
    """Let SGLang's V4 pool be built (nothing in it needs a device), and one key head be kept by every rank."""
    from sglang.srt.configs import update_config
    from sglang.srt.mem_cache import kv_cache_configurator as configurator

    refuse, pad = (
        configurator.reject_out_of_tree_path,
        update_config.adjust_config_with_unaligned_cpu_tp,
    )

    def reject(platform: object, *, subsystem: str) -> None:
        if "DeepSeek-V4" not in subsystem:
            refuse(platform, subsystem=subsystem)

    def keep(model_config: ModelConfig, load_config: object, tp_size: int) -> Any:
        if model_config.hf_config.model_type == "deepseek_v4":
            return model_config
        return pad(model_config, load_config, tp_size)

    configurator.reject_out_of_tree_path = reject
    replace("sglang.srt.configs.update_config", "adjust_config_with_unaligned_cpu_tp", keep)


def _routed_experts() -> None:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

    from dspark_sglang.serving.cpu.platform import BACKEND

    def forward(self: object, layer: object, dispatch_output: object) -> Any:
        return StandardCombineInput(hidden_states=layers.routed_experts(layer, dispatch_output))

    UnquantizedFusedMoEMethod.register_oot_forward(UnquantizedFusedMoEMethod, forward, BACKEND)


def _refuse_kernels() -> None:
    """Name a kernel that is reached all the same, in place of a compiler's or a driver's error."""
    from sglang.kernels.jit import utils
    from triton.runtime.jit import JITFunction

    load = utils.load_jit

    def load_jit(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cuda_files"):
            raise refusal(f"the CUDA kernel {args[0]} ({kwargs['cuda_files'][0]})")
        return load(*args, **kwargs)

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        raise refusal(f"the Triton kernel {self.fn.__module__}.{self.fn.__name__}")

    replace("sglang.kernels.jit.utils", "load_jit", load_jit)
    JITFunction.run = run


def widen(model: torch.nn.Module) -> None:
    """Make a float32 model's bfloat16 parameters float32: SGLang creates some so whatever was asked for."""
    parameters = dict(model.named_parameters())
    asked = [
        p.dtype for name, p in parameters.items() if name.endswith(("wq_b.weight", "wkv.weight"))
    ]
    if asked and asked[0] == torch.float32:
        for parameter in parameters.values():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
