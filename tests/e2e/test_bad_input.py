"""Wrong input to the real server command: one clear line, a failing exit code, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from dspark_sglang import targets
from dspark_sglang.server import Server, free_port, serve_command

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
DRAFTER = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"
SECONDS = 120


@pytest.fixture(scope="module")
def target() -> Path:
    return targets.ensure_target()


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    copy = tmp_path / "drafter"
    shutil.copytree(DRAFTER, copy)
    return copy


def refused(command: list[str]) -> str:
    """Run a server command that must fail by itself; its one error line."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("dspark: ")]
    assert len(lines) == 1, done.stderr[-2000:]
    assert "Expected " in lines[0]
    return lines[0]


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_wrong_model_path(tmp_path: Path) -> None:
    line = refused(serve_command(tmp_path / "no", free_port(), dtype="bfloat16", drafter=DRAFTER))
    assert "target path" in line and "is not a directory" in line


def foreign(drafter: Path) -> None:
    edit_config(drafter, num_target_layers=12)


def headless(drafter: Path) -> None:
    path = drafter / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if not n.startswith("confidence_head")}
    save_file(tensors, path)


def damaged(drafter: Path) -> None:
    path = drafter / "model.safetensors"
    path.write_bytes(path.read_bytes()[: 1 << 20])


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        pytest.param(foreign, "num_target_layers is 12", marks=pytest.mark.slow),
        pytest.param(headless, "no confidence head", marks=pytest.mark.slow),
        (damaged, "is damaged"),
    ],
    ids=["foreign", "headless", "damaged"],
)
def test_broken_drafter(
    target: Path, drafter: Path, break_it: Callable[[Path], None], says: str
) -> None:
    break_it(drafter)
    assert says in refused(serve_command(target, free_port(), dtype="bfloat16", drafter=drafter))


def test_gamma_that_contradicts_the_checkpoint(target: Path) -> None:
    extra = ["--speculative-num-draft-tokens", "8"]
    command = serve_command(target, free_port(), dtype="bfloat16", drafter=DRAFTER, extra=extra)
    line = refused(command)
    assert "--speculative-num-draft-tokens is 8" in line and "block_size 5" in line


def test_port_taken(target: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused(serve_command(target, port, dtype="bfloat16", drafter=DRAFTER))
    assert f"Port {port}" in line and "is taken" in line


def test_unknown_setting(target: Path) -> None:
    command = ["env", "DSPARK_SCHEDUL=all"]
    command += serve_command(target, free_port(), dtype="bfloat16", drafter=DRAFTER)
    assert "Did you mean DSPARK_SCHEDULE?" in refused(command)


@pytest.mark.parametrize(
    ("drafter", "extra", "says"),
    [
        (DRAFTER, ["--tp", "2"], "9 query heads, 3 key heads and MLPs of width 1536 do not divide"),
        (None, ["--enable-hierarchical-cache", "--hicache-size", "1"], "--enable-hierarchical-cache is set"),
    ],
    ids=["ranks", "hierarchical-cache-without-dspark"],
)  # fmt: skip
def test_starts_that_no_cpu_can_serve(
    target: Path, drafter: Path | None, extra: list[str], says: str
) -> None:
    command = serve_command(target, free_port(), dtype="float32", drafter=drafter, extra=extra)
    assert says in refused(command)


@pytest.mark.parametrize("when", ["starting", "serving"])
def test_interrupt_leaves_no_process(target: Path, tmp_path: Path, when: str) -> None:
    port = free_port()
    command = serve_command(target, port, dtype="bfloat16", drafter=DRAFTER)
    server = Server(command, port=port, log=tmp_path / "log").start()
    try:
        if when == "serving":
            server.wait_ready()
        else:
            time.sleep(8)
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        os.kill(server.pid, signal.SIGINT)
        _, alive = psutil.wait_procs(family, timeout=20)
        if alive and when == "starting":
            # Python drops an interrupt that lands in a callback of a library being imported;
            # a person presses Ctrl-C again.
            os.kill(server.pid, signal.SIGINT)
            _, alive = psutil.wait_procs(alive, timeout=45)
        assert not alive
    finally:
        server.stop()


def test_the_demos_servers_die_with_it(target: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dspark_sglang.cli.main", "demo", "--out", str(tmp_path)]
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS
        while len(psutil.Process(demo.pid).children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(6)
        servers = psutil.Process(demo.pid).children(recursive=True)
        assert len(servers) >= 2
        demo.kill()
        demo.wait()
        _, alive = psutil.wait_procs(servers, timeout=60)
        assert not alive
    finally:
        demo.kill()
        for process in psutil.process_iter(["cmdline"]):
            if str(tmp_path) in " ".join(process.info["cmdline"] or []):
                process.kill()
    assert not (tmp_path / "summary.json").exists()
