"""What a server does before it listens: measure what its steps cost, and compare text with and without speculation.

SGLang runs its warm-ups in the HTTP process before it takes requests; one that raises ends the server. So a server whose
scheduler does not run this plugin, or whose text changes with speculation, never answers ``/ready``. The requests of the
measurement carry an option that makes the scheduler process alternate decode steps and rounds of every depth
(:class:`dspark_sglang.core.schedule.measurement.Measurement`); the cost model learns from them as from any other step.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

from dspark_sglang.errors import ServerError
from dspark_sglang.serving.options import KEY

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import TokenizerManager

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


async def _answer(
    manager: TokenizerManager, rid: str, load: Load, rng: random.Random, vocabulary: int
) -> None:
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
    manager: TokenizerManager, load: Load, rng: random.Random, vocabulary: int, seconds: float
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


async def measure(disaggregation_mode: str, manager: TokenizerManager) -> None:
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
    """Make the measurement and the comparison known to SGLang under :data:`NAME` and :data:`CHECK`."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(NAME)(measure)
    warmup(CHECK)(check)


CHECK = "dspark_gate"

#: Tokens of each answer, and prompts: a second or two on two cores.
_CHECKED_TOKENS = 16
_PROMPTS = 3
_PROMPT_TOKENS = 12
#: Texts may part where the two best tokens are this close, in log-probability: in bfloat16 one row and several
#: round differently (up to 0.25 at logits of 32).
TIE = 0.5


async def check(disaggregation_mode: str, manager: TokenizerManager) -> None:
    """Refuse to serve where the plugin is not active or a short canary disagrees; SGLang calls this.

    Raises:
        ServerError: with what was found.
    """
    states = await manager.get_internal_state()
    record = states[0].get("dspark_info_record") or {}
    if not record.get("active"):
        raise ServerError(
            "The scheduler does not run this plugin.",
            expected="dspark_info_record with active: true",
            fix="See its log above, and run `dspark doctor`.",
        )
    await _compare(manager)


async def _compare(manager: TokenizerManager) -> None:
    vocabulary = int(manager.model_config.vocab_size)
    step = max(1, vocabulary // (_PROMPTS * _PROMPT_TOKENS + 1))
    prompts = [
        [1 + (row * _PROMPT_TOKENS + column) * step for column in range(_PROMPT_TOKENS)]
        for row in range(_PROMPTS)
    ]
    # Together, so that requests of a batch that do and do not draft are both seen.
    answers = await asyncio.gather(
        *(
            _checked_answer(manager, prompt, drafts)
            for prompt in prompts
            for drafts in (True, False)
        )
    )
    if any(rounds(plain) < _CHECKED_TOKENS - 1 for plain in answers[1::2]):
        # DSPARK_SCHEDULE=all verifies every draft, whatever a request asks for.
        logger.warning("dspark: this server cannot switch drafting off for a request: not compared")
        return
    for number, prompt in enumerate(prompts):
        drafted, plain = answers[2 * number], answers[2 * number + 1]
        problem = disagreement(drafted, plain)
        if problem:
            raise ServerError(
                f"Text with speculation differs from text without: {problem} (prompt {number}, tokens {prompt[:4]}...).",
                expected=f"the same {_CHECKED_TOKENS} greedy tokens",
                fix="Serve with DSPARK_PLUGIN=off and report it with this line.",
            )
    from sglang.srt.managers.io_struct import SetInternalStateReq

    await manager.flush_cache()
    await manager.set_internal_state(
        SetInternalStateReq(server_args={"dspark_clear_info_records": 1})
    )
    logger.info("dspark: %d prompts have the same text with and without speculation", _PROMPTS)


async def _checked_answer(
    manager: TokenizerManager, prompt: list[int], drafts: bool
) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    custom = None if drafts else {KEY: {"max_draft_tokens": 0}}
    request = GenerateReqInput(
        input_ids=prompt,
        sampling_params={
            "temperature": 0.0,
            "max_new_tokens": _CHECKED_TOKENS,
            "ignore_eos": True,
            "custom_params": custom,
        },
        return_logprob=not drafts,
        top_logprobs_num=0 if drafts else 2,
        stream=False,
    )
    answers = [answer async for answer in manager.generate_request(request, None)]
    found: dict[str, Any] = answers[-1]
    return found


def rounds(answer: dict[str, Any]) -> int:
    """Target forwards that an answer took; as many as tokens without drafting."""
    return int(answer["meta_info"].get("spec_verify_ct") or len(answer["output_ids"]))


def disagreement(drafted: dict[str, Any], plain: dict[str, Any]) -> str | None:
    """Where two answers differ by more than a near-tie, in words; None where they do not.

    Args:
        drafted, plain: SGLang's answers with ``output_ids``; ``plain`` with its two best log-probabilities.
    """
    ours, theirs = drafted["output_ids"], plain["output_ids"]
    if ours == theirs:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return f"{len(ours)} tokens and {len(theirs)}"
    best, second = (entry[0] for entry in plain["meta_info"]["output_top_logprobs"][at][:2])
    if best - second < TIE:
        return None
    return f"token {at} is {ours[at]}, not {theirs[at]}, which leads by {best - second:.2f}"
