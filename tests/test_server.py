"""Servers started side by side: each is paused once it is up, and one that fails says why."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dspark_sglang.errors import ServerError
from dspark_sglang.server import Server, free_port, pause_when_up

#: What a server shows of itself while it starts, without a model behind it.
UP = """
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready)
print("The server is fired up and ready to roll!", flush=True)
server.serve_forever()
"""
DOWN = "raise SystemExit('RuntimeError: no such device')"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def launched(stack: ExitStack, folder: Path, code: str) -> Server:
    port = free_port()
    log = folder / f"{port}.log"
    server = Server([sys.executable, "-c", code, str(port)], port=port, log=log)
    return stack.enter_context(server)


def stopped(server: Server) -> bool:
    """Whether Linux shows the process as stopped, soon: it has to be scheduled for that."""
    for _ in range(100):
        if Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.05)
    return False


def test_servers_are_paused_once_they_are_up(stack: ExitStack, tmp_path: Path) -> None:
    servers = {name: launched(stack, tmp_path, UP) for name in ("plain", "dspark")}
    told: list[float] = []
    assert pause_when_up(servers, tell=told.append) == {}
    assert all(stopped(server) for server in servers.values())
    assert told == sorted(told) != []


def test_one_that_may_fail_is_reported_and_the_others_go_on(
    stack: ExitStack, tmp_path: Path
) -> None:
    servers = {"good": launched(stack, tmp_path, UP), "bad": launched(stack, tmp_path, DOWN)}
    failed = pause_when_up(servers, tell=lambda took: None, may_fail=("bad",))
    assert list(failed) == ["bad"] and "no such device" in failed["bad"].found
    assert stopped(servers["good"])


def test_one_that_must_not_fail_ends_the_wait(stack: ExitStack, tmp_path: Path) -> None:
    servers = {"good": launched(stack, tmp_path, UP), "bad": launched(stack, tmp_path, DOWN)}
    with pytest.raises(ServerError, match="no such device"):
        pause_when_up(servers, tell=lambda took: None, may_fail=("good",))


def test_servers_that_do_not_come_up_are_named(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark_sglang.server.START_SECONDS", 0.2)
    slow = launched(stack, tmp_path, "import time; time.sleep(600)")
    with pytest.raises(ServerError, match="slow not ready") as caught:
        pause_when_up({"slow": slow}, tell=lambda took: None)
    assert str(slow.log) in caught.value.fix
