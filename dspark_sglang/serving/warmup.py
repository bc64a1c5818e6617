"""Measuring the step cost at start-up, by serving requests that try every kind of step.

Runs in the HTTP process before it listens. The requests carry an option that makes the scheduler
process alternate plain steps and rounds of every depth
(:class:`dspark_sglang.core.schedule.measurement.Measurement`); the cost model learns from them as from any other
step.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from typing import Any, NamedTuple

from dspark_sglang.serving.options import KEY

NAME = "dspark"
logger = logging.getLogger(__name__)

#: Seconds after which no further load is tried, and the running one is cut off.
BUDGET_S = 18.0
#: Tokens of each answer: two kinds of step, six depths and more.
_TOKENS = 20
_SHORT, _LONG = 24, 384
#: Seconds until a request that was not aborted yet is aborted again.
_ABORT_AGAIN_S = 0.5


class Load(NamedTuple):
    """One load to measure."""

    requests: int
    prompt: int
    temperature: float


def loads(most: int) -> list[Load]:
    """The loads to measure, the ones that tell most first.

    Args:
        most: requests the server runs at once.
    """
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= most]
    order = sizes[::-2] + sizes[-2::-2]  # from the largest down, then what lies between
    found = [Load(size, _SHORT, float(i % 2)) for i, size in enumerate(order)]
    if sizes:
        found.append(Load(min(4, most), _LONG, 0.0))
        found += [Load(size, _SHORT, float((i + 1) % 2)) for i, size in enumerate(order)]
    return found


async def _answer(manager: Any, rid: str, load: Load, rng: random.Random, vocabulary: int) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(
        rid=rid,
        input_ids=[rng.randrange(vocabulary) for _ in range(load.prompt)],
        sampling_params={
            "temperature": load.temperature,
            "max_new_tokens": _TOKENS,
            "ignore_eos": True,
            "custom_params": {KEY: {"profile": True}},
        },
        stream=True,  # as in service, where other processes take their part of the machine, too
    )
    async for _ in manager.generate_request(request, None):
        pass


async def _serve(
    manager: Any, load: Load, rng: random.Random, vocabulary: int, seconds: float
) -> bool:
    """Serve one load to its end, or abort it.

    Returns:
        Whether it ended within ``seconds``. None of its requests runs any more either way.
    """
    answers = {
        rid: asyncio.create_task(_answer(manager, rid, load, rng, vocabulary))
        for rid in (f"{NAME}-{uuid.uuid4().hex}" for _ in range(load.requests))
    }
    _, late = await asyncio.wait(answers.values(), timeout=seconds)
    running = late
    while running:
        for rid, answer in answers.items():
            if answer in running:
                manager.abort_request(rid)  # of no effect until the manager knows the request
        # The scheduler answers an aborted request as well.
        _, running = await asyncio.wait(running, timeout=_ABORT_AGAIN_S)
    await asyncio.gather(*answers.values())  # raises what one of them raised
    return not late


async def measure(disaggregation_mode: str, manager: Any) -> None:
    """Measure where the scheduler process has no step cost yet; SGLang calls this."""
    states = await manager.get_internal_state()
    record = states[0].get("dspark_info_record") or {}
    if record.get("cost_source") != "unmeasured":
        return
    from sglang.srt.managers.io_struct import SetInternalStateReq

    began, rng = time.monotonic(), random.Random(0)
    most = int(states[0].get("effective_max_running_requests_per_dp") or 1)
    vocabulary = int(manager.model_config.vocab_size)
    done = 0
    for load in loads(most):
        left = began + BUDGET_S - time.monotonic()
        if left <= 0.0 or not await _serve(manager, load, rng, vocabulary, left):
            break
        done += 1
    await manager.flush_cache()
    await manager.set_internal_state(
        SetInternalStateReq(server_args={"dspark_cost": 2, "dspark_clear_info_records": 1})
    )
    logger.info(
        "dspark: step cost measured under %d whole loads in %.1f s", done, time.monotonic() - began
    )


def register() -> None:
    """Make the measurement known to SGLang under :data:`NAME`."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(NAME)(measure)
