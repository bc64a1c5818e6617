"""Steps of a report: commands that leave files, each kept until its command or its surroundings change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from dspark_sglang.artifacts import write_json
from dspark_sglang.provenance import machine, versions

STATE = "state.json"
#: Seconds that an interrupted command gets to write down what it has and to stop its servers.
_GRACE_S = 45.0
#: Seconds between looks at a running command.
_LOOK_S = 0.5

Status = Literal["done", "kept", "failed", "interrupted", "not run"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A command of the kit and the files it leaves.

    Attributes:
        name: also its folder under the report's.
        arguments: of ``dspark``; ``{out}`` stands for its folder, ``{report}`` for the report's.
        produces: files that it leaves in its folder when it is done.
        expected_s: seconds it usually takes.
        limit_s: seconds after which it is stopped.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    produces: tuple[str, ...]
    expected_s: float
    limit_s: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a step ended.

    Attributes:
        message: why it did not end well; empty otherwise.
        key: of the command and everything around it that its result depends on.
    """

    name: str
    title: str
    command: str
    status: Status
    seconds: float = 0.0
    message: str = ""
    key: str = ""

    @property
    def good(self) -> bool:
        """Whether all its files are there."""
        return self.status in ("done", "kept")


class State(msgspec.Struct, kw_only=True):
    """What earlier runs left behind."""

    outcomes: dict[str, Outcome] = {}


#: Called while a step runs, with its seconds so far and the last line of its log.
Watch = Callable[[Step, float, str], None]


class Runner:
    """Runs steps one after the other under one folder.

    Args:
        folder: of the report.
        fresh: run what an earlier run finished as well.
    """

    def __init__(self, folder: Path, *, fresh: bool = False) -> None:
        self.folder = folder
        self.fresh = fresh
        self.state = _read(folder / STATE)

    def seconds(self, step: Step) -> float:
        """What ``step`` should take: as long as last time, else as expected."""
        known = self.state.outcomes.get(step.name)
        return known.seconds if known is not None and known.good else step.expected_s

    def kept(self, step: Step) -> bool:
        """Whether an earlier run did ``step`` with this command, these versions and this machine."""
        known = self.state.outcomes.get(step.name)
        return (
            not self.fresh
            and known is not None
            and known.good
            and known.key == _key(step)
            and all((self.folder / step.name / name).is_file() for name in step.produces)
        )

    def run(self, step: Step, watch: Watch) -> Outcome:
        """Run a step, or keep what is there.

        Raises:
            KeyboardInterrupt: after its command was told, had time to write, and was written down as interrupted.
        """
        if self.kept(step):
            return msgspec.structs.replace(self.state.outcomes[step.name], status="kept")
        log = self.folder / step.name / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        for name in step.produces:
            (log.parent / name).unlink(missing_ok=True)
        started = time.monotonic()
        try:
            code = _execute(self._argv(step), log, step, watch)
        except KeyboardInterrupt:
            self._record(step, "interrupted", time.monotonic() - started, "interrupted")
            raise
        spent = time.monotonic() - started
        missing = [name for name in step.produces if not (log.parent / name).is_file()]
        if code is None:
            message = f"stopped after {step.limit_s:.0f} s"
        elif code != 0:
            message = f"exit code {code}: {last_line(log)}"
        elif missing:
            message = f"left no {', '.join(missing)}"
        else:
            return self._record(step, "done", spent, "")
        return self._record(step, "failed", spent, message)

    def not_run(self, step: Step) -> Outcome:
        """A step that was never begun in this run; what an earlier one left, if it can be kept."""
        if self.kept(step):
            return msgspec.structs.replace(self.state.outcomes[step.name], status="kept")
        known = self.state.outcomes.get(step.name)
        if known is not None and known.status in ("failed", "interrupted"):
            return known
        return Outcome(name=step.name, title=step.title, command=shown(step), status="not run")

    def _argv(self, step: Step) -> list[str]:
        places = {"out": str(self.folder / step.name), "report": str(self.folder)}
        filled = [part.format_map(places) for part in step.arguments]
        return [sys.executable, "-m", "dspark_sglang.cli.main", *filled]

    def _record(self, step: Step, status: Status, seconds: float, message: str) -> Outcome:
        outcome = Outcome(
            name=step.name,
            title=step.title,
            command=shown(step),
            status=status,
            seconds=round(seconds, 1),
            message=message,
            key=_key(step),
        )
        self.state.outcomes[step.name] = outcome
        write_json(self.folder / STATE, self.state)
        return outcome


def shown(step: Step) -> str:
    """Its command as a user would type it, in a report kept under ``runs/report``."""
    places = {"out": f"runs/report/{step.name}", "report": "runs/report"}
    return shlex.join(["dspark", *(part.format_map(places) for part in step.arguments)])


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _read(path: Path) -> State:
    """A damaged state is no state: everything is run again."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.DecodeError):
        return State()


def _key(step: Step) -> str:
    around = [step.arguments, sorted(versions().items()), machine()]
    return hashlib.sha256(msgspec.json.encode(around)).hexdigest()


def _execute(argv: list[str], log: Path, step: Step, watch: Watch) -> int | None:
    """Run a command in a process group of its own. Returns its exit code; None when it ran too long."""
    started = time.monotonic()
    with log.open("wb") as stream:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
    try:
        while True:
            spent = time.monotonic() - started
            watch(step, spent, last_line(log))
            try:
                return child.wait(timeout=_LOOK_S)
            except subprocess.TimeoutExpired:
                if spent > step.limit_s:
                    return None
    finally:
        # Reached with a running child only on a limit, an interrupt or an error of ours.
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and what it started; kill what has not ended in time."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_GRACE_S)
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()
