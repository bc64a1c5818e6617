"""Penalties of running requests: batches change, requests are put back, and each output is counted once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark_sglang.core.step import Step
from dspark_sglang.serving.requests import RunningPenalties

VOCABULARY, GAMMA = 11, 3


def asking(output: list[int], **penalties: Any) -> Any:
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
               "min_new_tokens": 0, "stop_token_ids": [2]}  # fmt: skip
    return SimpleNamespace(
        sampling_params=SimpleNamespace(**(neutral | penalties)),
        output_ids=output,
        eos_token_ids=None,
        tokenizer=None,
    )


class Served:
    """A request, and what plain decoding would have penalised of it."""

    def __init__(self, output: list[int], **penalties: Any) -> None:
        self.request = asking(output, **penalties)
        self.output = list(output)

    def expected(self, before: list[int]) -> torch.Tensor:
        given, seen = self.request.sampling_params, self.output + before
        row = torch.zeros(VOCABULARY)
        for token in range(VOCABULARY):
            row[token] -= given.frequency_penalty * seen.count(token)
            row[token] -= given.presence_penalty * (token in seen)
        if len(seen) < given.min_new_tokens:
            row[2] = -torch.inf
        return row


def step(running: RunningPenalties, batch: list[Served], rng: torch.Generator) -> None:
    """One step; the host learns of its tokens a step later, as under overlap."""
    block = torch.randint(0, VOCABULARY, (len(batch), GAMMA + 1), generator=rng)
    count = torch.randint(0, GAMMA + 1, (len(batch),), generator=rng)
    logits = torch.zeros(len(batch) * (GAMMA + 1), VOCABULARY)
    running.apply([one.request for one in batch], logits, block, None)
    for one, own, rows in zip(
        batch, block.tolist(), logits.view(-1, GAMMA + 1, VOCABULARY), strict=True
    ):
        wanted = [one.expected(own[: place + 1]) for place in range(GAMMA + 1)]
        torch.testing.assert_close(rows, torch.stack(wanted))
    running.extend(count)
    for one, own, kept in zip(batch, block.tolist(), count.tolist(), strict=True):
        one.output += own[: kept + 1]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_batches_change_and_each_output_is_counted_once(rng: torch.Generator) -> None:
    running = RunningPenalties(Step())
    a = Served([], frequency_penalty=0.5, min_new_tokens=6)
    b, c, d = Served([]), Served([], presence_penalty=1.5), Served([], frequency_penalty=0.25)
    running.prefilled([a.request, b.request])
    for batch in ([a, b], [b, a], [b]):
        step(running, batch, rng)
    running.prefilled([c.request, d.request])  # one of them takes the row that was a's
    for batch in ([b, c], [c, d], [d, c, b]):
        step(running, batch, rng)


def test_a_request_that_is_put_back_is_counted_from_what_it_was_prefilled_with(
    rng: torch.Generator,
) -> None:
    running = RunningPenalties(Step())
    one, other = Served([], frequency_penalty=0.5), Served([], frequency_penalty=0.7)
    running.prefilled([one.request, other.request])
    step(running, [one, other], rng)
    step(running, [one, other], rng)
    one.output = one.output[:3]  # what was launched last is thrown away
    one.request.output_ids = list(one.output)
    running.prefilled([one.request])
    one.request.output_ids = [*one.output, 7]  # the host may know the prefill's token by then
    step(running, [one, other], rng)


def test_without_a_prefill_the_host_knows_the_output(rng: torch.Generator) -> None:
    one = Served([3, 3, 4], frequency_penalty=0.5)
    one.request.output_ids = [3, 3, 4, 5]  # the last is the anchor
    step(RunningPenalties(Step()), [one], rng)


def test_requests_without_penalties_cost_nothing(rng: torch.Generator) -> None:
    logits = torch.randn(GAMMA + 1, VOCABULARY, generator=rng)
    before = logits.clone()
    running = RunningPenalties(Step())
    running.apply([asking([1, 1])], logits, torch.zeros(1, GAMMA + 1, dtype=torch.int64), None)
    running.extend(torch.tensor([1]))
    assert torch.equal(logits, before)
