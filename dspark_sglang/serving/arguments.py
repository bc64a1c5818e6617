"""SGLang's arguments for DSPARK, resolved strictly.

Runs in the server's main process before any weights are read, so that a wrong argument costs a second and one line instead
of a minute and a traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from dspark_sglang import verify_mode
from dspark_sglang.checkpoint import read_config, read_headers
from dspark_sglang.config import COST_AUTO, read_settings
from dspark_sglang.errors import CheckpointError, ConfigError, DSparkError
from dspark_sglang.layouts.base import (
    DrafterConfig,
    check_drafter,
    drafter_at,
    is_bundle,
    layout_of,
)
from dspark_sglang.serving import placement, warmup

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import ServerArgs

logger = logging.getLogger(__name__)

_WIDTHS = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
#: What a server process needs beside weights and KV (Python, torch, tokenizer, buffers).
_OVERHEAD_BYTES = 2 << 30


def check_port(host: str | None, port: int) -> None:
    """Raise ConfigError when nothing can listen on ``host:port``."""
    address = host or "127.0.0.1"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"--host {address} cannot be resolved ({error}).",
            expected="an address of this machine",
            fix="Pass --host 127.0.0.1 or 0.0.0.0.",
        ) from error
    with socket.socket(family, kind, protocol) as probe:
        # As uvicorn does, so that a socket in TIME_WAIT does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            found = f"Port {port} on {address} " + (
                "is taken." if taken else f"cannot be used ({error.strerror})."
            )
            raise ConfigError(
                found,
                expected="a free port",
                fix=f"Stop the other server or pass another --port (see `ss -ltnp | grep {port}`).",
            ) from error


def weight_elements(directory: Path) -> int:
    """Number of stored parameters, from the files' headers; 0 where they cannot be read."""
    try:
        return sum(tensor.parameters for tensor in read_headers(directory).values())
    except CheckpointError:
        return 0


def check_memory(view: ServerArgs) -> None:
    """Raise ConfigError when target and drafter cannot fit in this machine's free memory."""
    if not view.device.startswith("cpu"):
        return
    width = _WIDTHS.get(str(view.dtype), 2)
    paths = {view.model_path, view.speculative_draft_model_path}  # one where the drafter is bundled
    weights = sum(
        weight_elements(Path(path)) * width for path in paths if path and Path(path).is_dir()
    )
    free = psutil.virtual_memory().available
    needed = weights + _OVERHEAD_BYTES * int(view.tp_size)
    if weights and needed > free:
        raise ConfigError(
            f"{free / 2**30:.1f} GiB of memory are free.",
            expected=f"at least {needed / 2**30:.1f} GiB "
            f"({weights / 2**30:.1f} GiB of weights in {view.dtype} and working space)",
            fix="Use a smaller model or --dtype bfloat16, or stop other programs.",
        )


_PATHS = {
    "--model-path": "target",
    "--model": "target",
    "--speculative-draft-model-path": "drafter",
    "--speculative-draft-model": "drafter",
}


def serves_http(argv: Sequence[str]) -> bool:
    """Whether this is SGLang's HTTP server, not an offline engine in somebody's program."""
    return Path(argv[0]).name == "launch_server.py" or "serve" in argv[1:2]


def check(argv: Sequence[str]) -> None:
    """Check the model directories named on the command line.

    Raises:
        CheckpointError: a local path without a readable ``config.json``.
    """
    for position, word in enumerate(argv):
        flag, separator, value = word.partition("=")
        if flag not in _PATHS:
            continue
        if not separator:
            value = argv[position + 1] if position + 1 < len(argv) else ""
        path = Path(value).expanduser()
        if value and (path.is_absolute() or value.startswith(".") or path.exists()):
            read_config(path, role=_PATHS[flag])


_RESOLVER = "_handle_dspark"
_FOLDED = "SGLANG_DSPARK_FOLDED_PROPOSAL"
_DUMP_WAIT = "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS"
_SHARDED_HEAD = "SGLANG_DSPARK_OPT_MARKOV_W2_TP_SHARD"


