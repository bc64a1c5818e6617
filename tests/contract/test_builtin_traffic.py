"""Bytes of SGLang's own Markov loop and acceptance: counted, and the same worked out by hand.

The interpreter has to be on before triton is imported, so counting happens in a process of its own.
"""

from __future__ import annotations

import pytest

from benchmarks.kernels import BUILTIN, call, worker
from benchmarks.traffic import Traffic

pytestmark = pytest.mark.costly
BATCH, COLUMNS, GAMMA, RANK, KEPT = 2, 5000, 3, 16, 1
#: Blocks that SGLang's kernels work in.
CHAIN, STATS, RESAMPLE, MARKOV = 4096, 8192, 1024, 1024


def counted(part: str) -> list[Traffic]:
    """Runs in a worker: what one of SGLang's parts moves, twice over."""
    from benchmarks import builtin
    from benchmarks.traffic import count

    last = {"rank": RANK} if part == "builtin_draft" else {"kept": KEPT}
    example = builtin.PARTS[part](BATCH, gamma=GAMMA, columns=COLUMNS, **last)
    example.max_error(example.run())
    return [count(example.run) for _ in range(2)]


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Traffic]]:
    with worker(interpret=True) as pool:
        return {part: pool.submit(call, __name__, "counted", part).result() for part in BUILTIN}


def test_counts_are_the_same_every_time(parts: dict[str, list[Traffic]]) -> None:
    for part, (first, second) in parts.items():
        assert first == second, part
        assert first.outside == 0, part


def test_the_default_acceptance(parts: dict[str, list[Traffic]]) -> None:
    # Three passes over bfloat16 logits and one float32 probability each, of both models; a temperature.
    rows = BATCH * (GAMMA + 1) + BATCH * GAMMA
    softmax = rows * (3 * 2 * COLUMNS + 4 * COLUMNS + 4)
    # Root (index in, out), tests (token, p, q, coin), kept tokens (token, index in, out), outcome.
    walk = 12 + 20 * (KEPT + 1) + 16 * KEPT + 12
    # The rejected row of both laws whole, then again as far as half of its mass.
    final = 8 * COLUMNS + 8 * CHAIN
    bonus = 4 + 4 + 4 + 8
    (found, _) = parts["builtin_accept"]
    assert found.kernels == softmax + BATCH * (walk + final + bonus)
    assert found.torch == 4 * BATCH * GAMMA + 4 * BATCH + 4 * BATCH
    assert found.operations == {"rand": 2, "zeros_like": 1}
    assert found.launches == 4


def test_the_blockwise_acceptance(parts: dict[str, list[Traffic]]) -> None:
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
    assert found.kernels == stats + BATCH * (judged + drawn + insert) + 16
    assert (found.torch, found.launches) == (0, 4)


def test_the_markov_loop(parts: dict[str, list[Traffic]]) -> None:
    pieces = -(-COLUMNS // MARKOV)
    # Base logits, bias and stored step logits; temperature, counter and candidate of each piece.
    step = BATCH * (3 * 2 * COLUMNS + pieces * (4 + 8 + 8) + 8 * pieces + 8)
    latent = BATCH * RANK * 2
    # Embedding: rows of W1 and their numbers in, latents out. Product: latents and W2 in, bias out.
    product = 2 * latent + 8 * BATCH + latent + COLUMNS * RANK * 2 + BATCH * COLUMNS * 2
    (found, _) = parts["builtin_draft"]
    assert found.kernels == GAMMA * step
    # And the counter raised by one, and the tokens of all steps stacked.
    assert found.torch == GAMMA * product + 16 + 2 * 8 * BATCH * GAMMA
    assert found.operations == {"embedding": GAMMA, "mm": GAMMA, "add_": 1, "stack": 1}
    assert found.launches == 2 * GAMMA
