"""What tests of generated data ask and read back."""

from __future__ import annotations

from pathlib import Path

from dspark_sglang.training.conversations import (
    Conversation,
    load_conversations,
)


def made(out: Path) -> list[Conversation]:
    return load_conversations([out]).conversations


def texts(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.messages]
