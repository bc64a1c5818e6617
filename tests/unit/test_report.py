"""The report: steps that are kept, gone on from and marked; figures copied, not typed; a page that shows offline."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from report_samples import synthetic_frontier
from typer.testing import CliRunner

from dspark_sglang import artifacts
from dspark_sglang.cli.main import app
from dspark_sglang.errors import ArtifactError, ConfigError, DataError
from dspark_sglang.load.frontier import Frontier
from dspark_sglang.load.summary import frontier_of
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.report import browser, collect, make, page
from dspark_sglang.report.steps import Outcome, Runner, Step, last_line

ROOT = Path(__file__).resolve().parents[2]
#: A run of `dspark bench-load` that is committed: measured, unlike the rest of what these tests make pages of.
LOAD = json.loads((ROOT / "docs" / "results" / "load.json").read_text())


def quiet(step: Step, seconds: float, line: str) -> None:
    """Watch nothing."""


def quoted_step(**other: object) -> Step:
    values: dict[str, object] = {
        "name": "quoted", "title": "Quoted", "arguments": ("economics", "--quoted", "--out", "{out}"),
        "produces": ("quoted.json",), "expected_s": 3, "limit_s": 120,
    }  # fmt: skip
    return Step(**(values | other))  # type: ignore[arg-type]


# --- steps ---------------------------------------------------------------------------------------


def test_a_step_is_run_kept_and_run_again_when_anything_changed(tmp_path: Path) -> None:
    step = quoted_step()
    assert Runner(tmp_path).run(step, quiet).status == "done"
    left = tmp_path / "quoted" / "quoted.json"
    stamp = left.stat().st_mtime_ns
    assert Runner(tmp_path).run(step, quiet).status == "kept"
    assert left.stat().st_mtime_ns == stamp
    assert not Runner(tmp_path).kept(quoted_step(arguments=(*step.arguments, "--json")))
    assert not Runner(tmp_path, fresh=True).kept(step)
    left.unlink()
    assert not Runner(tmp_path).kept(step)
    (tmp_path / "state.json").write_text("{")
    assert not Runner(tmp_path).kept(step)


def test_a_step_depends_on_what_it_reads(tmp_path: Path) -> None:
    step = quoted_step(reads=("in/frontier.json",))
    outcome = Runner(tmp_path).run(step, quiet)
    assert outcome.status == "failed" and "needs in/frontier.json" in outcome.message
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "frontier.json").write_text("1")
    assert Runner(tmp_path).run(step, quiet).status == "done"
    assert Runner(tmp_path).kept(step)
    (tmp_path / "in" / "frontier.json").write_text("2")
    assert not Runner(tmp_path).kept(step)


def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    bad = quoted_step(arguments=("economics", "nowhere.json", "--sla", "3", "--out", "{out}"))
    outcome = Runner(tmp_path).run(bad, quiet)
    assert outcome.status == "failed" and "exit code 2" in outcome.message
    assert "nowhere.json does not exist" in outcome.message
    absent = Runner(tmp_path).run(quoted_step(produces=("other.json",)), quiet)
    assert absent.status == "failed" and absent.message == "left no other.json"
    assert not Runner(tmp_path).kept(bad)


def test_a_step_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    outcome = Runner(tmp_path).run(quoted_step(limit_s=0.2), quiet)
    assert outcome.status == "failed" and outcome.message == "stopped after 0 s"


def test_an_interrupt_stops_the_command_and_is_written_down(tmp_path: Path) -> None:
    def interrupt(step: Step, seconds: float, line: str) -> None:
        raise KeyboardInterrupt

    runner = Runner(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        runner.run(quoted_step(), interrupt)
    assert runner.not_run(quoted_step()).status == "interrupted"
    assert Runner(tmp_path).not_run(quoted_step()).status == "interrupted"
    assert Runner(tmp_path).run(quoted_step(), quiet).status == "done"


def test_what_can_be_gone_on_from_is_left_alone(tmp_path: Path) -> None:
    """A step that resumes finds its files after a failure, unless its command changed or all is to be fresh."""
    for resumes in (True, False):
        step = quoted_step(resumes=resumes, limit_s=0.2)
        Runner(tmp_path).run(step, quiet)
        half = tmp_path / "quoted" / "half.json"
        half.write_text("{}")
        Runner(tmp_path).run(step, quiet)
        assert half.exists() == resumes
        half.unlink(missing_ok=True)
    step = quoted_step(resumes=True, limit_s=0.2)
    half.write_text("{}")
    Runner(tmp_path, fresh=True).run(step, quiet)
    assert not half.exists()


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert last_line(log) == ""
    log.write_text("one\n\rtwo 10%\rtwo 20%\n\n")
    assert last_line(log) == "two 20%"


def test_steps_use_commands_and_options_that_exist() -> None:
    """Each step's command is taken by the command line as far as its own checks."""
    root = typer.main.get_command(app)
    for step in make.plan():
        command: Any = root
        words = list(step.arguments)
        while words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        known = {
            name
            for parameter in command.params
            for name in [*parameter.opts, *parameter.secondary_opts]
        }
        used = {word for word in words if word.startswith("--")}
        assert command is not root and used <= known, (step.name, used - known)


