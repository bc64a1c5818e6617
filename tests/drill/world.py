"""What a drill runs on: a tiny random pair and a real one, served by processes of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from dspark_sglang import targets
from dspark_sglang.errors import CheckpointError, ServerError
from dspark_sglang.server import Server, free_port, serve_command
from tests.tiny_models import ensure_models

Pair = Literal["tiny", "real"]
Part = Literal["scheduler", "detokenizer", "server"]
#: Seconds in which everything a server started has to be gone after one of its processes was killed.
GONE_S = 60.0
#: The tiny model's operations are too small to share.
_TINY = {"DSPARK_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}
#: SGLang names its processes so.
_TITLES = {"scheduler": "sglang::scheduler", "detokenizer": "sglang::detokenizer"}


class World(NamedTuple):
    """Where a drill keeps its files, and what it serves."""

    out: Path
    #: Of the real pair.
    drafter: Path
    seed: int

    def models(self, pair: Pair) -> tuple[Path, Path]:
        """The target's and the drafter's directory.

        Raises:
            CheckpointError: the real drafter is not there.
        """
        if pair == "tiny":
            return ensure_models(self.out / "models", self.seed)
        if not (self.drafter / "config.json").is_file():
            raise CheckpointError(
                f"{self.drafter} holds no drafter.",
                expected="a drafter directory (run this from the repository's root)",
                fix="Pass --drafter DIR.",
            )
        return targets.ensure_target(), self.drafter

    def server(
        self,
        name: str,
        *,
        pair: Pair = "tiny",
        flags: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        port: int | None = None,
        log: Path | None = None,
        drafter: Path | None = None,
    ) -> Server:
        """A server that was not started yet.

        Args:
            port, log: free and under ``out`` when None.
            drafter: instead of the pair's own.
        """
        target, own = self.models(pair)
        port = port or free_port()
        command = serve_command(
            target,
            port,
            dtype="float32",
            drafter=drafter or own,
            extra=["--enable-metrics", *flags],
        )
        given = {"DSPARK_CACHE_DIR": str((self.out / "cache" / pair).resolve())}
        if pair == "tiny":
            given |= _TINY
        return Server(
            command,
            port=port,
            log=log or self.out / "logs" / f"{name}.log",
            environment={**given, **(environment or {})},
        )


def processes(server: Server) -> list[psutil.Process]:
    """Every living process of a server, the launched one first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(server.pid)
        return [first, *first.children(recursive=True)]
    return []


def find(server: Server, part: Part) -> psutil.Process:
    """One process of a running server.

    Raises:
        ServerError: there is none of that name.
    """
    running = processes(server)
    if part == "server" and running:
        return running[0]
    for process in running:
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == [_TITLES[part]] or process.name() == _TITLES[part][:15]:
                return process
    raise ServerError(
        f"The server has no process {part}.",
        expected=f"one named {_TITLES.get(part, part)}",
        fix=f"See its log in {server.log}.",
    )


def memory(server: Server) -> int:
    """Resident bytes of all its processes."""
    total = 0
    for process in processes(server):
        with contextlib.suppress(psutil.Error):
            total += int(process.memory_info().rss)
    return total


def wait_gone(known: Sequence[psutil.Process], seconds: float = GONE_S) -> list[int]:
    """Wait until processes have ended; the ids of those that have not."""
    deadline = time.monotonic() + seconds
    while alive := [p.pid for p in known if p.is_running() and p.status() != "zombie"]:
        if time.monotonic() > deadline:
            return alive
        time.sleep(0.1)
    return []


def terminate(server: Server) -> None:
    """SIGTERM as a kubelet sends it: to the first process alone."""
    os.kill(server.pid, signal.SIGTERM)


@contextlib.contextmanager
def started(server: Server, seconds: float = 300.0) -> Iterator[Server]:
    """A server that is ready, and ended afterwards."""
    with server:
        server.wait_ready(seconds)
        yield server
