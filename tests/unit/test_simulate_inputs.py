"""What the simulator is given: acceptance, arrivals, costs, parameters; and how its command answers to bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from dspark_loadtests.frontier import Frontier, Point, Series, read
from dspark_sglang.artifacts import Provenance, write_json
from dspark_sglang.cli import simulate as command
from dspark_sglang.core.steps import CostModel
from dspark_sglang.core.sts import BINS, area_under_curve
from dspark_sglang.errors import ArtifactError, ConfigError, DSparkError
from dspark_sglang.provenance import machine
from dspark_sglang.simulate import (
    acceptance,
    arrivals,
    checking,
    document,
    parameters,
    published,
    rederive,
    replicas,
)
from dspark_sglang.simulate.assumptions import Assumptions, changed, exchange, rows
from dspark_sglang.simulate.costs import Fixed, Overheads, learned, read_cost
from dspark_sglang.simulate.parameters import Observed, Parameters
from dspark_sglang.simulate.roofline import Roofline, sizes

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = ROOT / "docs" / "results" / "evaluation" / "evaluation.json"
ONE = np.ones(1)


# --- acceptance ----------------------------------------------------------------------------------


def test_a_fitted_law_has_the_means_and_areas_it_was_given() -> None:
    means, auc = [0.6, 0.5, 0.7], [0.70, 0.74, 0.78]
    law = acceptance.fitted("a", means, auc=auc)
    assert law.confidence.mean(axis=0) == pytest.approx(means, abs=1e-3)
    survival = np.cumprod(law.confidence, axis=1)
    found = [area_under_curve(column, column) for column in survival.T]
    assert found == pytest.approx(auc, abs=0.01)


def test_greedy_text_meets_the_same_confidences() -> None:
    law = acceptance.fitted("a", [0.4, 0.4], shift=[0.6, 0.5])
    assert law.confidence.mean(axis=0) == pytest.approx([0.4, 0.4], abs=1e-3)
    assert law.chance.mean(axis=0) == pytest.approx([0.6, 0.5], abs=1e-3)
    order = np.argsort(law.confidence[:, 0])
    assert (np.diff(law.chance[order, 0]) >= 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_laws_of_an_evaluation_have_its_accepted_lengths(temperature: float) -> None:
    known = json.loads(EVALUATION.read_text())
    # The first is as served; others are another engine's, or the drafter's alone.
    entry = next(e for e in known["lengths"] if e["temperature"] == temperature)
    mix = acceptance.from_evaluation(EVALUATION, temperature=temperature)
    assert mix.names == sorted(entry["by_domain"])
    mean = float(np.mean(list(entry["by_domain"].values())))
    assert mix.accept_length == pytest.approx(mean, abs=0.02)


def test_a_published_length_becomes_one_chance_at_every_position() -> None:
    law = acceptance.geometric("a", accept_length=4.75, of=7, gamma=7, spread=2.0)
    assert law.accept_length == pytest.approx(4.75, abs=0.02)
    assert np.ptp(law.chance.mean(axis=0)) < 1e-6


def test_what_a_server_counted_is_drawn_as_often() -> None:
    seen = np.zeros((2, 2, BINS))
    seen[1, 0, 2], seen[1, 0, BINS - 1], seen[1, 1, 5] = 300.0, 100.0, 50.0
    stated = seen * ((np.arange(BINS) + 0.5) / BINS)
    kept = seen * 0.25
    kept[1, 0, BINS - 1] = 90.0
    table = {"seen": seen.tolist(), "predicted": stated.tolist(), "kept": kept.tolist()}
    law = acceptance.from_reliability(table, sampled=True)
    likely = law.confidence[:, 0] > 0.9
    assert likely.mean() == pytest.approx(0.25, abs=0.01)
    assert law.chance[likely, 0].mean() == pytest.approx(0.9)
    assert law.chance[~likely, 0].mean() == pytest.approx(0.25)
    with pytest.raises(ArtifactError, match="Let it serve longer"):
        acceptance.from_reliability(table, sampled=False)


def test_recorded_blocks_are_accepted_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "blocks.jsonl"
    path.write_text(
        '{"confidence": [0.9, 0.8], "accepted": 2, "domain": "code"}\n'
        '{"confidence": [0.4, 0.3], "accepted": 0, "domain": "chat"}\n'
    )
    mix = acceptance.from_trace(path)
    assert mix.names == ["chat", "code"]
    assert mix.chance.tolist() == [[0.0, 0.3], [1.0, 1.0]]
    assert mix.accept_length == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("{", "Line 1"),
        ('{"confidence": [0.5], "accepted": 2}', "2 accepted"),
        ('{"confidence": [1.5], "accepted": 0}', "confidences"),
        (
            '{"confidence": [0.5], "accepted": 0}\n{"confidence": [0.5, 0.5], "accepted": 0}',
            "Block 2",
        ),
    ],
)
def test_blocks_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "blocks.jsonl"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=says):
        acceptance.from_trace(path)


def test_a_foreign_evaluation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("{}", "[", '{"lengths": 3}'):
        path.write_text(text)
        with pytest.raises(ArtifactError, match="cannot be read"):
            acceptance.from_evaluation(path, temperature=1.0)
    with pytest.raises(ArtifactError, match=r"temperatures \[0.0, 1.0\]"):
        acceptance.from_evaluation(EVALUATION, temperature=0.7)


# --- arrivals ------------------------------------------------------------------------------------


def test_a_trace_is_read_and_replayed_faster(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 1000, "input_length": 100, "output_length": 5, "hash_ids": [1]}\n'
        '{"timestamp": 3000, "input_length": 50, "output_length": 7}\n'
    )
    found = arrivals.trace(path, weights=ONE, rng=np.random.default_rng(0), cached=0.5, speed=4.0)
    assert found.at.tolist() == [0.0, 0.5]
    assert found.fresh.tolist() == [50, 25] and found.output.tolist() == [5, 7]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "is empty"),
        ([(5, 10, 10), (4, 10, 10)], "goes back in time at request 2"),
        ([(0, 10, 10), (4, 10, 0)], "Request 2"),
        ([(0, -3, 10)], "Request 1"),
    ],
)
def test_traces_that_are_none(tmp_path: Path, lines: list[tuple[int, int, int]], says: str) -> None:
    path = tmp_path / "trace.jsonl"
    keys = ("timestamp", "input_length", "output_length")
    path.write_text("\n".join(json.dumps(dict(zip(keys, line, strict=True))) for line in lines))
    with pytest.raises(ArtifactError, match=says):
        arrivals.trace(path, weights=ONE, rng=np.random.default_rng(0))


# --- costs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cost() -> CostModel:
    return learned(Fixed(gamma=5, step=0.04, round_=0.06), requests=16, context=100)


def cost_file(path: Path, cost: CostModel, **changes: Any) -> Path:
    known = {
        "kind": "cost", "schema_version": 1, "fingerprint": {"device": "a test"}, "model": cost.state(),
        "provenance": {"created": "", "command": "", "versions": {}},
    }  # fmt: skip
    path.write_text(json.dumps({**known, **changes}))
    return path


def test_a_cost_file_is_found_in_its_directory(tmp_path: Path, cost: CostModel) -> None:
    cost_file(tmp_path / "cost.json", cost)
    model, found = read_cost(tmp_path)
    assert model.state() == cost.state() and found.fingerprint == {"device": "a test"}


@pytest.mark.parametrize(
    "change", [{"kind": "sts"}, {"schema_version": 7}, {"model": {"gamma": 2}}, {"model": {}}]
)
def test_a_foreign_cost_file_is_refused(
    tmp_path: Path, cost: CostModel, change: dict[str, Any]
) -> None:
    with pytest.raises(ArtifactError, match="dspark profile"):
        read_cost(cost_file(tmp_path / "cost.json", cost, **change))
    with pytest.raises(ArtifactError, match="does not exist"):
        read_cost(tmp_path / "none.json")


def test_a_roofline_rises_with_requests_and_tokens_and_reads_distinct_experts() -> None:
    shape = sizes("deepseek-v4-flash-dspark")
    own = Assumptions()
    times = Roofline(shape, own.gpus(shape))
    assert times.gamma == 5 and own.gpus(shape).count == 8
    loads = [times.plain(n, n * 4989, n) for n in (1, 8, 64, 512, 4096)]
    assert loads == sorted(loads)
    depths = [times.round(256, 256 * k, 256 * 4989, 256) for k in range(6)]
    assert depths == sorted(depths) and depths[0] > times.plain(256, 256 * 4989, 256)
    # One token reads its 6 experts of 256, very many read all; nothing else here depends on that.
    few, _ = times.with_gpus(kernel=0.0, fp8=1e30)._layer(shape.layers, 1)
    all_, _ = times.with_gpus(kernel=0.0, fp8=1e30)._layer(shape.layers, 1e6)
    read = (all_ - few) * own.memory
    assert read == pytest.approx((256 - 6) * shape.layers.expert_bytes / 8, rel=0.01)


def test_pro_needs_more_nodes_than_flash() -> None:
    shape = sizes("deepseek-v4-pro-dspark")
    assert Assumptions().gpus(shape).count == 32


def test_exchanges_go_through_what_was_published() -> None:
    wait, speed = exchange(8)
    values = 128 * 8 * 7168
    assert wait + values * (1 + 4 / 128) / speed == pytest.approx(77e-6)
    assert wait + values * 2 / speed == pytest.approx(114e-6)


def test_every_alternative_assumption_changes_something() -> None:
    for row in rows():
        for value in row.instead:
            assert changed(row.name, value) != Assumptions()
        assert row.source


# --- the published result --------------------------------------------------------------------------


def line(*pairs: tuple[float, float]) -> list[Point]:
    return [
        Point(load=8.0 * 2**n, tok_s_per_user=u, tok_s_per_gpu=g, budget=3.0)
        for n, (u, g) in enumerate(pairs)
    ]


def test_ratios_are_read_off_both_frontiers() -> None:
    made = Frontier(
        source="simulated", model="m", hardware="h",
        series=[
            Series(name=published.MTP, gpus=8, points=line((130, 100), (80, 1000), (40, 2000))),
            Series(name=published.DSPARK, gpus=8, points=line((200, 150), (120, 1500), (40, 2400))),
        ],
    )  # fmt: skip
    found = published.compare("flash", made, Assumptions())
    assert found["throughput_at"]["simulated"] == pytest.approx(1950 / 1000, rel=1e-3)
    assert found["collapse"]["simulated"] == pytest.approx(1500 / 280, rel=1e-3)
    assert found["collapse"]["fastest_baseline"] == 130
    low, high = found["matched"]["simulated"]
    assert low < 200 / 130 < high or low == pytest.approx(200 / 130, rel=0.2)


def test_small_frontiers_of_both_models_come_out(tmp_path: Path) -> None:
    """The whole way at three loads: both series, falling speeds, budgets that fall with load."""
    made = published.frontier("flash", Assumptions(), loads=(4, 64, 362), steps=60)
    for series in made.series:
        speeds = [p.tok_s_per_user for p in series.points]
        assert speeds == sorted(speeds, reverse=True)
    ours = made.of(published.DSPARK).points
    assert ours[0].budget is not None and ours[-1].budget is not None
    assert ours[0].budget > ours[-1].budget + 1
    assert ours[0].tok_s_per_user > 1.4 * made.of(published.MTP).points[0].tok_s_per_user


def test_parts_of_the_result_are_kept(tmp_path: Path) -> None:
    rederive.update(tmp_path, sim_error_pct={"throughput": 1.0})
    rederive.update(tmp_path, frontier={"x": 1})
    found = rederive.read(tmp_path)
    assert found["sim_error_pct"] == {"throughput": 1.0} and found["frontier"] == {"x": 1}
    (tmp_path / rederive.FILE).write_text("{")
    with pytest.raises(ArtifactError, match="Remove it"):
        rederive.read(tmp_path)


# --- parameters of a real server ---------------------------------------------------------------------


def observed(users: int, *, steps: int, step_s: float, wall_s: float, began: int) -> Observed:
    return Observed(
        users=users, tok_s=100.0, tpot_s=0.05, ttft_s=0.1, budget=2.0, accept_length=1.7, drafting=1.0,
        wall_s=wall_s, step_s=step_s, steps=steps, began=began,
    )  # fmt: skip


def test_what_lies_between_steps_is_found_again() -> None:
    true = Overheads(step=0.004, request=0.0005, prefill_step=0.1)
    blocks = []
    for users, steps, began in ((1, 300, 8), (8, 200, 30), (32, 120, 70)):
        prefills = began - users + 1
        rest = true.step * steps + true.request * steps * users + true.prefill_step * prefills
        blocks.append(observed(users, steps=steps, step_s=9.0, wall_s=9.0 + rest, began=began))
    found = parameters.overheads(blocks)
    assert found.step == pytest.approx(true.step)
    assert found.request == pytest.approx(true.request)
    assert found.prefill_step == pytest.approx(true.prefill_step)
    for few in (blocks[:1], blocks[1:]):
        with pytest.raises(ConfigError, match="where prefill is timed"):
            parameters.overheads(few)


def fitted(cost: CostModel, **changes: Any) -> Parameters:
    seen = np.zeros((2, 5, BINS))
    seen[1, :, BINS // 2] = 500.0
    table = {
        "seen": seen.tolist(),
        "predicted": (seen * 0.5).tolist(),
        "kept": (seen * 0.5).tolist(),
    }
    known: dict[str, Any] = {
        "machine": machine(), "target": "t", "drafter_sha256": "d", "dtype": "bfloat16", "temperature": 1.0,
        "speculation": "on", "slots": 32, "max_tokens": 32, "cost": cost.state(), "fingerprint": {},
        "reliability": table, "reference_s": 0.05, "overheads": Overheads(step=0.01, prefill_request=0.05),
        "answer_tokens": [32], "prompt_tokens": [60],
        "fitted": [observed(8, steps=1, step_s=1, wall_s=2, began=1)],
        "provenance": Provenance(created="now", command="c", versions={}),
    }  # fmt: skip
    return Parameters(**{**known, **changes})


def test_a_lone_user_of_the_twin_is_as_fast_as_its_parts_say(cost: CostModel) -> None:
    one = parameters.predict(fitted(cost), 1, seconds=120.0)
    length = sum(0.5**k for k in range(6))
    assert one.budget == 5 and one.accept_length == pytest.approx(length, rel=0.03)
    assert one.tpot_ms is not None
    assert one.tpot_ms[0] == pytest.approx(1e3 * 0.07 / length, rel=0.06)
    seconds = 0.05 + 0.01 + 31 * 1e-3 * one.tpot_ms[0]
    assert one.tok_s == pytest.approx(32 / seconds, rel=0.05)


def test_parameters_come_back_and_belong_to_a_machine(tmp_path: Path, cost: CostModel) -> None:
    path = tmp_path / "p.json"
    write_json(path, fitted(cost))
    assert parameters.read(path, here=True) == fitted(cost)
    write_json(path, fitted(cost, machine="another"))
    assert parameters.read(path).machine == "another"
    with pytest.raises(ArtifactError, match="was fitted on another"):
        parameters.read(path, here=True)
    with pytest.raises(ArtifactError, match="simulate fit"):
        parameters.read(tmp_path / "none.json")


def test_loads_that_were_fitted_are_no_check(cost: CostModel) -> None:
    checking.check_loads(fitted(cost), [2, 3])
    for loads in ([2, 8], [64]):
        with pytest.raises(ConfigError, match="not fitted"):
            checking.check_loads(fitted(cost), loads)


def test_errors_are_relative_and_the_worst_counts(cost: CostModel, tmp_path: Path) -> None:
    one = parameters.predict(fitted(cost), 2, seconds=60.0)
    assert one.tpot_ms is not None
    base = observed(2, steps=1, step_s=1, wall_s=2, began=1)
    off = msgspec.structs.replace(
        base, tok_s=one.tok_s / 1.1, tpot_s=one.tpot_ms[1] / 1e3 / 0.95, budget=one.budget
    )
    # The same on a machine that takes twice as long for everything.
    slow = msgspec.structs.replace(off, tok_s=off.tok_s / 2, tpot_s=off.tpot_s * 2, reference_s=0.1)
    found = parameters.compare(one, [slow, slow], 0.05)
    assert found.error_pct == {"throughput": 10.0, "tpot": -5.0, "budget": 0.0}
    assert found.slowdown == 2.0
    assert parameters.worst([found]) == {"throughput": 10.0, "tpot": 5.0, "budget": 0.0}
    checking.write([found], fitted(cost), Path("p.json"), tmp_path)
    assert rederive.read(tmp_path)["sim_error_pct"]["throughput"] == 10.0


# --- the command -----------------------------------------------------------------------------------


def call(*arguments: str) -> Any:
    return CliRunner().invoke(command.app, list(arguments))


@pytest.fixture
def known(tmp_path: Path, cost: CostModel) -> list[str]:
    path = cost_file(tmp_path / "cost.json", cost)
    return ["--profile", str(path), "--evaluation", str(EVALUATION), "--out", str(tmp_path / "out")]


def test_a_study_is_written_and_printed(tmp_path: Path, known: list[str]) -> None:
    done = call(*known, "--concurrency", "1,4", "--requests", "60", "--json", "--sla-tpot-ms", "50")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["kind"] == "simulated_loads" and not printed["interrupted"]
    assert {mode: len(found) for mode, found in printed["summaries"].items()} == {
        "none": 2,
        "adaptive": 2,
    }
    frontier = read(tmp_path / "out" / "frontier.json")
    assert [p.load for p in frontier.of("adaptive").points] == [1.0, 4.0]
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 1000
    one = printed["summaries"]["none"][0]
    assert one["tpot_ms"][0] == pytest.approx(40, rel=0.03)
    assert one["sla_share"] == 1.0


def test_an_interrupted_study_keeps_its_loads_and_says_so(
    tmp_path: Path, known: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = replicas.Job.run

    def cut(job: replicas.Job, progress: Any = None) -> Any:
        if job.setting.users == 4:

            def stop(answered: int, now: float) -> None:
                raise KeyboardInterrupt

            return real(job, stop)
        return real(job)

    monkeypatch.setattr(replicas.Job, "run", cut)
    done = call(*known, "--concurrency", "1,4", "--requests", "300", "--modes", "none")
    assert done.exit_code == 130
    kept = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert kept["interrupted"] and kept["frontier"]["assumptions"]["interrupted"]
    assert [one["interrupted"] for one in kept["summaries"]["none"]] == [False, True]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--concurrency", "1", "--rate", "2"], "given for arrivals"),
        ([], "given for arrivals"),
        (["--concurrency", "0"], "numbers above 0"),
        (["--rate", "-3"], "numbers above 0"),
        (["--rate", "nan"], "numbers above 0"),
        (["--concurrency", "1", "--modes", "eagle"], "--modes names eagle"),
        (["--concurrency", "1", "--router", "x"], "--router"),
        (["--concurrency", "1", "--sla-tpot-ms", "0.5"], "No load meets"),
        (["--concurrency", "1", "--answer", "-4"], "answer's length"),
        (["--concurrency", "1", "--cached", "2"], "cached share"),
        (["--concurrency", "1", "--prefill-ms", "1,2"], "--prefill-ms"),
        (["--concurrency", "1", "--blocks", "x"], "--evaluation and --blocks"),
        (["--trace", "/nowhere.jsonl"], "cannot be read"),
    ],
)
def test_bad_input_is_one_error(known: list[str], more: list[str], says: str) -> None:
    done = call(*known, *more)
    assert isinstance(done.exception, DSparkError), done.output
    assert says in str(done.exception)


def test_drafting_needs_acceptance(tmp_path: Path, cost: CostModel) -> None:
    path = cost_file(tmp_path / "cost.json", cost)
    done = call("--profile", str(path), "--concurrency", "1")
    assert "Nothing says what drafted tokens are worth" in str(done.exception)
    done = call("--profile", str(path), "--concurrency", "1", "--modes", "none", "--requests", "5",
                "--out", str(tmp_path))  # fmt: skip
    assert done.exit_code == 0


def test_check_without_a_server_shows_predictions(tmp_path: Path, cost: CostModel) -> None:
    path = tmp_path / "p.json"
    write_json(path, fitted(cost))
    done = call("check", "--parameters", str(path), "--concurrency", "2", "--simulate-only")
    assert done.exit_code == 0 and "drafting" in done.output


# --- the document ------------------------------------------------------------------------------------


def test_the_document_shows_the_committed_result() -> None:
    found = json.loads((ROOT / "docs" / "results" / "simulation.json").read_text())
    text = (ROOT / "docs" / "simulation.md").read_text()
    for lines in (
        document.assumptions(found),
        document.figures(found),
        document.sensitivity(found),
    ):
        for one in lines:
            assert one in text
    assert found["assumptions"] == json.loads(msgspec.json.encode(rows()))


def test_the_committed_frontiers_give_the_committed_figures() -> None:
    found = json.loads((ROOT / "docs" / "results" / "simulation.json").read_text())
    for model, claim in published.CLAIMS.items():
        made = read(ROOT / "docs" / "results" / f"frontier-{model}.json")
        again = published.compare(model, made, Assumptions())
        assert (
            again["throughput_at"]["simulated"]
            == found["details"][model]["throughput_at"]["simulated"]
        )
        assert (
            found["frontier"][f"{model}_{claim.speed:g}"]["simulated"]
            == again["throughput_at"]["simulated"]
        )
