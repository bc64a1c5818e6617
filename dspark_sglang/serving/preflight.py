"""Checks that need no model: is the port free, will the weights fit."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open

from dspark_sglang.checkpoint import weight_files
from dspark_sglang.errors import ConfigError

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
    total = 0
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    size = 1
                    for extent in handle.get_slice(name).get_shape():
                        size *= extent
                    total += size
        except (SafetensorError, OSError):
            return 0
    return total


def check_memory(view: Any) -> None:
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
