"""Requests: what they ask of a step, refused where that would not be served exactly, finished where plain decoding ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

import torch
from sglang.srt.runtime_context import get_exec

from dspark_sglang.core.device import to_device
from dspark_sglang.core.penalties import OutputCounts, Penalties, Terms
from dspark_sglang.core.sampling import UNDECIDED
from dspark_sglang.core.schedule.scheduler import Scheduler
from dspark_sglang.core.step import Step
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.options import KEY, read_options
from dspark_sglang.serving.sglang_types import GenerationBatchResult, Req, ScheduleBatch

_KEPT = "_dspark_penalties"
_STOPS = "_dspark_stops"
#: Where a request keeps the output that its prefill was given.
_PREFILLED = "_dspark_prefilled_output"
#: Where a request keeps that its grammar has refused its last token.
_REFUSED = "_dspark_refused"


def stop_tokens(request: Req) -> tuple[int, ...]:
    """Tokens that end an SGLang request unless it ignores them, read once and kept on it."""
    known: tuple[int, ...] | None = getattr(request, _STOPS, None)
    if known is None:
        given, tokenizer = request.sampling_params, request.tokenizer
        stops: set[int | None] = {*(given.stop_token_ids or ()), *(request.eos_token_ids or ())}
        stops |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ())
        stops |= {getattr(tokenizer, "eos_token_id", None)}
        known = tuple(sorted(token for token in stops if token is not None))
        setattr(request, _STOPS, known)
    return known


def request_penalties(request: Req) -> Penalties:
    """The penalties of an SGLang request, read once and kept on it."""
    known: Penalties | None = getattr(request, _KEPT, None)
    if known is not None:
        return known
    given = request.sampling_params
    penalties = Penalties(
        frequency=given.frequency_penalty,
        presence=given.presence_penalty,
        repetition=given.repetition_penalty,
        min_new_tokens=given.min_new_tokens,
        stop_tokens=stop_tokens(request),
    )
    setattr(request, _KEPT, penalties)
    return penalties


class RunningPenalties:
    """Terms and output counts of the requests that a scheduler process runs.

    Plain decoding's penalties depend on every token of the output. Under overlap a step is launched before the host
    knows the last one's tokens. The device does: counts of each output are kept there, and grow by what a step commits.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._counts: OutputCounts | None = None
        #: Requests whose output is counted, by identity, and their rows; rows to be used again.
        self._slots: dict[int, tuple[Req, int]] = {}
        self._free: list[int] = []
        self._requests: list[Req] = []
        self._terms: Terms | None = None
        #: ``[R, W]`` int64 anchors and drafted tokens of the running step.
        self._block: torch.Tensor | None = None

    def prefilled(self, requests: Sequence[Req]) -> None:
        """A prefill of these requests is launched: each has its output so far in its KV, and draws one token more."""
        for request in requests:
            if request_penalties(request).active:
                setattr(request, _PREFILLED, list(request.output_ids))
                self._forget(request)
                self._requests = []

    def apply(
        self,
        requests: Sequence[Req],
        logits: torch.Tensor,
        block: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """What plain decoding's penalties do to the logits of a step, in place.

        Args:
            logits: ``[N, V]`` float32.
            block: ``[R, W]`` int64 anchors, and the tokens drafted after them.
            rows: ``[N]`` int64 places of the rows in the flattened block; None: all of it.
        """
        if self._counts is None:
            self._counts = OutputCounts(logits.shape[1], logits.device)
        if requests != self._requests:
            self._requests, self._terms = list(requests), self._renewed(requests, self._counts)
        self._block = None
        if self._terms is None:
            return
        self._block = block
        if rows is None:
            rows = torch.arange(len(logits), device=logits.device)
        self._step.penalise(logits, self._counts, self._terms, rows, block)

    def extend(self, count: torch.Tensor) -> None:
        """The running step keeps its anchors and ``[R]`` int64 drafted tokens; what it draws is the next one's anchor."""
        if self._block is not None and self._terms is not None and self._counts is not None:
            self._step.extend(self._counts, self._terms, self._block, count)
        self._block = None

    def _renewed(self, requests: Sequence[Req], counts: OutputCounts) -> Terms | None:
        penalties = [request_penalties(request) for request in requests]
        here = {id(request) for request in requests}
        for request, _ in list(self._slots.values()):
            if id(request) not in here:
                self._forget(request)
        if not any(own.active for own in penalties):
            return None
        begun: dict[int, Sequence[int]] = {}
        slots = [
            self._slot(request, begun) if own.active else 0
            for request, own in zip(requests, penalties, strict=True)
        ]
        if begun:
            counts.begin(begun)
        return Terms.of(penalties, slots, counts.device)

    def _slot(self, request: Req, begun: dict[int, Sequence[int]]) -> int:
        """The row of a request; one that it has not had yet is added to ``begun``, with its output."""
        known = self._slots.get(id(request))
        if known is not None:
            return known[1]
        slot = self._free.pop() if self._free else len(self._slots)
        # Only the first step after a prefill may be launched before the host knows the anchor.
        output = getattr(request, _PREFILLED, None)
        setattr(request, _PREFILLED, None)
        begun[slot] = request.output_ids[:-1] if output is None else output
        self._slots[id(request)] = (request, slot)
        return slot

    def _forget(self, request: Req) -> None:
        known = self._slots.pop(id(request), None)
        if known is not None:
            self._free.append(known[1])


def batch_stops(requests: Sequence[Req], device: torch.device | str) -> torch.Tensor | None:
    """``[R, S]`` int64 tokens at which a run of each request ends, padded with -1; None where nothing ends one.

    Where stop tokens are ignored, one still ends a grammar, and the next step has to begin there.
    """
    goes_on = [r.sampling_params.ignore_eos and r.grammar is None for r in requests]
    stops = [() if on else stop_tokens(r) for on, r in zip(goes_on, requests, strict=True)]
    width = max(map(len, stops), default=0)
    if not width:
        return None
    padded = [(*own, *(-1,) * (width - len(own))) for own in stops]
    return to_device(torch.tensor(padded), device)


def told(token: torch.Tensor, requests: Sequence[Req]) -> torch.Tensor:
    """``[R]`` or ``[R, W]`` integer tokens as the scheduler is told them: :data:`UNDECIDED` ends a request there.

    A grammar's parser is told one that it may refuse, as in plain decoding: some parsers take no negative number.
    """
    parsed = [request.grammar is not None for request in requests]
    if not any(parsed):
        return token
    of = to_device(torch.tensor(parsed), token.device).view(-1, *[1] * (token.dim() - 1))
    return torch.where(of, token.clamp(min=0), token)


def told_sampled(result: GenerationBatchResult, batch: ScheduleBatch) -> torch.Tensor:
    """:func:`told` of what SGLang's own sampler drew, from logits that it has made probabilities of."""
    info, token = batch.sampling_info, result.next_token_ids
    if info is None or info.is_all_greedy:
        return torch.as_tensor(token)
    # Without a distribution a row is NaN throughout; the sampler's token of it means nothing.
    undrawn = result.logits_output.next_token_logits[:, 0].isnan() & (info.top_ks.view(-1) > 1)
    return told(torch.where(undrawn, UNDECIDED, token), batch.reqs)


class _Process(NamedTuple):
    """What SGLang's own functions do not know of the scheduler process that they run in."""

    scheduler: Scheduler
    faults: Faults


_process: _Process | None = None


def bind(scheduler: Scheduler, faults: Faults) -> None:
    """Tell what decides the steps of this process, and counts their faults; called once by the worker."""
    global _process
    _process = _Process(scheduler, faults)


def _impossible(req: Req) -> str | None:
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


def validate(original: Callable[..., str | None], req: Req, enable_overlap: bool) -> str | None:
    """Why a request is refused, by SGLang or by us; None where it is not.

    Args:
        original: ``validate_dflash_request``.
    """
    return original(req, enable_overlap) or refusal(req)


def refusal(req: Req) -> str | None:
    """Why a request cannot be served exactly, or None when it can."""
    wrong = _impossible(req)
    if wrong is not None:
        return wrong
    try:
        options = read_options(req)
        if options.profile and not (
            _process is not None and _process.scheduler.measurement.running
        ):
            raise ValueError("profile belongs to the measurement at start-up")
    except ValueError as error:
        return (
            f"custom_params.{KEY} cannot be used: {error}. Expected max_draft_tokens (0 or more) "
            "and workload (a short name)."
        )
    if req.return_hidden_states:
        return (
            "return_hidden_states is set. Expected a request without it: DSPARK captures other states of the "
            "target. Ask a server without speculation."
        )
    if req.sampling_params.min_p > 0 and get_exec().kernel.sampling_backend != "pytorch":
        return (
            "min_p is not exact under DSPARK with this sampling backend. Expected a request "
            "without it, or a server started with --sampling-backend pytorch."
        )
    return None


def advance_grammar(
    original: Callable[..., list[int]], processor: object, req: Req, tokens: int | list[int]
) -> list[int]:
    """Let a grammar take a run of tokens, up to the first that it refuses.

    Plain decoding asks the grammar after it has looked whether the token ends the request. Here it is asked before,
    so the refused token stays in the run, and :func:`finish` ends the request with an error where nothing else does.

    Args:
        original: ``SchedulerBatchResultProcessor._accept_grammar_tokens``.
        tokens: one, or an accepted run.

    Returns:
        The tokens that are kept.
    """
    run = [tokens] if isinstance(tokens, int) else list(tokens)
    before = req.to_finish
    if before is not None:  # the request ends with the next token, whatever that is
        return run[:1]
    kept = original(processor, req, tokens)
    if req.to_finish is not None:
        setattr(req, _REFUSED, req.to_finish)
        req.to_finish = None
        kept = run[: len(kept) + 1]
    return kept


def finish(original: Callable[..., None], req: Req, new_accepted_len: int = 1) -> None:
    """End a request at the first of its new tokens at which plain decoding would have.

    - A token that could not be drawn ends it with an error of its own.
    - Plain decoding looks whether a grammar is over before that takes the new token; a run of accepted tokens
      has been taken by then.

    SGLang looks at a run of accepted tokens at once: there a stop string later in the run wins over
    one before it that comes later in the request's list. With stop strings, one token is looked
    at after the other.

    Args:
        original: ``Req.update_finish_state``.
        req: with the new tokens at the end of ``output_ids``.
        new_accepted_len: how many are new.
    """
    refused = getattr(req, _REFUSED, None)
    if refused is not None:
        setattr(req, _REFUSED, None)
        finish(original, req, new_accepted_len)
        if not req.finished():
            req.to_finish = req.to_finish or refused
        return
    if new_accepted_len and req.output_ids[-1] == UNDECIDED and not req.finished():
        req.output_ids[-1] = 0
        if new_accepted_len > 1:
            whole = req.output_ids
            req.output_ids = whole[:-1]
            finish(original, req, new_accepted_len - 1)
            req.output_ids = whole
            if req.finished() and req.finished_len is None:
                req.finished_len = len(whole) - 1
        if not req.finished():
            req.to_finish = req.to_finish or _undecided(req)
            if _process is not None:
                _process.faults.counts["request"] += 1
            original(req, 1)
        return
    grammar = req.grammar
    try:
        if grammar is not None and _just_over(req):
            req.grammar = None
        _finish(original, req, new_accepted_len)
    finally:
        req.grammar = grammar


def _undecided(req: Req) -> Any:
    """Why a request ends at a token that has no distribution: the client's fault where its own options can exclude all tokens."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    given = req.sampling_params
    own = (
        given.logit_bias
        or req.grammar
        or req.custom_logit_processor
        or request_penalties(req).active
    )
    message = (
        "The next token cannot be drawn: its logits are NaN or infinite, or every token is excluded. Expected "
        "finite logits with at least one allowed token. "
    )
    if own:
        message += "Check the request's logit_bias, penalties, grammar and logit processor."
        return FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
    message += "Check the target's weights and dtype."
    return FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


def _just_over(req: Req) -> bool:
    """Whether the last token is the one that ended the request's grammar.

    A grammar takes a stop token as its end only, so where the one before is such, it was over before.
    """
    if not req.output_ids or req.grammar is None or not req.grammar.is_terminated():
        return False
    stops = set(req.eos_token_ids or ()) | {getattr(req.tokenizer, "eos_token_id", None)}
    return req.output_ids[-1] in stops and not (
        len(req.output_ids) > 1 and req.output_ids[-2] in stops
    )


def _finish(original: Callable[..., None], req: Req, new_accepted_len: int) -> None:
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
