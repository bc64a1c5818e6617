"""Which drafters this plugin reads."""

from __future__ import annotations

from typing import Any

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
