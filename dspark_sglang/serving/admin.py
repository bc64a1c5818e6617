"""Changing a running server: keys of our own for SGLang's ``/set_internal_state``.

SGLang lets numbers through, nothing else:

======================  =========================================================================
``dspark_speculation``  -1: draft where it pays; 0: never; 1: always
``dspark_budget``       share of the drafted tokens to verify, 0 to 1; -1: what pays
``dspark_sts``          0: no calibration; 1: read the file again; 2: fit to what was verified
``dspark_cost``         0: forget the step cost; 1: read the file again; 2: write it
``dspark_canary``       what ``dspark canary`` found: 1: no fault; 0: one (shown in ``/metrics``)
======================  =========================================================================

SGLang's own ``dspark_force_budget_frac`` sets ``dspark_budget``; its null is -1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dspark_sglang.core.schedule.policy import Choice
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.serving.sglang_types import MemoryRequest, TokenizerManager, UpdaterManager

if TYPE_CHECKING:
    from dspark_sglang.serving.worker import DSparkWorker

logger = logging.getLogger(__name__)

Apply = Callable[[], None]
T = TypeVar("T")

_CANARY = "dspark_canary"
#: SGLang sets the budget of its own planner by it, which does not run here.
_SGLANG_BUDGET = "dspark_force_budget_frac"
SPECULATION: dict[int, Choice] = {-1: "auto", 0: "off", 1: "on"}


class Commands:
    """The keys of one worker. Each is checked in full before anything is changed."""

    def __init__(self, worker: DSparkWorker) -> None:
        self._worker = worker
        self._known: dict[str, Callable[[float], Apply]] = {
            "dspark_speculation": self._speculation,
            "dspark_budget": lambda value: self._budget("dspark_budget", value),
            _SGLANG_BUDGET: lambda value: self._budget(_SGLANG_BUDGET, value),
            "dspark_sts": self._sts,
            "dspark_cost": self._cost,
            _CANARY: self._canary,
        }

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key."""
        return tuple(self._known)

    def catch_up(self) -> None:
        """Learn from steps that still run: what they show belongs to the time before a change."""
        self._worker.catch_up()

    def prepare(self, key: str, value: float) -> Apply:
        """What applies a value.

        Raises:
            DSparkError: the value or a file it names is of no use, or this server does not
                schedule.
        """
        if key != _CANARY and not self._worker.scheduler.adaptive:
            raise ConfigError(
                f"{key} was set, but this server verifies everything it drafts.",
                expected="a server with DSPARK_SCHEDULE=adaptive (its log says where only whole blocks can be verified)",
                fix="Start it that way.",
            )
        return self._known[key](value)

    def _speculation(self, value: float) -> Apply:
        choice = _choose("dspark_speculation", value, SPECULATION)

        def apply() -> None:
            self._worker.scheduler.choose(choice)
            if choice != "off":  # in spite of a fault of the drafter
                self._worker.faults.resume()

        return apply

    def _budget(self, key: str, value: float) -> Apply:
        if value != -1 and not 0.0 <= value <= 1.0:
            raise ConfigError(
                f"{key} is {value}.",
                expected="a share of the drafted tokens, 0 to 1, or -1",
                fix="0 verifies nothing, 1 everything, -1 what pays.",
            )
        share = None if value == -1 else float(value)
        return lambda: self._worker.scheduler.fix_budget(share)

    def _sts(self, value: float) -> Apply:
        worker = self._worker
        found: dict[int, Callable[[], tuple[torch.Tensor, str]]] = {
            0: worker.calibration.none,
            1: worker.calibration.read,
            2: lambda: worker.calibration.fitted(worker.scheduler.reliability.blocks),
        }
        temperatures, source = _choose("dspark_sts", value, found)()
        return lambda: worker.set_temperatures(temperatures, source)

    def _cost(self, value: float) -> Apply:
        worker = self._worker
        plans: dict[int, Callable[[], Apply]] = {
            0: lambda: worker.scheduler.cost.forget,
            1: worker.known_cost.read,
            2: worker.known_cost.keep,
        }
        return _choose("dspark_cost", value, plans)()

    def _canary(self, value: float) -> Apply:
        passed = _choose(_CANARY, value, {0: False, 1: True})
        return lambda: self._worker.report_canary(passed)


