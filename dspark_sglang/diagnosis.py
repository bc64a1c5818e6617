"""What ``dspark doctor`` looks at: the installation, the machine, a running server.

Every finding says what was found and, if wrong, the fix.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import msgspec

from dspark_sglang import __version__, remote
from dspark_sglang.checkpoint import read_config
from dspark_sglang.config import (
    COST_AUTO,
    COST_ONLINE,
    Settings,
    read_api_key,
    read_settings,
)
from dspark_sglang.errors import DSparkError, ServerError
from dspark_sglang.layouts.base import check_drafter
from dspark_sglang.serving import compat, entry

Level = Literal["ok", "warning", "problem"]
_GROUPS = {"plugin": "sglang.srt.plugins", "CPU platform": "sglang.srt.platforms"}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was checked."""

    level: Level
    what: str
    fix: str = ""


def _failed(error: DSparkError) -> Finding:
    return Finding("problem", f"{error.found} Expected {error.expected}.", error.fix)


def local() -> list[Finding]:
    """The installation on this machine."""
    findings = [
        Finding("ok", f"dspark-sglang {__version__}, Python {sys.version.split()[0]}"),
        *activation(),
    ]
    try:
        compat.check((), allow_other=read_settings().allow_other_sglang)
        findings.append(Finding("ok", f"SGLang {compat.installed_version()} is installed"))
    except DSparkError as error:
        return [*findings, _failed(error)]
    return [*findings, *_platform(), *_contract()]


def activation() -> list[Finding]:
    """Whether SGLang would load this plugin here; imports nothing of it."""
    return [*_settings(), *_entry_points(), *_selection()]


def _settings() -> list[Finding]:
    try:
        settings = read_settings()
    except DSparkError as error:
        return [_failed(error)]
    found = [Finding("ok", "DSPARK_* settings are valid")]
    if settings.plugin == "off":
        found.append(
            Finding(
                "warning",
                "DSPARK_PLUGIN=off: SGLang's builtin DSPARK will run",
                "Unset it to use this plugin.",
            )
        )
    return found


def _entry_points() -> list[Finding]:
    findings = []
    for what, group in _GROUPS.items():
        names = [point.name for point in importlib.metadata.entry_points(group=group)]
        if entry.ENTRY_POINT in names:
            findings.append(Finding("ok", f"SGLang's entry point for the {what} is registered"))
        else:
            findings.append(
                Finding(
                    "problem",
                    f"no entry point named {entry.ENTRY_POINT} in {group}",
                    "Install the package: `pip install dspark-sglang` (or `pip install -e .`).",
                )
            )
    return findings


def _selection() -> list[Finding]:
    """Environment variables by which SGLang leaves plugins out."""
    findings = []
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name]
    if allowed and entry.ENTRY_POINT not in allowed:
        findings.append(
            Finding(
                "problem",
                f"SGLANG_PLUGINS={','.join(allowed)} leaves this plugin out",
                f"Add {entry.ENTRY_POINT} to it, or unset it.",
            )
        )
    chosen = os.environ.get("SGLANG_PLATFORM", "")
    if chosen and chosen != entry.ENTRY_POINT:
        findings.append(
            Finding(
                "problem",
                f"SGLANG_PLATFORM={chosen} makes SGLang skip every plugin of other platforms' "
                "packages, this one included",
                "Unset it: a GPU needs no platform plugin.",
            )
        )
    return findings


def _platform() -> list[Finding]:
    if entry.accelerator_present():
        import torch

        if not torch.cuda.is_available():
            return [Finding("ok", "device: an accelerator")]
        name, (major, _) = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
        return [Finding("ok", f"device: {name}"), judge_attention(major)]
    if entry.activate_platform() is not None:
        return [Finding("ok", "device: no accelerator found, the CPU platform will be used")]
    return [
        Finding(
            "warning",
            "SGLANG_USE_CPU_ENGINE=1 selects SGLang's own CPU engine, which has no DSPARK",
            "Unset it to use the CPU platform of this package.",
        )
    ]


def judge_attention(major: int) -> Finding:
    """What SGLang's attention verifies by default on a GPU of compute capability ``major``, for multi-head targets."""
    known = {9: "fa3", 10: "trtllm_mha"}
    if major in known:
        return Finding("ok", f"attention: {known[major]}, any part of a block can be verified")
    return Finding(
        "warning",
        "attention: flashinfer by default, with which only whole blocks are verified",
        "Pass --attention-backend fa3, which can verify parts." if major == 8 else "",
    )


