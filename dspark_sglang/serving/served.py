"""Which drafters this plugin reads, and where it can only verify whole blocks."""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_context, get_parallel, get_schedule

from dspark_sglang.errors import CompatibilityError

_MARKOV_HEADS = ("VanillaMarkov", "GatedMarkovHead", "RNNHead")


def require_known_heads(draft_model: Any) -> None:
    """Refuse drafters whose heads this plugin would read wrongly.

    Raises:
        CompatibilityError: a head of another kind, one sharded over ranks, or none.
    """
    head, confidence = draft_model.markov_head, draft_model.confidence_head
    found = type(head).__name__
    if found not in _MARKOV_HEADS or head.vocab_shard is not None or confidence is None:
        raise CompatibilityError(
            f"The drafter {type(draft_model).__name__} has a {found} "
            f"{'sharded over ranks ' if getattr(head, 'vocab_shard', None) else ''}and "
            f"{'a' if confidence is not None else 'no'} confidence head.",
            expected=f"an unsharded {' or '.join(_MARKOV_HEADS)} and a confidence head",
            fix="Serve it with SGLang's builtin: DSPARK_PLUGIN=off.",
        )


def whole_blocks(device: str) -> str | None:
    """Why every drafted token has to be verified here; None where a step may verify some.

    Args:
        device: SGLang's device of the target.
    """
    if not get_schedule().disable_overlap_schedule and get_parallel().attn_dp_enabled:
        return "with attention data parallelism and overlap scheduling ranks would have to agree on every step"
    backend = get_context().resolved_server_args_dict().get("attention_backend")
    if not device.startswith("cpu") and backend == "triton":
        return "SGLang's Triton attention reads blocks of one length only"
    return None
