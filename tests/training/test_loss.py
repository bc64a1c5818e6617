"""The fused vocabulary loss against the formula, written out in float64 with autograd."""

from __future__ import annotations

import pytest
import torch

from dspark_sglang.training import loss as module
from dspark_sglang.training.loss import Mix, drafting, frequent, vocabulary_loss, whole

VOCAB, WIDTH, RANK = 53, 12, 5
MIXES = {
    "paper": Mix(ce=0.1, kl=0.0, tv=0.9),
    "kl only": Mix(ce=0.0, kl=1.0, tv=0.0),
    "blend": Mix(ce=0.05, kl=0.5, tv=0.45),
}


def naive(hidden, latent, w2, wanted, labels, weights, head, mix, softcap=0.0, drafted=None):
    """The loss of the module's docstring; only the tokens ``drafted`` (None: all) are drafted."""
    target = wanted @ head.T
    if softcap:
        target = softcap * torch.tanh(target / softcap)
    p = torch.softmax(target, -1)
    logits = hidden @ head.T + latent @ w2.T
    inside = torch.ones(len(head), dtype=torch.bool)
    if drafted is not None:
        inside = torch.zeros(len(head), dtype=torch.bool)
        inside[drafted] = True
    log_q = torch.log_softmax(logits.masked_fill(~inside, -1e30), -1)
    known = (labels >= 0) & inside[labels]
    ce = -(log_q.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)).where(known, 0.0)
    kl = (p * (p.log() - log_q))[:, inside].sum(-1)
    tv = (p - log_q.exp()).abs().sum(-1)
    return (weights * (mix.ce * ce + mix.kl * kl + mix.tv * tv)).sum(), tv, ce, kl


def make(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "hidden": normal(rows, WIDTH),
        "latent": normal(rows, RANK),
        "w2": normal(VOCAB, RANK),
        "wanted": normal(rows, WIDTH),
        "labels": torch.randint(VOCAB, (rows,), generator=g),
        "weights": torch.rand(rows, generator=g, dtype=torch.float64),
        "head": normal(VOCAB, WIDTH),
    }


@pytest.mark.parametrize("chunk", [VOCAB, 3 * VOCAB, 1 << 20], ids=["row", "three", "all"])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("drafted", [None, [0, 3, 4, 11, 30, 31, 52]], ids=["all", "some"])
def test_loss_and_gradients(monkeypatch, drafted, rows, mix, chunk):
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", chunk)
    given = make(rows)
    head = given.pop("head")
    learn = {name: given[name].float().requires_grad_() for name in ("hidden", "latent", "w2")}
    exact = {name: given[name].requires_grad_() for name in learn}
    terms = vocabulary_loss(
        learn["hidden"],
        learn["latent"],
        learn["w2"],
        given["wanted"].float(),
        given["labels"],
        given["weights"].float(),
        vocabulary=drafting(head.float(), None if drafted is None else torch.tensor(drafted)),
        mix=mix,
    )
    expected, tv, ce, kl = naive(**given, head=head, mix=mix, drafted=drafted)
    torch.autograd.backward(3.0 * terms.loss)
    torch.autograd.backward(3.0 * expected)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(terms.acceptance.double(), 1 - tv.detach() / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(terms.kl.double(), kl.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.ce.double(), ce.detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in learn.items():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), exact[name].grad, rtol=1e-3, atol=1e-4, msg=name
        )


def test_frequent_vocabulary_is_the_loss_over_those_tokens():
    given = make(9)
    head = given.pop("head")
    counts = torch.arange(VOCAB).flip(0)  # the first 20 tokens are the frequent ones
    small = frequent(head.float(), counts, 20)
    terms = vocabulary_loss(
        given["hidden"].float(),
        given["latent"].float(),
        given["w2"].float(),
        given["wanted"].float(),
        given["labels"],
        given["weights"].float(),
        vocabulary=small,
        mix=MIXES["blend"],
    )
    given["labels"] = torch.where(given["labels"] < 20, given["labels"], -1)
    given["w2"] = given["w2"][:20]
    expected, *_ = naive(**given, head=head[:20], mix=MIXES["blend"])
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_best_token_that_is_never_drafted_is_never_matched():
    head = torch.eye(4)
    wanted = torch.tensor([[0.0, 9.0, 1.0, 0.0], [0.0, 1.0, 9.0, 0.0]])
    terms = vocabulary_loss(
        wanted, None, None, wanted, torch.tensor([1, 2]), torch.ones(2),
        vocabulary=drafting(head, torch.tensor([0, 2])), mix=MIXES["paper"],
    )  # fmt: skip
    assert terms.match.tolist() == [False, True]
    assert terms.acceptance[0] < 0.01 < 0.98 < terms.acceptance[1]


def test_rare_tokens_get_no_gradient_until_the_full_end():
    given = make(6)
    w2 = given["w2"].float().requires_grad_()
    small = frequent(given["head"].float(), torch.arange(VOCAB), 10)
    terms = vocabulary_loss(
        given["hidden"].float(),
        given["latent"].float(),
        w2,
        given["wanted"].float(),
        given["labels"],
        given["weights"].float(),
        vocabulary=small,
        mix=MIXES["paper"],
    )
    torch.autograd.backward(terms.loss)
    assert w2.grad is not None
    assert not w2.grad[: VOCAB - 10].any()
    assert w2.grad[VOCAB - 10 :].any()


def test_without_a_markov_head():
    given = make(4)
    zero = torch.zeros(4, 1, dtype=torch.float64), torch.zeros(VOCAB, 1, dtype=torch.float64)
    terms = vocabulary_loss(
        given["hidden"].float(),
        None,
        None,
        given["wanted"].float(),
        given["labels"],
        given["weights"].float(),
        vocabulary=whole(given["head"].float()),
        mix=MIXES["paper"],
    )
    expected, *_ = naive(
        given["hidden"], *zero, given["wanted"], given["labels"], given["weights"], given["head"],
        MIXES["paper"],
    )  # fmt: skip
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_perfect_draft_is_always_accepted():
    given = make(5)
    same = given["wanted"].float()
    terms = vocabulary_loss(
        same, None, None, same, given["labels"], given["weights"].float(),
        vocabulary=whole(given["head"].float()), mix=MIXES["kl only"],
    )  # fmt: skip
    torch.testing.assert_close(terms.acceptance, torch.ones(5), rtol=0, atol=1e-6)
    assert terms.match.all()
    assert terms.loss.item() == pytest.approx(0.0, abs=1e-5)


def test_softcap_applies_to_the_target_only():
    given = make(5)
    head = given.pop("head")
    terms = vocabulary_loss(
        given["hidden"].float(), given["latent"].float(), given["w2"].float(),
        given["wanted"].float(), given["labels"], given["weights"].float(),
        vocabulary=whole(head.float(), softcap=2.0), mix=MIXES["blend"],
    )  # fmt: skip
    expected, *_ = naive(**given, head=head, mix=MIXES["blend"], softcap=2.0)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
