"""Conversations for tests of training data."""

from __future__ import annotations

import msgspec

from dspark_sglang.training.conversations import (
    Conversation,
)


def lines(*conversations: Conversation) -> bytes:
    return b"".join(msgspec.json.encode(made) + b"\n" for made in conversations)


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
