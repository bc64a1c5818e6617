"""What a request may ask of DSPARK (``custom_params={"dspark": {...}}``), and what is refused before a scheduler sees it.

The scheduler ends at a message it cannot read, and SGLang sends it a request's values without a look at their kinds. Such
requests are answered with HTTP 400 in the HTTP process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import (
        Req,
        SamplingParams,
        TokenizedRequest,
        TokenizerManager,
    )

KEY = "dspark"
_KEPT = "_dspark_options"


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one request."""

    #: Most drafted tokens to verify a round; 0: this request is not speculated on.
    max_draft_tokens: int | None = None
    #: Requests that behave alike share a name; how deep to draft is learned for each.
    workload: str = ""
    #: Set by the start-up measurement, and refused after it: every kind of step is tried in turn.
    profile: bool = False


_DEFAULT = RequestOptions()


def read_options(request: Req) -> RequestOptions:
    """The options of an SGLang request, read once and kept on it.

    Raises:
        ValueError: they are not what :class:`RequestOptions` describes.
    """
    known: RequestOptions | None = getattr(request, _KEPT, None)
    if known is not None:
        return known
    given = request.sampling_params.custom_params
    found = _DEFAULT
    if isinstance(given, dict) and KEY in given:
        found = msgspec.convert(given[KEY], RequestOptions)
        if found.max_draft_tokens is not None and found.max_draft_tokens < 0:
            raise ValueError(f"max_draft_tokens is {found.max_draft_tokens}")
        if len(found.workload) > 64:
            raise ValueError("workload is longer than 64 characters")
    setattr(request, _KEPT, found)
    return found


def never_draft(request: Req) -> bool:
    """Draft nothing for an SGLang request from now on; says whether that is news."""
    known = read_options(request)
    setattr(request, _KEPT, msgspec.structs.replace(known, max_draft_tokens=0))
    return known.max_draft_tokens != 0


#: What SGLang makes itself: long, or packed later.
_OWN = ("input_ids", "input_embeds", "mm_inputs", "positional_embed_overrides", "time_stats")
#: Answers to one prompt. All are made at once, which a few bytes should not be able to make of a whole process.
_MOST_ANSWERS = 4096


def check_samples(result: None, obj: Any) -> None:
    """Refuse more answers than this process can hold; after ``GenerateReqInput._handle_parallel_sampling``.

    Raises:
        ValueError: there are.
    """
    if obj.parallel_sample_num > _MOST_ANSWERS:
        raise ValueError(f"n is {obj.parallel_sample_num}. Expected at most {_MOST_ANSWERS}.")


def made(
    original: Callable[..., Any], manager: TokenizerManager, obj: object, *args: Any, **kwargs: Any
) -> Any:
    """Make what the scheduler is sent of one request, if both processes can go on with it.

    Args:
        original: ``TokenizerManager._create_tokenized_object``.
        manager: its ``self``.
        obj: what the client asked for.

    Raises:
        ValueError: they cannot; SGLang answers 400.
    """
    _check_labels(obj, manager)
    try:
        request = original(manager, obj, *args, **kwargs)
        _bound(request.sampling_params, int(manager.model_config.vocab_size))
    except TypeError as error:
        raise ValueError(
            f"The request cannot be read: {error}. Expected parameters as SGLang documents them."
        ) from error
    _check_readable(request)
    _check_values(request)
    return request


def _check_labels(obj: object, manager: TokenizerManager) -> None:
    """Metrics have the labels named at start, and counting a request with another one ends this process."""
    from sglang.srt.runtime_context import get_observability

    labels = getattr(obj, "custom_labels", None)
    if not labels or not manager.enable_metrics:
        return
    allowed = get_observability().tokenizer_metrics_allowed_custom_labels or ()
    wrong = [
        name for name, value in labels.items() if name not in allowed or not isinstance(value, str)
    ]
    if wrong:
        raise ValueError(
            f"custom_labels has {wrong[0]!r}: {labels[wrong[0]]!r}. Expected text for "
            f"{' or '.join(allowed) or 'no label: the server was started without --tokenizer-metrics-allowed-custom-labels'}."
        )


def _bound(given: SamplingParams, size: int) -> None:
    """Say the same of the target's ``size`` tokens alone: the scheduler ends at numbers beyond its tensors'.

    A stop token that the target does not have stops nothing, and more tokens than it has are all.
    """
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    known = {token for token in given.stop_token_ids or () if 0 <= token < size}
    given.stop_token_ids = known or None
    given.top_k = TOP_K_ALL if given.top_k >= size else given.top_k


def _check_readable(request: msgspec.Struct) -> None:
    """Read what the scheduler will be sent, as it will.

    Args:
        request: SGLang's ``TokenizedGenerateReqInput``.

    Raises:
        ValueError: it could not.
    """
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    fields = request.__struct_fields__
    rest = msgspec.structs.replace(request, **{name: None for name in _OWN if name in fields})
    try:
        msgpack_decode(msgpack_encode(rest))
    except (msgspec.MsgspecError, TypeError, OverflowError, UnicodeError) as error:
        said, _, place = str(error).partition(" - at ")
        raise ValueError(f"{_where(request, place)} cannot be used: {said}.") from error


def _where(request: msgspec.Struct, place: str) -> str:
    """The field at a place that msgspec names by numbers, since SGLang's structures travel as arrays."""
    found = re.search(r"\$\[(\d+)\](?:\[(\d+)\])?", place)
    if found is None:
        return "A value of the request"
    name = request.__struct_fields__[int(found[1]) - 1]  # its kind comes first
    inner = getattr(getattr(request, name), "__struct_fields__", None)
    return f"{name}.{inner[int(found[2])]}" if inner and found[2] else str(name)


def _check_values(request: TokenizedRequest) -> None:
    """Values that can be read and not be used."""
    overrides = request.positional_embed_overrides
    if not isinstance(overrides, msgspec.Struct | None):
        raise ValueError(
            "positional_embed_overrides holds no tensors. Expected a request without it: JSON has none."
        )
    for what, least in (("logprob_start_len", -1), ("top_logprobs_num", 0)):
        value = getattr(request, what, None)
        if value is not None and value < least and request.return_logprob:
            raise ValueError(f"{what} is {value}. Expected at least {least}.")
    for token, bias in (request.sampling_params.logit_bias or {}).items():
        if not bias < math.inf:  # minus infinity excludes a token
            raise ValueError(f"logit_bias of token {token} is {bias}. Expected a number.")