def _contract() -> list[Finding]:
    symbols = compat.ALGORITHM_SYMBOLS + compat.CPU_SYMBOLS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's modules warn about kernels absent here
        wrong = list(compat.differences(symbols))
    if not wrong:
        return [
            Finding("ok", f"all {len(symbols)} SGLang symbols this plugin uses are as expected")
        ]
    fix = f"Install sglang=={compat.SGLANG_VERSION}."
    return [Finding("problem", line, fix) for line in wrong]


def models(target: Path | None, drafter: Path) -> list[Finding]:
    """A drafter's files, and whether it fits a target."""
    try:
        shape = None if target is None else read_config(target, role="target")
        config = check_drafter(drafter, shape, name=str(target))
    except DSparkError as error:
        return [_failed(error)]
    said = f"{drafter}: gamma {config.gamma}, {config.markov_head} Markov head"
    fits = [] if target is None else [Finding("ok", f"it fits {target}")]
    return [Finding("ok", said), *fits]


def server(url: str) -> list[Finding]:
    """Whether our algorithm is what a running server uses; its key is read from ``API_KEY``."""
    try:
        with remote.client(url.rstrip("/"), read_api_key()) as http:
            info = remote.info(http)
    except ServerError as error:
        return [_failed(error)]
    return _judge(url, info, (info.get("internal_states") or [{}])[0])


def _judge(url: str, info: dict[str, Any], state: dict[str, Any]) -> list[Finding]:
    algorithm = info.get("speculative_algorithm")
    record = state.get("dspark_info_record")
    if str(algorithm).upper() != entry.ALGORITHM:
        return [
            Finding(
                "problem",
                f"{url} runs without DSPARK (speculative_algorithm is {algorithm})",
                "Start it with --speculative-algorithm DSPARK "
                "--speculative-draft-model-path DRAFTER.",
            )
        ]
    if not isinstance(record, dict) or not record.get("active"):
        return [
            Finding(
                "problem",
                f"{url} runs SGLang's builtin DSPARK, not this plugin",
                "Install dspark-sglang in the server's environment, run `dspark doctor` there, and "
                "check that neither DSPARK_PLUGIN=off nor SGLANG_PLUGINS leaves it out.",
            )
        ]
    length = record.get("accept_length")
    said = "nothing generated yet" if length is None else f"accepted length {length:.2f}"
    ran = ", ".join(f"{name} ×{count}" for name, count in sorted(record["ran"].items()))
    findings = [
        Finding("ok", f"{url} runs dspark {record['version']}: gamma {record['gamma']}, {said}"),
        Finding("ok", f"what ran: {ran or 'nothing yet'}"),
    ]
    if record.get("drafting_stopped"):
        findings.append(
            Finding(
                "problem",
                f"{url} drafts no more: {record['drafting_stopped']}",
                'See its log. Drafting again: POST /set_internal_state {"server_args": {"dspark_speculation": -1}}.',
            )
        )
    return findings


#: Ranks exchange batches and NCCL its buffers through it; Docker's default is 64 MiB.
SHM_BYTES = 1 << 30
#: A converted target, measured costs, and room for a log.
CACHE_BYTES = 1 << 30
_SHM = Path("/dev/shm")
_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def look(port: int | None, drafter: Path | None = None) -> list[Finding]:
    """Everything here.

    Args:
        port: of a server to come; None: one runs already.
        drafter: a directory that will be served; None: not asked for.
    """
    try:
        settings = read_settings()
    except DSparkError:
        return [*driver(), shared_memory(_SHM)]  # said already, with its fix
    return [
        *driver(),
        shared_memory(_SHM),
        directory(settings.cache_path, "cache directory"),
        *artifacts(settings, drafter),
        *([] if port is None else ports(port, _PORTS)),
    ]


def driver() -> list[Finding]:
    """Driver and NCCL, where this machine or this torch is meant for NVIDIA GPUs."""
    import torch

    devices = Path("/dev/nvidiactl").exists()
    if not devices and not torch.cuda.is_available():
        return [Finding("ok", "driver and NCCL: not needed, no NVIDIA device here")]
    if torch.version.cuda is None:
        fix = "Install it with `pip install 'dspark-sglang[gpu]'`, in an environment of its own."
        return [Finding("problem", "this machine has NVIDIA devices, but torch is the CPU build", fix)]  # fmt: skip
    if not torch.cuda.is_available():
        what = f"torch is built for CUDA {torch.version.cuda} and finds no usable GPU"
        fix = "Check `nvidia-smi` for the driver; in a container, start it with `--gpus all`."
        return [Finding("problem", what, fix)]
    return [_driver(torch), _nccl(torch)]