def test_the_whole_takes_less_than_half_an_hour() -> None:
    assert sum(step.expected_s for step in make.plan()) < 1800


# --- report.json ---------------------------------------------------------------------------------


def outcomes(folder: Path, failed: str = "") -> list[Outcome]:
    return [
        Outcome(
            name=step.name, title=step.title, command="dspark ...", seconds=1.0,
            status="failed" if step.name == failed else "done",
            message="exit code 1: no room" if step.name == failed else "",
        )
        for step in make.plan()
    ]  # fmt: skip


def measured(temperature: float = 1.0) -> Frontier:
    return frontier_of(
        LOAD["cells"],
        model="SmolLM2",
        hardware=LOAD["machine"],
        temperature=temperature,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all steps leave: the sweep is a committed measurement, the frontiers of GPUs are synthetic."""
    out = tmp_path_factory.mktemp("report")
    artifacts.write_json(out / "sweep" / make.SWEEP, measured())
    artifacts.write_json(out / "sweep" / "summary.json", LOAD)
    for model in ("flash", "pro"):
        artifacts.write_json(
            out / "published" / f"frontier-{model}.json",
            synthetic_frontier(f"deepseek-v4-{model}-dspark"),
        )
    pair = {"published": 1.51, "simulated": 1.4}
    wide = {"published": [1.6, 1.85], "simulated": None}
    derived = {"flash_80": pair, "pro_35": pair, "flash_matched": wide, "pro_matched": wide}
    artifacts.write_json(out / "published" / "simulation.json", {"frontier": derived})
    artifacts.write_json(out / "check.json", {"sim_error_pct": {"tok_s": 4.25, "tpot_ms": 7.5}})
    artifacts.write_json(
        out / "generator" / "selfcheck.json",
        {"streams": 500, "lag_ms": 3.25, "metric_error_pct": 0.5},
    )
    for step in make.plan():
        if step.arguments[0] == "economics":
            places = {"out": str(out / step.name), "report": str(out)}
            done = CliRunner().invoke(app, [part.format_map(places) for part in step.arguments])
            assert done.exit_code == 0, done.output
    return out


def write(folder: Path, failed: str = "") -> str:
    found = make.write(
        folder,
        outcomes(folder, failed),
        validation=folder / "check.json",
        machine=machine(),
        provenance=provenance(["dspark", "report"]),
    )
    return found.read_text()


def test_figures_are_copied_from_the_steps(folder: Path) -> None:
    write(folder)
    found = json.loads((folder / make.RESULTS).read_text())
    assert found["sim_error_pct"] == {"tok_s": 4.25, "tpot_ms": 7.5}
    assert found["frontier"]["flash_80"] == {"published": 1.51, "simulated": 1.4}
    assert found["frontier"]["pro_matched"] == {"published": [1.6, 1.85], "simulated": None}
    assert found["generator"] == {"streams": 500, "lag_ms": 3.25}
    assert found["metric_error_pct"] == 0.5
    assert found["sources"]["frontier"].endswith("published/simulation.json")
    assert [step["name"] for step in found["steps"]] == [step.name for step in make.plan()]


def test_what_is_missing_is_none_and_said(tmp_path: Path) -> None:
    nothing = [
        Outcome(name=s.name, title=s.title, command="", status="not run") for s in make.plan()
    ]
    text = make.write(
        tmp_path, nothing, validation=tmp_path / "none", machine="m", provenance=provenance(["t"])
    ).read_text()
    found = json.loads((tmp_path / make.RESULTS).read_text())
    names = ("sim_error_pct", "frontier", "generator", "metric_error_pct")
    assert [found[name] for name in names] == [None] * 4
    assert "This report is partial." in text and text.count("not run") >= 2 * len(make.plan())


def test_a_file_without_a_validation_is_none(folder: Path) -> None:
    """`dspark simulate published` writes the file that `dspark simulate check` adds to."""
    found = collect.results(
        derived=None, validation=folder / "published" / "simulation.json", generator=None,
        outcomes=[], machine="m", provenance=provenance(["t"]),
    )  # fmt: skip
    assert found.sim_error_pct is None and found.sources == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("published/simulation.json", "{", "cannot be read"),
        ("published/simulation.json", '{"frontier": {}}', "lacks flash_80"),
        ("published/simulation.json", "{}", "has no frontier"),
        ("generator/selfcheck.json", '{"streams": 5, "metric_error_pct": 1}', "lag_ms"),
        ("check.json", '{"sim_error_pct": {"a": "b"}}', "sim_error_pct|float"),
        ("sweep/frontier-T1-bfloat16.json", "{}", "a frontier"),
        ("quoted/quoted.json", "{}", "claims"),
    ],
)
def test_a_damaged_file_is_an_error(folder: Path, name: str, content: str, message: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    try:
        path.write_text(content)
        with pytest.raises(ArtifactError, match=message):
            write(folder)
    finally:
        path.write_bytes(whole)


def test_a_measured_summary_becomes_a_frontier() -> None:
    found = measured()
    cell = LOAD["cells"]["T1-c8"]["dspark"]
    point = next(p for p in found.of("dspark").points if p.load == 8)
    assert point.tok_s_per_gpu == cell["tok_s"] and point.budget == cell["mean_budget"]
    assert point.tok_s_per_user == pytest.approx(1 / cell["tpot_s"])
    loads = [name for name in LOAD["cells"] if name.startswith("T1-") and "float32" not in name]
    assert {len(series.points) for series in found.series} == {len(loads)}
    assert measured(0.0) != found and measured(0.5).series == []


# --- the page ------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured_and_what_was_not(folder: Path) -> None:
    text = write(folder)
    ratio = LOAD["cells"]["T1-c1"]["ratio_none"]
    assert f"{ratio[1]:.2f}× ({ratio[0]:.2f} to {ratio[2]:.2f})" in text
    assert LOAD["command"] in text and "1.40× (published 1.51×)" in text
    assert "none: the baseline never is that fast" in text and "4.2%" in text
    assert "This report is partial." not in text
    assert "api-docs.deepseek.com" in text and "http" not in text


def test_a_load_under_which_nothing_came_is_left_out(folder: Path) -> None:
    path = folder / "sweep" / "summary.json"
    whole = path.read_bytes()
    try:
        cells = LOAD["cells"] | {"T1-c1": {"ratio_none": [None, 0.5, None]}}
        artifacts.write_json(path, LOAD | {"cells": cells})
        assert "no speculation, 1 requests at once, temperature 1" not in write(folder)
        assert "no speculation, 8 requests at once, temperature 1" in write(folder)
    finally:
        path.write_bytes(whole)


def test_a_failed_step_is_marked_where_it_belongs(folder: Path) -> None:
    text = write(folder, failed="sweep")
    assert "This report is partial." in text
    assert (
        text.count("Real server, with and without speculation: failed: exit code 1: no room.") == 2
    )


def test_a_page_escapes_and_refuses_what_leads_outside(tmp_path: Path) -> None:
    def one(text: str) -> page.Page:
        section = page.Section(name="a", title="A", text=[text])
        return page.Page(title="T", subtitle="s", partial=[], sections=[section], footer="f")

    assert "&lt;script&gt;" in page.render(one("<script>"))
    for text in ("see https://example.org", "//example.org/x.js"):
        with pytest.raises(DataError, match=r"example\.org"):
            page.render(one(text))
    outside = '<img src="a.png"><script>1</script><a href="#in">x</a><style>@import "b"</style>'
    assert len(page.addresses(outside)) == 3
    bad = page.Figure(path=tmp_path / "a.png", caption="c")
    shown = msgspec.structs.replace(
        one(""), sections=[page.Section(name="a", title="A", figures=[bad])]
    )
    with pytest.raises(DataError, match="cannot be read"):
        page.render(shown)
    bad.path.write_bytes(b"GIF89a")
    with pytest.raises(DataError, match="not a PNG"):
        page.render(shown)


def test_a_browser_shows_it(folder: Path, tmp_path: Path) -> None:
    found = browser.find()
    if found is None:
        pytest.skip(f"no browser. {browser.HINT}")
    write(folder)
    checked = browser.check(folder / make.PAGE, tmp_path, found)
    assert checked.problems == []
    assert [view.name for view in checked.views] == ["light", "dark", "narrow"]
    assert [view.dark for view in checked.views] == [False, True, False]
    assert all(view.images >= 5 and view.sections >= 9 for view in checked.views)
    assert checked.printed_pages >= 2
    assert all(view.screenshot.stat().st_size > 20_000 for view in checked.views)


def test_the_browser_notices_what_does_not_show(tmp_path: Path) -> None:
    found = browser.find()
    if found is None:
        pytest.skip(f"no browser. {browser.HINT}")
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><style>p{color:#aaa}</style><section><p>faint</p><div style="width:3000px">wide</div>'
        '<img src="data:image/png;base64,AAAA"></section>'
    )
    problems = "\n".join(browser.check(bad, tmp_path / "shots", found).problems)
    for expected in ("1 of 1 figures do not show", "too wide", "contrast of 2.3"):
        assert expected in problems
    with pytest.raises(DataError, match="no browser 'netscape'"):
        browser.find("netscape")


# --- the command ---------------------------------------------------------------------------------


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dspark_sglang.cli.main", "report", "--out", str(folder), *options],
        capture_output=True, text=True, cwd=folder.parent, check=False,
    )  # fmt: skip


def test_one_step_alone_from_anywhere(tmp_path: Path) -> None:
    done = run(tmp_path / "r", "--only", "quoted", "--browser", "none")
    assert done.returncode == 0, done.stderr
    assert "done The quoted economics" in done.stdout.replace("\n", " ")
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [s["status"] for s in found["steps"]].count("not run") == len(make.plan()) - 1
    assert "computed" in (tmp_path / "r" / "report.html").read_text()


def test_a_failed_step_is_exit_code_1_and_the_rest_is_there(tmp_path: Path) -> None:
    done = run(tmp_path / "r", "--only", "quoted,economics-flash", "--browser", "none")
    assert done.returncode == 1
    assert "needs published/frontier-flash.json" in done.stdout.replace("\n", " ")
    assert (tmp_path / "r" / "quoted" / "quoted.json").is_file()


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "r", "--only", "quoted,lunch")
    assert done.returncode == 2 and "--only names lunch. Expected quoted, " in done.stderr
    with pytest.raises(ConfigError):
        from dspark_sglang.cli.report import _chosen

        _chosen("lunch", make.plan())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_page(tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "r"
    child = subprocess.Popen(
        [sys.executable, "-m", "dspark_sglang.cli.main", "report", "--out", str(out), "--browser", "none"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = out / "quoted" / "log.txt"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == code, said
    assert "Interrupted: the page is partial" in said
    assert "This report is partial." in (out / "report.html").read_text()
    steps = json.loads((out / "report.json").read_text())["steps"]
    assert steps[0]["status"] in ("interrupted", "done") and steps[-1]["status"] == "not run"
    assert run(out, "--only", "quoted", "--browser", "none").returncode == 0
