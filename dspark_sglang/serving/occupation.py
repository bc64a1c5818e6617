"""Releasing a server's memory and taking it back: refused where SGLang would end at it.

Only the scheduler knows whether it is idle and what it has released. It decides, and its answer carries the reason in
a field that SGLang leaves empty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def _tags(recv_req: Any) -> list[str]:
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

    return list(recv_req.tags or GPU_MEMORY_ALL_TYPES)


def refusal(updater: Any, recv_req: Any, *, release: bool) -> str | None:
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


def guard(original: Callable[..., Any], updater: Any, recv_req: Any, *, release: bool) -> Any:
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


async def ask(manager: Any, obj: Any, *, release: bool) -> None:
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
