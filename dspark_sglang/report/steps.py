"""Steps of a report: commands that leave files, each kept until its command or its surroundings change."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
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
#: How a command is told to stop, and the seconds it then gets to write down what it has and to stop its servers.
#: An interrupt is not heeded by a child of a shell's background job.
_ASKED = ((signal.SIGINT, 30.0), (signal.SIGTERM, 20.0))
#: Seconds between looks at a running command.
_LOOK_S = 0.5

Status = Literal["done", "kept", "failed", "interrupted", "not run"]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A command of the kit and the files it leaves.

    Attributes:
        name: also its folder under the report's.
        arguments: of ``dspark``; ``{out}`` stands for its folder, ``{report}`` for the report's.
        produces: files that it leaves in its folder when it is done.
        reads: files of earlier steps, under the report's folder.
        resumes: it goes on from its own files after an interrupt.
        expected_s: seconds it usually takes.
        limit_s: seconds after which it is stopped.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    produces: tuple[str, ...]
    expected_s: float
    limit_s: float
    reads: tuple[str, ...] = ()
    resumes: bool = False


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
        self._ran: set[str] = set()

    def seconds(self, step: Step) -> float:
        """What ``step`` should take: as long as last time, else as expected."""
        known = self.state.outcomes.get(step.name)
        return known.seconds if known is not None and known.good else step.expected_s

    def kept(self, step: Step) -> bool:
        """Whether an earlier run did ``step`` with this command, input, versions and machine."""
        return not self.fresh and self._valid(step)

    def run(self, step: Step, watch: Watch) -> Outcome:
        """Run a step, or keep what is there.

        Raises:
            KeyboardInterrupt, SystemExit: after its command was told, had time to write, and was written down as
                interrupted.
        """
        if self.kept(step):
            return self.not_run(step)
        lacking = [name for name in step.reads if not (self.folder / name).is_file()]
        if lacking:
            return self._record(
                step, "failed", 0.0, f"needs {', '.join(lacking)}, which is not there"
            )
        log = self._prepared(step) / "log.txt"
        started = time.monotonic()
        try:
            code = _execute(self._argv(step), log, step, watch)
        except (KeyboardInterrupt, SystemExit):
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
        """A step that is not run now: how it ended in this run or, if that still holds, in an earlier one."""
        known = self.state.outcomes.get(step.name)
        if step.name in self._ran and known is not None:
            return known
        if known is not None and self._valid(step):
            return msgspec.structs.replace(known, status="kept")
        if known is not None and known.key == self._key(step):
            return known
        return Outcome(name=step.name, title=step.title, command=shown(step), status="not run")

    def _valid(self, step: Step) -> bool:
        known = self.state.outcomes.get(step.name)
        return (
            known is not None
            and known.good
            and known.key == self._key(step)
            and all((self.folder / step.name / name).is_file() for name in step.produces)
        )

    def _key(self, step: Step) -> str:
        """Of everything that the result of a step depends on."""
        read = [_digest(self.folder / name) for name in step.reads]
        around = [step.arguments, read, sorted(versions().items()), machine()]
        return hashlib.sha256(msgspec.json.encode(around)).hexdigest()

    def _prepared(self, step: Step) -> Path:
        """Its folder, without what an earlier run left unless that is gone on from."""
        folder = self.folder / step.name
        known = self.state.outcomes.get(step.name)
        goes_on = (
            step.resumes and not self.fresh and known is not None and known.key == self._key(step)
        )
        if not goes_on and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

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
            key=self._key(step),
        )
        self._ran.add(step.name)
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
    # Where results went says nothing of how it ended.
    telling = [line for line in lines if not line.startswith("Written:")] or lines
    return telling[-1][:300] if telling else ""


def _read(path: Path) -> State:
    """A damaged state is no state: everything is run again."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.DecodeError):
        return State()


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


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
    """Interrupt a command, end it where it does not heed that, and kill it and its group where it does not end."""
    try:
        for number, seconds in _ASKED:
            if child.poll() is None:
                child.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=seconds)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
