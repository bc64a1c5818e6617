"""The few places where SGLang's DSPARK code assumes an accelerator, replaced on our CPU platform.

SGLang's reference forwards spend a small model's step on dispatch: a norm is ten tensor operations. Those here compute the
same functions in fewer; with a residual, the norm reads the sum as it is stored, rounded to the activations' dtype, as
HuggingFace's models do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from dspark_sglang.serving.cpu import sampler
from dspark_sglang.serving.cpu.platform import BACKEND, assign_slots, threads
from dspark_sglang.serving.sglang_types import ModelRunner


def register_backend() -> None:
    """Register the attention backend and the operator forwards, and make streams harmless."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    choices.add_attention_backend_choices([BACKEND])
    choices.add_draft_attention_backend_choices([BACKEND])
    choices.add_deterministic_attention_backend_choices([BACKEND])
    choices.add_radix_supported_deterministic_attention_backend_choices([BACKEND])

    def create(runner: ModelRunner) -> Any:
        from dspark_sglang.serving.cpu.attention import CpuAttentionBackend

        return CpuAttentionBackend(runner)

    register_attention_backend(BACKEND)(create)
    _register_forwards()
    _ignore_streams_on_cpu()


def _ignore_streams_on_cpu() -> None:
    """``Tensor.record_stream`` raises on CPU tensors, where there is nothing to record."""
    original = torch.Tensor.record_stream
    if getattr(original, "dspark", False):
        return

    def record_stream(self: torch.Tensor, stream: torch.Stream) -> None:
        if self.device.type != "cpu":
            original(self, stream)

    record_stream.dspark = True  # type: ignore[attr-defined]
    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign, assignment]


def _no_fused_bundle(self: object, pool: object) -> None:
    """The draft's fused norm-RoPE-write kernel is Triton; None selects its torch path."""


def _plain_draft_attention(result: object, self: Any, *args: Any, **kwargs: Any) -> None:
    """The draft attention's table-driven norm and RoPE kernel is Triton as well."""
    self.use_table_qk_norm_rope = False


def _no_batch_invariant_kernels(self: object) -> None:
    """SGLang's batch-invariant operators are Triton kernels for accelerators.

    Seeded requests then repeat up to rounding: a near-tie may fall otherwise in another batch.
    """


def _add_then_scale(result: object, self: Any, *args: Any, **kwargs: Any) -> None:
    """Penalties in the order of SGLang's overlapped loop; without overlap it takes that of a set, random a process."""
    ordered = sorted(self.penalizers.items(), key=lambda item: item[1].is_multiplicative)
    self.penalizers = dict(ordered)


def _last_slots(
    req_to_token: torch.Tensor,
    req_pool_indices_tensor: torch.Tensor,
    prefix_lens_tensor: torch.Tensor,
) -> torch.Tensor:
    """Where each request's slots end so far, with pages; SGLang knows its own backends without Triton by name."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    last: torch.Tensor = get_last_loc_torch(
        req_to_token, req_pool_indices_tensor, prefix_lens_tensor
    )
    return last


def _share_cores(*, device: str) -> None:
    """Ranks share the cores they may run on; SGLang wants a NUMA node for each.

    None binds nothing: SGLang's own binding needs sgl_kernel, which is not used here.
    """
    from sglang.srt.runtime_context import get_parallel

    torch.set_num_threads(threads(ranks=int(get_parallel().tp_size)))


def _served_config(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A target's configuration; a DeepSeek-V4 gets what it needs here before anything is built."""
    config = original(*args, **kwargs)
    if getattr(config, "model_type", None) != "deepseek_v4":
        return config
    from dspark_sglang.serving.cpu.v4 import install

    return install.served_config(config)


def hooks(targets: Mapping[str, str]) -> list[tuple[str, str, Callable[..., Any], str]]:
    """The hooks of this module as (name, target, function, kind)."""
    return [
        ("slots", targets["slots"], assign_slots, "REPLACE"),
        ("last_slots", targets["last_slots"], _last_slots, "REPLACE"),
        ("draft_kv_bundle", targets["draft_kv_bundle"], _no_fused_bundle, "REPLACE"),
        ("draft_attention", targets["draft_attention"], _plain_draft_attention, "AFTER"),
        ("filtered_sampling", targets["filtered_sampling"], sampler.filtered, "AROUND"),
        ("unfiltered_sampling", targets["unfiltered_sampling"], sampler.unfiltered, "AROUND"),
        ("softmax", targets["softmax"], sampler.softmax, "REPLACE"),
        ("seeded_sampling", targets["seeded_sampling"], sampler.seeded, "REPLACE"),
        ("threads", targets["threads"], _share_cores, "REPLACE"),
        ("model_config", targets["model_config"], _served_config, "AROUND"),
        ("penalties", targets["penalties"], _add_then_scale, "AFTER"),
        (
            "batch_invariance",
            targets["batch_invariance"],
            _no_batch_invariant_kernels,
            "REPLACE",
        ),
    ]


def rms_norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of ``x`` (plus ``residual``); returns the sum as the new residual as well."""
    if (
        post_residual_addition is not None
        or self.variance_size_override is not None
        or self.override_orig_dtype is not None
        or self.fp32_residual
        or self.cast_x_before_out_mul
    ):
        result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = self.forward_native(
            x, residual, post_residual_addition, quant_linear
        )
        return result
    if residual is None:
        return functional.rms_norm(x, (self.hidden_size,), self.weight, self.variance_epsilon)
    total = x + residual
    normed = functional.rms_norm(total, (self.hidden_size,), self.weight, self.variance_epsilon)
    return normed, total


def silu_and_mul(self: object, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU: ``silu(x[:, :d]) * x[:, d:]``."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _register_forwards() -> None:
    """Register the forwards above for our platform."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm

    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm, BACKEND)
    BaseFusedOp.register_oot_forward(SiluAndMul, silu_and_mul, BACKEND)
