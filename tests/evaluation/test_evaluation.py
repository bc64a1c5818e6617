"""``dspark eval``: every number against the reference drafter, written out position by position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dspark_sglang import remote
from dspark_sglang.artifacts import (
    DRAFT_VOCAB_FILE,
    SCHEMA_VERSION,
    STSArtifact,
    read_draft_vocab,
    read_sts,
    write_json,
)
from dspark_sglang.checkpoint import read_config
from dspark_sglang.cli.main import app
from dspark_sglang.core.draft import SAMPLED_SHORTLIST, SHORTLIST, WHOLE_VOCABULARY
from dspark_sglang.core.engine import Engine
from dspark_sglang.errors import ConfigError, ServerError
from dspark_sglang.evaluation import answer, served
from dspark_sglang.evaluation.answer import Question, load_questions
from dspark_sglang.evaluation.report import Domain, calibration, lengths
from dspark_sglang.layouts.base import weights_digest
from dspark_sglang.layouts.dense.config import parse_drafter_config
from dspark_sglang.layouts.dense.read import read_drafter
from dspark_sglang.layouts.dense.reference import DenseDrafter
from dspark_sglang.provenance import provenance
from dspark_sglang.training import config as configs
from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.distributed import World
from dspark_sglang.training.loss import drafting
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.replay import Walk, nothing, score_sequence
from dspark_sglang.training.target import Target
from dspark_sglang.training.trainer import Trainer
from tests.training.tiny_training import write_config, write_conversations, write_target

GAMMA = 3
QUESTIONS = [
    Question(domain, [{"role": "user", "content": f"w{i} w{i + 1} w{3 * i}"}])
    for i, domain in enumerate(["chat", "code", "chat", "math"])
]


@pytest.fixture(scope="module", params=["vanilla", "rnn", "vanilla over 30 tokens"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny target and a drafter trained on it for a few steps."""
    folder = tmp_path_factory.mktemp(request.param)
    target = write_target(folder / "target")
    data = write_conversations(folder / "data.jsonl", 40)
    head, *limited = request.param.split()
    drafter = {"gamma": GAMMA, "layers": 1, "markov_rank": 8, "markov_head": head}
    if limited:
        drafter["draft_vocabulary"] = 30
    settings = configs.read_config(write_config(folder, target, data, drafter=drafter))
    trainer = Trainer(settings, Target(str(target), bf16=False), World(), log=lambda line: None)
    list(trainer.steps())
    trainer.export(folder / "drafter")
    return target, folder / "drafter"


def answered(pair: Any, temperature: float, **options: Any) -> tuple[answer.Pair, list[Any]]:
    loaded = answer.load_pair(*pair, bf16=False)
    options = {"max_tokens": 20, "seed": 1} | options
    return loaded, answer.answer(loaded, QUESTIONS, temperature=temperature, **options)


