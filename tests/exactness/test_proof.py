"""The distribution enumeration, the tests built on it, the option table, the mutants, and resuming."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_sglang.errors import ConfigError, DataError
from tests.exactness import mutants, options, prompts, run, sampled, statistics, store
from tests.exactness.distribution import Distribution, Output, adjust, allowed, filtered
from tests.exactness.options import NAMES, OPTIONS, Option
from tests.exactness.statistics import goodness, holm, partition, two_sample
from tests.exactness.store import Clock, Judged, Sampled
from tests.tiny_models import EOS, PAIRS, VOCABULARY

ROOT = Path(__file__).resolve().parents[2]


class Toy:
    """Logits of a random model over a few tokens: any table by output."""

    def __init__(self, size: int = 5, seed: int = 0, scale: float = 1.5) -> None:
        self.size, self.seed, self.scale = size, seed, scale
        self.asked: list[Output] = []

    def __call__(self, outputs: Sequence[Output]) -> torch.Tensor:
        self.asked += outputs
        rows = []
        for output in outputs:
            generator = torch.Generator().manual_seed(hash((self.seed, *output)) % 2**31)
            rows.append(torch.randn(self.size, generator=generator, dtype=torch.float64))
        return torch.stack(rows) * self.scale


def every_output(distribution: Distribution, size: int) -> Iterator[tuple[Output, float]]:
    """Every finished output and its probability, token by token."""

    def below(output: Output, mass: float) -> Iterator[tuple[Output, float]]:
        if distribution.ends(output):
            yield output, mass
            return
        for token in range(size):
            yield from below((*output, token), mass * float(distribution.after(output)[token]))

    return below((), 1.0)


def draw(distribution: Distribution, size: int, samples: int, seed: int) -> Counter[Output]:
    outputs, chances = zip(*every_output(distribution, size), strict=True)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(chances)
    picked = torch.multinomial(weights, samples, replacement=True, generator=generator)
    return Counter(outputs[i] for i in picked.tolist())


PLAIN: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 3, "ignore_eos": True}
STOPPING = PLAIN | {"ignore_eos": False, "stop_token_ids": [4], "min_new_tokens": 2}


# --- the distribution ------------------------------------------------------------------------------------


def test_the_distribution_of_an_output_is_the_product_of_softmaxes() -> None:
    model = Toy()
    distribution = Distribution(model, PLAIN | {"temperature": 0.7})
    for output in itertools.product(range(5), repeat=3):
        wanted, found = 1.0, 1.0
        for length in range(3):
            row = model([output[:length]])[0] / 0.7
            wanted *= float(row.exp()[output[length]] / row.exp().sum())
            found *= float(distribution.after(output[:length])[output[length]])
        assert found == pytest.approx(wanted, rel=1e-12)


def test_stops_end_outputs_and_are_held_back_at_first() -> None:
    found = dict(every_output(Distribution(Toy(), STOPPING), 5))
    assert sum(found.values()) == pytest.approx(1.0)
    assert all(mass == 0.0 for output, mass in found.items() if len(output) < 3)
    assert any(mass > 0 and output[-1] == 4 for output, mass in found.items())
    early = dict(every_output(Distribution(Toy(), STOPPING | {"min_new_tokens": 0}), 5))
    assert early[4,] > 0.0 and early[EOS,] > 0.0


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"frequency_penalty": 0.5}, [1.0, 0.0, -1.5, 3.0]),
        ({"presence_penalty": 0.5}, [1.0, 0.5, -1.5, 3.0]),
        ({"repetition_penalty": 2.0}, [1.0, 0.5, -2.0, 3.0]),
        ({"logit_bias": {"0": -1.0, "3": 2.0}}, [0.0, 1.0, -1.0, 5.0]),
        ({"min_new_tokens": 4, "stop_token_ids": [3]}, [1.0, 1.0, -torch.inf, -torch.inf]),
        ({"min_new_tokens": 3, "stop_token_ids": [3]}, [1.0, 1.0, -1.0, 3.0]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_adjusted_logits(params: dict[str, Any], wanted: list[float]) -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, 3.0]], dtype=torch.float64)
    adjust(logits, [(1, 1, 2)], params)
    assert logits[0].tolist() == wanted


def test_adjusted_logits_are_those_of_sglangs_penalizers() -> None:
    pytest.importorskip("sglang")
    from types import SimpleNamespace

    from sglang.srt.sampling import penaltylib

    params = {
        "frequency_penalty": 0.7,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 3,
        "stop_token_ids": {3, 5},
    }
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=EOS)
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(**params), eos_token_ids={EOS}, tokenizer=tokenizer
    )
    batch = SimpleNamespace(reqs=[request], device="cpu", ref=None)
    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    }
    Batch = type("Batch", (SimpleNamespace,), {})
    holder = Batch(**vars(batch))
    for changes in ({}, {"repetition_penalty": 1.4, "frequency_penalty": 0.0}):
        for name, value in changes.items():
            setattr(request.sampling_params, name, value)
        theirs = penaltylib.BatchedPenalizerOrchestrator(8, holder, kinds)
        logits = torch.randn(8, generator=torch.Generator().manual_seed(1))
        output: Output = ()
        for token in (1, 1, 6, 1):
            found = logits.clone()[None]
            theirs.apply(found)
            wanted = logits.double().clone()[None]
            adjust(wanted, [output], params | changes)
            torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
            theirs.cumulate_output_tokens(torch.tensor([token]))
            output = (*output, token)


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {"all": 1}], ids=str
)
def test_filters_are_those_of_sglangs_sampler(params: dict[str, Any]) -> None:
    pytest.importorskip("sglang")
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    if "all" in params:
        params = {"top_k": 6, "top_p": 0.8, "min_p": 0.05}
    generator = torch.Generator().manual_seed(2)
    distribution = torch.softmax(2.0 * torch.randn((200, 40), generator=generator), dim=-1)
    rows = torch.ones(len(distribution))
    _, weights, tokens, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        distribution.clone(),
        (rows * params.get("top_k", 40)).int(),
        rows * params.get("top_p", 1.0),
        rows * params.get("min_p", 0.0),
        "min_p" in params,
        None,
        torch.zeros(len(distribution), dtype=torch.int64),
        return_filtered_probs=True,
    )
    wanted = torch.zeros_like(distribution).scatter_(-1, tokens.long(), weights)
    found, margin = filtered(distribution.double(), params)
    clear = margin > 1e-4
    assert int(clear.sum()) > 190
    wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(found[clear].float(), wanted[clear], atol=1e-6, rtol=1e-5)


def test_the_grammar_allows_what_can_still_become_a_match() -> None:
    texts = ["".join(text) for n in range(5) for text in itertools.product("aQ7z", repeat=n)]
    matches = [text for text in texts if re.fullmatch(options.REGEX, text)]
    for text in [text for text in texts if len(text) <= 2]:
        if not any(match.startswith(text) for match in matches):
            continue
        possible = allowed(text)
        for one in "aQ7z":  # what a unit lacks is at most one character
            can = any(match.startswith(text + one) for match in matches)
            assert bool(possible[VOCABULARY.index(one)]) == can, (text, one)
    assert bool(allowed("a7")[EOS]) and not bool(allowed("Q")[EOS]) and not bool(allowed("")[EOS])
    assert not bool(allowed("")[:EOS].any())


def test_outputs_that_plain_decoding_never_gives_are_found() -> None:
    distribution = Distribution(Toy(), STOPPING | {"top_k": 2})
    likely = [output for output, mass in every_output(distribution, 5) if mass > 0]
    assert distribution.impossible(likely) == []
    forbidden = next(
        o for o in itertools.product(range(4), repeat=3) if o not in likely and EOS not in o
    )
    run_over = (*likely[0][:2], 4, 0)
    assert distribution.impossible([forbidden, run_over, likely[0][:1]]) == [
        forbidden,
        run_over,
        likely[0][:1],
    ]


def test_a_threshold_that_rounding_decides_is_left_alone() -> None:
    def model(outputs: Sequence[Output]) -> torch.Tensor:
        return torch.tensor([[0.5, 0.3, 0.2 + 1e-9]]).double().log().expand(len(outputs), -1)

    distribution = Distribution(model, PLAIN | {"top_p": 0.5})
    assert distribution.ambiguous(())
    cells = partition(distribution, 10_000)
    assert list(cells.chance) == [((), False)]
    assert distribution.impossible([(2, 2, 2)]) == []


# --- cells and tests -------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [50, 400, 5_000, 200_000])
@pytest.mark.parametrize(
    "params", [PLAIN, STOPPING, PLAIN | {"top_k": 2}], ids=["plain", "stop", "k"]
)
def test_cells_are_a_partition_with_exact_chances(params: dict[str, Any], samples: int) -> None:
    distribution = Distribution(Toy(scale=3.0), params)
    cells = partition(distribution, samples)
    brute: Counter[Any] = Counter()
    for output, mass in every_output(distribution, 5):
        if mass > 0:
            brute[cells.of(output)] += mass  # type: ignore[assignment]
    assert set(brute) == set(cells.chance)
    for cell, mass in brute.items():
        assert cells.chance[cell] == pytest.approx(mass, rel=1e-9)
        assert len(cells.chance) == 1 or mass * samples >= statistics.EXPECTED * (1 - 1e-9)
    assert samples < 1000 or len(cells.chance) > 5


def test_the_tail_of_chi_square() -> None:
    assert statistics.chi_square_tail(3.841459, 1) == pytest.approx(0.05, abs=1e-6)
    assert statistics.chi_square_tail(124.3421, 100) == pytest.approx(0.05, abs=1e-6)
    assert statistics.chi_square_tail(5.0, 0) == 1.0


def test_the_goodness_test_keeps_its_level() -> None:
    distribution = Distribution(Toy(scale=2.0), PLAIN)
    values = [
        goodness(distribution, draw(distribution, 5, 1_000, seed)).p_value for seed in range(400)
    ]
    for level in (0.01, 0.05, 0.5):
        share = sum(value <= level for value in values) / len(values)
        assert share == pytest.approx(level, abs=3.5 * (level * (1 - level) / len(values)) ** 0.5)


def test_the_goodness_test_notices_a_slightly_different_law() -> None:
    distribution, warmer = (
        Distribution(Toy(scale=2.0), PLAIN | {"temperature": t}) for t in (1.0, 1.08)
    )
    assert goodness(distribution, draw(warmer, 5, 20_000, 1)).p_value < 1e-6
    distribution, late = (
        Distribution(Toy(scale=1.0), PLAIN | {"frequency_penalty": f}) for f in (0.2, 0.0)
    )
    assert goodness(distribution, draw(late, 5, 20_000, 1)).p_value < 1e-6


def test_one_impossible_output_is_enough() -> None:
    distribution = Distribution(Toy(), PLAIN | {"top_k": 2})
    counts = draw(distribution, 5, 1_000, 3)
    assert goodness(distribution, counts).p_value > 1e-3
    never = next(o for o in itertools.product(range(5), repeat=3) if distribution.impossible([o]))
    found = goodness(distribution, counts + Counter({never: 1}))
    assert (found.p_value, found.impossible) == (0.0, 1)


def test_the_two_sample_test_keeps_its_level_and_has_power() -> None:
    distribution = Distribution(Toy(scale=2.0), PLAIN)
    values = [
        two_sample(
            draw(distribution, 5, 800, seed), draw(distribution, 5, 500, 10_000 + seed)
        ).p_value
        for seed in range(300)
    ]
    assert sum(value <= 0.05 for value in values) / 300 == pytest.approx(0.05, abs=0.045)
    warmer = Distribution(Toy(scale=2.0), PLAIN | {"temperature": 1.3})
    assert two_sample(draw(distribution, 5, 4_000, 1), draw(warmer, 5, 4_000, 2)).p_value < 1e-6


def test_holm_steps_down() -> None:
    assert holm({"a": 0.01, "b": 0.02, "c": 0.9}, 0.05) == {"a", "b"}
    assert holm({"a": 0.02, "b": 0.02, "c": 0.02}, 0.05) == set()
    assert holm({}, 0.05) == set()


# --- options and mutants -----------------------------------------------------------------------


def test_every_option_is_there_with_a_mutant_of_its_own() -> None:
    assert (
        *("temperature", "top_k", "top_p", "min_p", "all_filters", "frequency_penalty"),
        *("presence_penalty", "repetition_penalty", "min_new_tokens", "logit_bias", "grammar"),
        *("stop", "block_verification"),
    ) == NAMES
    assert sorted(option.mutant for option in OPTIONS) == sorted(mutants.MUTANTS)
    for option in OPTIONS:
        Distribution(Toy(len(VOCABULARY)), option.request)


def test_options_are_chosen_by_name() -> None:
    assert options.choose("all") == list(OPTIONS)
    assert [option.name for option in options.choose("top_p, temperature")] == [
        "temperature",
        "top_p",
    ]
    with pytest.raises(ConfigError, match=r"'topp'.*Did you mean top_p"):
        options.choose("topp")
    with pytest.raises(ConfigError, match="names nothing"):
        options.choose(",")
    with pytest.raises(ConfigError, match="--parts"):
        run.choose_parts("greedy,speed")


def test_the_vocabulary_is_larger_than_the_draft_shortlist() -> None:
    from dspark_sglang.core.draft import SHORTLIST

    assert SHORTLIST < len(VOCABULARY) == len(set(VOCABULARY)) <= 256
    assert all(len(text) == 2 for text in PAIRS)


@pytest.mark.parametrize("mutant", sorted(mutants.MUTANTS))
def test_every_mutant_patches_something_that_exists(mutant: str) -> None:
    pytest.importorskip("sglang")
    module, path, _ = mutants.MUTANTS[mutant]
    owner: Any = __import__(module, fromlist=["_"])
    for part in path.split("."):
        owner = getattr(owner, part)
    assert callable(owner) or isinstance(owner, property)


def test_a_mutant_reaches_a_process_through_its_path(tmp_path: Path) -> None:
    environment = {**os.environ, **mutants.prepare("top_k_ignored", tmp_path)}
    code = (
        "import torch; from dspark_sglang.core.sampling import target_weights; "
        "distribution = target_weights(torch.zeros(1, 4), torch.ones(1), top_k=torch.tensor([1])); "
        "print(int((distribution > 0).sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "4"
    assert mutants.said("top_k_ignored") in done.stderr


# --- resuming -----------------------------------------------------------------------------------


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Servers that answer at once; the sizes of the calls they got."""
    calls: list[int] = []

    class Fake:
        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def wait_ready(self) -> None:
            return None

        def dspark(self) -> dict[str, Any]:
            return {"ran": {"accept": 1}, "accept_length": 1.5}

    def generate(client: Any, running: Any, params: Sequence[dict[str, Any]]) -> list[Output]:
        calls.append(len(params))
        return [(5, 6, 7, 8, 9)] * len(params)

    monkeypatch.setattr(sampled, "server", lambda *_, **__: Fake())
    monkeypatch.setattr(sampled, "generate", generate)
    return calls


