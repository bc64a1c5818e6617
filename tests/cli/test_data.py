"""``dspark data``: what it says, exit codes, and a run that is killed and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_sglang.cli import main
from dspark_sglang.training.conversations import (
    load_conversations,
)
from tests.training.fake_endpoint import FakeEndpoint, running_endpoint
from tests.training.generate_data_samples import made, texts
from tests.training.tokenizer_samples import CHATML, tokenizer


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with running_endpoint() as running:
        yield running


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"question {number}\n" for number in range(40)))
    return path


def arguments(target: Path, out: Path, url: str, *more: object) -> list[str]:
    given = ["--target", target, "--out", out, "--url", url, "--concurrency", 2, *more]
    return ["data", *map(str, given)]


def dspark(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> int:
    """The exit code of ``dspark`` in this process."""
    monkeypatch.setattr(sys, "argv", ["dspark", *given])
    before = signal.getsignal(signal.SIGTERM)
    try:
        main.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def test_the_command_says_what_it_did(
    endpoint: FakeEndpoint,
    target: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    out = tmp_path / "out [bold].jsonl"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{no\n")
    given = ("--prompts", prompts, "--prompts", bad, "--temperatures", "0,0.5,1")
    assert dspark(monkeypatch, arguments(target, out, endpoint.url + "/", *given)) == 0
    said = capsys.readouterr().out
    assert "40 prompts, 1 broken entries skipped" in said and f"{bad}:1: " in said
    conversations = made(out)
    tokens = sum(c.completion_tokens for c in conversations)
    assert f"{out}: {tokens} tokens in 40 conversations (40 new, 0 duplicates" in said
    assert {c.temperature for c in conversations} == {0.0, 0.5, 1.0}
    assert endpoint.requests[0].headers["Authorization"] == "Bearer secret"

    with out.open("a") as stream:
        stream.write("broken\n")
    before = len(endpoint.requests)
    assert dspark(monkeypatch, arguments(target, out, endpoint.url, *given)) == 0
    said = capsys.readouterr().out
    assert f"{out}: 40 conversations, {tokens} tokens already, 1 broken lines skipped" in said
    assert "(0 new, 40 duplicates" in said
    assert len(endpoint.requests) == before


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["prompts", "recipe"])
def test_killed_and_started_again(
    endpoint: FakeEndpoint,
    target: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    out = tmp_path / "out.jsonl"
    more = ("--prompts", prompts) if mode == "prompts" else ("--tokens", 300)
    given = arguments(target, out, endpoint.url, *more)
    endpoint.delay = 0.02
    running = subprocess.Popen(
        [sys.executable, "-m", "dspark_sglang.cli.main", *given], stdout=subprocess.DEVNULL
    )
    try:
        while not out.exists() or out.read_bytes().count(b"\n") < 10:
            assert running.poll() is None
            time.sleep(0.002)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    with out.open("r+b") as stream:  # as if it had been killed inside the last line
        stream.truncate(out.stat().st_size - 7)
    kept = {texts(c)[0] for c in made(out)}
    assert len(kept) >= 9
    endpoint.delay, before = 0.0, len(endpoint.asked)

    assert dspark(monkeypatch, given) == 0
    again = endpoint.asked[before:]
    assert not kept & set(again), "nothing that was kept is asked again"
    scan = load_conversations([out])
    assert scan.broken == 0 and scan.duplicates == 0
    assert kept < {texts(c)[0] for c in scan.conversations}
    if mode == "prompts":
        answered = sorted(texts(c)[0] for c in scan.conversations)
        assert answered == sorted(prompts.read_text().splitlines())
    else:
        assert sum(c.completion_tokens for c in scan.conversations) >= 300


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--temperatures": "0,warm"}, "--temperatures is '0,warm'"),
        ({"--temperatures": "-1"}, "--temperatures is '-1'"),
        ({"--temperatures": "nan"}, "--temperatures is 'nan'"),
        ({"--temperatures": ""}, "--temperatures is ''"),
        ({"--url": "127.0.0.1:1/v1"}, "--url is '127.0.0.1:1/v1'"),
        ({"--url": "localhost/v1"}, "--url is 'localhost/v1'"),
        ({"--url": "http://[::1"}, "--url is 'http://[::1'"),
        ({"--recipe": "perfectbland"}, "Cannot use recipe perfectbland"),
        ({"--prompts": "/nowhere/prompts.txt"}, "/nowhere/prompts.txt cannot be read"),
        ({"--target": "/nowhere/target"}, "tokenizer of /nowhere/target cannot be loaded"),
        ({"--out": "/dev/null/data.jsonl"}, "/dev/null/data.jsonl cannot be written"),
    ],
    ids=lambda value: "=".join(*value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    endpoint: FakeEndpoint,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    says: str,
) -> None:
    usual = {"--target": str(target), "--out": str(tmp_path / "out.jsonl"), "--url": endpoint.url}
    given = [text for pair in (usual | changes).items() for text in pair]
    assert dspark(monkeypatch, ["data", *given]) == 2
    line = capsys.readouterr().err
    assert line.startswith("dspark: error: ") and line.count("\n") == 1
    assert says in line and " Expected " in line
    assert not endpoint.requests and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("status", "says"),
    [(400, "got no answer"), (404, "failed: 404")],
)
def test_a_server_that_refuses_is_exit_code_2(
    endpoint: FakeEndpoint,
    target: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    says: str,
) -> None:
    endpoint.reply = lambda request: (status, b"no")
    out = tmp_path / "out.jsonl"
    given = arguments(target, out, endpoint.url, "--prompts", prompts)
    assert dspark(monkeypatch, given) == 2
    line = capsys.readouterr().err
    assert line.startswith("dspark: error: ") and line.count("\n") == 1 and says in line


def test_a_base_model(
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bare = tokenizer(CHATML)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "base")
    given = arguments(tmp_path / "base", tmp_path / "out.jsonl", "http://127.0.0.1:9/v1")
    assert dspark(monkeypatch, given) == 2
    assert "base has no chat template. Expected a chat model." in capsys.readouterr().err