def stop(error: DSparkError) -> NoReturn:
    """One line on standard error and exit code 2."""
    print(f"dspark: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error


def resolve(original: Callable[[Any], None], server_args: ServerArgs) -> None:
    """Stand in for SGLang's DSPARK argument resolution.

    Args:
        original: SGLang's own resolver, still used on the devices it accepts.
        server_args: SGLang's arguments in resolution.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.platforms import current_platform

    view = resolving_view(server_args)
    try:
        if serves_http(sys.argv):
            check_port(view.host, view.port)
        _refuse_ignored_options(view)
        drafter = _check_drafter(view)
        check_memory(view)
        _check_placement(view, drafter)
        _choose_mode(server_args, view)
    except DSparkError as error:
        stop(error)
    _check_at_start(server_args, view)
    _admit_at_once(server_args, view)
    if view.device.startswith("cpu"):
        if not getattr(current_platform, "dspark_cpu", False):
            stop(
                ConfigError(
                    "--device cpu was chosen, but the CPU platform of this plugin is not active.",
                    expected="SGLANG_PLATFORM=dspark on a machine with an accelerator",
                    fix="Set SGLANG_PLATFORM=dspark, or remove --device cpu.",
                )
            )
        _resolve_on_cpu(server_args, view, drafter)
        # SGLang waits a minute for dumps of a GPU when one of its processes dies, and clients with it.
        os.environ.setdefault(_DUMP_WAIT, "0")
    else:
        # Our sampler and acceptance run after the graphs, not folded into them.
        os.environ[_FOLDED] = "0"
        original(server_args)
        if drafter is None:
            try:
                _check_downloaded(view)
            except DSparkError as error:
                stop(error)


def resolve_builtin(original: Callable[[Any], None], server_args: ServerArgs) -> None:
    """Let SGLang's own DSPARK run on the CPU platform, to compare with: nothing of it is ours."""
    from sglang.srt.arg_groups.overrides import resolving_view

    view = resolving_view(server_args)
    try:
        drafter = _check_drafter(view)
    except DSparkError as error:
        stop(error)
    _resolve_on_cpu(server_args, view, drafter)


def _check_at_start(server_args: ServerArgs, view: ServerArgs) -> None:
    """Add our measurement and our comparison to SGLang's warm-ups."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    settings = read_settings()
    own = [warmup.CHECK]
    if settings.cost == COST_AUTO and settings.schedule != "all":
        own.insert(0, warmup.NAME)  # it does nothing where the cost is known
    warmup.register()
    names = [name for name in (view.warmups or "").split(",") if name]
    names += [name for name in own if name not in names]
    declare_resolution(server_args, _RESOLVER, warmups=",".join(names))


def _admit_at_once(server_args: ServerArgs, view: ServerArgs) -> None:
    """Let a waiting request in as soon as one has ended.

    For drafters with a prefill of their own SGLang holds requests back until up to four may begin together. Ours
    reads what the target's prefill computed; holding back would leave up to three of the running requests' places
    empty. A value of the operator's own is kept.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution

    if view.min_free_slots_delay is None and view.pp_size == 1:
        declare_resolution(server_args, _RESOLVER, min_free_slots_delay=1)


def _refuse_ignored_options(view: ServerArgs) -> None:
    """Options of SGLang's builtin that would be accepted here and then do nothing, or harm."""
    from sglang.srt.environ import envs

    used = {
        "--speculative-dspark-sps-table-path": view.speculative_dspark_sps_table_path,
        "--speculative-dspark-align-verify-tokens-to-graph-tier": view.speculative_dspark_align_verify_tokens_to_graph_tier,
        "--disaggregation-mode": view.disaggregation_mode != "null",
        "SGLANG_SIMULATE_ACC_LEN": envs.SGLANG_SIMULATE_ACC_LEN.get() > 0,
        "SGLANG_DSPARK_USE_GREEDY_DRAFT": envs.SGLANG_DSPARK_USE_GREEDY_DRAFT.get(),
    }
    for name, value in used.items():
        if value:
            raise ConfigError(
                f"{name} is set, which this plugin does not support.",
                expected="DSPARK without it",
                fix=f"Remove {name}, or run SGLang's builtin with DSPARK_PLUGIN=off.",
            )


def _check_placement(view: ServerArgs, drafter: DrafterConfig | None) -> None:
    """Refuse a placement that cannot be, where the drafter is known already."""
    if drafter is None or drafter.bundled:
        os.environ[_SHARDED_HEAD] = "0"  # where W2 is cut, it is by us
    if view.tp_size == 1 or view.attn_dp_size > 1:
        return
    if drafter is not None:
        placement.decide(
            read_settings(), drafter, ranks=int(view.tp_size), requests=1, device=str(view.device)
        )


def _choose_mode(server_args: ServerArgs, view: ServerArgs) -> None:
    """Tell SGLang whether it verifies whole blocks; the attention backend is known by now.

    Raises:
        ConfigError: the mode asked for cannot be.
    """
    from sglang.srt.environ import envs

    whole = (
        [] if view.device.startswith("cpu") else verify_mode.why_whole(_server(server_args, view))
    )
    variable = envs.SGLANG_RAGGED_VERIFY_MODE
    mode = verify_mode.choose(variable.get() if variable.is_set() else None, whole)
    variable.set(mode)
    if mode == verify_mode.WHOLE:
        logger.warning(
            "dspark: blocks are verified whole: %s. Parts can be verified with --attention-backend %s.",
            ", ".join(whole) or f"{verify_mode.VARIABLE} is {mode}",
            verify_mode.ADVICE,
        )


def _server(server_args: ServerArgs, view: Any) -> verify_mode.Server:
    from sglang.srt.arg_groups.model_override_base import attention_backends_of, model_config_of
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_platform

    prefill, decode = attention_backends_of(view)
    model, gpu = model_config_of(server_args), get_platform()
    return verify_mode.Server(
        backend=decode if view.speculative_attention_mode == "decode" else prefill,
        xqa=bool(gpu.is_sm90 or gpu.is_sm120),
        latent=model.attention_arch == AttentionArch.MLA,
        recurrent=mambaish_config(model) is not None,
        lora=bool(view.enable_lora or view.lora_paths),
        two_batch_overlap=bool(view.enable_two_batch_overlap),
        padded=not view.disable_cuda_graph_padding,
        attention_cp=int(view.attn_cp_size),
        attention_dp=int(view.attn_dp_size),
        moe_a2a=str(view.moe_a2a_backend),
        coordinated=bool(envs.SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION.get()),
        bundled=is_bundle(model.hf_config.to_dict()),
    )


def _drafter_directory(view: ServerArgs) -> Path | None:
    """The local drafter directory, the target's own where it bundles one; None while it is on the Hub."""
    if view.speculative_draft_model_path is None:
        return drafter_at(Path(view.model_path))
    given = str(view.speculative_draft_model_path)
    path = Path(given).expanduser()
    looks_local = path.is_absolute() or given.startswith(".") or path.exists()
    return path if looks_local else None


def _check_drafter(view: ServerArgs) -> DrafterConfig | None:
    directory = _drafter_directory(view)
    target: dict[str, Any] | None = None
    if Path(view.model_path).is_dir():
        target = read_config(Path(view.model_path), role="target")
    if directory is None:
        if view.speculative_draft_model_path is None and target is not None:
            raise ConfigError(
                "--speculative-algorithm DSPARK was given without a drafter.",
                expected="--speculative-draft-model-path DIR (the target bundles none)",
                fix="Pass the drafter's directory or Hub name.",
            )
        config = None
    else:
        config = check_drafter(directory, target, name=str(view.model_path))
        _check_gamma(view, config)
    return config


def _check_downloaded(view: ServerArgs) -> None:
    """Refuse a drafter of the Hub that cannot be served; SGLang has looked at its configuration by now.

    Raises:
        CheckpointError: it cannot be.
    """
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        found = get_config(
            view.speculative_draft_model_path,
            trust_remote_code=view.trust_remote_code,
            revision=view.speculative_draft_model_revision,
        )
    except (OSError, ValueError) as error:
        logger.warning("dspark: the drafter's configuration cannot be read yet: %s", error)
        return
    raw = found.to_dict()
    layout_of(raw).check_served(raw)


def _check_gamma(view: ServerArgs, config: DrafterConfig) -> None:
    for flag, given, expected in (
        ("--speculative-dspark-block-size", view.speculative_dspark_block_size, config.gamma),
        (
            "--speculative-num-draft-tokens",
            view.speculative_num_draft_tokens,
            config.gamma + 1,
        ),
    ):
        if given is not None and int(given) != expected:
            raise CheckpointError(
                f"{flag} is {given}.",
                expected=f"{expected}: the drafter was trained with block_size {config.gamma}",
                fix=f"Remove {flag}; the drafter's configuration decides.",
            )


def _resolve_on_cpu(
    server_args: ServerArgs, view: ServerArgs, drafter: DrafterConfig | None
) -> None:
    """SGLang's resolver refuses this device, so its steps that apply here are done here."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    unsupported = {
        "--dp-size with attention data parallelism": view.attn_dp_size > 1,
        "--pp-size": view.pp_size != 1,
    }
    for flag, used in unsupported.items():
        if used:
            stop(
                ConfigError(
                    f"{flag} is set.",
                    expected="a single pipeline stage without it on the CPU platform",
                    fix=f"Remove {flag}, or serve on GPUs.",
                )
            )
    directory = _drafter_directory(view)
    if directory is None or drafter is None:
        stop(
            ConfigError(
                "The drafter is not a local directory.",
                expected="--speculative-draft-model-path DIR on the CPU platform",
                fix="Download it first with `hf download NAME --local-dir DIR`.",
            )
        )

    declare_resolution(
        server_args,
        _RESOLVER,
        speculative_draft_model_path=str(directory),
        speculative_num_steps=1,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=drafter.gamma + 1,
    )
    if view.max_running_requests is None:
        declare_resolution(server_args, _RESOLVER, max_running_requests=48)
