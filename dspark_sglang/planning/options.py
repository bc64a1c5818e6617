"""What a user may say about the server, and what follows from it where nothing is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
import typer

from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.memory import Ranks, Split
from dspark_sglang.planning.hardware import Hardware
from dspark_sglang.planning.model import Model

Role = Literal["null", "prefill", "decode"]
#: Requests at once where nothing is said: what SGLang resets DSPARK to.
DEFAULT_RUNNING = 48
#: Context of the least that has to fit.
DEFAULT_CONTEXT = 32_768
#: All-to-all backends of experts, all of which spread them over every rank.
TO_ALL = ("deepep", "deepep_v2", "megamoe", "flashinfer_megamoe", "mooncake", "mori", "nixl", "pplx", "flashinfer")  # fmt: skip
_SIZES = {"auto": None, "fp8_e4m3": 1, "fp8_e5m2": 1, "bfloat16": 2, "bf16": 2}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments of a server, as far as a plan reads them; None: SGLang's or this plan's choice."""

    tp: Annotated[int | None, typer.Option(help="Ranks. Default: as many as can be used.")] = None
    ep: Annotated[int, typer.Option(help="Expert parallel size.")] = 1
    attention_dp: Annotated[int, typer.Option(help="Attention data parallel size.")] = 1
    pd: Annotated[Role, typer.Option(help="Side of PD disaggregation.")] = "null"
    context: Annotated[
        int | None, typer.Option(help="Tokens a request must have room for. Default: 32,768.")
    ] = None
    requests: Annotated[int, typer.Option(help="So many of them at once, at least.")] = 1
    max_running: Annotated[
        int | None,
        typer.Option("--max-running-requests", help="Default: 48, fewer where it would not fit."),
    ] = None
    chunked_prefill: Annotated[
        int | None,
        typer.Option(
            "--chunked-prefill-size", help="Default: SGLang's, less where it would not fit."
        ),
    ] = None
    mem_fraction: Annotated[
        float | None,
        typer.Option("--mem-fraction-static", help="Default: what SGLang's heuristic gives."),
    ] = None
    max_total_tokens: Annotated[int | None, typer.Option(help="Cap of the pool.")] = None
    page_size: Annotated[int | None, typer.Option(help="Tokens a page.")] = None
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Type of weights.")
    ] = None
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bf16 or fp8_e4m3.")] = "auto"
    attention_backend: Annotated[str | None, typer.Option(help="Of the target.")] = None
    moe_runner: Annotated[
        str | None, typer.Option("--moe-runner-backend", help="Kernels of the experts.")
    ] = None
    moe_a2a: Annotated[
        str, typer.Option("--moe-a2a-backend", help="All-to-all of the experts.")
    ] = "none"
    lora: Annotated[bool, typer.Option("--lora", help="Serve LoRA adapters.")] = False
    hicache: Annotated[bool, typer.Option("--hicache", help="Hierarchical KV cache.")] = False
    radix_cache: Annotated[bool, typer.Option(" /--no-radix-cache", help="No prefix reuse.")] = True
    eplb: Annotated[bool, typer.Option("--eplb", help="Balance experts while serving.")] = False
    builtin: Annotated[
        bool, typer.Option("--builtin", help="Draft with SGLang's builtin (DSPARK_PLUGIN=off).")
    ] = False

    @property
    def running(self) -> int:
        """Requests at once, chosen or not."""
        return DEFAULT_RUNNING if self.max_running is None else self.max_running


def check(options: Options) -> None:
    """Refuse numbers that no server takes.

    Raises:
        ConfigError: one of them, by its flag.
    """
    numbers = (
        "tp", "attention_dp", "ep", "page_size", "max_running", "chunked_prefill",
        "max_total_tokens", "requests", "context",
    )  # fmt: skip
    for name in numbers:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}.", expected="at least 1", fix="Change it."
            )
    if options.moe_a2a not in ("none", *TO_ALL):
        raise ConfigError(
            f"--moe-a2a-backend is {options.moe_a2a!r}.",
            expected=" or ".join(("none", *TO_ALL)),
            fix="Choose one of these.",
        )
    if options.mem_fraction is not None and not 0.0 < options.mem_fraction < 1.0:
        raise ConfigError(
            f"--mem-fraction-static is {options.mem_fraction}.",
            expected="more than 0 and less than 1",
            fix="Leave it out for SGLang's own choice.",
        )


def kv_element(options: Options) -> int | None:
    """Bytes of one value in the pools; None: as the model's weights.

    Raises:
        ConfigError: a type whose pool is not planned.
    """
    if options.kv_cache_dtype not in _SIZES:
        raise ConfigError(
            f"--kv-cache-dtype is {options.kv_cache_dtype!r}.",
            expected=" or ".join(_SIZES),
            fix="Its pool cannot be planned; choose one of these.",
        )
    return _SIZES[options.kv_cache_dtype]


def layout(options: Options, model: Model, tp: int) -> Ranks:
    """How ``tp`` ranks share the weights of ``model``."""
    to_all = options.moe_a2a != "none"
    ep = tp if to_all else options.ep
    shared = Ranks(tp=tp, attention_dp=options.attention_dp, ep=ep)
    whole = to_all or not _shared_experts_divide(model, shared)
    return msgspec.structs.replace(shared, shared_experts_whole=whole)


def _shared_experts_divide(model: Model, shared: Ranks) -> bool:
    """Whether every rank gets whole blocks of the shared experts; one rank has all of them."""
    return shared.tp == 1 or all(
        tensor.extent % (shared.tp * tensor.grain) == 0
        for tensor in model.tensors
        if tensor.split is Split.SHARED
    )


def expert_width(model: Model, shared: Ranks) -> int | None:
    """Width of a routed expert on one rank; None without experts."""
    extents = {t.extent for t in model.tensors if t.split is Split.EXPERTS}
    return min(extents) // max(1, shared.tp // shared.ep) if extents else None


def needs_marlin(options: Options, model: Model, machine: Hardware, shared: Ranks) -> bool:
    """Whether experts are too narrow for Hopper's default fp4 kernel, but not for Marlin."""
    width = expert_width(model, shared)
    fp4 = model.target.config.get("expert_dtype") == "fp4"
    hopper = machine.architecture == "sm90" and options.moe_runner is None
    return bool(fp4 and hopper and width and width % 128 and width % 64 == 0)


def candidates(machine: Hardware) -> Iterator[int]:
    """Numbers of ranks that use whole nodes or an even part of one, the largest first."""
    for nodes in range(machine.nodes, 1, -1):
        if machine.nodes % nodes == 0:
            yield machine.gpus * nodes
    for ranks in range(machine.gpus, 0, -1):
        if machine.gpus % ranks == 0:
            yield ranks
