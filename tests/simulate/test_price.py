"""Prices: the account by hand, its laws, figures published elsewhere, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.blocks import frontier_of
from dspark_loadtests import frontier
from dspark_loadtests.frontier import Frontier, Point, Series
from dspark_sglang import artifacts
from dspark_sglang.cli import main as command
from dspark_sglang.cli.app import GONE
from dspark_sglang.errors import ConfigError, DSparkError
from dspark_sglang.simulate import price
from dspark_sglang.simulate.price import Prices

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PRO = price.load("v4-pro", None)
#: Load, tokens a second and GPU, tokens a second and user, milliseconds to the first token: made up.
MTP = ((8, 110, 110, 100), (256, 2000, 85, 300), (2048, 5000, 30, 900))
DSPARK = ((8, 180, 180, 100), (256, 3200, 120, 300), (2048, 6000, 60, 900))


def synthetic(*, measured: bool = False, ttft: bool = True) -> Frontier:
    """Two ways of serving, the second better everywhere."""
    return Frontier(
        source="measured" if measured else "simulated",
        model="m",
        hardware="made up",
        series=[
            Series(name=name, gpus=8, points=[
                Point(load=load, tok_s_per_gpu=gpu, tok_s_per_user=user, ttft_ms=ms if ttft else None)
                for load, gpu, user, ms in rows
            ])
            for name, rows in (("MTP-1", MTP), ("DSpark-5", DSPARK))
        ],
    )  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "frontier.json"
    artifacts.write_json(path, synthetic())
    return path


def values(prices: Prices) -> dict[str, float]:
    return {name: quantity.value for name, quantity in prices.quantities().items()}


def costs(found: price.Answer) -> dict[str, float]:
    return {side.name: side.hour.cost_per_million for side in found.sides if side.hour is not None}


# --- the account ---------------------------------------------------------------------------------


def test_an_hour_by_hand() -> None:
    hour = price.account(1000.0, {
        "gpu_hour": 3.0, "output": 2.0, "input_miss": 1.0, "input_hit": 0.1, "input_per_output": 4.0,
        "cache_hit": 0.5, "prefill": 2000.0, "utilisation": 0.5, "throughput": 1.0,
    })  # fmt: skip
    # 1 ms to decode a token and 4 × 0.5 / 2000 s = 1 ms to prefill for it, half of the hours.
    assert hour.tokens == pytest.approx(900_000)
    assert hour.prefill_share == pytest.approx(0.5)
    assert hour.cost_per_million == pytest.approx(3.0 / 0.9)
    assert hour.revenue == pytest.approx(0.9 * (2.0 + 2 * 1.0 + 2 * 0.1))
    assert hour.margin == pytest.approx((3.78 - 3.0) / 3.78)


def test_without_a_price_there_is_cost_alone() -> None:
    hour = price.account(100.0, values(price.load("cpu", None)))
    assert hour.revenue is None and hour.margin is None and hour.prefill_share == 0
    assert hour.cost_per_million == pytest.approx(0.08 / (100 * 3600 * 0.82) * 1e6)


@given(
    rate=st.floats(1, 1e5), gain=st.floats(1, 10), inputs=st.floats(0, 10), hit=st.floats(0, 0.99)
)
def test_prefill_makes_a_gain_in_decoding_smaller(
    rate: float, gain: float, inputs: float, hit: float
) -> None:
    """Amdahl's law: never more than the gain in decoding, never less than 1."""
    given = values(PRO) | {"cache_hit": hit, "input_per_output": inputs}
    before, after = price.account(rate, given), price.account(rate * gain, given)
    ratio = before.cost_per_million / after.cost_per_million
    assert 1 - 1e-9 <= ratio <= gain + 1e-9
    assert ratio == pytest.approx(1 / (before.prefill_share + (1 - before.prefill_share) / gain))


@given(rate=st.floats(1, 1e5), factor=st.floats(0.1, 10))
def test_dollars_and_tokens_scale(rate: float, factor: float) -> None:
    """Rent is proportional in cost, prices are in revenue, and busy hours are in tokens."""
    given = values(PRO) | {"utilisation": 0.5}
    base = price.account(rate, given)
    dearer = price.account(rate, given | {"gpu_hour": factor * given["gpu_hour"]})
    assert dearer.cost_per_million == pytest.approx(factor * base.cost_per_million)
    assert dearer.revenue == base.revenue and dearer.tokens == base.tokens
    sold = {name: factor * given[name] for name in ("output", "input_miss", "input_hit")}
    assert base.revenue is not None
    assert price.account(rate, given | sold).revenue == pytest.approx(factor * base.revenue)
    busy = price.account(rate, given | {"utilisation": 1.0})
    assert busy.tokens == pytest.approx(2 * base.tokens)
    assert busy.cost_per_million == pytest.approx(base.cost_per_million / 2)


