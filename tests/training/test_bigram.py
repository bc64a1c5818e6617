"""Fitting the Markov embeddings to neighbouring tokens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dspark_sglang.core.heads import MarkovHead
from dspark_sglang.training import bigram
from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.model import Markov

SIZE, RANK = 24, 6


def chain(count: int, seed: int = 0) -> tuple[bigram.Pairs, float]:
    """Pairs of a random chain whose logits have rank 4, and the entropy of its steps."""
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(SIZE, 4, generator=g) @ torch.randn(4, SIZE, generator=g)
    law = torch.softmax(logits, -1)
    before = torch.randint(SIZE, (count,), generator=g)
    after = torch.multinomial(law[before], 1, generator=g).squeeze(1)
    return bigram.Pairs(before, after), float(-(law * law.log()).sum(-1).mean())


def test_the_fit_finds_a_law_of_its_rank():
    pairs, entropy = chain(60_000)
    found = bigram.fit(pairs, SIZE, RANK)
    assert found.unigram > entropy + 0.3
    assert found.bigram == pytest.approx(entropy, abs=0.1)


def test_only_some_tokens_are_fitted_and_the_rest_follow_the_rare_ones():
    pairs, _ = chain(20_000)
    tokens = torch.arange(0, SIZE, 2)
    found = bigram.fit(pairs, SIZE, RANK, tokens=tokens)
    assert found.bigram < found.unigram
    counts = torch.bincount(pairs.after, minlength=SIZE)[tokens]
    rare = found.w2[tokens[counts.argsort()[: len(tokens) // 4]]]
    torch.testing.assert_close(found.w2[1::2], rare.mean(0).expand(SIZE // 2, -1))


def test_tokens_that_begin_no_pair_change_nothing():
    pairs, _ = chain(5_000)
    kept = pairs.before != 3
    found = bigram.fit(bigram.Pairs(pairs.before[kept], pairs.after[kept]), SIZE, RANK)
    assert not found.w1[3].any()
    assert found.w1[4].any()


def test_pairs_end_in_written_tokens():
    sequence = TokenSequence(
        np.array([5, 6, 7, 8, 9], dtype=np.int32),
        np.array([False, False, True, True, False]),
        0,
    )
    pairs = bigram.pairs_of([sequence, sequence])
    assert pairs.before.tolist() == [6, 7, 6, 7]
    assert pairs.after.tolist() == [7, 8, 7, 8]


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_every_head_starts_with_the_fitted_bias(kind):
    config = SimpleNamespace(markov_rank=RANK, hidden_size=10, vocab_size=SIZE, markov_head=kind)
    module = Markov(config)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(1)
    w1 = 0.05 * torch.randn(SIZE, RANK, generator=g)
    w2 = torch.randn(SIZE, RANK, generator=g)
    bigram.start_head(module, bigram.Fit(w1, w2, 0.0, 0.0))
    head = MarkovHead.from_module(module)
    x = torch.tensor([0, 7, 23])
    hidden = torch.randn(3, 10, generator=g)
    latent, _ = head.step(x, hidden, head.start(3))
    torch.testing.assert_close(latent @ head.w2.T, w1[x] @ w2.T, rtol=0, atol=2e-3)
