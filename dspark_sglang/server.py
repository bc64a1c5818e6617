"""One SGLang server as a child process: started, paused, resumed, and always ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import httpx

from dspark_sglang.errors import ServerError

#: Everything that both servers of a comparison share.
COMMON_FLAGS = (
    "--host", "127.0.0.1",
    "--mem-fraction-static", "0.5",
    "--max-total-tokens", "32768",
    "--max-running-requests", "16",
    "--random-seed", "7",
    "--skip-server-warmup",
    "--enable-cache-report",
    "--log-level", "info",
)  # fmt: skip
START_SECONDS = 300.0
#: The last line SGLang logs while it starts.
_STARTED = b"The server is fired up"
_PR_SET_PDEATHSIG = 1
STOP_SECONDS = 20.0
Name = TypeVar("Name", bound=str)


def _first_handed_out() -> int:
    """The lowest port that the kernel gives to sockets that ask for any (Linux)."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32768


def free_ports(count: int) -> list[int]:
    """Different TCP ports nobody listens on at this moment.

    They lie below those the kernel hands out: the ranks of a server that starts take many of these, and
    would take its own before it listens.
    """
    low = max(2048, _first_handed_out())
    found: list[int] = []
    for port in random.SystemRandom().sample(range(low // 2, low), k=low // 2):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    return free_ports(1)[0]


def serve_command(
    model: Path, port: int, *, dtype: str, drafter: Path | None, extra: Sequence[str] = ()
) -> list[str]:
    """The command line of a server; ``drafter`` adds the speculative flags and nothing else."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--port", str(port), "--dtype", dtype, *COMMON_FLAGS, *extra]
    if drafter is not None:
        command += ["--speculative-algorithm", "DSPARK"]
        command += ["--speculative-draft-model-path", str(drafter)]
    return command


def _end_with_parent() -> None:
    """Runs in the child: be killed should the parent die without cleaning up.

    SIGTERM would wait behind a pause; SGLang arranges the same for its own children.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Server:
    """A server in a process group of its own, so that nothing of it can be left behind."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: IO[bytes] | None = None
        #: Made once: to make a client takes 20 ms of a core, which the server that is measured needs. Connections are
        #: not kept: a server that is paused for long closes them as it resumes.
        self.http = httpx.Client(
            base_url=self.url, timeout=60.0, limits=httpx.Limits(max_keepalive_connections=0)
        )

    def start(self) -> Self:
        """Launch without waiting; see :meth:`wait_ready`."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.log.open("wb")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        return self

    @property
    def pid(self) -> int:
        """Process id of the launched server, which is also its process group."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def alive(self) -> bool:
        """Whether the launched process still runs."""
        return self._process is not None and self._process.poll() is None

    def poll(self) -> bool:
        """Whether the server is up and takes requests.

        Raises:
            ServerError: it stopped instead.
        """
        assert self._process is not None, "the server was not started"
        code = self._process.poll()
        if code is not None:
            raise ServerError(
                f"The server stopped with exit code {code}: {self.reason()}",
                expected="a server that starts",
                fix=f"Its whole log is in {self.log}.",
            )
        try:
            # Ready comes before SGLang's own last steps, which a pause would defeat.
            if _STARTED not in self.log.read_bytes():
                return False
            if self.http.get("/ready", timeout=2.0).status_code != 200:
                return False
            # A part of SGLang's warm-up, which is skipped: every server is to run as it would in service.
            self.http.post("/freeze_gc", timeout=30.0)
        except httpx.HTTPError:
            return False
        return True

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until the server takes requests.

        Raises:
            ServerError: it stopped, or is not up in time.
        """
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The server was not ready after {seconds:.0f} s.",
                    expected="/ready to answer 200",
                    fix=f"See its log in {self.log}.",
                )
            time.sleep(0.25)

    def reason(self) -> str:
        """The line of the log that says best why the server stopped."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        ours = [line for line in lines if line.startswith("dspark: ")]
        errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
        found = ours or errors or lines or ["no output"]
        return found[-1].strip()[:400]

    def pause(self) -> None:
        """Stop the whole group from using the processor (its idle loop polls)."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused group run again."""
        os.killpg(self.pid, signal.SIGCONT)

    def info(self) -> dict[str, Any]:
        """``/server_info`` of a running server."""
        try:
            answer: dict[str, Any] = self.http.get("/server_info").json()
        except (httpx.HTTPError, ValueError) as error:
            raise self.gone(error) from error
        return answer

    def requests(self) -> int:
        """How many requests run or wait in the scheduler that has most, as it said last.

        From ``/v1/loads``: ``/server_info`` does not tell.

        Raises:
            ServerError: the server does not answer, or says nothing of its load.
        """
        try:
            answer = self.http.get("/v1/loads", params={"include": "core"})
            loads = answer.json()["loads"]
            # One for each scheduler; max() of none is an error.
            return max(int(load["num_running_reqs"] + load["num_waiting_reqs"]) for load in loads)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise self.gone(error) from error

    def gone(self, error: Exception) -> ServerError:
        """What to raise when a running server stops answering."""
        return ServerError(
            f"The server stopped answering ({error!r}): {self.reason()}",
            expected="a running server",
            fix=f"Its whole log is in {self.log}.",
        )

    def dspark(self) -> dict[str, Any] | None:
        """What our plugin reports in the scheduler process; None where it is not running."""
        record = self.info()["internal_states"][0].get("dspark_info_record")
        return record if isinstance(record, dict) and record.get("active") else None

    def update(self, **values: float) -> None:
        """Change how the running server schedules (``serving/admin.py`` lists the names).

        Raises:
            ServerError: it refused.
        """
        answer = self.http.post("/set_internal_state", json={"server_args": values})
        if answer.status_code != 200 or not all(answer.json()):
            raise ServerError(
                f"The server refused {values}: {answer.text[:200]}.",
                expected="a server of this plugin that schedules",
                fix=f"The reason is in {self.log}.",
            )

    def record(self) -> dict[str, Any]:
        """The same for a result file, empty without it: where files lie says nothing to a reader."""
        found = self.dspark() or {}
        places = ("cost_source", "sts")
        return found | {name: Path(str(found[name])).name for name in places if found.get(name)}

    def stop(self) -> None:
        """End the server and everything it started; safe to call twice."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.resume()
            os.killpg(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def pause_when_up(
    servers: Mapping[Name, Server],
    *,
    tell: Callable[[float], None],
    may_fail: Collection[str] = (),
) -> dict[Name, ServerError]:
    """Wait until launched servers are up, pausing each at once so that it takes nothing from others.

    Args:
        servers: launched, by name.
        tell: told the seconds waited, twice a second.
        may_fail: names of those that may stop instead.

    Returns:
        The errors of those that did.

    Raises:
        ServerError: another one stopped, or some are not up in :data:`START_SECONDS`.
    """
    waiting, began = dict(servers), time.monotonic()
    failed: dict[Name, ServerError] = {}
    while waiting:
        for name, server in list(waiting.items()):
            try:
                if not server.poll():
                    continue
                server.pause()
            except ServerError as error:
                if name not in may_fail:
                    raise
                failed[name] = error
            del waiting[name]
        took = time.monotonic() - began
        if waiting and took > START_SECONDS:
            raise ServerError(
                f"{', '.join(waiting)} not ready after {START_SECONDS:.0f} s.",
                expected="all servers up",
                fix=f"See the log in {next(iter(waiting.values())).log}.",
            )
        tell(took)
        time.sleep(0.5)
    return failed