# --- figures that others published ---------------------------------------------------------------

#: DeepSeek's open-infra-index, day 6: nodes of 8 GPUs over 24 hours, and what a node decodes a second.
DAY_GPU_HOURS = 226.75 * 8 * 24
NODE_TOK_S = 14_800.0


def quoted() -> dict[str, float]:
    """Figures of the table in docs/explanation/economics.md, computed."""
    bare = price.account(5e6 / 3600, values(price.load("quoted", None)))
    day = values(price.load("r1-2025", None))
    before = price.account(NODE_TOK_S / 8, day)
    assert bare.revenue is not None and bare.margin is not None and before.revenue is not None
    rent, revenue = day["gpu_hour"] * DAY_GPU_HOURS, before.revenue * DAY_GPU_HOURS
    after = [price.account(NODE_TOK_S / 8 * gain, day).tokens / 1e6 for gain in (1.51, 1.85)]
    return {
        "sold": bare.revenue, "left": bare.margin * bare.revenue, "fleet": before.tokens / 1e6,
        "rent": rent, "revenue": revenue, "profit": (revenue - rent) / rent, "low": after[0], "high": after[1],
    }  # fmt: skip


def test_published_figures_come_out() -> None:
    found = quoted()
    assert found["sold"] == pytest.approx(5 * 0.87)  # quoted as 4.4
    assert found["left"] == pytest.approx(4.35 - 2.42)
    assert found["fleet"] == pytest.approx(168e9 / DAY_GPU_HOURS / 1e6, rel=0.002)
    assert found["rent"] == pytest.approx(87_072)
    # The day's figures are rounded where they were published.
    assert found["revenue"] == pytest.approx(562_027, rel=0.002)
    assert found["profit"] == pytest.approx(5.45, rel=0.002)
    assert found["low"] == pytest.approx(5, rel=0.06) == found["high"]


def test_the_document_shows_what_is_computed() -> None:
    text = (ROOT / "docs" / "explanation" / "economics.md").read_text()
    found = quoted()
    for shown in (
        f"${found['sold']:.2f}", f"${found['left']:.2f}", f"${found['rent']:,.0f}", f"${found['revenue']:,.0f}",
        f"{found['profit']:.0%}", f"{found['fleet']:.2f} M", f"{found['low']:.2f} to {found['high']:.2f} M",
    ):  # fmt: skip
        assert f"| {shown}" in text, shown


@pytest.mark.parametrize(
    ("name", "sla", "preset"),
    [("flash", 80, "v4-flash"), ("pro", 35, "v4-pro"), ("cpu", 10, "cpu")],
)
def test_speculation_hardly_changes_the_cost_of_committed_frontiers(
    name: str, sla: float, preset: str
) -> None:
    """As docs/explanation/economics.md says."""
    found = price.answer(
        frontier.read(RESULTS / f"frontier-{name}.json"), price.load(preset, None), sla=sla
    )
    ours = next(side for side in found.sides if side.name in ("DSpark-5", "dspark"))
    assert ours.times_first == pytest.approx(1, abs=0.03)


# --- a frontier ----------------------------------------------------------------------------------


def test_every_way_is_read_at_the_same_speed() -> None:
    found = price.answer(synthetic(), PRO, sla=80)
    ours = 6000 + (3200 - 6000) * 20 / 60
    theirs = 5000 + (2000 - 5000) * 50 / 55
    assert [side.tok_s_per_gpu for side in found.sides] == pytest.approx([theirs, ours])
    assert costs(found) == {
        "MTP-1": pytest.approx(price.account(theirs, values(PRO)).cost_per_million),
        "DSpark-5": pytest.approx(price.account(ours, values(PRO)).cost_per_million),
    }
    first, second = (side.times_first for side in found.sides)
    assert first == 1 and second == pytest.approx(costs(found)["DSpark-5"] / costs(found)["MTP-1"])
    assert second is not None and theirs / ours < second < 1


