"""What the simulator is given: acceptance, arrivals, costs; and how its command answers to bad ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dspark_loadtests.frontier import Frontier, Point, Series, read
from dspark_sglang.cli import simulate as command
from dspark_sglang.core.schedule.cost_model import CostModel
from dspark_sglang.core.sts import area_under_curve
from dspark_sglang.errors import ArtifactError, DSparkError
from dspark_sglang.simulate import acceptance, arrivals, replicas
from dspark_sglang.simulate.costs import learned, read_cost
from dspark_sglang.simulate.roofline import Assumptions, Roofline, exchange, sizes
from tests.simulate.simulated_times import Fixed
from tests.simulation import published
from tests.simulation.published import changed, rows

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
    with pytest.raises(ArtifactError, match="dspark calibrate --cost"):
        read_cost(cost_file(tmp_path / "cost.json", cost, **change))
    with pytest.raises(ArtifactError, match="does not exist"):
        read_cost(tmp_path / "none.json")


def test_a_roofline_rises_with_requests_and_tokens_and_reads_distinct_experts() -> None:
    shape = sizes("deepseek-v4-flash-dspark")
    own = Assumptions()
    times = Roofline(shape, own)
    assert times.gamma == 5 and times.count == 8
    loads = [times.plain(n, n * 4989, n) for n in (1, 8, 64, 512, 4096)]
    assert loads == sorted(loads)
    depths = [times.round(256, 256 * k, 256 * 4989, 256) for k in range(6)]
    assert depths == sorted(depths) and depths[0] > times.plain(256, 256 * 4989, 256)
    # One token reads its 6 experts of 256, very many read all; nothing else here depends on that.
    free = Roofline(shape, replace(own, kernel=0.0, fp8=1e30))
    few, _ = free._layer(shape.layers, 1)
    all_, _ = free._layer(shape.layers, 1e6)
    read = (all_ - few) * own.memory
    assert read == pytest.approx((256 - 6) * shape.layers.expert_bytes / 8, rel=0.01)


def test_pro_needs_more_nodes_than_flash() -> None:
    shape = sizes("deepseek-v4-pro-dspark")
    assert Roofline(shape, Assumptions()).count == 32


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
    published.update(tmp_path, sim_error_pct={"throughput": 1.0})
    published.update(tmp_path, frontier={"x": 1})
    found = published.read(tmp_path)
    assert found["sim_error_pct"] == {"throughput": 1.0} and found["frontier"] == {"x": 1}
    (tmp_path / published.FILE).write_text("{")
    with pytest.raises(ArtifactError, match="Remove it"):
        published.read(tmp_path)


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
        (["--concurrency", "1", "--sla-tpot-ms", "0.5"], "No load meets"),
        (["--concurrency", "1", "--answer", "-4"], "answer's length"),
        (["--concurrency", "1", "--cached", "2"], "cached share"),
        (["--concurrency", "1", "--prefill-ms", "1,2"], "--prefill-ms"),
        (["--trace", "/nowhere.jsonl"], "cannot be read"),
    ],
)
def test_bad_input_is_one_error(known: list[str], more: list[str], says: str) -> None:
    done = call(*known, *more)
    assert isinstance(done.exception, DSparkError), done.output
    assert says in str(done.exception)


def test_a_router_is_one_of_three(known: list[str]) -> None:
    done = call(*known, "--concurrency", "1", "--router", "x")
    assert done.exit_code == 2 and "--router" in done.output


def test_drafting_needs_acceptance(tmp_path: Path, cost: CostModel) -> None:
    path = cost_file(tmp_path / "cost.json", cost)
    done = call("--profile", str(path), "--concurrency", "1")
    assert "Nothing says what drafted tokens are worth" in str(done.exception)
    done = call("--profile", str(path), "--concurrency", "1", "--modes", "none", "--requests", "5",
                "--out", str(tmp_path))  # fmt: skip
    assert done.exit_code == 0


# --- the committed result ------------------------------------------------------------------------------------


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
