"""Drafting and confidence: every Markov head against its equation, sampled rows against their law."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dspark_sglang.core.accept import Round, accept_block, accept_greedy, accept_sampled
from dspark_sglang.core.draft import (
    SAMPLED_SHORTLIST,
    SHORTLIST,
    WHOLE_VOCABULARY,
    DraftBlock,
    cpu_shortlist,
    draft_block,
    undrafted,
)
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.seeded import Noise
from tests.core.laws import THRESHOLD, grouped_p_values, p_value, uniforms

KINDS = ("vanilla", "gated", "rnn")
GAMMA, VOCAB, HIDDEN, RANK = 4, 11, 6, 3


def make_head(kind: str, *, vocab: int = VOCAB) -> MarkovHead:
    gate = joint = None
    if kind == "gated":
        gate = (torch.randn(RANK, HIDDEN + RANK), torch.randn(RANK))
    if kind == "rnn":
        joint = (torch.randn(3 * RANK, 2 * RANK + HIDDEN), torch.randn(3 * RANK))
    w1, w2 = torch.randn(vocab, RANK), torch.randn(vocab, RANK)
    return MarkovHead(w1=w1, w2=w2, gate=gate, joint=joint)


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def affine(weight: torch.Tensor, bias: torch.Tensor, features: list[float]) -> list[float]:
    return [
        sum(w * f for w, f in zip(row, features, strict=True)) + b
        for row, b in zip(weight.tolist(), bias.tolist(), strict=True)
    ]


class Reference:
    """One request's Markov biases in plain Python floats, from the paper's equations."""

    def __init__(self, head: MarkovHead, kind: str) -> None:
        self.head, self.kind = head, kind
        self.state = [0.0] * RANK

    def bias(self, previous: int, hidden: list[float]) -> list[float]:
        e = self.head.w1[previous].tolist()
        if self.kind == "vanilla":
            latent = e
        elif self.kind == "gated":
            assert self.head.gate is not None
            gate = affine(*self.head.gate, hidden + e)
            latent = [sigmoid(g) * x for g, x in zip(gate, e, strict=True)]
        else:
            assert self.head.joint is not None
            out = affine(*self.head.joint, self.state + e + hidden)
            g, c, o = out[:RANK], out[RANK : 2 * RANK], out[2 * RANK :]
            latent = [math.tanh(x) for x in o]
            self.state = [
                sigmoid(a) * s + (1 - sigmoid(a)) * math.tanh(b)
                for a, s, b in zip(g, self.state, c, strict=True)
            ]
        return [
            sum(w * x for w, x in zip(row, latent, strict=True)) for row in self.head.w2.tolist()
        ]


def reference_logits(
    base: torch.Tensor, hidden: torch.Tensor, tokens: list[int], anchor: int, reference: Reference
) -> list[list[float]]:
    """The corrected logits of every step when ``tokens`` are drafted after ``anchor``."""
    rows = []
    for step, previous in enumerate([anchor, *tokens[:-1]]):
        bias = reference.bias(previous, hidden[step].tolist())
        rows.append([u + b for u, b in zip(base[step].tolist(), bias, strict=True)])
    return rows


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    base = torch.randn(rows, GAMMA, VOCAB)
    return base, torch.randint(VOCAB, (rows,)), torch.randn(rows, GAMMA, HIDDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_head_reports_its_kind(kind: str) -> None:
    assert make_head(kind).kind == kind


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_take_the_argmax_of_the_equation(kind: str, rows: int) -> None:
    head = make_head(kind)
    base, anchors, hidden = batch(rows)
    block = draft_block(base.clone(), anchors, hidden, head)
    assert block.probs is None
    assert torch.equal(block.previous[:, 0], anchors)
    assert torch.equal(block.previous[:, 1:], block.tokens[:, :-1])
    for row in range(rows):
        tokens = block.tokens[row].tolist()
        reference = Reference(head, kind)
        logits = reference_logits(base[row], hidden[row], tokens, int(anchors[row]), reference)
        assert tokens == [max(range(VOCAB), key=step.__getitem__) for step in logits]


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_laws_are_the_softmax_of_the_equation(kind: str) -> None:
    head = make_head(kind)
    base, anchors, hidden = batch(5)
    sampled, temperatures = torch.tensor([0, 2, 3]), torch.tensor([0.5, 1.0, 2.0])
    generator = torch.Generator().manual_seed(1)
    block = draft_block(
        base.clone(),
        anchors,
        hidden,
        head,
        temperatures=temperatures,
        sampled=sampled,
        uniforms=uniforms(generator, 3, GAMMA),
    )
    assert block.probs is not None and block.probs.shape == (3, GAMMA, VOCAB)
    for index, row in enumerate(sampled.tolist()):
        tokens = block.tokens[row].tolist()
        reference = Reference(head, kind)
        logits = reference_logits(base[row], hidden[row], tokens, int(anchors[row]), reference)
        wanted = torch.softmax(torch.tensor(logits) / temperatures[index], -1)
        torch.testing.assert_close(block.probs[index], wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_leaves_greedy_rows_as_they_were(kind: str) -> None:
    head = make_head(kind)
    base, anchors, hidden = batch(6)
    alone = draft_block(base.clone(), anchors, hidden, head)
    sampled = torch.tensor([1, 4])
    mixed = draft_block(
        base.clone(),
        anchors,
        hidden,
        head,
        temperatures=torch.full((2,), 5.0),
        sampled=sampled,
        uniforms=torch.full((2, GAMMA), 0.999, dtype=torch.float64),
    )
    greedy = [0, 2, 3, 5]
    assert torch.equal(mixed.tokens[greedy], alone.tokens[greedy])
    assert torch.equal(mixed.previous[greedy], alone.previous[greedy])
    assert not torch.equal(mixed.tokens[sampled], alone.tokens[sampled])


def test_sampled_tokens_follow_the_recorded_laws() -> None:
    rows, vocab = 60_000, 5
    head = make_head("rnn", vocab=vocab)
    base = torch.randn(1, GAMMA, vocab).repeat(rows, 1, 1)
    block = draft_block(
        base,
        torch.zeros(rows, dtype=torch.int64),
        torch.randn(1, GAMMA, HIDDEN).repeat(rows, 1, 1),
        head,
        temperatures=torch.full((rows,), 3.0),
        sampled=torch.arange(rows),
        uniforms=uniforms(torch.Generator().manual_seed(2), rows, GAMMA),
    )
    assert block.probs is not None
    first = torch.bincount(block.tokens[:, 0], minlength=vocab)
    assert p_value(first, block.probs[0, 0]) > THRESHOLD
    # The law of the second token depends on the first only: one representative row each.
    owners = [int((block.tokens[:, 0] == token).nonzero()[0]) for token in range(vocab)]
    second = block.probs[owners, 1]
    assert not torch.allclose(second[0], second[1], atol=1e-2)
    assert min(grouped_p_values(block.tokens[:, 0], block.tokens[:, 1], second)) > THRESHOLD
    # A wrong law is noticed.
    shifted = second.roll(1, dims=0)
    assert min(grouped_p_values(block.tokens[:, 0], block.tokens[:, 1], shifted)) < THRESHOLD


@pytest.mark.parametrize("shortlist", [None, 3])
def test_a_draft_vocabulary_is_the_block_of_the_other_tokens_masked(shortlist: int | None) -> None:
    head = make_head("rnn")
    base, anchors, hidden = batch(6)
    vocabulary = torch.tensor([1, 4, 5, 9, 10])
    masked = torch.full_like(base, -1e30)
    masked[..., vocabulary] = base[..., vocabulary]
    sampling = {
        "temperatures": torch.tensor([0.7, 1.3]),
        "sampled": torch.tensor([1, 4]),
        "uniforms": uniforms(torch.Generator().manual_seed(3), 2, GAMMA),
    }
    found = draft_block(
        base[..., vocabulary], anchors, hidden, head,
        **sampling, shortlist=shortlist, vocabulary=vocabulary,
    )  # fmt: skip
    wanted = draft_block(masked, anchors, hidden, head, **sampling, shortlist=shortlist)
    greedy = [0, 2, 3, 5]
    assert torch.equal(found.tokens[greedy], wanted.tokens[greedy])
    assert found.probs is not None and found.support is not None and wanted.probs is not None
    assert set(found.support.unique().tolist()) <= set(vocabulary.tolist())
    assert (found.support.dim() == 1) == (shortlist is None)
    laws = dense(found, VOCAB)
    # Candidates come in any order, so equal uniforms may draw different first tokens.
    torch.testing.assert_close(laws[:, 0], dense(wanted, VOCAB)[:, 0])
    if shortlist is None:  # here they do not
        assert torch.equal(found.tokens, wanted.tokens)
        torch.testing.assert_close(laws, dense(wanted, VOCAB))


def dense(block: DraftBlock, vocab: int) -> torch.Tensor:
    """Drafted laws over the whole vocabulary, whatever they are over."""
    assert block.probs is not None
    if block.support is None:
        return block.probs
    laws = torch.zeros(*block.probs.shape[:2], vocab)
    return laws.scatter_(-1, block.support.expand(block.probs.shape), block.probs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seeded", [False, True], ids=["unseeded", "seeded"])
def test_gathered_rows_of_a_vocabulary_draft_what_it_drafts(kind: str, seeded: bool) -> None:
    head = make_head(kind)
    base, anchors, hidden = batch(6)
    vocabulary = torch.tensor([0, 2, 3, 7, 10])
    sampled = torch.tensor([0, 3, 5])
    drawing: dict[str, Any] = {
        "temperatures": torch.tensor([0.7, 1.3, 1.0]),
        "sampled": sampled,
        "vocabulary": vocabulary,
    }
    if seeded:
        drawing["noise"] = Noise(seeds=torch.arange(3), positions=torch.tensor([4, 9, 2]))
    else:
        drawing["uniforms"] = uniforms(torch.Generator().manual_seed(4), 3, GAMMA)
    columns = base[..., vocabulary]
    found = draft_block(
        columns, anchors, hidden, head, **drawing, vocabulary_rows=head.w2[vocabulary]
    )
    wanted = draft_block(columns, anchors, hidden, head, **drawing)
    assert torch.equal(found.tokens, wanted.tokens)
    assert set(found.tokens.unique().tolist()) <= set(vocabulary.tolist())
    if seeded:
        assert found.probs is wanted.probs is found.support is None
    else:
        assert found.support is not None and torch.equal(found.support, vocabulary)
        torch.testing.assert_close(dense(found, VOCAB), dense(wanted, VOCAB))


@pytest.mark.parametrize(
    ("columns", "sampled", "wanted"),
    [
        (50_000, False, SHORTLIST),
        (50_000, True, SAMPLED_SHORTLIST),
        (100, True, None),
        (WHOLE_VOCABULARY, False, None),
        (WHOLE_VOCABULARY + 1, False, SHORTLIST),
    ],
)
def test_candidates_on_a_cpu(columns: int, sampled: bool, wanted: int | None) -> None:
    assert cpu_shortlist(columns, sampled=sampled) == wanted


@pytest.mark.parametrize("laws", [None, 0, 2])
def test_a_block_that_nobody_drafted_is_verified_like_plain_decoding(laws: int | None) -> None:
    """Without drafted tokens to send, acceptance gives one token of the target's own law."""
    block = undrafted(3, sampled=laws, device=torch.device("cpu"))
    assert block.tokens.shape == block.previous.shape == (3, 1)
    none, rows = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    if laws is None:
        assert block.probs is None and block.support is None
        outcome = accept_greedy(torch.tensor([5, 6, 7]), block.tokens, none, rows)
        assert (outcome.count.tolist(), outcome.token.tolist()) == ([0, 0, 0], [5, 6, 7])
        return
    assert block.probs is not None and block.support is not None
    # None left: the requests that sampled have ended, and the batch does not know it yet.
    weights = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])[:laws]
    own = (block.tokens[:laws], block.probs, none[:laws], rows[:laws], block.support)
    for accept in (accept_sampled, accept_block):
        outcome = accept(Round(weights, *own), torch.full((laws, 2), 0.5, dtype=torch.float64))
        found = (outcome.count.tolist(), outcome.token.tolist())
        assert found == ([0] * laws, [1, 3][:laws])


