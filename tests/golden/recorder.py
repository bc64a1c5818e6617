"""A plugin of the servers that are recorded: it lets requests in by decode step, keeps the clock, writes the trace.

SGLang loads it in every process of a server, named by :func:`environment`. It hooks SGLang alone; what it asks of our
plugin goes through :mod:`tests.golden.adapter`. Requests of the scenario are held until all of them are there, so that
each step has the same ones in every run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.golden import scenario
from tests.golden.trace import FORMAT, Line, changes, encode, number

_FILE, _CASE = "GOLDEN_TRACE", "GOLDEN_CASE"
_ENTRY = "[sglang.srt.plugins]\ngolden_recorder = tests.golden.recorder:activate\n"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
_WARMUPS = "sglang.srt.entrypoints.warmup.execute_warmups"
#: Requests, drafted tokens of each and cached tokens of each, of the steps known at the start.
_REQUESTS, _CONTEXTS = (1, 2, 4, 8), (16, 96)


def environment(folder: Path, trace: Path, case: scenario.Case) -> dict[str, str]:
    """Variables with which a server records ``case`` to ``trace``; ``folder`` is for what names the plugin."""
    info = folder / "golden_recorder-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: golden-recorder\nVersion: 0\n")
    (info / "entry_points.txt").write_text(_ENTRY)
    path = os.pathsep.join([str(folder), *(entry or str(Path.cwd()) for entry in sys.path)])
    return {"PYTHONPATH": path, _FILE: str(trace), _CASE: case.name}


class Clock:
    """Stands in place of ``time``: it goes on with the forwards of the models alone."""

    def __init__(self) -> None:
        self.microseconds = 0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.microseconds * 1e-6

    monotonic = perf_counter

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Recorder:
    """Of one scheduler process."""

    def __init__(self, scheduler: Any, case: scenario.Case, path: Path) -> None:
        self.scheduler, self.case, self.path = scheduler, case, path
        self.clock = Clock()
        self.arrives = {
            scenario.PREFIX + request.name: (request.arrives, number)
            for number, request in enumerate(scenario.requests(case))
        }
        self.now = scenario.Moment(-1, 0)
        self.held: list[Any] = []
        self.arrived = self.steps = 0
        self.released: set[str] = set()
        self.known: dict[str, Any] = {}
        #: Of the running step: the clock before it, whether the draft model ran, rows of the target.
        self.began, self.drafted, self.rows = 0, False, 0
        from tests.golden import adapter  # other processes of the server need nothing of it

        adapter.read_clock_from(self.clock)
        self.plugin = adapter.Serving(
            scheduler.draft_worker,
            confidence=scenario.confidence,
            began=self._begin,
            told=self._tell,
        )
        self.file = path.with_suffix(".part").open("w", encoding="utf-8")
        self._start()

    def _start(self) -> None:
        gamma = int(self.scheduler.draft_worker.gamma)
        steps = []
        for count in _REQUESTS:
            for each in _CONTEXTS:
                for depth in range(gamma + 1):
                    given = {"requests": count, "drafted": count * depth, "context": count * each}
                    seconds = scenario.known_seconds(**given)
                    steps.append((count, count * depth, count * each, seconds))
        self.plugin.know(steps)
        self.known = self.plugin.learned()
        case = self.case
        head = {"trace": case.name, "format": FORMAT, "about": case.about, "gamma": gamma}
        self._write(head | {"known": self.known})

    def _write(self, line: Line) -> None:
        self.file.write(encode(line) + "\n")

    # -- requests ----------------------------------------------------------------------------

    def hold(self, request: Any) -> bool:
        """Whether a request of the scenario is kept from the scheduler for now."""
        if request.rid not in self.arrives or request.rid in self.released:
            return False
        self.held.append(request)
        self.arrived += 1
        return True

    def release(self, queue: Callable[[Any], None]) -> None:
        """Let in whose time has come; where nothing is left to do, the next phase begins."""
        if self.arrived < len(self.arrives):
            return
        scheduler, now = self.scheduler, self.now
        busy = (
            scheduler.waiting_queue
            or scheduler.last_batch
            or not scheduler.running_batch.is_empty()
        )
        if not busy and not self.held:
            self._end()
            return
        if not busy:
            if not self.released:
                torch.manual_seed(0)
            self.now = now = min(self._when(request)[0] for request in self.held)
        due = [
            r for r in self.held if self._when(r)[0].phase == now.phase and self._when(r)[0] <= now
        ]
        self.held = [request for request in self.held if request not in due]
        for request in sorted(due, key=self._when):
            self.released.add(request.rid)
            queue(request)

    def _when(self, request: Any) -> tuple[scenario.Moment, int]:
        return self.arrives[request.rid]

    # -- steps -------------------------------------------------------------------------------

    def forward(self, runner: Any, batch: Any) -> None:
        """A model runs."""
        mode, rows = batch.forward_mode.name, int(batch.input_ids.shape[0])
        context = int(batch.seq_lens.sum())
        self.clock.microseconds += scenario.microseconds(
            draft=runner.is_draft_worker,
            mode=mode,
            requests=int(batch.batch_size),
            rows=rows,
            context=context,
            now=self.now,
        )
        self.drafted |= runner.is_draft_worker
        self.rows = self.rows if runner.is_draft_worker else rows

    def _begin(self) -> None:
        command = scenario.COMMANDS.get(self.now)
        if command is not None:
            self.plugin.command(*command)
        self.began, self.drafted, self.rows = self.clock.microseconds, False, 0

    def _tell(self, line: Line, known: dict[str, Any]) -> None:
        line["draft"] = {"forward": self.drafted} | line["draft"]
        line["admission"]["rows"] = self.rows
        line["requests"] = [rid.removeprefix(scenario.PREFIX) for rid in line["requests"]]
        line["seconds"] = number((self.clock.microseconds - self.began) * 1e-6)
        line["learned"] = changes(self.known, known)
        self._write({"step": self.steps} | line)
        self.known = known
        self.steps += 1
        self.now = self.now._replace(step=self.now.step + 1)

    def _end(self) -> None:
        if self.file.closed:
            return
        counts, known = self.plugin.end()
        self._write({"end": counts, "learned": changes(self.known, known)})
        self.file.close()
        Path(self.file.name).rename(self.path)


def activate() -> None:
    """Register the hooks, in every process of the server."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    case, path = scenario.CASES[os.environ[_CASE]], Path(os.environ[_FILE])
    recorders: list[Recorder] = []

    async def nothing(*args: Any, **kwargs: Any) -> None:
        """Of the warm-ups: their requests come together, in another order each time."""

    def made(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        recorders.append(Recorder(scheduler, case, path))

    def queued(
        original: Callable[..., None], scheduler: Any, req: Any, *args: Any, **kw: Any
    ) -> None:
        if not (recorders and recorders[0].hold(req)):
            original(scheduler, req, *args, **kw)

    def received(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(scheduler, *args, **kwargs)
        if recorders:
            recorders[0].release(scheduler._add_request_to_queue)
        return found

    def forward(
        original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kw: Any
    ) -> Any:
        if recorders:
            recorders[0].forward(runner, batch)
        return original(runner, batch, *args, **kw)

    HookRegistry.register(_WARMUPS, nothing, HookType.REPLACE)
    HookRegistry.register(f"{_SCHEDULER}.__init__", made, HookType.AFTER)
    HookRegistry.register(f"{_SCHEDULER}._add_request_to_queue", queued, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.ingest_requests", received, HookType.AROUND)
    HookRegistry.register(_FORWARD, forward, HookType.AROUND)
