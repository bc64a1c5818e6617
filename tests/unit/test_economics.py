"""Economics: the account by hand, its laws, the quoted arithmetic, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import synthetic_frontier
from typer.testing import CliRunner

from dspark_sglang import artifacts
from dspark_sglang.cli import main as command
from dspark_sglang.economics import account, prices, quoted, sensitivity, slots, study
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.load.frontier import Frontier
from dspark_sglang.provenance import provenance

PRO = prices.load("v4-pro", None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "frontier.json"
    artifacts.write_json(path, synthetic_frontier())
    return path


def ask(sla: float = 80, found: Frontier | None = None, **other: object) -> study.Study:
    question = study.Question(series="DSpark-5", baseline="MTP-1", sla=sla, draws=500)
    values = {"slots": None, "assumptions": PRO, **other}
    return study.answer(
        found or synthetic_frontier(),
        values.get("question", question),  # type: ignore[arg-type]
        values["assumptions"],  # type: ignore[arg-type]
        values["slots"],  # type: ignore[arg-type]
        provenance(["test"]),
    )[0]


# --- the account ---------------------------------------------------------------------------------


def test_an_hour_by_hand() -> None:
    values = {
        "gpu_hour": 3.0, "output": 2.0, "input_miss": 1.0, "input_hit": 0.1, "input_per_output": 4.0,
        "cache_hit": 0.5, "prefill": 2000.0, "utilisation": 0.5, "throughput": 1.0,
    }  # fmt: skip
    hour = account.hour(1000.0, values)
    # 1 ms to decode a token and 4 × 0.5 / 2000 s = 1 ms to prefill for it, half of the hours.
    assert hour.tokens == pytest.approx(3600 * 0.5 / 0.002)
    assert hour.prefill_share == pytest.approx(0.5)
    assert hour.cost_per_million == pytest.approx(3.0 / 0.9)
    assert hour.output_revenue == pytest.approx(0.9 * 2.0)
    assert hour.input_revenue == pytest.approx(0.9 * (2 * 1.0 + 2 * 0.1))
    assert hour.revenue == pytest.approx(0.9 * 4.2)
    assert hour.profit == pytest.approx(0.9 * 4.2 - 3.0)
    assert hour.margin == pytest.approx((0.9 * 4.2 - 3.0) / (0.9 * 4.2))


def test_without_a_price_there_is_cost_alone() -> None:
    hour = account.hour(100.0, prices.load("cpu", None).values())
    assert hour.revenue is None and hour.margin is None and hour.prefill_share == 0
    assert hour.cost_per_million == pytest.approx(0.08 / (100 * 3600 * 0.82) * 1e6)


@given(rate=st.floats(1, 1e5), gain=st.floats(1, 10), share=st.floats(0, 1), hit=st.floats(0, 0.99))
def test_prefill_makes_a_gain_in_decoding_smaller(
    rate: float, gain: float, share: float, hit: float
) -> None:
    """Amdahl's law: never more than the gain in decoding, never less than 1."""
    values = PRO.values() | {"cache_hit": hit, "input_per_output": 10 * share}
    before, after = account.hour(rate, values), account.hour(rate * gain, values)
    ratio = before.cost_per_million / after.cost_per_million
    assert 1 - 1e-9 <= ratio <= gain + 1e-9
    decoding = 1 - before.prefill_share
    assert ratio == pytest.approx(1 / (before.prefill_share + decoding / gain))


def test_the_last_stage_is_the_whole_account() -> None:
    stages = account.stages(1000.0, PRO)
    assert stages[-1].hour == account.hour(1000.0, PRO.values())
    assert stages[0].hour.tokens == pytest.approx(3.6e6)
    names = [stage.counted for stage in stages]
    assert len(set(names)) == len(names) == 5
    fitting = account.stages(1000.0, PRO, fitting=900.0)
    assert fitting[1].hour.tokens == pytest.approx(0.9 * fitting[0].hour.tokens)


# --- the quoted arithmetic -----------------------------------------------------------------------


def test_the_quoted_arithmetic_comes_out() -> None:
    found = {(claim.what, claim.unit): claim for claim in quoted.work_out().claims}
    for claim in found.values():
        if claim.published is not None:
            assert claim.computed == pytest.approx(claim.published, rel=0.06), claim.what
    sold = found["output of a GPU, sold", "$/GPU-hour"]
    assert sold.computed == pytest.approx(5 * 0.87)
    assert found["left of it after the GPU", "$/GPU-hour"].computed == pytest.approx(4.35 - 2.42)
    assert found["before: rent of the day", "$"].computed == pytest.approx(87_072)
    # The day's figures are rounded where they were published.
    assert found["before: revenue of the day", "$"].computed == pytest.approx(562_027, rel=0.002)


def test_what_the_quoted_arithmetic_leaves_out_is_most_of_it() -> None:
    stages = quoted.work_out().stages
    assert stages[0].hour.margin == pytest.approx(0.444, abs=0.001)
    idle = next(stage for stage in stages if stage.counted == "idle hours")
    assert idle.hour.margin is not None and idle.hour.margin < 0