def test_gamma_one() -> None:
    head = make_head("gated")
    base, anchors, hidden = batch(2)
    block = draft_block(base[:, :1].clone(), anchors, hidden[:, :1], head)
    assert block.tokens.shape == block.previous.shape == (2, 1)


@pytest.mark.parametrize("with_markov", [True, False], ids=["h+markov", "h-only"])
def test_confidence_is_the_scaled_linear_probe(with_markov: bool) -> None:
    markov = make_head("vanilla")
    width = HIDDEN + (RANK if with_markov else 0)
    temperatures = torch.tensor([0.5, 1.0, 2.0, 3.0])
    head = ConfidenceHead(torch.randn(width), torch.tensor(0.3), with_markov, temperatures)
    hidden, previous = torch.randn(2, GAMMA, HIDDEN), torch.randint(VOCAB, (2, GAMMA))
    found = head.calibrate(head.logits(hidden, previous, markov))
    for row in range(2):
        for step in range(GAMMA):
            features = hidden[row, step].tolist()
            if with_markov:
                features += markov.w1[previous[row, step]].tolist()
            score = affine(head.weight[None], head.bias[None], features)[0]
            wanted = sigmoid(score / temperatures[step].item())
            assert found[row, step].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("shortlist", [None, 4])
def test_arguments_are_left_alone(shortlist: int | None) -> None:
    head = make_head("rnn")
    base, anchors, hidden = batch(2)
    before = base.clone(), anchors.clone(), hidden.clone()
    draft_block(base, anchors, hidden, head, shortlist=shortlist)
    assert all(map(torch.equal, (base, anchors, hidden), before))


