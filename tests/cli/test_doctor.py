"""``dspark doctor``: what it says of an installation and of a server, and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dspark_sglang import diagnosis

ROOT = Path(__file__).resolve().parents[2]
DRAFTER = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"
OURS = {"active": True, "version": "0.1.0", "gamma": 5, "accept_length": 1.5, "ran": {"a:b": 2}}


@contextmanager
def server_info(answer: dict[str, Any], key: str = "") -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answer).encode()
            known = not key or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("algorithm", "record", "level", "says"),
    [
        ("DSPARK", OURS, "ok", "runs dspark 0.1.0"),
        ("DSPARK", OURS | {"accept_length": None}, "ok", "nothing generated yet"),
        ("DSPARK", None, "problem", "builtin DSPARK"),
        ("DSPARK", {"step": 3}, "problem", "builtin DSPARK"),
        (None, None, "problem", "without DSPARK"),
        ("EAGLE", None, "problem", "speculative_algorithm is EAGLE"),
    ],
    ids=["ours", "idle", "builtin", "builtin-records", "plain", "eagle"],
)
def test_a_server(algorithm: str | None, record: Any, level: str, says: str) -> None:
    state = {} if record is None else {"dspark_info_record": record}
    answer = {"speculative_algorithm": algorithm, "internal_states": [state]}
    with server_info(answer) as url:
        finding = diagnosis.server(url)[0]
    assert finding.level == level
    assert says in finding.what
    assert bool(finding.fix) == (level == "problem")


def test_a_server_that_drafts_no_more() -> None:
    record = OURS | {"drafting_stopped": "drafting raised RuntimeError: x"}
    answer = {
        "speculative_algorithm": "DSPARK",
        "internal_states": [{"dspark_info_record": record}],
    }
    with server_info(answer) as url:
        finding = diagnosis.server(url)[-1]
    assert finding.level == "problem" and "RuntimeError: x" in finding.what
    assert "dspark_speculation" in str(finding.fix)


@pytest.mark.parametrize("answer", [{}, {"internal_states": []}], ids=["empty", "no-states"])
def test_an_answer_of_another_server(answer: dict[str, Any]) -> None:
    with server_info(answer) as url:
        assert diagnosis.server(url)[0].level == "problem"


def test_a_server_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"speculative_algorithm": "DSPARK", "internal_states": [{"dspark_info_record": OURS}]}
    monkeypatch.delenv("API_KEY", raising=False)
    with server_info(answer, key="secret") as url:
        finding = diagnosis.server(url)[0]
        assert finding.level == "problem" and "401" in finding.what and "API_KEY" in finding.fix
        monkeypatch.setenv("API_KEY", "secret")
        assert diagnosis.server(url)[0].level == "ok"


def test_no_server() -> None:
    finding = diagnosis.server("http://127.0.0.1:9")[0]
    assert finding.level == "problem" and "no usable answer" in finding.what


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SGLANG_PLUGINS", "other", "leaves this plugin out"),
        ("SGLANG_PLATFORM", "other", "makes SGLang skip"),
        ("DSPARK_SHEDULE", "all", "Did you mean DSPARK_SCHEDULE?"),
        ("DSPARK_PLUGIN", "off", "builtin DSPARK will run"),
    ],
)
def test_the_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    findings = diagnosis._settings() + diagnosis._selection()
    assert any(says in f"{f.what} {f.fix}" for f in findings if f.level != "ok")


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no")


def missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def test_a_good_drafter() -> None:
    assert [finding.level for finding in diagnosis.models(None, DRAFTER)] == ["ok"]


@pytest.mark.parametrize("harm", [damaged, missing], ids=["damaged", "missing"])
def test_a_bad_drafter(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    (tmp_path / "config.json").write_text((DRAFTER / "config.json").read_text())
    harm(tmp_path)
    finding = diagnosis.models(None, tmp_path)[0]
    assert finding.level == "problem" and finding.fix


@pytest.mark.costly
def test_the_command_prints_json_and_fails_on_a_problem() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dspark_sglang.cli.main", "doctor", "--json"),
            *("--url", "http://127.0.0.1:9"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    findings = json.loads(done.stdout)
    problems = [finding["what"] for finding in findings if finding["level"] == "problem"]
    assert done.returncode == 1
    assert len(problems) == 1 and "127.0.0.1:9" in problems[0]
    assert any("symbols this plugin uses are as expected" in f["what"] for f in findings)
