"""Starts that cannot succeed on this platform, with DSPARK or without: refused before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_sglang.checkpoint import read_config
from dspark_sglang.errors import ConfigError

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import ServerArgs


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
