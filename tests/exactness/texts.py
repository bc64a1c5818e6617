"""Answers of a real target, asked of one server after the other and compared token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from dspark_sglang.demo.measure import NEAR_TIE
from dspark_sglang.server import Server, free_port, serve_command
from tests.exactness import store
from tests.exactness.prompts import Ask
from tests.exactness.sampled import post
from tests.exactness.store import Answers, Clock

#: Prompts are prefilled in pieces of this many tokens by the servers under test.
CHUNK = 256
_SAVE_SECONDS = 10.0
#: Continuations of one sampled prompt: tokens each, and requests a call.
DRAWN_TOKENS = 3
_DRAW_CALL = 64


class Phase(NamedTuple):
    """What one server is asked."""

    name: str
    target: Path
    drafter: Path | None
    dtype: str
    flags: tuple[str, ...]
    asks: tuple[Ask, ...]
    #: The prompt that is sampled, and how many continuations of it are drawn.
    prompt: tuple[int, ...] = ()
    draws: int = 0
    #: Whether a streaming request is aborted while others run.
    aborts: bool = False

    def key(self) -> str:
        """The key of its answers; more draws of the same go on."""
        drafter = "" if self.drafter is None else store.digest(self.drafter)
        return store.key(
            *(self.name, str(self.target), drafter, self.dtype, self.flags),
            *(self.asks, self.prompt, self.aborts),
        )


def collect(phase: Phase, out: Path, *, clock: Clock) -> Answers:
    """Ask what was not answered yet; saves as it goes.

    Raises:
        ServerError: the server did not start, stopped, or refused a request.
    """
    path = out / "answers" / f"{phase.name}.json"
    found = store.load(path, Answers, phase.key()) or Answers(key=phase.key())
    if clock.over or complete(phase, found):
        return found
    port = free_port()
    seed = 11 + sum(found.drawn.values()) + 100_003 * (phase.drafter is not None)
    command = serve_command(
        phase.target,
        port,
        dtype=phase.dtype,
        drafter=phase.drafter,
        extra=[*phase.flags, "--random-seed", str(seed)],
    )
    saved = time.monotonic()

    def progress() -> None:
        nonlocal saved
        if time.monotonic() - saved > _SAVE_SECONDS:
            store.save(path, found)
            saved = time.monotonic()
            done = len(found.answers) + sum(found.drawn.values())
            print(f"{phase.name}: {done} of {len(phase.asks) + phase.draws}", flush=True)

    with (
        Server(command, port=port, log=out / "logs" / f"{phase.name}.log") as running,
        httpx.Client(timeout=600.0) as client,
    ):
        running.wait_ready()
        try:
            _answer(phase, found, client, running, clock, progress)
            _draw(phase, found, client, running, clock, progress)
        finally:
            log = running.log.read_text(encoding="utf-8", errors="replace")
            found.events["retracted"] = found.events.get("retracted", 0) + log.count(
                "Retract requests"
            )
            store.save(path, found)
    return found


def complete(phase: Phase, found: Answers) -> bool:
    """Whether everything was answered."""
    return len(found.answers) == len(phase.asks) and sum(found.drawn.values()) >= phase.draws


def _answer(
    phase: Phase,
    found: Answers,
    client: httpx.Client,
    running: Server,
    clock: Clock,
    progress: Callable[[], None],
) -> None:
    def one(ask: Ask) -> tuple[str, list[int]] | None:
        if clock.over:
            return None
        body = {"input_ids": ask.tokens, "sampling_params": ask.params}
        return ask.id, post(client, running, body)["output_ids"]

    for at_once in sorted({ask.at_once for ask in phase.asks}):
        group = [a for a in phase.asks if a.at_once == at_once and a.id not in found.answers]
        with ThreadPoolExecutor(at_once) as pool:
            answers = pool.map(one, group)
            if phase.aborts and at_once > 1 and group:
                _abort(client, running, group[0])
                found.events["aborted"] = found.events.get("aborted", 0) + 1
            for answer in answers:
                if answer is not None:
                    found.answers[answer[0]] = answer[1]
                    progress()


def _abort(client: httpx.Client, running: Server, ask: Ask) -> None:
    """Start a long streaming request and hang up after its first tokens."""
    body = {
        "input_ids": ask.tokens,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 400, "ignore_eos": True},
        "stream": True,
    }
    with client.stream("POST", f"{running.url}/generate", json=body) as answer:
        next(answer.iter_lines())


def _draw(
    phase: Phase,
    found: Answers,
    client: httpx.Client,
    running: Server,
    clock: Clock,
    progress: Callable[[], None],
) -> None:
    params = {"temperature": 1.0, "max_new_tokens": DRAWN_TOKENS, "ignore_eos": True}
    while not clock.over and (left := phase.draws - sum(found.drawn.values())) > 0:
        count = min(_DRAW_CALL, left)
        body = {"input_ids": [list(phase.prompt)] * count, "sampling_params": params}
        for entry in post(client, running, body):
            name = " ".join(map(str, entry["output_ids"]))
            found.drawn[name] = found.drawn.get(name, 0) + 1
        progress()


class Difference(NamedTuple):
    """An answer that differs, and how close the two best logits were where it first does."""

    ask: str
    position: int
    gap: float

    @property
    def near_tie(self) -> bool:
        """Whether rounding may choose either."""
        return self.gap < NEAR_TIE


def differences(
    asks: Sequence[Ask], plain: Answers, ours: Answers, target: Path
) -> list[Difference]:
    """Answers of two servers that differ, with the gap in the target's own float32 logits."""
    different = [
        ask
        for ask in asks
        if ask.id in plain.answers
        and ask.id in ours.answers
        and plain.answers[ask.id] != ours.answers[ask.id]
    ]
    if not different:
        return []
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    found = []
    for ask in different:
        first, second = plain.answers[ask.id], ours.answers[ask.id]
        shared = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
        gap = float("inf")
        if shared < min(len(first), len(second)):
            tokens = torch.tensor([ask.tokens + first[:shared]])
            with torch.inference_mode():
                logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
            best = logits.topk(2).values
            gap = float(best[0] - best[1])
        found.append(Difference(ask.id, shared, gap))
    return found


def equal(asks: Sequence[Ask], plain: Answers, ours: Answers) -> tuple[int, int]:
    """How many answers are equal, and how many both servers gave."""
    both = [ask.id for ask in asks if ask.id in plain.answers and ask.id in ours.answers]
    return sum(plain.answers[name] == ours.answers[name] for name in both), len(both)