def test_a_way_that_is_never_that_fast_is_said() -> None:
    first, second = price.answer(synthetic(), PRO, sla=150).sides
    assert first.hour is None and first.fastest == 110
    assert second.hour is not None and second.times_first is None


def test_a_measured_frontier_pays_for_prefill_already() -> None:
    found = price.answer(synthetic(measured=True), PRO, sla=80)
    hours = [side.hour for side in found.sides if side.hour is not None]
    assert [hour.prefill_share for hour in hours] == [0, 0] and "prefill" not in found.sensitivity
    assert hours[1].tokens == pytest.approx(found.sides[1].tok_s_per_gpu * 3600 * 0.82)
    assert any("pays for prefill already" in note for note in found.notes)


def test_late_first_tokens_do_not_count() -> None:
    found = price.answer(synthetic(), PRO, sla=80, max_ttft_ms=300)
    assert [side.tok_s_per_gpu for side in found.sides] == [2000, 3200]
    with pytest.raises(ConfigError, match="gives a user 80 tokens/s within 50 ms"):
        price.answer(synthetic(), PRO, sla=80, max_ttft_ms=50)
    with pytest.raises(ConfigError, match="points that say their time to the first token"):
        price.answer(synthetic(ttft=False), PRO, sla=80, max_ttft_ms=300)


@pytest.mark.parametrize("sla", [0, -1, math.nan, math.inf])
def test_a_speed_that_is_none(sla: float) -> None:
    with pytest.raises(ConfigError, match="a speed above 0"):
        price.answer(synthetic(), PRO, sla=sla)


def test_a_speed_beyond_the_frontier_says_the_fastest() -> None:
    with pytest.raises(
        ConfigError, match=r"200 tokens/s\. Expected at most 110 of MTP-1, at most 180 of"
    ):
        price.answer(synthetic(), PRO, sla=200)


def test_one_input_at_a_time() -> None:
    found = price.answer(synthetic(), PRO, sla=80)
    # What users pay is no part of the cost of a token.
    assert set(found.sensitivity) == set(values(PRO)) - {"output", "input_miss", "input_hit"}
    for name, ends in found.sensitivity.items():
        one = PRO.quantities()[name]
        for side in found.sides:
            by_hand = tuple(
                price.account(side.tok_s_per_gpu, values(PRO) | {name: end}).cost_per_million
                for end in (one.low, one.high)
            )
            assert ends[side.name] == by_hand and by_hand[0] != by_hand[1]
            assert min(by_hand) <= costs(found)[side.name] <= max(by_hand)
    known = price.load("v4-pro", None, gpu_hour=2.0)
    assert "gpu_hour" not in price.answer(synthetic(), known, sla=80).sensitivity


def test_the_committed_frontier_is_the_committed_measurement() -> None:
    load = json.loads((RESULTS / "load.json").read_text())
    found = frontier_of(
        load["cells"], model="smollm2-135m-instruct", hardware=load["machine"], temperature=1.0, dtype="bfloat16"
    )  # fmt: skip
    committed = json.loads((RESULTS / "frontier-cpu.json").read_text())
    assert json.loads(msgspec.json.encode(found)) == committed
    cell = load["cells"]["T1-c8"]["dspark"]
    point = next(p for p in found.of("dspark").points if p.load == 8)
    assert point.tok_s_per_gpu == cell["tok_s"] and point.budget == cell["mean_budget"]
    assert point.tok_s_per_user == pytest.approx(1 / cell["tpot_s"])


# --- presets -------------------------------------------------------------------------------------


def test_every_price_has_its_date_and_source() -> None:
    for name in price.builtin():
        for key, quantity in price.load(name, None).quantities().items():
            assert quantity.source, (name, key)
            assert quantity.date or key in ("utilisation", "throughput"), (name, key)


def test_the_command_and_the_document_name_every_preset() -> None:
    shown = CliRunner().invoke(command.app, ["simulate", "price", "--help"], env={"COLUMNS": "200"})
    text = (ROOT / "docs" / "explanation" / "economics.md").read_text()
    for name in price.builtin():
        assert name in re.sub(r"[\s│]+", " ", shown.stdout) and f"`{name}`" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu_hour": 0.0}, r"gpu_hour is 0 \(\$/GPU-hour\).*above 0"),
        ({"gpu_hour": -2.0}, "gpu_hour is -2 .*above 0"),
        ({"output": math.nan}, "output is nan .*finite"),
        ({"gpu_hour": math.inf}, "gpu_hour is inf .*finite"),
        ({"utilisation": 1.5}, "above 0 and at most 1"),
        ({"cache_hit": -0.1}, "at least 0 and at most 1"),
        ({"rent": 2.0}, "rent"),
    ],
)
def test_a_price_that_cannot_be_is_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        price.load("v4-pro", None, **given)


