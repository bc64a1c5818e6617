"""What a request may ask of DSPARK: ``custom_params={"dspark": {...}}`` in the sampling parameters."""

from __future__ import annotations

from typing import Any

import msgspec

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


def read_options(request: Any) -> RequestOptions:
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


def never_draft(request: Any) -> bool:
    """Draft nothing for an SGLang request from now on; says whether that is news."""
    known = read_options(request)
    setattr(request, _KEPT, msgspec.structs.replace(known, max_draft_tokens=0))
    return known.max_draft_tokens != 0
