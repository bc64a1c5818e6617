"""The reference engine: its output is plain decoding's, greedy token for token and sampled in law."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dspark_sglang.core.accept import Accepted, Round, accept_sampled
from dspark_sglang.core.draft import draft_block
from dspark_sglang.core.engine import Drafter, Engine, Request
from dspark_sglang.core.penalties import Penalties
from dspark_sglang.errors import ConfigError, DataError, NumericsError
from dspark_sglang.layouts.dense.config import parse_drafter_config
from dspark_sglang.layouts.dense.reference import DenseDrafter
from dspark_sglang.layouts.dense.tensors import dense_tensors
from dspark_sglang.layouts.v4.config import V4Shape
from dspark_sglang.layouts.v4.drafter import V4Drafter
from dspark_sglang.training.target import HFTarget, Target
from tests.core.laws import THRESHOLD, p_value
from tests.layouts.v4_samples import random_tensors
from tests.training.tiny_training import write_target

GAMMA = 3
#: Markov head (or v4), confidence with the Markov embedding, sample_from_anchor.
DRAFTERS = [
    ("vanilla", True, True),
    ("vanilla", False, False),
    ("gated", True, False),
    ("gated", False, True),
    ("rnn", True, True),
    ("rnn", False, False),
    ("v4", True, True),
    ("v4", False, False),
]
named = pytest.mark.parametrize(
    ("kind", "with_markov", "whole"),
    DRAFTERS,
    ids=[f"{k}-{'markov' if m else 'bare'}-{'anchor' if w else 'masks'}" for k, m, w in DRAFTERS],
)


# --- drafters that are right often enough ---------------------------------------------------------


def make_drafter(
    kind: str, with_markov: bool, whole: bool, embedding: torch.Tensor, table: torch.Tensor
) -> Drafter:
    """Random weights, but a Markov head that says ``table`` ``[V, V]``: logits after each token."""
    vocab, hidden = embedding.shape
    prefix = "mtp.0." if kind == "v4" else ""
    common = {
        "hidden_size": hidden,
        "vocab_size": vocab,
        "num_attention_heads": 2,
        "head_dim": 8,
        "sample_from_anchor": whole,
        "confidence_head_with_markov": with_markov,
    }
    if kind == "v4":
        shape = V4Shape.from_config(common | v4_fields(vocab))
        tensors = random_tensors(shape, 1)
        tensors["mtp.0.norm.weight"] *= 0.1  # the parallel stage says little
    else:
        config = parse_drafter_config(common | dense_fields(kind, vocab))
        generator = torch.Generator().manual_seed(1)
        tensors = {}
        for name, size in dense_tensors(config).items():
            value = torch.randn(size, generator=generator)
            tensors[name] = (
                1 + 0.1 * value if name.endswith("norm.weight") else value / size[-1] ** 0.5
            )
        tensors["norm.weight"] *= 0.1
        tensors["confidence_head.proj.bias"] = torch.tensor([0.3])
    # As embeddings of the tokens stand the unit vectors, so W2 is the table itself.
    tensors[f"{prefix}markov_head.markov_w1.weight"] = torch.eye(vocab)
    tensors[f"{prefix}markov_head.markov_w2.weight"] = table.T.contiguous()
    if kind == "gated":
        tensors["markov_head.gate_proj.bias"] += 2.0
    if kind == "rnn":
        joint = tensors["markov_head.joint_proj.weight"]
        joint *= 0.2
        tensors["markov_head.joint_proj.bias"] *= 0.2
        joint[2 * vocab :, vocab : 2 * vocab] += 2.0 * torch.eye(vocab)
    tensors[f"{prefix}confidence_head.proj.weight"] *= 0.4
    if kind == "v4":
        return V4Drafter.load(tensors, shape, embedding)
    return DenseDrafter(tensors, config, embedding)


def dense_fields(kind: str, vocab: int) -> dict[str, Any]:
    return {
        "block_size": GAMMA,
        "markov_rank": vocab,
        "markov_head_type": kind,
        "mask_token_id": vocab - 1,
        "target_layer_ids": [1],
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 12,
    }


def v4_fields(vocab: int) -> dict[str, Any]:
    return {
        "dspark_block_size": GAMMA,
        "dspark_markov_rank": vocab,
        "dspark_noise_token_id": vocab - 1,
        "dspark_target_layer_ids": [1],
        "num_hidden_layers": 4,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 4,
        "o_lora_rank": 4,
        "o_groups": 2,
        "sliding_window": 5,
        "n_routed_experts": 3,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4,
        "routed_scaling_factor": 1.5,
        "hc_mult": 2,
    }


class Toy:
    """A target over few tokens whose law depends on the last two tokens."""

    def __init__(self, vocab: int, hidden: int = 8) -> None:
        generator = torch.Generator().manual_seed(5)
        self.embedding = torch.randn(vocab, hidden, generator=generator)
        self.head = 0.3 * torch.randn(vocab, hidden, generator=generator)
        self.last = 0.8 * torch.randn(vocab, vocab, generator=generator)
        self.before = 0.5 * torch.randn(vocab, vocab, generator=generator)
        self.calls = 0

    def law(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and states of every token of one sequence."""
        self.calls += 1
        logits = self.last[tokens]
        logits[1:] += self.before[tokens[:-1]]
        count = torch.arange(1, len(tokens) + 1)[:, None]
        return logits, self.embedding[tokens].cumsum(0) / count

    def forward(self, sequences: Any, rows: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = [self.law(tokens) for tokens in sequences]
        return [
            (logits[-n:].clone(), states) for (logits, states), n in zip(made, rows, strict=True)
        ]


def toy_engine(kind: str = "vanilla", vocab: int = 3, **changes: Any) -> Engine:
    target = changes.pop("target", None) or Toy(vocab)
    with_markov, whole = changes.pop("with_markov", True), changes.pop("whole", True)
    drafter = make_drafter(kind, with_markov, whole, target.embedding, 1.5 * target.last)
    return Engine(target, drafter, torch.Generator().manual_seed(7), **changes)


class Priced:
    """A round costs ``1 + slope * B``."""

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def seconds(self, tokens: Any) -> Any:
        return 1.0 + self.slope * tokens


# --- greedy: token for token ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(str(write_target(tmp_path_factory.mktemp("llama"))), bf16=False)


@pytest.fixture(scope="module")
def bigrams(llama: Target) -> torch.Tensor:
    """Logits of every one-token sequence: what a good Markov head would know."""
    with torch.no_grad():
        return llama.model(torch.arange(len(llama.head))[:, None]).logits[:, 0]


def test_a_target_without_a_chat_template_is_named(llama: Target) -> None:
    template, llama.tokenizer.chat_template = llama.tokenizer.chat_template, None
    try:
        with pytest.raises(DataError, match="no chat template"):
            llama.encode([{"role": "user", "content": "Hello"}])
    finally:
        llama.tokenizer.chat_template = template
    assert llama.encode([{"role": "user", "content": "Hello"}])


@torch.no_grad()
def plain_greedy(model: Any, request: Request) -> list[int]:
    """Decode one token at a time with the Hugging Face model itself."""
    output: list[int] = []
    while len(output) < request.max_new_tokens:
        logits = model(torch.tensor([request.prompt + output])).logits[:, -1].float()
        request.penalties.apply(logits, output, [])
        output.append(int(logits.argmax()))
        if output[-1] in request.stop_tokens:
            break
    return output


def greedy_requests() -> list[Request]:
    """Greedy ones of several lengths and penalties, with sampled ones between them."""
    penalties = [
        Penalties(),
        Penalties(frequency=0.7, presence=0.4),
        Penalties(repetition=1.6),
        Penalties(min_new_tokens=6, stop_tokens=(20, 40, 60)),
    ]
    made = [Request([5, 6, 7 + i], 9 + i, penalties=p) for i, p in enumerate(penalties)]
    made.insert(1, Request([9], 6, temperature=1.0, top_k=20, top_p=0.9))
    made.append(Request([4, 5], 11, temperature=0.6, penalties=penalties[1]))
    return made


@named
def test_greedy_output_is_plain_greedy_decoding(
    kind: str, with_markov: bool, whole: bool, llama: Target, bigrams: torch.Tensor
) -> None:
    target = HFTarget(llama, [2])
    drafter = make_drafter(kind, with_markov, whole, target.embedding, bigrams)
    engine = Engine(target, drafter, torch.Generator().manual_seed(0), cost=Priced(0.05))
    requests = greedy_requests()
    reports = engine.generate(requests)
    for request in requests:
        assert len(request.output) == request.max_new_tokens
        if not request.temperature:
            assert request.output == plain_greedy(llama.model, request)
    kept = sum(int(report.kept.sum()) for report in reports)
    rounds = sum(len(report.kept) for report in reports)
    assert 0.3 * rounds < kept < sum(int(report.sent.sum()) for report in reports)


def test_stop_tokens_end_the_output(llama: Target, bigrams: torch.Tensor) -> None:
    target = HFTarget(llama, [2])
    free = Request([5, 6, 7], 12)
    drafter = make_drafter("vanilla", True, True, target.embedding, bigrams)
    engine = Engine(target, drafter, torch.Generator().manual_seed(0))
    engine.generate([free])
    for stop in set(free.output):
        held = Request([5, 6, 7], 12, stop_tokens=(stop,))
        engine.generate([held])
        assert held.output == free.output[: free.output.index(stop) + 1]


def test_the_hugging_face_target(llama: Target) -> None:
    tokens = torch.tensor([5, 9, 2, 30])
    ((logits, states),) = HFTarget(llama, [0, 3]).forward([tokens], [4])
    out = llama.model(tokens[None], output_hidden_states=True)
    torch.testing.assert_close(logits, out.logits[0])
    torch.testing.assert_close(states[:, :32], out.hidden_states[1][0])
    assert states.shape == (4, 64)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_what_a_target_keeps_of_the_last_sequence_changes_nothing(
    kind: str, tmp_path: Path
) -> None:
    model = Target(str(write_target(tmp_path / "target", kind)), bf16=False)
    if kind == "gemma":  # a window short enough to matter
        model.config.sliding_window = 6
        for layer in model.layers:
            layer.self_attn.sliding_window = 6 if layer.self_attn.sliding_window else None
    kept, generator = HFTarget(model, [0, 2]), torch.Generator().manual_seed(0)
    one, two, three = torch.randint(4, 90, (3, 40), generator=generator)
    calls = [
        [one[:9], two[:12], three[:5]],
        [one[:16], two[:13], three[:11]],
        # What was rejected is run again, in the same order and in another.
        [torch.cat([one[:11], two[20:24]]), two[:13], torch.cat([three[:7], one[30:31]])],
        [torch.cat([three[:7], one[30:36]]), torch.cat([one[:11], two[20:23], two[30:39]])],
        [torch.cat([one[:11], two[20:23], two[30:40]])],
        # Nothing that is known, and less than that.
        [two[:30], one[:4]],
        [two[:3], one[:4]],
    ]
    for sequences in calls:
        for rows in ([1] * len(sequences), [2] * len(sequences)):
            found = kept.forward(sequences, rows)
            for tokens, got, count in zip(sequences, found, rows, strict=True):
                (alone,) = HFTarget(model, [0, 2]).forward([tokens], [count])
                out = model.model(tokens[None], output_hidden_states=True)
                torch.testing.assert_close(got[0], out.logits[0, -count:], atol=2e-5, rtol=1e-4)
                for mine, wanted in zip(got, alone, strict=True):
                    torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("repeats", [True, False], ids=["repeating text", "other text"])
def test_copies_bring_greedy_requests_on_and_change_nothing(repeats: bool) -> None:
    """A target that counts in a circle, and a drafter that knows nothing of it."""
    target = Toy(5)
    target.before.zero_()
    target.last = 5.0 * torch.eye(5).roll(1, dims=1)
    made = []
    for lookup in (False, True):
        drafter = make_drafter("vanilla", True, True, target.embedding, 0 * target.last)
        engine = Engine(target, drafter, torch.Generator().manual_seed(0), lookup=lookup)
        prompt = [0, 1, 2, 3, 4, 0, 1] if repeats else [3, 1]
        requests = [Request(prompt, 20), Request([1, 2], 8, temperature=1.0)]
        reports = [engine.step(requests[:1]) for _ in range(3)]
        engine.generate(requests)
        made.append((requests[0].output, sum(int(report.kept.sum()) for report in reports)))
    (plain, drafted), (same, copied) = made
    assert plain == same == [(prompt[-1] + 1 + i) % 5 for i in range(20)]
    assert drafted <= copied
    assert (copied == 3 * GAMMA) == repeats


@pytest.mark.parametrize(
    "limits",
    [{"vocabulary": torch.tensor([0, 2])}, {"shortlist": 2}],
    ids=["vocabulary", "shortlist"],
)
def test_what_may_be_drafted_changes_no_law(limits: dict[str, Any]) -> None:
    engine = toy_engine(**limits)
    requests = [Request([0, 1], 3, temperature=1.0) for _ in range(300)]
    reports = engine.generate(requests)
    assert judge(requests, sequence_law(engine.target, requests[0], 3), 3) > THRESHOLD
    drafted = torch.cat([report.drafted for report in reports])
    if "vocabulary" in limits:
        assert set(drafted.unique().tolist()) == {0, 2}
    assert sum(int(report.kept.sum()) for report in reports) > 0


# --- sampled: in law ----------------------------------------------------------------------------


def sequence_law(target: Toy, request: Request, length: int) -> torch.Tensor:
    """Probability of every output of ``length`` tokens, by enumeration of plain decoding."""
    vocab = len(target.embedding)
    made = []
    for output in itertools.product(range(vocab), repeat=length):
        chance = 1.0
        for step, token in enumerate(output):
            logits, _ = target.law(torch.tensor([*request.prompt, *output[:step]]))
            row = logits[-1:].clone()
            request.penalties.apply(row, output[:step], [])
            chance *= float(torch.softmax(row[0] / request.temperature, dim=-1)[token])
        made.append(chance)
    return torch.tensor(made)


def judge(requests: list[Request], law: torch.Tensor, vocab: int) -> float:
    """P-value of the requests' outputs; those that are expected too rarely count as one."""
    codes = [sum(t * vocab**i for i, t in enumerate(reversed(r.output))) for r in requests]
    seen = torch.bincount(torch.tensor(codes), minlength=len(law))
    rare = law * len(requests) < 5
    pooled = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, law)]
    if pooled[1][-1] * len(requests) < 5:
        pooled = [torch.cat([x[1:-1], (x[0] + x[-1])[None]]) for x in pooled]
    return p_value(*pooled)