def test_a_value_of_the_command_line_is_taken_as_known() -> None:
    found = price.load("v4-pro", None, gpu_hour=9.0, utilisation=None)
    assert (found.gpu_hour.low, found.gpu_hour.value, found.gpu_hour.high) == (9, 9, 9)
    assert found.gpu_hour.source == "the command line" and found.utilisation == PRO.utilisation


GPU = '[preset.x.gpu_hour]\nvalue = {}\nlow = {}\nhigh = {}\ndate = "2026-07"\nsource = "ours"\n'


def test_a_file_of_ones_own_extends_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text('[preset.x]\nextends = "v4-pro"\n' + GPU.format(1.5, 1.4, 1.6))
    found = price.load(None, path)
    assert found.gpu_hour.value == 1.5 and found.output == PRO.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[preset", "cannot be read"),
        ("a = 1", "holds no preset"),
        ("preset = {x = 1}", "holds no preset"),
        ('[preset.x]\nextends = "y"', "no preset 'y'.*v4-flash"),
        ('[preset.x]\nextends = "x"', "extends itself"),
        ('[preset.x]\nabout = "b"', "gpu_hour"),
        ('[preset.x]\nextends = "cpu"\n[preset.x.gpu_hour]\nvalue = 1', "low"),
        ('[preset.x]\nextends = "cpu"\n' + GPU.format(1, 2, 3), "a value within its range"),
        ('[preset.x]\nextends = "cpu"\n' + GPU.format(1, 1, 1).replace("gpu_hour", "prefill"),
         "no input_per_output and no cache_hit"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        price.load(None, path)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_what_is_computed(file: Path) -> None:
    arguments = ["simulate", "price", str(file), "--sla", "80", "--preset", "v4-flash"]
    done = CliRunner().invoke(command.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    expected = price.answer(synthetic(), price.load("v4-flash", None), sla=80)
    assert printed == json.loads(msgspec.json.encode(expected))
    assert "api-docs.deepseek.com" in printed["prices"]["output"]["source"]
    shown = CliRunner().invoke(command.app, arguments, env={"COLUMNS": "160"}).stdout
    assert expected.sides[1].hour is not None
    assert (
        f"{expected.sides[1].hour.cost_per_million:.3g}" in shown
        and "simulated, not measured" in shown
    )
    assert "gpu_hour, $/GPU-hour" in shown and "cost over MTP-1's" in shown
    fast = CliRunner().invoke(command.app, [*arguments[:4], "150"], env={"COLUMNS": "160"}).stdout
    assert "at most 110 tok/s/user" in fast


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json", "--sla", "8"], "nowhere.json does not exist.*dspark simulate"),
        (["FILE", "--sla", "8", "--preset", "x"], "no preset 'x'.*v4-flash"),
        (["FILE", "--sla", "8", "--gpu-hour", "0"], "gpu_hour is 0"),
        (["FILE", "--sla", "8", "--prices", "nowhere.toml"], "nowhere.toml cannot be read"),
    ],
)
def test_wrong_use_is_explained(file: Path, arguments: list[str], message: str) -> None:
    given = [str(file) if part == "FILE" else part for part in arguments]
    done = CliRunner().invoke(command.app, ["simulate", "price", *given])
    assert isinstance(done.exception, DSparkError)
    with pytest.raises(DSparkError, match=message):
        raise done.exception


@pytest.mark.parametrize("arguments", [[], ["frontier.json", "--sla", "8"], ["--help"]])
@pytest.mark.parametrize("name", GONE)
def test_a_command_that_is_gone_says_what_took_its_place(name: str, arguments: list[str]) -> None:
    done = CliRunner().invoke(command.app, [*name.split(), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert GONE[name][0] in done.exception.expected and f"dspark {name}" in done.exception.found
    *groups, last = name.split()
    assert f"│ {last} " not in CliRunner().invoke(command.app, [*groups, "--help"]).stdout
