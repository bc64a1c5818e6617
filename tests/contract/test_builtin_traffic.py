"""Bytes of SGLang's own Markov loop and acceptance: counted, and the same worked out by hand.

The interpreter has to be on before triton is imported, so counting happens in a child process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.children import results

pytestmark = pytest.mark.costly
BATCH, COLUMNS, GAMMA, RANK, KEPT = 2, 5000, 3, 16, 1
#: Blocks that SGLang's kernels work in.
CHAIN, STATS, RESAMPLE, MARKOV = 4096, 8192, 1024, 1024


def counted() -> Iterator[dict[str, Any]]:
    """Runs in the child: what each of SGLang's parts moves, twice over."""
    from benchmarks import moved
    from benchmarks import round as rounds

    sizes, cpu = rounds.Sizes(GAMMA, RANK, KEPT), torch.device("cpu")
    for name, part in rounds.PARTS.items():
        call = part.make(sizes, BATCH, COLUMNS, cpu)
        kept: list[Any] = []
        found = [moved.count(lambda run=call.run, k=kept: k.append(run())) for _ in range(2)]  # type: ignore[misc]
        call.check(kept[0])
        yield {"part": name, "found": [entry._asdict() for entry in found]}


@pytest.fixture(scope="module")
def parts() -> dict[str, list[dict[str, Any]]]:
    return {
        entry["part"]: entry["found"] for entry in results(f"{__name__}.counted", interpret=True)
    }


def test_counts_are_the_same_every_time(parts: dict[str, list[dict[str, Any]]]) -> None:
    assert set(parts) == {"builtin_draft", "builtin_accept", "builtin_accept_optin"}
    for name, (first, second) in parts.items():
        assert first == second, name
        assert first["outside"] == 0, name


def test_the_default_acceptance(parts: dict[str, list[dict[str, Any]]]) -> None:
    # Three passes over bfloat16 logits and one float32 probability each, of both models; a temperature.
    rows = BATCH * (GAMMA + 1) + BATCH * GAMMA
    softmax = rows * (3 * 2 * COLUMNS + 4 * COLUMNS + 4)
    # Root (index in, out), tests (token, p, q, coin), kept tokens (token, index in, out), outcome.
    walk = 12 + 20 * (KEPT + 1) + 16 * KEPT + 12
    # The rejected row of both laws whole, then again as far as half of its mass.
    final = 8 * COLUMNS + 8 * CHAIN
    bonus = 4 + 4 + 4 + 8
    (found, _) = parts["builtin_accept"]
    assert found["kernels"] == softmax + BATCH * (walk + final + bonus)
    assert found["torch"] == 4 * BATCH * GAMMA + 4 * BATCH + 4 * BATCH
    assert found["operations"] == {"rand": 2, "zeros_like": 1}
    assert found["launches"] == 4


def test_the_blockwise_acceptance(parts: dict[str, list[dict[str, Any]]]) -> None:
    blocks, pieces = -(-COLUMNS // STATS), -(-COLUMNS // RESAMPLE)
    assert blocks == 1
    # Logits of both models once, a temperature and two sums for each.
    stats = BATCH * GAMMA * 2 * (2 * COLUMNS + 4 + 8)
    # Tests: token, a logit of each model, all sums of both; then sums of the rejecting row.
    judged = 8 + 8 + (KEPT + 1) * (8 + 2 + 2 + 16) + 12 + 16 + 8
    # The rejecting row of both models; counter, length, temperatures, token, sums, best of the piece.
    drawn = 4 * COLUMNS + pieces * (8 + 4 + 4 + 8 + 4 + 8 + 12)
    insert = 4 + 4 + 4 * pieces + 8 + 8
    (found, _) = parts["builtin_accept_optin"]
    assert found["kernels"] == stats + BATCH * (judged + drawn + insert) + 16
    assert (found["torch"], found["launches"]) == (0, 4)


def test_the_markov_loop(parts: dict[str, list[dict[str, Any]]]) -> None:
    pieces = -(-COLUMNS // MARKOV)
    # Base logits, bias and stored step logits; temperature, counter and candidate of each piece.
    step = BATCH * (3 * 2 * COLUMNS + pieces * (4 + 8 + 8) + 8 * pieces + 8)
    latent = BATCH * RANK * 2
    # Embedding: rows of W1 and their numbers in, latents out. Product: latents and W2 in, bias out.
    product = 2 * latent + 8 * BATCH + latent + COLUMNS * RANK * 2 + BATCH * COLUMNS * 2
    (found, _) = parts["builtin_draft"]
    assert found["kernels"] == GAMMA * step
    # And the counter raised by one, and the tokens of all steps stacked.
    assert found["torch"] == GAMMA * product + 16 + 2 * 8 * BATCH * GAMMA
    assert found["operations"] == {"embedding": GAMMA, "mm": GAMMA, "add_": 1, "stack": 1}
    assert found["launches"] == 2 * GAMMA