# --- sensitivity ---------------------------------------------------------------------------------


def test_the_tornado_holds_all_others_and_is_sorted() -> None:
    swings = sensitivity.tornado(1000.0, PRO, "cost_per_million")
    sizes = [abs(swing.at_high - swing.at_low) for swing in swings]
    assert sizes == sorted(sizes, reverse=True) and len(swings) == len(PRO.quantities())
    rent = next(swing for swing in swings if swing.name == "gpu_hour")
    assert rent.at_high / rent.at_low == pytest.approx(rent.high / rent.low)


def test_draws_stay_in_range_repeat_by_seed_and_follow_a_triangle() -> None:
    drawn = sensitivity.draw(PRO, draws=20_000, seed=3)
    again, other = (sensitivity.draw(PRO, draws=20_000, seed=seed) for seed in (3, 4))
    for name, quantity in PRO.quantities().items():
        low, high = quantity.range
        assert drawn[name].min() >= low and drawn[name].max() <= high
        assert drawn[name].mean() == pytest.approx((low + quantity.value + high) / 3, rel=0.02)
        assert np.array_equal(drawn[name], again[name])
    assert not np.array_equal(drawn["gpu_hour"], other["gpu_hour"])


def test_a_fixed_assumption_does_not_change_the_draws_of_others() -> None:
    fixed = prices.load("v4-pro", None, ["gpu_hour=2.42:2.42:2.42"])
    ours, theirs = (sensitivity.draw(a, draws=200, seed=0) for a in (PRO, fixed))
    assert np.array_equal(ours["utilisation"], theirs["utilisation"])
    assert set(theirs["gpu_hour"]) == {2.42}


def test_without_ranges_all_draws_are_the_answer() -> None:
    fixed = [f"{n}={q.value}:{q.value}:{q.value}" for n, q in PRO.quantities().items()]
    found = ask(assumptions=prices.load("v4-pro", None, fixed))
    assert found.ours.hour is not None and found.tornado == []
    spread = found.monte_carlo.metrics["margin"]
    assert spread.p5 == pytest.approx(found.ours.hour.margin) == spread.p95
    assert found.monte_carlo.gain is not None
    assert found.monte_carlo.gain.p50 == pytest.approx(found.gain)


# --- questions to a frontier ---------------------------------------------------------------------


def test_both_sides_are_read_at_the_same_speed() -> None:
    found = ask(80)
    assert found.ours.rate == pytest.approx(6000 + (3200 - 6000) * 20 / 60)
    assert found.baseline is not None and found.baseline.rate == pytest.approx(
        5000 + (2000 - 5000) * 50 / 55
    )
    assert found.gain is not None and 1 < found.gain < found.ours.rate / found.baseline.rate


def test_a_baseline_that_is_never_that_fast_is_said() -> None:
    found = ask(150)
    assert found.baseline is not None and found.baseline.hour is None and found.gain is None
    assert found.baseline.fastest == 110 and found.monte_carlo.gain is None


def test_an_sla_beyond_the_frontier_says_the_fastest() -> None:
    with pytest.raises(
        ConfigError, match=r"never gives a user 200 tokens/s\..*at most 180.*--sla 180"
    ):
        ask(200)


@pytest.mark.parametrize("sla", [0, -1, float("nan"), float("inf")])
def test_an_sla_that_is_no_speed(sla: float) -> None:
    with pytest.raises(ConfigError, match="a speed above 0"):
        ask(sla)


def test_late_first_tokens_do_not_count() -> None:
    question = study.Question(series="DSpark-5", sla=80, max_ttft_ms=300, draws=500)
    assert ask(question=question).ours.rate == 3200
    with pytest.raises(ConfigError, match="never gives a user 80 tokens/s within 50 ms"):
        ask(question=study.Question(series="DSpark-5", sla=80, max_ttft_ms=50))
    with pytest.raises(ConfigError, match="points that say their time to the first token"):
        ask(question=question, found=synthetic_frontier(ttft=False))


def test_memory_takes_the_heaviest_loads_away() -> None:
    room = slots.Slots(
        model="m",
        hardware="h",
        context=1,
        ranks=8,
        requests=1152,
        without_drafter=2048,
        drafter_gib=1,
    )
    found = ask(60, slots=room)
    # Half way from 256 to 2048 requests, and no further; the baseline has all of them.
    assert found.ours.rate == 6000 and found.ours.hour is not None
    assert found.ours.hour.decode_tokens == pytest.approx(4600 * 3600)
    assert found.baseline is not None and found.baseline.slots == 2048
    assert found.stages[1].counted == "requests that fit beside the drafter"
    with pytest.raises(ConfigError, match=r"Memory holds 4 requests.*at least 8"):
        ask(60, slots=slots.Slots(
            model="m", hardware="h", context=1, ranks=8, requests=4, without_drafter=9, drafter_gib=1
        ))  # fmt: skip


