"""Requests: refused where they would not be served exactly, and finished where plain decoding ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.runtime_context import get_exec

from dspark_sglang.serving.control import Control
from dspark_sglang.serving.options import KEY, read_options
from dspark_sglang.serving.verifier import request_penalties

#: Decides the steps of this process, once its worker is built.
_control: Control | None = None


def bind(control: Control) -> None:
    """Tell what decides the steps of this process; called once by the worker."""
    global _control
    _control = control


def _impossible(req: Any) -> str | None:
    """What no forward can answer, and SGLang lets through: it would end the scheduler, and with it the server."""
    if not req.origin_input_ids:
        return "The prompt has no tokens. Expected at least one: there is nothing to go on from."
    size = req.vocab_size
    if not size:
        return None
    asked = list(req.logprob.token_ids_logprob or ())
    # An image's places are filled with hashes of it.
    prompt = () if getattr(req, "multimodal_inputs", None) is not None else req.origin_input_ids
    for what, tokens in (("The prompt", prompt), ("token_ids_logprob", asked)):
        # Extremes, not each token: prompts are long.
        low, high = (min(tokens), max(tokens)) if tokens else (0, 0)
        wrong = low if low < 0 else high
        if not 0 <= wrong < size:
            return (
                f"{what} has token {wrong}. Expected tokens from 0 to {size - 1}, as the target's "
                "tokenizer makes them."
            )
    if (req.logprob.top_logprobs_num or 0) > size:
        return f"top_logprobs_num is {req.logprob.top_logprobs_num}. Expected at most {size}, all tokens there are."
    return None


def refusal(req: Any, enable_overlap: bool) -> str | None:
    """Why a request cannot be served exactly, or None when it can.

    Under overlap scheduling the host does not know the last step's tokens while it prepares the
    next, and penalties depend on them.
    """
    wrong = _impossible(req)
    if wrong is not None:
        return wrong
    try:
        options = read_options(req)
        if options.profile and not (_control is not None and _control.measuring):
            raise ValueError("profile belongs to the measurement at start-up")
    except ValueError as error:
        return (
            f"custom_params.{KEY} cannot be used: {error}. Expected max_draft_tokens (0 or more) "
            "and workload (a short name)."
        )
    if req.sampling_params.min_p > 0 and get_exec().kernel.sampling_backend != "pytorch":
        return (
            "min_p is not exact under DSPARK with this sampling backend. Expected a request "
            "without it, or a server started with --sampling-backend pytorch."
        )
    if enable_overlap and request_penalties(req).active:
        return (
            "Penalties and min_new_tokens are not exact under DSPARK with overlap scheduling. "
            "Expected a request without them, or a server started with "
            "--disable-overlap-schedule."
        )
    return None


def finish(original: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """End a request at the first of its new tokens at which plain decoding would have.

    SGLang looks at a run of accepted tokens at once: there a stop string later in the run wins over
    one before it that comes later in the request's list. With stop strings, one token is looked
    at after the other.

    Args:
        original: ``Req.update_finish_state``.
        req: with the new tokens at the end of ``output_ids``.
        new_accepted_len: how many are new.
    """
    given = req.sampling_params
    watched = bool(given.stop_strs or given.stop_regex_strs)
    if new_accepted_len <= 1 or not watched or req.finished() or req.to_finish:
        return original(req, new_accepted_len)
    whole, grammar = req.output_ids, req.grammar
    try:
        for end in range(len(whole) - new_accepted_len + 1, len(whole) + 1):
            req.output_ids = whole[:end]
            # The grammar has taken the whole run already.
            req.grammar = grammar if end == len(whole) else None
            original(req, 1)
            if req.finished():
                if req.finished_len is None:
                    req.finished_len = end
                return None
    finally:
        req.output_ids, req.grammar = whole, grammar
    return None
