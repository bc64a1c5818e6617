"""``dspark eval``: every number against the reference drafter, written out position by position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import write_config, write_conversations, write_target
from typer.testing import CliRunner

from dspark_sglang.artifacts import (
    DRAFT_VOCAB_FILE,
    SCHEMA_VERSION,
    STSArtifact,
    read_draft_vocab,
    write_json,
)
from dspark_sglang.checkpoint import parse_drafter_config, read_config, weights_digest
from dspark_sglang.cli.evaluate import Settings
from dspark_sglang.cli.main import app
from dspark_sglang.core.draft import (
    FOLLOWING,
    SAMPLED_SHORTLIST,
    SHORTLIST,
    WHOLE_VOCABULARY,
    DraftBlock,
    draft_block,
)
from dspark_sglang.core.drafter import DenseDrafter, DenseShape
from dspark_sglang.errors import ConfigError, ServerError
from dspark_sglang.evaluation import drafted as drafted_blocks
from dspark_sglang.evaluation import served, standalone
from dspark_sglang.evaluation import shortlist as shortlists
from dspark_sglang.evaluation.questions import Question, load_questions
from dspark_sglang.evaluation.report import Domain, calibration, lengths
from dspark_sglang.provenance import provenance
from dspark_sglang.training import config as configs
from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.distributed import World
from dspark_sglang.training.replay import Walk, nothing
from dspark_sglang.training.states import Target
from dspark_sglang.training.trainer import Trainer

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


def answered(
    pair: Any, temperature: float, shortlist: int = 0
) -> tuple[standalone.Pair, list[Any], list[Any]]:
    loaded = standalone.load_pair(*pair, bf16=False)
    answers = standalone.write_answers(
        loaded.target, QUESTIONS, temperature=temperature, max_tokens=20, seed=1, at_once=3
    )
    scored = standalone.score_answers(loaded, answers, QUESTIONS, shortlist=shortlist)
    return loaded, answers, scored


@torch.no_grad()
def reference(
    pair: Any, loaded: standalone.Pair, tokens: torch.Tensor, anchor: int, shortlist: int = 0
) -> Any:
    """Laws of the block at one anchor from the reference drafter, true tokens before each."""
    config = parse_drafter_config(read_config(pair[1], role="drafter"))
    model = loaded.target.model
    weights = load_file(pair[1] / "model.safetensors")
    shape = DenseShape(
        config.gamma, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
        config.num_layers, config.mask_token_id, config.rms_norm_eps, config.rope_theta,
    )  # fmt: skip
    table = model.get_input_embeddings().weight
    drafter = DenseDrafter.load({n: w.float() for n, w in weights.items()}, shape, table)
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
        previous = tokens[min(anchor + k, len(tokens) - 1)][None]
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


@pytest.mark.parametrize("shortlist", [0, 7, 1000], ids=["whole", "shortlist", "longer than all"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_are_the_reference_drafters(pair: Any, temperature: float, shortlist: int) -> None:
    loaded, answers, scored = answered(pair, temperature, shortlist)
    assert len(scored) == len(QUESTIONS)
    for sequence, answer in zip(answers, scored, strict=True):
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
        for row, anchor in enumerate(sequence.anchors()[:6]):
            drafted, _, truth = reference(pair, loaded, tokens, int(anchor), shortlist)
            for k in range(min(GAMMA, int(answer.remaining[row]))):
                follows = int(tokens[anchor + k + 1])
                p, q = truth[anchor + k], drafted[k]
                assert answer.match[row, k] == float(int(q.argmax()) == follows)
                ratio = min(1.0, float(q[follows] / p[follows]))
                assert answer.ratio[row, k] == pytest.approx(ratio, abs=1e-4)
            assert not answer.match[row, int(answer.remaining[row]) :].any()


@torch.no_grad()
def test_drafted_blocks_are_scored_as_serving_scores_them(pair: Any, monkeypatch: Any) -> None:
    loaded, answers, _ = answered(pair, 1.0)
    made: list[DraftBlock] = []

    def kept(*args: Any, **kwargs: Any) -> DraftBlock:
        made.append(draft_block(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(drafted_blocks, "draft_block", kept)
    blocks = drafted_blocks.draft_blocks(loaded, answers, seed=3)
    assert blocks.owner.tolist() == [a.source for a in answers for _ in a.anchors()]
    tokens = torch.cat([block.tokens for block in made])
    row = 0
    for sequence in answers:
        for anchor in sequence.anchors():
            text = torch.tensor([*sequence.tokens[: anchor + 1].tolist(), *tokens[row].tolist()])
            laws, confidence, truth = reference(pair, loaded, text, int(anchor))
            np.testing.assert_allclose(blocks.confidence[row], confidence, atol=1e-4)
            for k, token in enumerate(tokens[row].tolist()):
                ratio = float(truth[anchor + k, token] / laws[k][token])
                assert blocks.acceptance[row, k] == pytest.approx(min(1.0, ratio), abs=1e-4)
            row += 1
    assert row == len(tokens) == len(blocks.acceptance)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
@torch.no_grad()
def test_blocks_run_together_are_blocks_run_alone(kind: str, tmp_path: Path) -> None:
    target = Target(str(write_target(tmp_path / "target", kind)), bf16=False)
    if kind == "gemma":  # a window short enough to matter
        target.config.sliding_window = 6
        for layer in target.layers:
            layer.self_attn.sliding_window = 6 if layer.self_attn.sliding_window else None
    tokens = torch.randint(4, 90, (20,))
    anchors, blocks = torch.tensor([0, 7, 18, 19]), torch.randint(4, 90, (4, 3))
    together = target.after_blocks(tokens, anchors, blocks)
    for number, anchor in enumerate(anchors.tolist()):
        alone = torch.cat([tokens[: anchor + 1], blocks[number]])
        final = target.states(alone[None], [0]).final[0, anchor:]
        torch.testing.assert_close(together[number], final, atol=2e-5, rtol=1e-4)
    assert target.after_blocks(tokens, anchors, blocks[:, :0]).shape == (4, 1, target.hidden)


def test_greedy_answers_are_the_targets_own(pair: Any) -> None:
    loaded, answers, _ = answered(pair, 0.0)
    for question, sequence in zip(QUESTIONS, answers, strict=True):
        text = loaded.target.tokenizer.apply_chat_template(
            question.messages, tokenize=False, add_generation_prompt=True
        )
        prompt = loaded.target.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sequence.tokens[: len(prompt)].tolist() == prompt
        tokens = torch.from_numpy(sequence.tokens.astype(np.int64))
        best = loaded.target.model(tokens[None]).logits[0].argmax(-1)
        assert torch.equal(best[len(prompt) - 1 : -1], tokens[len(prompt) :])


def test_the_seed_decides_sampled_answers(pair: Any) -> None:
    texts = [[a.tokens.tolist() for a in answered(pair, 1.0)[1]] for _ in range(2)]
    assert texts[0] == texts[1]
    loaded = standalone.load_pair(*pair, bf16=False)
    other = standalone.write_answers(
        loaded.target, QUESTIONS, temperature=1.0, max_tokens=20, seed=2, at_once=3
    )
    assert [answer.tokens.tolist() for answer in other] != texts[0]


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


def test_what_the_shortlist_loses_is_written(pair: Any, tmp_path: Path) -> None:
    target, drafter = pair
    prompts, found = tmp_path / "prompts.txt", tmp_path / "shortlist.json"
    prompts.write_text("w1 w2 w3\nw7 w8\nw20 w21\n")
    flags = ["eval", "--artifact", str(drafter), "--target", str(target), "--prompts", str(prompts)]
    flags += ["--max-tokens", "24", "--dtype", "float32", "--json", "--no-lookup"]
    losing = [*flags, "--shortlist", "2", "--shortlist-loss", str(found)]
    short = json.loads(CliRunner().invoke(app, losing).stdout)
    whole = json.loads(CliRunner().invoke(app, [*flags, "--shortlist", "0"]).stdout)
    lost = json.loads(found.read_text())
    assert (short["candidates"], whole["candidates"]) == ({"0": 2, "1": 2}, {"0": 0, "1": 0})
    assert [entry["candidates"] for entry in lost["by_temperature"]] == [2, 2]
    greedy, sampled = lost["by_temperature"]
    assert (greedy["temperature"], sampled["temperature"]) == (0.0, 1.0)
    assert greedy["whole"] == whole["accept_length_greedy"]
    assert greedy["shortlist"] == short["accept_length_greedy"]
    assert sampled["whole"] == pytest.approx(whole["accept_length_t1"], rel=0.3)
    for entry in (greedy, sampled):
        percent = 100 * (1 - entry["shortlist"] / entry["whole"])
        assert entry["loss_pct"] == pytest.approx(percent, abs=0.02)
    assert lost["tau_loss_pct"] == max(entry["loss_pct"] for entry in lost["by_temperature"])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--engine", "server", "--shortlist", "5"], "--engine server"),
        (["--shortlist", "0", "--shortlist-loss", "x.json"], "--shortlist 0"),
    ],
    ids=["of a server", "of nothing"],
)
def test_a_shortlist_that_cannot_be_is_refused(flags: list[str], match: str) -> None:
    done = CliRunner().invoke(app, ["eval", "--artifact", "drafter", *flags])
    assert isinstance(done.exception, ConfigError)
    assert match in str(done.exception)


@pytest.mark.parametrize("sure", [False, True], ids=["unsure drafter", "sure drafter"])
def test_greedy_answers_copy_what_their_text_repeats(sure: bool) -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 9]
    sequence = TokenSequence(np.array(text), np.array([False] * 4 + [True] * 12), 3)
    shape = (len(sequence.anchors()), GAMMA)
    logits = np.full(shape, 9.0 if sure else -9.0)
    answer = standalone.Answer(
        3, "chat", np.zeros(shape), np.zeros(shape), logits, sequence.remaining()
    )
    (found,) = standalone.with_copies([answer], [sequence], None)
    if sure:  # wrong, but more is expected of it than of copies
        assert not found.match.any()
        return
    at = {int(anchor): row for row, anchor in enumerate(sequence.anchors())}
    assert not found.match[at[8]].any()  # 8, 5 was not seen before
    assert found.match[at[9]].tolist() == [1.0] * GAMMA  # 5, 6: 7, 8, 5 as before
    assert found.match[at[13]].tolist() == [1.0, 0.0, 0.0]  # 5, 6: 7, 8, 5, but 7, 9 and the end
    assert standalone.with_copies([answer], [sequence], [1.0] * GAMMA)[0].match.any()


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_expected_rounds_are_the_mean_of_drawn_ones(greedy: bool) -> None:
    rng = np.random.default_rng(0)
    remaining = np.array([7, 6, 5, 4, 3, 2, 1, 3, 2, 1])
    chance = rng.random((10, GAMMA)) * (np.arange(GAMMA) < remaining[:, None])
    match, logits = (chance > 0.3).astype(float), np.zeros_like(chance)
    answer = standalone.Answer(0, "chat", match, chance, logits, remaining)
    expected = shortlists.expected_rounds(answer, greedy=greedy)
    draws = 1 if greedy else 4000
    walks = [standalone.replay([answer], greedy=greedy, seed=i)[0] for i in range(draws)]
    assert {w.tokens for w in walks} == {10}
    error = 1e-9 if greedy else 0.06
    assert expected == pytest.approx(np.mean([w.rounds for w in walks]), abs=error)


def test_candidates_are_those_of_serving_unless_told() -> None:
    serving, told = (Settings(16, "float32", 0, size, [], None, True) for size in (None, 300))

    def found(settings: Settings, tokens: int) -> list[int]:
        return [settings.candidates(t, tokens) for t in (0.0, 1.0)]

    assert found(serving, 50_000) == [SHORTLIST, SAMPLED_SHORTLIST]
    # A vocabulary that is small is drafted from whole.
    assert found(serving, WHOLE_VOCABULARY) == [0, 0]
    assert found(serving, WHOLE_VOCABULARY + 1) == [SHORTLIST, SAMPLED_SHORTLIST]
    assert [found(told, tokens)[1] for tokens in (50_000, 301, 300)] == [300, 300, 0]


def test_a_loss_is_of_what_the_kernels_draft_from() -> None:
    losing = Settings(16, "float32", 0, None, [], Path("loss.json"), False)
    assert losing.following == FOLLOWING
    assert [losing.candidates(t, 50_000) for t in (0.0, 1.0)] == [SHORTLIST, SHORTLIST]
    assert losing._replace(loss=None).following == 0


def test_loss_compares_the_same_answers() -> None:
    def answer(matches: list[float]) -> standalone.Answer:
        match = np.array(matches)[:, None]
        left = np.arange(len(match), 0, -1)
        return standalone.Answer(0, "chat", match, match, np.zeros_like(match), left)

    whole = [answer([1, 0, 1, 0]), answer([0, 0])]
    short = [answer([1, 0, 0, 0]), answer([0, 0])]
    found = shortlists.loss(0.0, 9, whole, short)
    assert (found.whole, found.shortlist, found.loss_pct) == (1.5, 1.2, 20.0)
    assert found.candidates == 9
    assert found.ci95 == (0.0, 33.333)


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
    with pytest.raises(ServerError, match="did not answer usefully"):
        served.counters("http://127.0.0.1:9")


def test_counters_of_a_domain_are_differences() -> None:
    before = {"rounds": 5, "position_reached": [5, 2, 1], "position_kept": [2, 1, 0]}
    after = {"rounds": 9, "position_reached": [9, 4, 2], "position_kept": [4, 2, 1]}
    walk = served._difference(before, after, tokens=8)
    assert walk.accept_length == 2.0
    assert walk.per_position == [0.5, 0.5, 1.0]
    assert (nothing(GAMMA) + walk).rounds == 4
