"""What the fake server is told to do for a request, and what it wrote down that it did."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Ending = Literal["done", "error", "truncate", "hang", "http_500"]
Usage = Literal["continuous", "last"]


class Chunk(msgspec.Struct, frozen=True):
    """Wait ``delay_s``, then send ``tokens`` tokens in one chunk."""

    delay_s: float
    tokens: int
    #: Send it as two TCP writes, this many seconds apart, cut inside the JSON.
    split_s: float = 0.0


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """How the server answers one request. Its chunks after the first are verify rounds."""

    chunks: tuple[Chunk, ...]
    ending: Ending = "done"
    usage: Usage = "continuous"
    prompt_tokens: int = 20
    cached_tokens: int | None = None


class Served(msgspec.Struct):
    """What the server did for one request; times are ``time.perf_counter`` seconds."""

    body: dict[str, Any]
    received_at: float
    #: Before each content chunk's last write: no client can have read it earlier.
    chunk_times: list[float] = []
    chunk_tokens: list[int] = []
    ended_at: float | None = None
    tokens: int = 0


def rehearsal_script() -> Script:
    """A plausible answer: 80 ms to the first token, then 20 rounds of 1 to 6 tokens."""
    rounds = (3, 6, 1, 4, 2) * 4
    return Script(chunks=(Chunk(0.08, 1), *(Chunk(0.02, tokens) for tokens in rounds)))


def paced_script(number: int, *, chunks: int, chunk_s: float) -> Script:
    """An answer of evenly paced chunks of 1 to 4 tokens.

    Requests differ in TTFT (one to two paces) and length (half of ``chunks`` to one and a half), so that they do not
    stay in step.
    """
    first = chunk_s * (1 + (number * 0.618034) % 1)
    length = round(chunks * (0.5 + (number * 0.754877) % 1))
    rounds = (Chunk(chunk_s, 1 + (number + each) % 4) for each in range(1, length))
    return Script(chunks=(Chunk(first, 1), *rounds))
