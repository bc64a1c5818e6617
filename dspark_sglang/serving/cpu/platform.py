"""The out-of-tree SGLang platform that runs on ordinary CPU cores, and the starts that cannot succeed on it."""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.interface import PlatformCapabilities, PlatformEnum, SRTPlatform

from dspark_sglang.checkpoint import read_config
from dspark_sglang.config import read_settings
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.memory import keep_freed_memory
from dspark_sglang.serving.sglang_types import ServerArgs

logger = logging.getLogger(__name__)

BACKEND = "dspark_cpu"


@functools.cache
def _kv_pool_cls() -> type:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    class CpuKVPool(MHATokenToKVPool):
        """A multi-head KV pool written with plain indexing (no copy kernels to warm up)."""

        def _init_kv_copy_and_warmup(self) -> None:
            self._kv_copy_config = None

        def _store_kv_layer(
            self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor
        ) -> None:
            self.k_buffer[layer_idx].index_copy_(0, loc, cache_k)
            self.v_buffer[layer_idx].index_copy_(0, loc, cache_v)

    return CpuKVPool


def cache_slots(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """KV slots of positions ``[start, end)`` of each request, concatenated.

    Args:
        req_pool_indices: ``[R]`` integer rows of ``req_to_token``.
        req_to_token: ``[pool, context]`` int32 slot of each position.
        start_offset: ``[R]`` first position of each request.
        end_offset: ``[R]`` one past the last position of each request.

    Returns:
        ``[sum(end - start)]`` int64 slots.
    """
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    taken = [req_to_token[row, low:high] for row, low, high in spans]
    return torch.cat([req_to_token.new_empty(0), *taken]).to(torch.int64)


def assign_slots(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write newly allocated slots into ``req_to_token`` (the inverse of :func:`cache_slots`)."""
    taken = 0
    source = out_cache_loc.to(req_to_token.dtype)
    for row, low, high in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, low:high] = source[taken : taken + high - low]
        taken += high - low


def threads(*, ranks: int) -> int:
    """Torch threads of one of ``ranks`` processes that share the cores this one may run on."""
    return read_settings().cpu_threads or max(1, len(os.sched_getaffinity(0)) // ranks)


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Device and subsystem choices for plain CPU serving."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()
    #: Read by ``serving.entry`` without importing this module.
    dspark_cpu = True

    def init_backend(self) -> None:
        torch.set_num_threads(threads(ranks=1))  # until the number of ranks is known
        keep_freed_memory()

    def post_load_model(self, model: torch.nn.Module) -> None:
        from dspark_sglang.serving.cpu.packing import pack_model

        v4 = sys.modules.get("dspark_sglang.serving.cpu.v4.install")
        if v4 is not None and v4.installed():
            v4.widen(model)
        logger.info("Packed %d projections for oneDNN.", pack_model(model))

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Choose what runs here where the user did not choose; refuse what cannot."""
        try:
            check(server_args)
        except DSparkError as error:
            from dspark_sglang.serving.arguments import stop

            stop(error)
        # SGLang has already written its own CPU default, which needs sgl_kernel.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = BACKEND
        # Overlap scheduling hides host work behind a device; here they are the same cores.
        if not read_settings().cpu_overlap:
            server_args.disable_overlap_schedule = True
        # An idle scheduler polls; on an accelerator's host that is a spare core, here it is not.
        server_args.sleep_on_idle = True

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm.upper() == "DSPARK"

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == BACKEND

    def get_dispatch_key_name(self) -> str:
        return BACKEND

    def get_compile_backend(self, mode: str | None = None) -> str:
        # SGLang compiles a few sampling helpers; inductor would need a C++ compiler at run time.
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        return _kv_pool_cls() if kind == "mha" else None

    def get_speculative_cache_locs_fn(self) -> Any:
        return cache_slots


def check(server_args: ServerArgs) -> None:
    """Look at SGLang's arguments.

    Raises:
        ConfigError: an option that needs an accelerator, or ranks over which the target does not divide.
        CheckpointError: a local target that cannot be read.
    """
    for flag, used, why in (
        (
            "--enable-hierarchical-cache",
            server_args.enable_hierarchical_cache,
            "it moves KV between an accelerator's memory and the host's, which are one here",
        ),
        (
            "--enable-memory-saver",
            server_args.enable_memory_saver,
            "it maps and unmaps an accelerator's memory",
        ),
    ):
        if used:
            raise ConfigError(
                f"{flag} is set.",
                expected=f"the CPU platform without it: {why}",
                fix=f"Remove {flag}, or serve on a GPU.",
            )
    divided = (
        server_args.enable_dp_attention or server_args.attn_dp_size > 1
    )  # attention's ranks are fewer then
    target = Path(str(server_args.model_path)).expanduser()
    if server_args.tp_size > 1 and not divided and target.is_dir():
        check_divides(read_config(target, role="target"), int(server_args.tp_size))


def check_divides(target: dict[str, Any], ranks: int) -> None:
    """Refuse a number of ranks over which a target's heads or its MLPs do not divide.

    SGLang pads such a target on a CPU, and then finds no weights for what it has added. It serves fewer key heads
    than ranks on accelerators only.

    Args:
        target: its ``config.json``.
        ranks: of tensor parallelism.

    Raises:
        ConfigError: they do not divide.
    """
    shape = target.get("text_config", target)
    heads = shape.get("num_attention_heads")
    if not heads or "kv_lora_rank" in shape:
        return
    keys = shape.get("num_key_value_heads") or heads
    width = shape.get("intermediate_size") or 0
    sizes = (heads, keys, width)
    if any(size % ranks for size in sizes):
        fitting = [str(n) for n in range(1, keys + 1) if not any(size % n for size in sizes)]
        raise ConfigError(
            f"--tp is {ranks}, and the target's {heads} query heads, {keys} key heads and MLPs of width {width} "
            "do not divide over as many ranks.",
            expected=f"--tp {' or '.join(fitting)} for this target on a CPU",
            fix="Pass that.",
        )
