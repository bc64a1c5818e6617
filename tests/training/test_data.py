"""Files of conversations and prompts: what is read, what is skipped, what survives a crash."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dspark_sglang.errors import DataError
from dspark_sglang.training.conversations import (
    Conversation,
    ConversationWriter,
    Message,
    is_validation,
    load_conversations,
    prompt_id,
)
from tests.layouts.drafter_samples import actionable
from tests.training.training_data_samples import ANSWER, USER, lines


def conversation(question: str, answer: str = "Yes.", tokens: int = 2) -> Conversation:
    messages = [Message("user", question), Message("assistant", answer)]
    return Conversation(id=prompt_id(messages), messages=messages, completion_tokens=tokens)


def questions(path: Path) -> list[str]:
    return [made.messages[0].content for made in load_conversations([path]).conversations]


# --- reading conversations -----------------------------------------------------------------------


def test_the_record_on_disk() -> None:
    made = Conversation(
        id="00ff00ff00ff00ff",
        messages=[Message("user", "Hi"), Message("assistant", "Ho ☕")],
        finish_reason="length",
        temperature=1.0,
        completion_tokens=3,
    )
    assert lines(made).decode() == (
        '{"id":"00ff00ff00ff00ff","messages":[{"role":"user","content":"Hi"},'
        '{"role":"assistant","content":"Ho ☕"}],"finish_reason":"length","temperature":1.0,'
        '"completion_tokens":3}\n'
    )


BROKEN = {
    "not-json": b"{nonsense",
    "cut": lines(conversation("cut"))[:-9],
    "not-utf8": b'{"id":"00000000","messages":[{"role":"user","content":"\xff"}]}',
    "list": b"[]",
    "no-id": json.dumps({"messages": [USER, ANSWER]}).encode(),
    "id-not-hex": json.dumps({"id": "question-1", "messages": [USER, ANSWER]}).encode(),
    "no-messages": b'{"id":"00000000","messages":[]}',
    "unknown-role": json.dumps({"id": "0", "messages": [{"role": "x", "content": ""}]}).encode(),
    "no-user": json.dumps({"id": "00000000", "messages": [ANSWER]}).encode(),
    "no-answer": json.dumps({"id": "00000000", "messages": [USER, ANSWER, USER]}).encode(),
    "empty-answer": json.dumps(
        {"id": "00000000", "messages": [USER, ANSWER | {"content": " \n"}]}
    ).encode(),
    "parts": json.dumps({"id": "0", "messages": [USER | {"content": [{"text": "x"}]}]}).encode(),
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_counted_and_skipped(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(conversation("a")) + line + b"\n\n" + lines(conversation("b")))
    scan = load_conversations([path])
    assert [made.messages[0].content for made in scan.conversations] == ["a", "b"]
    assert scan.broken == 1 and scan.duplicates == 0
    assert scan.examples[0].startswith(f"{path}:2: ")


def test_only_the_first_broken_lines_are_kept_as_examples(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"no\n" * 50 + lines(conversation("a")))
    scan = load_conversations([path])
    assert scan.broken == 50 and len(scan.examples) == 3


def test_repeated_prompts_are_counted_and_the_first_kept(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(lines(conversation("Why?", "first"), conversation("why?", "second")))
    two.write_bytes(lines(conversation(" WHY?\n", "third"), conversation("What?")))
    scan = load_conversations([one, two])
    assert [made.messages[1].content for made in scan.conversations] == ["first", "Yes."]
    assert scan.duplicates == 2 and scan.broken == 0


@pytest.mark.parametrize("content", [b"", b"\n \n", b"no\nno\n"], ids=["empty", "blank", "broken"])
def test_nothing_usable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_conversations([path])
    broken = content.count(b"no")
    actionable(caught.value, found=f"No usable conversation in {path} ({broken}", expected="lines")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_conversations([tmp_path / "none.jsonl"])
    actionable(caught.value, found="none.jsonl cannot be read: No such file", expected="JSON Lines")
    assert "dspark data" in caught.value.fix


# --- identity and split --------------------------------------------------------------------------


def test_a_prompt_is_known_by_all_before_the_first_answer() -> None:
    base = [Message("system", "Be brief"), Message("user", "Why so?")]
    same = [Message("system", " be  BRIEF"), Message("user", "why\nso?")]
    assert prompt_id(base) == prompt_id(same)
    assert prompt_id(base) == prompt_id([*base, Message("assistant", "x"), Message("user", "y")])
    assert prompt_id(base) != prompt_id(base[1:])
    assert prompt_id(base) != prompt_id([Message("user", "Be brief"), Message("system", "Why so?")])
    # Written down: files that exist must not change sides.
    assert prompt_id([Message("user", "Why?")]) == "af6fcb61efa10c68"


def test_the_split_depends_on_the_prompt_alone(tmp_path: Path) -> None:
    made = [conversation(f"question {number}") for number in range(2000)]
    held = {c.id for c in made if is_validation(c.id, 20)}
    assert 20 <= len(held) <= 60  # 2% of 2000
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(lines(*made[:700]))
    two.write_bytes(lines(*reversed(made[700:])))
    for order in ([one, two], [two, one]):
        scan = load_conversations(order)
        assert {c.id for c in scan.conversations if is_validation(c.id, 20)} == held
    assert held < {c.id for c in made if is_validation(c.id, 50)}, "a larger split takes others"


# --- writing -------------------------------------------------------------------------------------


def test_writing_grows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "data.jsonl"
    with ConversationWriter(path) as out:
        assert out.write(conversation("a", tokens=5))
        assert not out.write(conversation("A ", "again", tokens=7))
        assert path.read_bytes() == lines(conversation("a", tokens=5)), "readable at once"
    with ConversationWriter(path) as out:
        assert out.tokens == 5 and len(out.ids) == 1 and out.broken == 0
        assert not out.write(conversation("a"))
        assert out.write(conversation("b", tokens=3))
        assert out.tokens == 8
    assert questions(path) == ["a", "b"]


def test_a_line_cut_anywhere_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    whole, last = lines(conversation("a")), lines(conversation("b ☕"))
    for size in range(1, len(last) - 1):
        path.write_bytes(whole + last[:size])
        with ConversationWriter(path) as out:
            assert len(out.ids) == 1
            out.write(conversation("c"))
        assert path.read_bytes() == whole + lines(conversation("c")), size


def test_a_long_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(conversation("a")) + lines(conversation("b", "x" * 200_000))[:-5])
    with ConversationWriter(path) as out:
        assert len(out.ids) == 1
    assert path.read_bytes() == lines(conversation("a"))


def test_a_cut_first_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(conversation("a"))[:30])
    with ConversationWriter(path) as out:
        assert not out.ids
    assert path.read_bytes() == b""


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(conversation("a"))[:-1])
    with ConversationWriter(path) as out:
        out.write(conversation("b"))
    assert questions(path) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [b"notes without a line end", b'[{"id": 1}]', b'{"model": "x"}', b"one\ntwo\n"],
    ids=["text", "array", "object", "lines"],
)
def test_a_foreign_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught, ConversationWriter(path):
        pass
    actionable(caught.value, found=str(path), expected="conversations that this command wrote")
    assert "another --out" in caught.value.fix
    assert path.read_bytes() == content


def test_broken_lines_in_the_middle_stay_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(conversation("a")) + b"oops\n" + lines(conversation("b")))
    with ConversationWriter(path) as out:
        assert out.broken == 1 and len(out.ids) == 2


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with ConversationWriter(path) as out:
        with pytest.raises(DataError) as caught, ConversationWriter(path):
            pass
        actionable(caught.value, found=f"Another process writes {path}", expected="one at a time")
        out.write(conversation("a"))
    with ConversationWriter(path) as out:
        assert len(out.ids) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [("file/data.jsonl", "File exists"), ("folder", "Is a directory")],
    ids=["below-a-file", "a-folder"],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as caught, ConversationWriter(tmp_path / name):
        pass
    actionable(caught.value, found=f"{name} cannot be written: {why}", expected="a place")


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the disk is full after this
    try:
        with pytest.raises(DataError) as caught, ConversationWriter(path) as out:
            for number in range(100):
                out.write(conversation(f"question {number}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    actionable(caught.value, found=f"{path} cannot be written", expected="space")
    assert "the same command again" in caught.value.fix
    before = path.read_bytes()
    assert before.endswith(b"}\n") and 800 < len(before) <= 1000
    with ConversationWriter(path) as out:
        assert len(out.ids) == before.count(b"\n")
        assert out.write(conversation("there is space again"))


def test_a_full_device() -> None:
    with pytest.raises(DataError) as caught, ConversationWriter(Path("/dev/full")) as out:
        out.write(conversation("a"))
    actionable(caught.value, found="No space left on device", expected="space")


_WRITER = """
import sys
from pathlib import Path
from dspark_sglang.training.conversations import *
with ConversationWriter(Path(sys.argv[1])) as out:
    for number in range(10**9):
        messages = [Message("user", f"{len(out.ids)}"), Message("assistant", "x" * 50_000)]
        out.write(Conversation(id=prompt_id(messages), messages=messages))
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for minimum in (10_000, 5_000_000):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)])
        try:
            while (
                not path.exists()
                or path.stat().st_size < minimum
                or b"\n" not in path.read_bytes()  # a line may be written in parts
            ):
                assert writer.poll() is None
                time.sleep(0.001)
            writer.send_signal(signal.SIGKILL)
        finally:
            writer.kill()
            writer.wait()
        whole = path.read_bytes().count(b"\n")
        with ConversationWriter(path) as out:  # nothing of the dead one is in the way
            assert len(out.ids) == whole and not out.broken
        assert questions(path) == [str(number) for number in range(whole)]
