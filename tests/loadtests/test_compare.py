"""Comparing, gating and drawing: ratios against a known truth, and verdicts that noise does not make."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from dspark_loadtests import frontier, gate
from dspark_loadtests.client import connect
from dspark_loadtests.compare import Versus, switch
from dspark_loadtests.frontier import Frontier, Point, Series
from dspark_loadtests.schema import BenchResult, Estimate
from dspark_sglang.artifacts import read_artifact, write_json
from dspark_sglang.cli.main import app
from dspark_sglang.errors import ConfigError, DSparkError, ServerError
from tests.fake_server import Chunk, FakeServer, Script


def script(chunk_s: float) -> Script:
    """13 tokens: TTFT 20 ms, then four chunks of 3 tokens."""
    return Script(chunks=(Chunk(0.02, 1), *[Chunk(chunk_s, 3)] * 4))


def bench(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", *options])
    if isinstance(done.exception, DSparkError):
        return 2, str(done.exception)
    return done.exit_code, done.output


QUICK = ("--blocks", "2", "--duration", "1.2", "--warmup", "0.2", "--concurrency", "2")


def read(out: Path) -> Versus:
    return read_artifact(out / "compare.json", Versus, "a comparison", "")


# --- compare ----------------------------------------------------------------------------------------


@pytest.mark.costly
def test_two_servers_of_known_speed(tmp_path: Path) -> None:
    with FakeServer(lambda _: script(0.04)) as ours, FakeServer(lambda _: script(0.08)) as other:
        code, text = bench("compare", f"a={ours.url}", f"b={other.url}", *QUICK, "--out", str(tmp_path))  # fmt: skip
        bodies = [
            {served.body["messages"][-1]["content"] for served in server.served[:2]}
            for server in (ours, other)
        ]
    assert code == 0, text
    found = read(tmp_path)
    assert found.ways == ["a", "b"] and found.complete
    turns = found.cells[0].turns
    assert [turn.way for turn in turns] == ["a", "b", "b", "a"], "who goes first rotates"
    ratios = found.cells[0].ratios["b"]
    # 180 and 340 ms an answer; 160 and 320 ms for its 12 tokens after the first
    assert ratios["tok_s"][1] == pytest.approx(340 / 180, rel=0.2)
    assert ratios["user_tok_s"][1] == pytest.approx(2.0, rel=0.15)
    assert ratios["tok_s"][0] <= ratios["tok_s"][1] <= ratios["tok_s"][2]
    assert bodies[0] == bodies[1], "the same prompts, though two users may come in any order"
    line = frontier.read(tmp_path / "frontier.json")
    assert [series.name for series in line.series] == ["a", "b"]
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    assert (tmp_path / "budget.png").stat().st_size > 5000


@pytest.mark.costly
def test_one_server_switched_while_it_serves(tmp_path: Path) -> None:
    states: list[dict[str, float]] = []

    def answer(_: int) -> Script:
        state = dict(server.state)
        states.append(state)
        return script(0.08 if state["dspark_speculation"] == 0 else 0.03)

    with FakeServer(answer) as server:
        code, text = bench("compare", server.url, "--modes", "dspark,none", *QUICK, "--out", str(tmp_path))  # fmt: skip
        assert server.state == {"dspark_speculation": -1, "dspark_budget": -1}, "switched back"
    assert code == 0, text
    assert {state["dspark_speculation"] for state in states} == {-1, 0}
    assert read(tmp_path).cells[0].ratios["none"]["tok_s"][1] > 1.6


def test_a_server_that_cannot_be_switched_is_not_compared_with_itself(tmp_path: Path) -> None:
    with FakeServer(lambda _: script(0.03), switches=False) as server:
        code, text = bench("compare", server.url, *QUICK, "--out", str(tmp_path))
    assert code == 2 and "answered [False]" in text and "compare two servers" in text


@pytest.mark.costly
def test_a_server_that_dies_keeps_finished_cells(tmp_path: Path) -> None:
    with (
        FakeServer(lambda _: script(0.03)) as ours,
        FakeServer(lambda _: script(0.03), dies_after=70) as other,
    ):
        code, text = bench(
            "compare", f"a={ours.url}", f"b={other.url}", *QUICK, "--concurrency", "1,8", "--out",
            str(tmp_path),
        )  # fmt: skip
    assert code == 1 and "Incomplete" in text
    found = read(tmp_path)
    assert [cell.concurrency for cell in found.cells] == [1] and not found.complete


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["a=http://127.0.0.1:9", "b=http://127.0.0.1:9"], "Start the server"),
        (["http://127.0.0.1:9", "--modes", "eagle"], "dspark, none, fixed"),
    ],
)
def test_bad_comparisons(options: list[str], reason: str) -> None:
    code, text = bench("compare", *options)
    assert code == 2 and reason in text


# --- the gate -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    out = tmp_path_factory.mktemp("saved")
    with FakeServer(lambda _: script(0.03)) as server:
        code, text = bench(
            "--url", server.url, "--concurrency", "4", "--duration", "3", "--warmup", "0.3", "--out", str(out)
        )  # fmt: skip
    assert code == 0, text
    return read_artifact(out / "result.json", BenchResult, "a result", "")


def changed(result: BenchResult, metric: str, low: float, value: float, high: float) -> BenchResult:
    """The result with one metric set, in units of what it was."""
    (stage,) = result.stages
    was = stage.estimates[metric].value
    new = Estimate(low=low * was, value=value * was, high=high * was)
    stage = msgspec.structs.replace(stage, estimates=stage.estimates | {metric: new})
    return msgspec.structs.replace(result, stages=[stage])


def narrow(result: BenchResult, metric: str) -> BenchResult:
    return changed(result, metric, 0.99, 1.0, 1.01)


@pytest.mark.parametrize(
    ("metric", "interval", "verdict", "passed"),
    [
        ("output_tok_s", (0.88, 0.90, 0.92), "worse", False),
        ("output_tok_s", (0.96, 0.97, 0.98), "ok", True),  # within the tolerance
        ("output_tok_s", (0.80, 0.90, 1.02), "unsure", True),  # noise could have made it
        ("output_tok_s", (1.10, 1.12, 1.14), "better", True),
        ("tpot_ms_mean", (1.08, 1.10, 1.12), "worse", False),  # more is worse
        ("tpot_ms_mean", (0.88, 0.90, 0.92), "better", True),
        ("ttft_ms_p50", (0.99, 1.00, 1.01), "ok", True),
    ],
)
def test_verdicts(
    saved: BenchResult, metric: str, interval: tuple[float, float, float], verdict: str, passed: bool
) -> None:  # fmt: skip
    found = gate.compare(changed(saved, metric, *interval), narrow(saved, metric), tolerance=0.05)
    (check,) = [check for check in found.checks if check.metric == metric]
    assert (check.verdict, found.passed) == (verdict, passed)
    assert check.change == pytest.approx(interval[1] - 1, abs=1e-9)
    assert check.low < check.change < check.high


def test_a_goodput_that_vanished_is_worse(saved: BenchResult) -> None:
    (stage,) = saved.stages
    none = stage.estimates | {"goodput_ratio": Estimate(low=0.0, value=0.0, high=0.0)}
    worse = msgspec.structs.replace(saved, stages=[msgspec.structs.replace(stage, estimates=none)])
    assert not gate.compare(worse, saved, tolerance=0.05).passed


def test_what_fails_beside_the_metrics(saved: BenchResult) -> None:
    (stage,) = saved.stages
    failed = msgspec.structs.replace(stage, counts=msgspec.structs.replace(stage.counts, failed=1))
    hot = msgspec.structs.replace(
        stage, settings=msgspec.structs.replace(stage.settings, temperature=0.0)
    )
    silent = msgspec.structs.replace(stage, estimates={})
    for other, reason in (
        (msgspec.structs.replace(saved, stages=[failed]), "1 of"),
        (msgspec.structs.replace(saved, stages=[hot]), "temperature is 0.0"),
        (msgspec.structs.replace(saved, complete=False), "incomplete"),
        (msgspec.structs.replace(saved, stages=[silent]), "too few requests completed"),
    ):
        found = gate.compare(other, saved, tolerance=0.5)
        assert not found.passed and reason in found.problems[0]
    elsewhere = msgspec.structs.replace(saved, stages=[msgspec.structs.replace(stage, name="c9")])
    with pytest.raises(ConfigError, match="Run both with the same"):
        gate.compare(elsewhere, saved, tolerance=0.05)


def test_the_gate_command_and_its_exit_codes(saved: BenchResult, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_json(old, narrow(saved, "output_tok_s"))
    write_json(new, changed(saved, "output_tok_s", 0.68, 0.70, 0.72))
    code, text = bench("--result", str(new), "--baseline", str(old))
    assert code == 1 and "FAILED" in text
    code, text = bench("--result", str(old), "--baseline", str(old))
    assert code == 0 and "PASSED" in text
    assert bench("--result", str(new), "--baseline", str(old), "--tolerance", "0.4")[0] == 0
    code, text = bench("--result", str(new), "--baseline", str(tmp_path / "none.json"))
    assert code == 2 and "does not exist" in text


@pytest.mark.costly
def test_a_slower_server_is_caught_end_to_end(saved: BenchResult, tmp_path: Path) -> None:
    with FakeServer(lambda _: script(0.045)) as server:
        bench("--url", server.url, "--concurrency", "4", "--duration", "3", "--warmup", "0.3", "--out", str(tmp_path))  # fmt: skip
    slower = read_artifact(tmp_path / "result.json", BenchResult, "a result", "")
    found = gate.compare(slower, saved, tolerance=0.05)
    worse = {check.metric for check in found.checks if check.verdict == "worse"}
    assert {"output_tok_s", "tpot_ms_mean"} <= worse


# --- the frontier ---------------------------------------------------------------------------------------


def points(*pairs: tuple[float, float, float | None]) -> list[Point]:
    return [
        Point(load=2.0**i, tok_s_per_user=u, tok_s_per_gpu=g, budget=b, accept_length=2.0)
        for i, (u, g, b) in enumerate(pairs)
    ]


OURS = Series(name="ours", gpus=8, points=points((60, 60, 5), (40, 120, 3), (30, 110, 2), (20, 160, 1)))  # fmt: skip
PLAIN = Series(name="plain", gpus=8, points=points((30, 30, None), (20, 100, None)))


def both(*series: Series) -> Frontier:
    return Frontier(source="measured", model="org/m", hardware="h", series=list(series))


def test_ratios_at_equal_service() -> None:
    found = {(one.kind, one.at): one for one in frontier.iso(both(OURS, PLAIN), "ours")}
    # At 30 tok/s a user ours is between (40, 120) and (20, 160); the point (30, 110) is beaten.
    assert found["speed", 30].ratio == pytest.approx(140 / 30)
    assert found["throughput", 100].ratio == pytest.approx((40 + 20 * 20 / 60) / 20)
    (only,) = [o for o in frontier.iso(both(OURS, PLAIN), "ours", speeds=[50]) if o.kind == "speed"]
    assert only.ours == pytest.approx(90) and only.theirs is None and only.ratio is None


def test_the_frontier_command(tmp_path: Path) -> None:
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    write_json(one, both(OURS))
    write_json(two, both(PLAIN))
    code, text = bench(
        "compare", str(one), str(two), "--user-speed", "25,50", "--out", str(tmp_path)
    )
    assert code == 0, text
    assert "cannot" in text and "ours over the others" in text
    for name in ("frontier.png", "budget.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert [s.name for s in frontier.read(tmp_path / "frontier.json").series] == ["ours", "plain"]
    code, text = bench("compare", str(one), str(one), "--out", str(tmp_path))
    assert code == 2 and "both have a series ours" in text


def test_no_budget_no_figure(tmp_path: Path) -> None:
    assert not frontier.draw_budget(both(PLAIN), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_switch_says_why(tmp_path: Path) -> None:
    with FakeServer(lambda _: script(0.01)) as server:
        endpoint = connect(server.url)
    with pytest.raises(ServerError, match="set_internal_state"):
        switch(endpoint, {"dspark_speculation": 0})
