"""Not ready unless right: what has to hold before SGLang listens.

SGLang runs its custom warm-ups in the HTTP process before it takes requests, and a warm-up that raises ends the
server. So a server whose scheduler does not run this plugin, or whose text changes with speculation, never answers
``/ready``. Checksums are checked before, by ``dspark gate``; kernels against their references in the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from dspark_sglang.errors import ServerError
from dspark_sglang.serving.options import KEY

NAME = "dspark_gate"
logger = logging.getLogger(__name__)

#: Tokens of each answer, and prompts: a second or two on two cores.
_TOKENS = 16
_PROMPTS = 3
_PROMPT_TOKENS = 12
#: Texts may part where the two best tokens are this close, in log-probability: in bfloat16 one row and several
#: round differently (up to 0.25 at logits of 32).
TIE = 0.5


async def check(disaggregation_mode: str, manager: Any) -> None:
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


async def _compare(manager: Any) -> None:
    vocabulary = int(manager.model_config.vocab_size)
    step = max(1, vocabulary // (_PROMPTS * _PROMPT_TOKENS + 1))
    prompts = [
        [1 + (row * _PROMPT_TOKENS + column) * step for column in range(_PROMPT_TOKENS)]
        for row in range(_PROMPTS)
    ]
    # Together, so that requests of a batch that do and do not draft are both seen.
    answers = await asyncio.gather(
        *(_answer(manager, prompt, drafts) for prompt in prompts for drafts in (True, False))
    )
    if any(rounds(plain) < _TOKENS - 1 for plain in answers[1::2]):
        # DSPARK_SCHEDULE=all verifies every draft, whatever a request asks for.
        logger.warning("dspark: this server cannot switch drafting off for a request: not compared")
        return
    for number, prompt in enumerate(prompts):
        drafted, plain = answers[2 * number], answers[2 * number + 1]
        problem = disagreement(drafted, plain)
        if problem:
            raise ServerError(
                f"Text with speculation differs from text without: {problem} (prompt {number}, tokens {prompt[:4]}...).",
                expected=f"the same {_TOKENS} greedy tokens",
                fix="Serve with DSPARK_PLUGIN=off and report it with this line.",
            )
    from sglang.srt.managers.io_struct import SetInternalStateReq

    await manager.flush_cache()
    await manager.set_internal_state(
        SetInternalStateReq(server_args={"dspark_clear_info_records": 1})
    )
    logger.info("dspark: %d prompts have the same text with and without speculation", _PROMPTS)


async def _answer(manager: Any, prompt: list[int], drafts: bool) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import GenerateReqInput

    custom = None if drafts else {KEY: {"max_draft_tokens": 0}}
    request = GenerateReqInput(
        input_ids=prompt,
        sampling_params={
            "temperature": 0.0,
            "max_new_tokens": _TOKENS,
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


def register() -> None:
    """Make the check known to SGLang under :data:`NAME`."""
    from sglang.srt.entrypoints.warmup import warmup

    warmup(NAME)(check)