@named
def test_sampled_output_follows_the_plain_law(kind: str, with_markov: bool, whole: bool) -> None:
    """Two kinds of request in one batch, with a schedule that admits some drafts and not others."""
    share = 2 if kind == "v4" else 1  # it is slower
    cost = Priced(0.4 * share / 500)
    engine = toy_engine(kind, with_markov=with_markov, whole=whole, cost=cost)
    hot = [Request([0, 1], 3, temperature=1.0) for _ in range(300 // share)]
    penalties = Penalties(frequency=0.6, presence=0.2)
    cool = [Request([1], 3, temperature=0.5, penalties=penalties) for _ in range(200 // share)]
    mixed = [r for pair in itertools.zip_longest(hot, cool) for r in pair if r is not None]
    reports = engine.generate(mixed)
    sent, kept = (torch.cat([getattr(r, name) for r in reports]) for name in ("sent", "kept"))
    assert 0.3 * len(sent) < int(sent.sum()) < GAMMA * len(sent)
    assert 0.2 * len(sent) < int(kept.sum()) < int(sent.sum())
    for group in (hot, cool):
        law = sequence_law(engine.target, group[0], 3)
        assert judge(group, law, 3) > THRESHOLD


def test_filters_are_those_of_plain_decoding() -> None:
    """With top_k 2 of 4 tokens, never a third one, and the right share of the two."""
    engine = toy_engine(vocab=4)
    requests = [Request([2], 2, temperature=1.0, top_k=2) for _ in range(400)]
    engine.generate(requests)
    pairs = torch.tensor([request.output for request in requests])
    for first in pairs[:, 0].unique().tolist():
        logits, _ = engine.target.law(torch.tensor([2, first]))
        law = torch.softmax(logits[-1], dim=-1)
        law[law < law.topk(2).values[-1]] = 0.0
        seen = torch.bincount(pairs[pairs[:, 0] == first, 1], minlength=4)
        assert p_value(seen, law) > THRESHOLD
    assert len(pairs[:, 0].unique()) == 2


# --- schedule, confidence, randomness --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rnn", "v4"])
def test_with_no_budget_every_round_gives_one_token(kind: str) -> None:
    engine = toy_engine(kind, limit=0)
    requests = [Request([0], 4), Request([1, 2], 4, temperature=1.0)]
    reports = engine.generate(requests)
    assert len(reports) == 3  # the first token comes before the first round
    assert all(report.sent.tolist() == [0, 0] for report in reports)
    wanted = [0]
    for _ in range(4):
        wanted.append(int(engine.target.law(torch.tensor(wanted))[0][-1].argmax()))
    assert requests[0].output == wanted[1:]


def test_the_limit_is_over_all_requests_and_the_likeliest_go_first() -> None:
    engine = toy_engine(limit=4)
    requests = [Request([i], 20, temperature=1.0) for i in (0, 1, 2)]
    report = engine.step(requests)
    assert int(report.sent.sum()) == 4
    sent = np.arange(GAMMA) < report.sent.numpy()[:, None]
    assert report.survival[sent].min() >= report.survival[~sent].max()
    assert (report.kept <= report.sent).all()


def test_an_expensive_token_is_not_sent() -> None:
    requests = [Request([0], 4), Request([1], 4)]
    assert toy_engine(cost=Priced(100.0)).step(requests).sent.tolist() == [0, 0]
    requests = [Request([0], 9), Request([1], 9)]
    assert toy_engine().step(requests).sent.tolist() == [GAMMA, GAMMA]


def test_confidences_are_scaled_by_their_temperatures() -> None:
    def logits(temperatures: list[float] | None) -> np.ndarray[Any, Any]:
        given = None if temperatures is None else torch.tensor(temperatures)
        engine = toy_engine(temperatures=given)
        chance = engine.step([Request([0], 9), Request([2], 9, temperature=1.0)]).survival
        own = chance / np.concatenate([np.ones((2, 1)), chance[:, :-1]], axis=1)
        return np.log(own / (1 - own))

    plain = logits(None)
    np.testing.assert_allclose(logits([2.0, 0.5, 3.0]), plain / [2.0, 0.5, 3.0], rtol=1e-3)
    with pytest.raises(ConfigError, match="temperatures"):
        logits([1.0, 1.0])


def test_randomness_and_acceptance_come_from_outside() -> None:
    shapes: list[tuple[int, ...]] = []

    def uniforms(shape: tuple[int, ...]) -> torch.Tensor:
        shapes.append(shape)
        return torch.full(shape, 0.25, dtype=torch.float64)

    seen: list[Round] = []

    def accept(round_: Round, given: torch.Tensor) -> Accepted:
        seen.append(round_)
        return accept_sampled(round_, given)

    engine = toy_engine(accept=accept)
    again = Engine(engine.target, engine.drafter, uniforms, accept=accept)
    requests = [Request([0], 5), Request([1], 5, temperature=1.0), Request([2], 5, temperature=0.5)]
    again.step(requests)
    assert shapes == [(1,), (1,), (2, GAMMA), (2, GAMMA + 1)]
    assert seen[0].drafted.shape == (2, GAMMA)
    assert seen[0].weights.shape[0] == int((seen[0].lens + 1).sum())
    again.generate([Request([0], 5)])
    assert len(seen) == 1  # greedy requests are not sampled

    outputs = []
    for _ in range(2):
        made = [Request([i], 8, temperature=1.0) for i in range(3)]
        toy_engine().generate(made)
        outputs.append([request.output for request in made])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kind", ["rnn", "v4"])
def test_what_is_committed_is_what_the_next_round_drafts_from(kind: str) -> None:
    """Context rows of every token before the anchor, and a block drafted right after it."""
    engine = toy_engine(kind)
    requests = [Request([0], 12), Request([1, 2, 0], 12, temperature=1.0)]
    engine.step(requests)
    kept = 0
    while all(not request.finished for request in requests):
        before = [request.tokens for request in requests]
        for request, tokens in zip(requests, before, strict=True):
            _, states = engine.target.law(torch.tensor(tokens))
            assert request.context is not None
            torch.testing.assert_close(request.context, engine.drafter.context(states[:-1]))
        report = engine.step(requests)
        drafter, tokens = engine.drafter, torch.tensor(before[0])
        _, states = engine.target.law(tokens)
        row = engine.target.embedding[tokens[-1:]]
        hidden = drafter.hidden(drafter.context(states), torch.tensor([len(tokens) - 1]), row)
        logits = drafter.base_logits(hidden, engine.target.head)
        wanted = draft_block(logits, tokens[-1:], hidden, drafter.markov)
        assert torch.equal(report.drafted[:1], wanted.tokens)
        score = drafter.confidence.logits(hidden, wanted.previous, drafter.markov)
        chance = torch.sigmoid(score).cumprod(1)[0].numpy()
        np.testing.assert_allclose(report.survival[0], chance, rtol=1e-5)
        kept += int(report.kept.sum())
    assert kept > 0


# --- edges ----------------------------------------------------------------------------------------


def test_no_requests() -> None:
    engine = toy_engine()
    assert engine.generate([]) == []
    report = engine.step([])
    assert report.drafted.shape == report.survival.shape == (0, GAMMA)
    assert report.sent.shape == report.kept.shape == (0,)
    done = Request([0], 0)
    assert engine.generate([done]) == []
    assert done.output == []
    single = Request([0], 1)
    assert len(engine.generate([single])) == 1
    assert len(single.output) == 1
    with pytest.raises(ConfigError, match="empty prompt"):
        engine.step([Request([], 3)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [1, 2])
def test_broken_logits(temperature: float, value: float, call: int) -> None:
    """In the prompt's forward as in a verify forward: infinity is the token taken, and nothing is drawn from NaN."""

    class Broken(Toy):
        def law(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, states = super().law(tokens)
            if self.calls == call:
                logits[:, 1] = value
            return logits, states

    engine = toy_engine(target=Broken(3))
    request = Request([0, 1], 6, temperature=temperature)
    if temperature and math.isnan(value):
        with pytest.raises(NumericsError):
            engine.generate([request])
    else:
        engine.generate([request])
        assert 1 in request.output and len(request.output) == 6


def test_a_broken_drafter_is_an_error() -> None:
    engine = toy_engine()
    engine.drafter.confidence.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="confidence"):
        engine.step([Request([0], 6)])


def test_a_dense_drafter_without_the_anchors_row_drops_it() -> None:
    target = Toy(5)
    masks = make_drafter("vanilla", True, False, target.embedding, target.last)
    assert isinstance(masks, DenseDrafter)
    changes = {"gamma": GAMMA + 1, "sample_from_anchor": True}
    sizes = msgspec.structs.replace(masks.config, **changes)
    wider = DenseDrafter(masks._t, sizes, target.embedding)
    context = masks.context(torch.randn(6, 8))
    given = context, torch.tensor([4, 6]), torch.randn(2, 8)
    assert masks.hidden(*given).shape == (2, GAMMA, 8)
    torch.testing.assert_close(masks.hidden(*given), wider.hidden(*given)[:, 1:])