def _driver(torch: object) -> Finding:
    """Whether the driver is new enough for torch's CUDA."""
    number = int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    built: str = torch.version.cuda  # type: ignore[attr-defined]
    return judge_driver((number // 1000, number % 1000 // 10), built)


def judge_driver(supported: tuple[int, int], built: str) -> Finding:
    """A driver that supports CUDA ``supported``, for a torch built with ``built``.

    A driver runs every release of CUDA of its own major number.
    """
    said = ".".join(map(str, supported))
    if supported[0] < int(built.split(".")[0]):
        return Finding(
            "problem",
            f"the driver supports CUDA {said}, torch is built for {built}",
            f"Install a driver for CUDA {built.split('.')[0]} or newer.",
        )
    return Finding("ok", f"driver: CUDA {said}, torch built for {built}")


def _nccl(torch: object) -> Finding:
    if not torch.distributed.is_nccl_available():  # type: ignore[attr-defined]
        return Finding("problem", "torch has no NCCL: --tp cannot be used",
                       "Install torch from PyPI, as `pip install 'dspark-sglang[gpu]'` does.")  # fmt: skip
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[attr-defined]
    return Finding("ok", f"NCCL {version}")


def shared_memory(path: Path, least: int = SHM_BYTES) -> Finding:
    """Whether the file system of shared memory is large enough."""
    fix = (
        "Docker: `--shm-size 8g`. Kubernetes: mount an emptyDir with `medium: Memory` at /dev/shm."
    )
    try:
        size = shutil.disk_usage(path)
    except OSError as error:
        return Finding("problem", f"{path} cannot be used: {error.strerror}", fix)
    said = f"shared memory: {size.free >> 20} of {size.total >> 20} MiB free at {path}"
    return Finding("ok", said) if size.free >= least else Finding("warning", said, fix)


def directory(path: Path, what: str, least: int = CACHE_BYTES) -> Finding:
    """Whether a directory can be made and written, and has room."""
    fix = f"Run `chown -R $(id -u) {path}`, or name another place: DSPARK_CACHE_DIR=DIR."
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
            probe.flush()
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding("problem", f"{what} {path} cannot be written: {error.strerror}", fix)
    said = f"{what} {path} can be written, {free >> 20} MiB free"
    if free < least:
        return Finding("warning", said, "Free some space, or set DSPARK_CACHE_DIR.")
    return Finding("ok", said)


def artifacts(settings: Settings, drafter: Path | None) -> list[Finding]:
    """Whether the files that settings name, and a drafter's, can be read by this user."""
    wanted: list[tuple[Path, str]] = []
    if settings.sts:
        wanted.append((Path(settings.sts), "DSPARK_STS"))
    if settings.cost not in (COST_AUTO, COST_ONLINE):
        wanted.append((Path(settings.cost), "DSPARK_COST"))
    if drafter is not None and drafter.is_dir():
        wanted += [(path, "the drafter") for path in sorted(drafter.iterdir()) if path.is_file()]
    bad = [(path, what) for path, what in wanted if not os.access(path, os.R_OK)]
    if not bad:
        return [Finding("ok", f"{len(wanted)} artifact files can be read")] if wanted else []
    return [
        Finding(
            "problem",
            f"{path} ({what}) " + ("cannot be read" if path.exists() else "does not exist"),
            f"Run `chmod a+r {path}`." if path.exists() else f"Correct or unset {what}.",
        )
        for path, what in bad
    ]


def ports(port: int, handed_out: Path) -> list[Finding]:
    """Whether a server could listen on a port, and whether its own ranks might take it first.

    Args:
        handed_out: the kernel's file with the first and last port it gives to sockets that ask for any.
    """
    from dspark_sglang.serving.arguments import check_port

    try:
        check_port("127.0.0.1", port)
        found = [Finding("ok", f"port {port} is free")]
    except DSparkError as error:
        found = [Finding("warning", error.found.rstrip("."), error.fix)]
    try:
        first, last = map(int, handed_out.read_text().split())
    except (OSError, ValueError):
        return found
    if first <= port <= last:
        found.append(
            Finding(
                "warning",
                f"port {port} lies among those the kernel hands out ({first} to {last}), and ranks that start "
                "take many of these",
                f"Pass a --port below {first}.",
            )
        )
    return found