# --- shortlist -------------------------------------------------------------------------------


@pytest.mark.parametrize("shortlist", [1, 4, VOCAB, VOCAB + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shortlist_drafts_among_the_likeliest_base_tokens(kind: str, shortlist: int) -> None:
    head = make_head(kind)
    base, anchors, hidden = batch(5)
    sampled, temperatures = torch.tensor([1, 3]), torch.tensor([0.7, 1.5])
    block = draft_block(
        base,
        anchors,
        hidden,
        head,
        temperatures=temperatures,
        sampled=sampled,
        uniforms=uniforms(torch.Generator().manual_seed(3), 2, GAMMA),
        shortlist=shortlist,
    )
    assert block.probs is not None
    assert (block.support is None) == (shortlist >= VOCAB)
    assert torch.equal(block.previous[:, 1:], block.tokens[:, :-1])
    for row in range(5):
        tokens = block.tokens[row].tolist()
        reference = Reference(head, kind)
        logits = reference_logits(base[row], hidden[row], tokens, int(anchors[row]), reference)
        for step, scores in enumerate(logits):
            order = sorted(range(VOCAB), key=base[row, step].tolist().__getitem__, reverse=True)
            allowed = order[:shortlist]
            if row not in sampled.tolist():
                assert tokens[step] == max(allowed, key=scores.__getitem__)
                continue
            index = sampled.tolist().index(row)
            wanted = torch.zeros(VOCAB)
            kept = torch.tensor([scores[token] for token in allowed]) / temperatures[index]
            wanted[allowed] = torch.softmax(kept, 0)
            found = block.probs[index, step]
            if block.support is not None:
                found = torch.zeros(VOCAB).scatter(0, block.support[index, step], found)
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)
            assert found[tokens[step]] > 0