def _choose(key: str, value: float, choices: Mapping[int, T]) -> T:
    if value not in choices:
        raise ConfigError(
            f"{key} is {value}.",
            expected=" or ".join(str(choice) for choice in choices),
            fix="Use one of these; docs/reference/settings.md says what they do.",
        )
    return choices[int(value)]


def handlers(original: Callable[[Any], dict[str, Any]], controller: Any) -> dict[str, Any]:
    """SGLang's table of keys with ours in it.

    Args:
        original: ``SchedulerInternalStateController._update_handlers``.
        controller: its ``self``.
    """
    from sglang.srt.managers.scheduler_components import internal_state

    known = dict(original(controller))
    commands: Commands | None = getattr(controller.scheduler.draft_worker, "commands", None)
    if commands is None:
        return known
    prepared: dict[str, Apply] = {}

    def validate(key: str, value: Any) -> None:
        if value is None and key == _SGLANG_BUDGET:
            value = -1
        commands.catch_up()
        try:
            prepared[key] = commands.prepare(key, float(value))
        except DSparkError as error:
            raise internal_state.UpdateRejected(str(error)) from error

    def apply(key: str, value: object) -> None:
        prepared.pop(key)()
        logger.info("%s set to %r", key, value)

    for key in commands.keys:
        known[key] = internal_state._UpdateHandler(validate, apply)
    return known


def _tags(recv_req: MemoryRequest) -> list[str]:
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

    return list(recv_req.tags or GPU_MEMORY_ALL_TYPES)


def refusal(updater: UpdaterManager, recv_req: MemoryRequest, *, release: bool) -> str | None:
    """Why memory cannot be released or taken back now; None when it can.

    Args:
        updater: SGLang's ``SchedulerWeightUpdaterManager``.
        recv_req: with the kinds of memory, ``tags``.
        release: or take back.
    """
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
    from sglang.srt.runtime_context import get_model

    tags, gone = _tags(recv_req), updater.offload_tags
    if not updater.memory_saver_adapter.enabled:
        return "This server keeps its memory. Expected one started with --enable-memory-saver, on a GPU."
    unknown = sorted(set(tags) - set(GPU_MEMORY_ALL_TYPES))
    if unknown:
        return f"tags has {unknown[0]!r}. Expected {', '.join(GPU_MEMORY_ALL_TYPES)}."
    if "weights" in tags and get_model().weight_cache_mode != "off":
        return "The weights belong to a weight cache. Expected a server started with --weight-cache-mode off."
    wrong = sorted(tag for tag in tags if (tag in gone) == release)
    if wrong:
        have, wanted = ("released", "in use") if release else ("in use", "released")
        return (
            f"{', '.join(wrong)} of this server: {have}. Expected memory that is {wanted}: tags of "
            f"{', '.join(sorted(set(GPU_MEMORY_ALL_TYPES) - gone if release else gone)) or 'none'}."
        )
    scheduler = updater.scheduler
    paused = scheduler is not None and scheduler._engine_paused
    if release and not updater.is_fully_idle(ignore_waiting=paused):
        return "Requests are running. Expected an idle server: wait for them, or abort them."
    return None


def guard(
    original: Callable[..., Any], updater: UpdaterManager, recv_req: MemoryRequest, *, release: bool
) -> Any:
    """Release or take back in the scheduler, or leave all as it is.

    Args:
        original: ``release_memory_occupation`` or ``resume_memory_occupation`` of SGLang's updater.
    """
    from sglang.srt.managers import io_struct

    why = refusal(updater, recv_req, release=release)
    if why is None:
        return original(updater, recv_req)
    logger.warning("Memory was not %s: %s", "released" if release else "taken back", why)
    kind = (
        io_struct.ReleaseMemoryOccupationReqOutput
        if release
        else io_struct.ResumeMemoryOccupationReqOutput
    )
    return kind(rid=why)


async def ask(
    manager: TokenizerManager, obj: object, request: object = None, *, release: bool
) -> None:
    """Ask the schedulers, in the HTTP process.

    Raises:
        ValueError: one refused; SGLang answers 400.
    """
    manager.auto_create_handle_loop()
    call = (
        manager.release_memory_occupation_communicator
        if release
        else manager.resume_memory_occupation_communicator
    )
    for answer in await call(obj):
        if answer.rid is not None:
            raise ValueError(answer.rid)
