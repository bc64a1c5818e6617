"""A full disk under the log, the cache directory and calibration files, on small file systems in memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from dspark_sglang.server import Server
from tests.drill.requests import Reference, ask_all, client, references
from tests.drill.section import Findings, Tell
from tests.drill.world import World, started

LIMIT_S = 120.0
_BALLAST = "ballast"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A file system of ``size`` in memory, mounted at ``folder``; None where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def fill(folder: Path) -> None:
    """Use every byte that is left."""
    with (folder / _BALLAST).open("ab", buffering=0) as stream:
        for piece in (1 << 16, 1):
            try:
                while True:
                    stream.write(b"\0" * piece)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def free(folder: Path) -> None:
    """Give it back."""
    (folder / _BALLAST).unlink()


async def _answers(url: str, wanted: list[Reference] | None, seed: int, what: str,
                   found: Findings) -> list[Reference]:  # fmt: skip
    async with client(url) as http:
        wanted = wanted or await references(http, 16, tokens=24, seed=seed)
        found.take(what, await ask_all(http, wanted, limit_s=LIMIT_S), allowed=())
    return wanted


def _command(url: str, key: str, value: int = 2) -> bool:
    """Whether the server did what ``/set_internal_state`` asked for."""
    sent = {"server_args": {key: value}}
    answer = httpx.post(f"{url}/set_internal_state", json=sent, timeout=60.0)
    return answer.status_code == 200 and answer.json() in (True, [True])


def _calibrate(url: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dspark_sglang.cli.main", "calibrate", "--url", url]
    return subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, check=False, timeout=300
    )


def disk(world: World, tell: Tell) -> Findings:
    """Start with a full cache, serve with a full log, and be asked to write what has no room."""
    found = Findings()
    root = world.out / "disks"
    with small_disk(root / "cache", "1m") as cache, small_disk(root / "log", "4m") as log:
        if cache is None or log is None:
            found.skipped = "a small file system cannot be mounted here: run as root"
            return found
        fill(cache)
        tell("starting with a full cache directory")
        server = world.server(
            "disk",
            environment={"DSPARK_CACHE_DIR": str(cache.resolve())},
            flags=("--log-requests", "--log-requests-level", "2"),
            log=log / "server.log",
        )
        with started(server):
            wanted = asyncio.run(_answers(server.url, None, world.seed + 5, "full cache", found))
            _full_log(server, log, wanted, found, tell, world.seed)
            _refused_writes(server, cache, wanted, found, tell)
            found.expect(server.alive(), "the server stopped")
    found.figures |= {"file systems": "tmpfs of 1 MiB (cache) and 4 MiB (log)", "uid": os.getuid()}
    return found


def _full_log(
    server: Server, log: Path, wanted: list[Reference], found: Findings, tell: Tell, seed: int
) -> None:
    tell("serving with a full log")
    fill(log)
    before = server.log.stat().st_size
    asyncio.run(_answers(server.url, wanted, seed, "full log", found))
    grown = server.log.stat().st_size - before
    # The last page of the log may have had room.
    found.expect(grown < 4096, f"the log grew by {grown} bytes: it was not full")
    free(log)
    asyncio.run(_answers(server.url, wanted, seed, "after the log had room again", found))
    grown = server.log.stat().st_size - before
    found.expect(grown > 0, "nothing is logged after the log had room again")
    found.figures["log_grew_again_by"] = grown


def _refused_writes(
    server: Server, cache: Path, wanted: list[Reference], found: Findings, tell: Tell
) -> None:
    tell("writing cost and calibration to a full disk")
    # A fit needs blocks that were verified.
    found.expect(_command(server.url, "dspark_speculation", 1), "speculation cannot be turned on")
    asyncio.run(_answers(server.url, wanted * 3, 0, "speculation on", found))
    found.expect(not _command(server.url, "dspark_cost"), "dspark_cost 2 said it wrote a full disk")
    asyncio.run(_answers(server.url, wanted, 0, "after dspark_cost 2", found))
    done = _calibrate(server.url, cache / "sts.json")
    lines = done.stderr.strip().splitlines()
    found.figures["calibrate"] = {"exit": done.returncode, "said": lines[-1][:200] if lines else ""}
    found.expect(
        done.returncode == 2 and len(lines) == 1 and "space" in lines[0],
        f"dspark calibrate on a full disk: exit code {done.returncode}, {len(lines)} lines",
    )
    left = [path.name for path in cache.rglob("*") if path.is_file() and path.name != _BALLAST]
    found.expect(not left, f"half a file was left on the full disk: {left}")
    free(cache)
    asyncio.run(_answers(server.url, wanted * 3, 0, "after calibrate", found))
    found.expect(_command(server.url, "dspark_cost"), "dspark_cost 2 fails where there is room")
    done = _calibrate(server.url, cache / "sts.json")
    written = (cache / "sts.json").is_file() and any(cache.rglob("cost/*.json"))
    found.expect(written, f"cost and calibration were not written: {done.stderr[-200:]}")
