"""Real servers of the tiny V4 bundle, and what is asked of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_sglang.layouts.v4.reference import Reference
from dspark_sglang.server import Server, free_port, serve_command

#: A server of six layers needs little; the default number of requests would make its pools large.
FLAGS = (
    "--max-total-tokens", "16384",
    "--swa-full-tokens-ratio", "1.0",
    "--max-running-requests", "8",
    "--context-length", "4096",
)  # fmt: skip
#: Scores closer than this are a near-tie: float32 and the rounding of storage decide them.
NEAR = 1e-4
#: Prompts that end before, at and behind the borders of window (128), blocks (4, 128) and pages (256).
LENGTHS = (5, 40, 126, 127, 128, 129, 200, 254, 256, 257, 300, 520, 700, 1100)


def server(
    bundle: Path, log: Path, *, dspark: bool, extra: Sequence[str] = (), **more: Any
) -> Server:
    """A server of ``bundle``, not started."""
    port = free_port()
    flags = [*FLAGS, *extra]
    if dspark:
        flags += ["--speculative-algorithm", "DSPARK"]
    command = serve_command(
        bundle, port, dtype=more.pop("dtype", "float32"), drafter=None, extra=flags
    )
    return Server(command, port=port, log=log, **more)


def prompt(length: int, seed: int | None = None) -> list[int]:
    """Random tokens without the special ones."""
    chosen = random.Random(length if seed is None else seed)
    return [chosen.randrange(2, 500) for _ in range(length)]


def clear_prompts(reference: Reference, length: int, count: int) -> list[list[int]]:
    """The first random prompts in which no choice of experts or blocks is nearly a tie.

    Two right implementations choose otherwise there, and differ visibly from then on.
    """
    found: list[list[int]] = []
    for seed in range(length, length + 40 * count):
        tokens = prompt(length, seed)
        if not reference(tokens).near_ties(NEAR):
            found.append(tokens)
        if len(found) == count:
            return found
    raise AssertionError(f"too few prompts of {length} tokens without a near-tie")


def generate(
    of: Server, tokens: Sequence[int] | Sequence[Sequence[int]], new: int, **more: Any
) -> Any:
    """SGLang's ``/generate``: greedy unless ``sampling_params`` says otherwise, ends of text ignored."""
    params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    params |= more.pop("sampling_params", {})
    body = {"input_ids": tokens, "sampling_params": params, **more}
    answer = of.http.post("/generate", json=body, timeout=600)
    answer.raise_for_status()
    return answer.json()


def greedy(
    of: Server, prompts: Sequence[Sequence[int]], new: int, *, at_once: int
) -> list[list[int]]:
    """Greedy tokens of each prompt, ``at_once`` requests at a time."""
    found: list[list[int]] = []
    for start in range(0, len(prompts), at_once):
        answers = generate(of, [list(p) for p in prompts[start : start + at_once]], new)
        found += [answer["output_ids"] for answer in answers]
    return found


def scored(of: Server, tokens: Sequence[int]) -> tuple[list[float], list[int]]:
    """Log-probabilities of ``tokens[1:]``, and the most likely token of each of their rows."""
    more = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
    meta = generate(of, list(tokens), 1, **more)["meta_info"]
    own = [entry[0] for entry in meta["input_token_logprobs"][1:]]
    return own, [rows[0][1] for rows in meta["input_top_logprobs"][1:]]