def test_drawing_goes_on_where_it_stopped(tmp_path: Path, fake_server: list[int]) -> None:
    chosen = options.choose("temperature,top_k")

    def go(samples: int) -> dict[str, Sampled]:
        setting = sampled.Setting(tmp_path, 0, samples, 100)
        return sampled.draw(setting, chosen, clock=Clock(0))

    assert all(piece.samples >= 300 for piece in go(300).values())
    first = sum(fake_server)
    again = go(300)
    assert sum(fake_server) == first
    assert all(piece.samples >= 700 for piece in go(700).values())
    assert sum(fake_server) - first < 2 * 700
    assert again["top_k"].outputs() == {(5, 6, 7, 8, 9): again["top_k"].samples}


def test_no_time_starts_nothing(tmp_path: Path, fake_server: list[int]) -> None:
    setting = sampled.Setting(tmp_path, 0, 300, 100)
    clock = Clock(1e-9)
    found = sampled.draw(setting, options.choose("top_k"), clock=clock)
    assert found["top_k"].samples == 0 and not fake_server


def test_other_settings_or_source_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = sampled.Setting(tmp_path, 0, 300, 100)
    option = options.choose("top_k")[0]
    piece = Sampled(key=setting.key(option))
    piece.add([(1, 2), (1, 2), (3,)])
    path = tmp_path / "piece.json"
    store.save(path, piece)
    loaded = store.load(path, Sampled, setting.key(option))
    assert loaded is not None and loaded.outputs() == {(1, 2): 2, (3,): 1}
    assert store.load(path, Sampled, setting._replace(seed=1).key(option)) is None
    changed = Option(option.name, {**option.params, "top_k": 5}, option.mutant)
    assert store.load(path, Sampled, setting.key(changed)) is None
    monkeypatch.setattr(store, "source_digest", lambda: "other")
    assert store.load(path, Sampled, setting.key(option)) is None