def test_the_drafters_memory_is_counted_as_a_plan_does() -> None:
    found = slots.count("deepseek-v4-flash-dspark", None, "h800-80x8", 8192)
    assert found.requests < found.without_drafter and 0 < found.lost < 0.2
    assert found.drafter_gib == pytest.approx(10.21, abs=0.01)
    with pytest.raises(ConfigError, match="leaves room for 0 tokens"):
        slots.count("deepseek-v4-pro-dspark", None, "h800-80x8", 8192)
    with pytest.raises(ConfigError, match="bundles no drafter"):
        slots.count("qwen3-8b", None, "h800-80x8", 8192)


# --- prices --------------------------------------------------------------------------------------


def test_every_price_has_its_date_and_source() -> None:
    for name in prices.presets():
        for key, quantity in prices.load(name, None).quantities().items():
            assert quantity.source, (name, key)
            assert quantity.date or key in ("utilisation", "throughput"), (name, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gpu_hour=0", "gpu_hour is 0 .*above 0"),
        ("gpu_hour=-2", "gpu_hour is -2 .*above 0"),
        ("output=nan", "output is nan .*finite"),
        ("output=1:2:3", "a value within its range"),
        ("utilisation=1.5", "at most 1"),
        ("cache_hit=-0.1", "at least 0 and at most 1"),
        ("gpu_hour", "NAME=VALUE"),
        ("rent=2", "NAME one of gpu_hour"),
        ("gpu_hour=2:1", "NAME=VALUE:LOW:HIGH"),
    ],
)
def test_a_price_that_cannot_be_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prices.load("v4-pro", None, [change])


def test_a_change_keeps_the_range_it_lies_in() -> None:
    kept = prices.load("v4-pro", None, ["gpu_hour=2.0"]).gpu_hour
    assert (kept.value, kept.range) == (2.0, PRO.gpu_hour.range)
    assert prices.load("v4-pro", None, ["gpu_hour=9"]).gpu_hour.range == (9, 9)
    assert prices.load("v4-pro", None, ["gpu_hour=9:8:10"]).gpu_hour.range == (8, 10)


def test_a_file_of_ones_own_extends_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(
        '[preset.mine]\nextends = "v4-pro"\n[preset.mine.gpu_hour]\nvalue = 1.5\ndate = "2026-07"\nsource = "ours"\n'
    )
    found = prices.load(None, path)
    assert found.gpu_hour.value == 1.5 and found.output == PRO.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[preset", "cannot be read"),
        ("a = 1", "holds a"),
        ('[preset.x]\nextends = "y"', "no preset 'y'"),
        ('[preset.x]\nextends = "x"', "extends itself"),
        ('[preset.x]\nabout = "b"', "gpu_hour"),
        ('[preset.x]\nextends = "cpu"\n[preset.x.gpu_hour]\nvalue = 1', "date"),
        (
            '[preset.x]\nextends = "cpu"\n[preset.x.prefill]\nvalue = 1\ndate = ""\nsource = ""',
            "cached",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        prices.load(None, path)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_and_writes_the_same(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["economics", str(file), "--sla", "80", "--preset", "v4-flash", "--out", str(out)]
    done = CliRunner().invoke(command.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    printed, written = json.loads(done.stdout), json.loads((out / "economics.json").read_text())
    assert printed["ours"] == written["ours"] and printed["question"]["baseline"] == "MTP-1"
    assert (out / "economics.png").read_bytes().startswith(b"\x89PNG")
    tables = CliRunner().invoke(command.app, arguments, env={"COLUMNS": "160"})
    assert "A token costs MTP-1" in tables.stdout and "Idle" not in tables.stdout
    assert "computed, not run" not in tables.stdout and "simulated, not measured" in tables.stdout


def test_the_quoted_arithmetic_needs_no_frontier(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        command.app, ["economics", "--quoted", "--json", "--out", str(tmp_path)]
    )
    assert json.loads(done.stdout) == json.loads((tmp_path / "quoted.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FRONTIER is missing"),
        (["FILE"], "--sla is missing.*30 to 180"),
        (["nowhere.json", "--sla", "8"], "nowhere.json does not exist.*dspark simulate"),
        (["FILE", "--sla", "8", "--series", "x"], "no series 'x'.*MTP-1, DSpark-5"),
        (["FILE", "--sla", "8", "--preset", "x"], "no preset 'x'.*v4-flash"),
        (["FILE", "--sla", "8", "--draws", "1"], "at least 100 draws"),
        (["FILE", "--sla", "8", "--model", "x-dspark"], "x-dspark"),
    ],
)
def test_wrong_use_is_explained(file: Path, arguments: list[str], message: str) -> None:
    given = [str(file) if part == "FILE" else part for part in arguments]
    done = CliRunner().invoke(command.app, ["economics", *given])
    assert isinstance(done.exception, DSparkError)
    with pytest.raises(DSparkError, match=message):
        raise done.exception
