"""Rounds replayed on written text: small cases by hand, and the law of serving by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_sglang.training.replay import nothing, walk

GAMMA = 3


def chances(rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def remaining(count: int) -> np.ndarray:
    return np.arange(count, 0, -1)


def sure(count: int) -> np.ndarray:
    """Every draft right, as far as the answer goes."""
    left = remaining(count)[:, None]
    return (np.arange(GAMMA) < left).astype(np.float64)


def run(chance: np.ndarray, left: np.ndarray | None = None, uniform: float = 0.5):
    lengths = remaining(len(chance)) if left is None else left
    return walk(chance, np.full(chance.shape, uniform), lengths)


def test_nothing_accepted_is_plain_decoding():
    result = run(np.zeros((7, GAMMA)))
    assert (result.rounds, result.tokens, result.accept_length) == (7, 7, 1.0)
    assert result.reached.tolist() == [7, 0, 0]


def test_everything_accepted():
    result = run(sure(8))
    assert (result.rounds, result.tokens) == (2, 8)
    assert result.accepted.tolist() == [2, 2, 2]


def test_answer_ends_inside_a_block():
    # 4 + 2 of 6 tokens: the second block is accepted to the end, and there is no bonus token.
    result = run(sure(6))
    assert (result.rounds, result.tokens) == (2, 6)
    assert result.accepted.tolist() == [2, 2, 1]
    assert result.reached.tolist() == [2, 2, 1]


def test_a_rejection_moves_one_past_what_was_accepted():
    chance = chances([[1, 0, 1], [9, 9, 9], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    result = run(chance)
    # 1 accepted + 1, then anchor 2: 0 + 1, then anchor 3: both that are left.
    assert (result.rounds, result.tokens) == (3, 5)
    assert result.reached.tolist() == [3, 2, 0]
    assert result.accepted.tolist() == [2, 1, 0]


def test_turns_do_not_run_into_each_other():
    two_turns = np.array([2, 1, 3, 2, 1])
    chance = (np.arange(GAMMA) < two_turns[:, None]).astype(np.float64)
    result = run(chance, two_turns)
    assert (result.rounds, result.tokens) == (2, 5)


def test_no_anchor_is_no_round():
    result = run(np.zeros((0, GAMMA)))
    assert result.rounds == 0
    assert np.isnan(result.accept_length)


def test_walks_add_up():
    one = run(sure(8))
    assert (nothing(GAMMA) + one + one).tokens == 16


@pytest.mark.parametrize("seed", range(3))
def test_replaying_has_the_law_of_serving(seed):
    """Rejection sampling on a Markov chain, really run, against its text replayed."""
    rng = np.random.default_rng(seed)
    size, length, answers = 4, 60, 400
    target = rng.dirichlet(np.full(size, 0.7), size)
    draft = rng.dirichlet(np.full(size, 0.7), size)

    def pick(law: np.ndarray) -> int:
        return int(rng.choice(size, p=law / law.sum()))

    served = rounds = 0
    replayed = nothing(GAMMA)
    for _ in range(answers):
        text, state = [], 0
        while len(text) < length:  # serving
            rounds += 1
            for _ in range(GAMMA):
                drafted = pick(draft[state])
                if rng.random() < target[state, drafted] / draft[state, drafted]:
                    text.append(drafted)
                    state = drafted
                else:
                    state = pick(np.maximum(target[state] - draft[state], 0))
                    text.append(state)
                    break
            else:
                state = pick(target[state])
                text.append(state)
        served += len(text)
        text = [0, *text]
        previous, following = np.array(text[:-1]), np.array(text[1:])
        ratio = np.minimum(1, draft[previous, following] / target[previous, following])
        left = remaining(len(ratio))
        padded = np.append(ratio, np.zeros(GAMMA))
        chance = np.stack([padded[i : i + GAMMA] for i in range(len(ratio))])
        replayed += walk(chance, rng.random(chance.shape), left)
    assert replayed.accept_length == pytest.approx(served / rounds, rel=0.02)