def test_damaged_results_are_reported(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"key": 1')
    with pytest.raises(DataError, match=r"x\.json is damaged.*Remove it"):
        store.load(tmp_path / "x.json", Judged, "k")


def test_real_prompts_are_many_shared_and_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder(prompts.Encoder):
        def __init__(self) -> None:
            pass

        def chat(self, prompt: Any, way: str) -> list[int]:
            return list(way.format(prompt.user).encode())

        def _plain(self, text: str) -> list[int]:
            return list(text.encode())

    asks = prompts.greedy(Encoder(), 216)
    assert len({ask.id for ask in asks}) == len(asks) == 216
    assert {ask.at_once for ask in asks} == {1, 4, 16}
    assert len({ask.params["max_new_tokens"] for ask in asks}) > 4
    assert sum(len(ask.tokens) == prompts.LONG_TOKENS for ask in asks) == 2
    seeded = prompts.seeded(Encoder(), 8)
    assert {ask.at_once for ask in seeded} == {1, 16}
    assert [a.params for a in seeded[:8]] == [a.params for a in seeded[8:]]


def test_failures_are_named() -> None:
    entry = {
        "p_value": 0.0, "impossible": 3, "passed": False, "mutant_rejected": False, "mutant": "m",
    }  # fmt: skip
    good = entry | {"passed": True, "mutant_rejected": True}
    summary: dict[str, Any] = {"options": {"stop": entry, "top_k": good}}
    assert len(run.failures(summary)) == 2
    summary = {"options": {}, "greedy_equal": 7, "greedy_near_ties": 1, "greedy_total": 9}
    assert run.failures(summary) == ["greedy: 1 of 9 differ"]
    summary["greedy_near_ties"] = 2
    assert run.failures(summary) == []
    assert run.failures({"options": {}, "two_sample": {"p_value": 1e-9}})
