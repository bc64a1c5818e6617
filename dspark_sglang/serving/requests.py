"""Requests this plugin would not serve exactly, refused instead of served approximately."""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_exec

from dspark_sglang.serving.verifier import request_penalties


def refusal(req: Any, enable_overlap: bool) -> str | None:
    """Why a request cannot be served exactly, or None when it can.

    Under overlap scheduling the host does not know the last step's tokens while it prepares the
    next, and penalties depend on them.
    """
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