@torch.no_grad()
def reference(
    pair: Any, model: Any, tokens: torch.Tensor, anchor: int, shortlist: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Laws and confidences of the block at one anchor, given the tokens after it, and the target's laws."""
    config = parse_drafter_config(read_config(pair[1], role="drafter"))
    weights = load_file(pair[1] / "model.safetensors")
    table = model.get_input_embeddings().weight
    drafter = DenseDrafter({n: w.float() for n, w in weights.items()}, config, table)
    out = model(tokens[None], output_hidden_states=True)
    states = torch.cat([out.hidden_states[i + 1][0] for i in config.target_layer_ids], dim=-1)
    hidden = drafter.hidden(
        drafter.context(states), torch.tensor([anchor]), table[tokens[anchor]][None]
    )
    vocabulary = pair[1] / DRAFT_VOCAB_FILE
    allowed = torch.arange(len(model.lm_head.weight))
    if vocabulary.is_file():
        allowed = torch.tensor(read_draft_vocab(vocabulary, vocab_size=len(allowed)).tokens)
        assert len(allowed) == 30
    drafted, confidences = [], []
    state = drafter.markov.start(1)
    for k in range(config.gamma):
        previous = tokens[anchor + k][None]
        latent, state = drafter.markov.step(previous, hidden[:, k], state)
        base = hidden[:, k] @ model.lm_head.weight.T
        logits = base + latent @ drafter.markov.w2.T
        law = torch.zeros_like(logits[0])
        listed = allowed
        if shortlist:
            listed = allowed[base[0, allowed].argsort(descending=True)[:shortlist]]
        law[listed] = logits[0, listed].softmax(-1)
        drafted.append(law)
        confidences.append(drafter.confidence.logits(hidden[:, k], previous, drafter.markov))
    return drafted, torch.cat(confidences), out.logits[0].softmax(-1)


@pytest.mark.parametrize("shortlist", [0, 7], ids=["whole", "shortlist"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_round_is_the_reference_drafters(
    pair: Any, temperature: float, shortlist: int, monkeypatch: Any
) -> None:
    reports: list[tuple[list[tuple[int, int]], Any]] = []
    step = Engine.step

    def kept(self: Engine, requests: Any) -> Any:
        running = [(i, len(r.tokens) - 1) for i, r in enumerate(requests) if not r.finished]
        reports.append((running, step(self, requests)))
        return reports[-1][1]

    monkeypatch.setattr(Engine, "step", kept)
    loaded, answers = answered(pair, temperature, shortlist=shortlist)
    texts = [
        [*loaded.target_model.encode(question.messages), *found.output]
        for question, found in zip(QUESTIONS, answers, strict=True)
    ]
    rounds = [0] * len(answers)
    for running, report in reports:
        for place, (number, anchor) in enumerate(running):
            found, block = answers[number], report.drafted[place].tolist()
            read = torch.tensor([*texts[number][: anchor + 1], *block])
            laws, confidence, truth = reference(
                pair, loaded.target_model.model, read, anchor, shortlist
            )
            row = rounds[number]
            np.testing.assert_allclose(found.confidence[row], confidence, atol=1e-3)
            for k, token in enumerate(block):
                assert laws[k][token] > 0
                if temperature:
                    ratio = min(1.0, float(truth[anchor + k, token] / laws[k][token]))
                    assert found.acceptance[row, k] == pytest.approx(ratio, abs=1e-3)
                else:
                    assert laws[k][token] == laws[k].max()
            rounds[number] += 1
    assert rounds == [found.walk.rounds for found in answers]
    assert {len(found.acceptance) for found in answers} == set(rounds)


@torch.no_grad()
def test_validation_in_training_scores_as_the_reference_does(pair: Any) -> None:
    loaded, answers = answered(pair, 1.0)
    config, tensors = read_drafter(pair[1])
    drafter = Drafter(config)
    assert drafter.load(tensors) == []
    target = loaded.target_model
    vocabulary = drafting(target.head, loaded.vocabulary)
    for question, found in zip(QUESTIONS, answers, strict=True):
        prompt = target.encode(question.messages)
        tokens = torch.tensor([*prompt, *found.output])
        written = np.arange(len(tokens)) >= len(prompt)
        sequence = TokenSequence(tokens.numpy().astype(np.int32), written, 0)
        states = target.states(tokens[None], config.target_layer_ids)
        scores = score_sequence(drafter, target, sequence, states, vocabulary, bf16=False)
        assert len(scores.match) == len(found.output) - 1
        padded = torch.cat([tokens, tokens[-1:].expand(GAMMA)])
        for row, anchor in enumerate(sequence.anchors()[:6].tolist()):
            laws, _, truth = reference(pair, target.model, padded, anchor)
            inside = min(GAMMA, int(sequence.remaining()[row]))
            for k in range(inside):
                follows = int(tokens[anchor + k + 1])
                assert scores.match[row, k] == float(int(laws[k].argmax()) == follows)
                ratio = min(1.0, float(laws[k][follows] / truth[anchor + k, follows]))
                assert float(scores.ratio[row, k]) == pytest.approx(ratio, abs=1e-4)
            assert not scores.match[row, inside:].any() and not scores.ratio[row, inside:].any()


def test_walks_add_up_to_the_answers(pair: Any) -> None:
    for temperature in (0.0, 1.0):
        for found in answered(pair, temperature)[1]:
            # The first token is the prefill's.
            assert found.walk.tokens == len(found.output) - 1
            assert found.walk.reached[0] == found.walk.rounds
            assert (found.walk.accepted <= found.walk.reached).all()
            bonus = found.walk.tokens - found.walk.accepted.sum()
            assert found.walk.rounds - 1 <= bonus <= found.walk.rounds


@pytest.mark.parametrize("lookup", [False, True], ids=["drafted", "lookup"])
def test_greedy_answers_are_the_targets_own(pair: Any, lookup: bool) -> None:
    loaded, answers = answered(pair, 0.0, lookup=lookup)
    for question, found in zip(QUESTIONS, answers, strict=True):
        prompt = loaded.target_model.encode(question.messages)
        tokens = torch.tensor([*prompt, *found.output])
        best = loaded.target_model.model(tokens[None]).logits[0].argmax(-1)
        assert torch.equal(best[len(prompt) - 1 : -1], tokens[len(prompt) :])
        assert len(found.output) == 20 or found.output[-1] == 2


def test_the_seed_decides_sampled_answers(pair: Any) -> None:
    texts = [[found.output for found in answered(pair, 1.0, seed=s)[1]] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_command_prints_what_it_measured(pair: Any, tmp_path: Path) -> None:
    target, drafter = pair
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2 w3\nw7 w8\nw20 w21\n")
    flags = ["eval", "--artifact", str(drafter), "--target", str(target), "--prompts", str(prompts)]
    flags += ["--max-tokens", "24", "--dtype", "float32", "--json", "--out", str(tmp_path / "out")]
    runs = [CliRunner().invoke(app, flags) for _ in range(2)]
    found = [json.loads(run.stdout) for run in runs]
    numbers = ["accept_length_greedy", "accept_length_t1", "per_position", "ece_before"]
    assert [found[0][n] for n in numbers] == [found[1][n] for n in numbers]
    assert 1 <= found[0]["accept_length_greedy"] <= GAMMA + 1
    assert len(found[0]["per_position"]) == GAMMA
    assert found[0]["ece_after"] is None
    rows = {
        (row["engine"], row["temperature"]): row["accept_length"] for row in found[0]["lengths"]
    }
    assert list(rows) == [("standalone", 0.0), ("standalone", 1.0), ("drafter alone", 0.0)]
    assert rows[("drafter alone", 0.0)] == found[0]["accept_length_greedy_drafted"]
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["gamma"] == GAMMA
    assert (tmp_path / "out/reliability.png").stat().st_size > 5000


def test_temperatures_beside_the_weights_are_judged(pair: Any, tmp_path: Path) -> None:
    target, drafter = pair
    sts = drafter / "sts.json"
    write_json(
        sts,
        STSArtifact(
            schema_version=SCHEMA_VERSION,
            gamma=GAMMA,
            temperatures=[2.0] * GAMMA,
            drafter_sha256=weights_digest(drafter),
            target="tiny",
            provenance=provenance(["test"]),
        ),
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2 w3\nw7 w8\n")
    flags = ["eval", "--artifact", str(drafter), "--target", str(target), "--prompts", str(prompts)]
    try:
        done = CliRunner().invoke(app, [*flags, "--max-tokens", "24", "--json"])
        found = json.loads(done.stdout)
        assert found["ece_after"] is not None
        assert found["ece_after"] != found["ece_before"]
    finally:
        sts.unlink()


def test_a_shortlist_of_a_server_is_refused() -> None:
    done = CliRunner().invoke(
        app, ["eval", "--artifact", "drafter", "--engine", "server", "--shortlist", "5"]
    )
    assert isinstance(done.exception, ConfigError)
    assert "--engine server" in str(done.exception)


def test_candidates_are_those_of_serving(pair: Any) -> None:
    loaded = answer.load_pair(*pair, bf16=False)

    def found(tokens: int) -> list[int]:
        some = loaded._replace(vocabulary=torch.arange(tokens))
        return [some.candidates(sampled=sampled) for sampled in (False, True)]

    assert found(50_000) == [SHORTLIST, SAMPLED_SHORTLIST]
    # A vocabulary that is small is drafted from whole.
    assert found(WHOLE_VOCABULARY) == [0, 0]
    assert found(WHOLE_VOCABULARY + 1) == [SHORTLIST, SAMPLED_SHORTLIST]


def test_temperatures_are_fitted_to_the_drafters_rounds(pair: Any, tmp_path: Path) -> None:
    target, drafter = pair
    prompts, out = tmp_path / "prompts.txt", tmp_path / "sts.json"
    prompts.write_text("".join(f"w{i} w{i + 1} w{2 * i}\n" for i in range(8)))
    flags = ["calibrate", "--target", str(target), "--drafter", str(drafter)]
    flags += ["--prompts", str(prompts), "--max-tokens", "24", "--out", str(out)]
    assert CliRunner().invoke(app, flags).exit_code == 0
    fitted = read_sts(out, gamma=GAMMA, drafter_sha256=weights_digest(drafter))
    assert fitted.blocks > 8
    assert fitted.ece_before is not None and fitted.ece_after is not None
    prompts.write_text("w1\nw2\n")
    few = CliRunner().invoke(app, flags)
    assert isinstance(few.exception, ConfigError) and "2 prompts" in str(few.exception)


def test_calibration_is_perfect_where_confidence_is_the_truth() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.05, 0.95, (500, GAMMA))
    logits = np.log(chance / (1 - chance))
    assert calibration(logits, chance, None).ece_before == pytest.approx(0.0, abs=1e-9)
    assert calibration(logits * 3, chance, [3.0] * GAMMA).ece_after == pytest.approx(0, abs=1e-9)


def test_lengths_add_up_and_hold_their_interval() -> None:
    one = Walk(2, 6, np.array([2, 2, 1]), np.array([2, 2, 0]))
    two = Walk(4, 4, np.array([4, 0, 0]), np.array([0, 0, 0]))
    walks = [Domain("chat", one), Domain("code", two), Domain("chat", one)]
    found = lengths("standalone", 1.0, walks, by_prompt=True)
    assert found.accept_length == 2.0
    assert found.by_domain == {"chat": 3.0, "code": 1.0}
    assert found.per_position == [0.5, 1.0, 0.0]
    assert found.survival == [0.5, 0.5, 0.0]
    assert found.ci95 is not None
    assert 1.0 <= found.ci95[0] <= 2.0 <= found.ci95[1] <= 3.0


def test_prompts_of_every_format(tmp_path: Path) -> None:
    packaged = load_questions(None)
    assert {question.domain for question in packaged} == {"chat", "math", "code", "instructions"}
    share = tmp_path / "share.json"
    share.write_text(
        json.dumps(
            [
                {
                    "domain": "code",
                    "conversations": [
                        {"from": "system", "value": "Be brief."},
                        {"from": "human", "value": "Say hello."},
                        {"from": "gpt", "value": "Hello."},
                        {"from": "human", "value": "Again."},
                    ],
                }
            ]
        )
    )
    assert load_questions(share) == [
        Question(
            "code",
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Say hello."},
            ],
        )
    ]


def test_a_server_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ServerError, match="no usable answer"):
        remote.record(remote.client("http://127.0.0.1:9", None))


def test_counters_of_a_domain_are_differences() -> None:
    before = {"rounds": 5, "position_reached": [5, 2, 1], "position_kept": [2, 1, 0]}
    after = {"rounds": 9, "position_reached": [9, 4, 2], "position_kept": [4, 2, 1]}
    walk = served._difference(before, after, tokens=8)
    assert walk.accept_length == 2.0
    assert walk.per_position == [0.5, 0.5, 1.0]
    assert (nothing(GAMMA) + walk).rounds == 4
