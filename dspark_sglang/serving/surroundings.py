"""What ``dspark doctor`` looks at around the installation: driver, NCCL, shared memory, directories, ports."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from dspark_sglang.config import COST_AUTO, COST_ONLINE, Settings, read_settings
from dspark_sglang.errors import DSparkError
from dspark_sglang.serving.diagnosis import Finding
from dspark_sglang.serving.preflight import check_port

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
