"""Files of conversations and prompts: what is read, what is skipped, what survives a crash."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from drafter_samples import actionable

from dspark_sglang.errors import DataError
from dspark_sglang.training.conversations import (
    Conversation,
    ConversationWriter,
    Message,
    is_validation,
    load_conversations,
    prompt_id,
)
from dspark_sglang.training.generate import Draft
from dspark_sglang.training.prompts import load_prompt_files
from dspark_sglang.training.recipe import Opening, load_recipe, recipe_names


def conversation(question: str, answer: str = "Yes.", tokens: int = 2) -> Conversation:
    messages = [Message("user", question), Message("assistant", answer)]
    return Conversation(id=prompt_id(messages), messages=messages, completion_tokens=tokens)


def lines(*conversations: Conversation) -> bytes:
    return b"".join(msgspec.json.encode(made) + b"\n" for made in conversations)


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


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
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
    assert "dspark generate-data" in caught.value.fix


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
            while not path.exists() or path.stat().st_size < minimum:
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


# --- prompts -------------------------------------------------------------------------------------


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief"},
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "not used"},
        {"from": "human", "value": "And?"},
    ]
}
OPENAI = {"messages": [{"role": "user", "content": "Why?"}, ANSWER], "domain": "math"}


def prompts(tmp_path: Path, name: str, content: bytes) -> list[Draft]:
    (tmp_path / name).write_bytes(content)
    return load_prompt_files([tmp_path / name]).drafts


def test_sharegpt(tmp_path: Path) -> None:
    expected = [Draft("chat", "Be brief", ("Why?", "And?"))]
    assert prompts(tmp_path, "a.jsonl", json.dumps(SHAREGPT).encode()) == expected
    assert prompts(tmp_path, "a.json", json.dumps([SHAREGPT], indent=1).encode()) == expected
    assert prompts(tmp_path, "b.json", json.dumps(SHAREGPT).encode()) == expected


def test_openai_messages(tmp_path: Path) -> None:
    assert prompts(tmp_path, "a.jsonl", json.dumps(OPENAI).encode()) == [
        Draft("math", None, ("Why?",))
    ]


def test_openai_parts_and_tool_calls(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Why "}, {"type": "text", "text": "so?"}]
    entry = {
        "messages": [
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": []},
        ]
    }
    made = prompts(tmp_path, "a.jsonl", json.dumps(entry).encode())
    assert made == [Draft("chat", "Be brief", ("Why so?",))]


def test_text(tmp_path: Path) -> None:
    made = prompts(tmp_path, "a.txt", b"\xef\xbb\xbfWhy?\r\n\n  2+2? \nlast")
    assert [draft.turns for draft in made] == [("Why?",), ("2+2?",), ("last",)]
    assert {draft.domain for draft in made} == {"chat"}


def test_several_files_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(OPENAI))
    scan = load_prompt_files([tmp_path / "b.jsonl", tmp_path / "a.txt"], domain="mine")
    assert [(draft.domain, draft.turns[0]) for draft in scan.drafts] == [
        ("math", "Why?"),
        ("mine", "one"),
        ("mine", "two"),
    ]


def test_long_conversations_are_shortened(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": f"turn {number}"} for number in range(30)]
    (draft,) = prompts(tmp_path, "a.jsonl", json.dumps({"messages": turns}).encode())
    assert draft.turns == tuple(f"turn {number}" for number in range(8))


IMAGE = {"type": "image_url", "image_url": {"url": "data:..."}}


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"conversations": [{"from": "human", "value": {"image": 1}}]}, "not text"),
        ({"conversations": [{"from": "human", "value": None}]}, "not text"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]},
            "not",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "not text"),
        ({"messages": ["Why?"]}, "a message that is a str"),
        ({"messages": [ANSWER]}, "no user turn"),
        ({"messages": [{"role": "user", "content": "  "}]}, "no user turn"),
        ({"messages": [{"role": ["user"], "content": "Why?"}]}, "no user turn"),
        (["Why?"], "a list, not an object"),
        (7, "a int, not an object"),
    ],
    ids=str,
)
@pytest.mark.parametrize("array", [False, True], ids=["jsonl", "json"])
def test_an_unusable_entry_is_counted_and_skipped(
    tmp_path: Path, entry: Any, why: str, array: bool
) -> None:
    path = tmp_path / ("a.json" if array else "a.jsonl")
    entries = [OPENAI, entry, OPENAI]
    content = json.dumps(entries) if array else "\n".join(map(json.dumps, entries))
    path.write_text(content)
    scan = load_prompt_files([path])
    assert len(scan.drafts) == 2 and scan.broken == 1
    assert scan.examples[0].startswith(f"{path}:2: ") and why in scan.examples[0]


@pytest.mark.parametrize("line", [b"{no", b'{"messages": "\xff"}'], ids=["cut", "not-utf8"])
def test_lines_that_are_not_json_are_skipped(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + json.dumps(OPENAI).encode())
    scan = load_prompt_files([tmp_path / "a.jsonl"])
    assert len(scan.drafts) == 1 and scan.broken == 1


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.jsonl", b"", "nothing in them"),
        ("a.jsonl", b"{}\n{}\n", "none of messages"),
        ("a.json", b'{"messages":', "cannot be read"),
        ("a.json", b"\xff", "cannot be read"),
        ("a.json", json.dumps(OPENAI).encode() * 2, "cannot be read"),
        ("a.parquet", b"PAR1", "no prompt file by its name"),
        ("a.txt", None, "cannot be read: No such file"),
        ("a.json", None, "cannot be read: [Errno 2]"),
    ],
    ids=["empty", "unknown", "cut", "not-utf8", "json-lines", "parquet", "no-text", "no-json"],
)
def test_a_useless_file(tmp_path: Path, name: str, content: bytes | None, found: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompt_files([tmp_path / name])
    actionable(caught.value, found=found, expected="")
    assert str(tmp_path / name) in caught.value.found


# --- recipes -------------------------------------------------------------------------------------


def test_the_packaged_recipe_is_the_papers_mix() -> None:
    assert recipe_names() == ["perfectblend"]
    recipe = load_recipe("perfectblend")
    assert recipe.shares == {"math": 0.394, "code": 0.389, "chat": 0.176, "instructions": 0.041}
    assert sum(recipe.shares.values()) == pytest.approx(1.0)


def test_domains_come_by_their_shares() -> None:
    recipe, rng = load_recipe("perfectblend"), random.Random(1)
    drawn = [recipe.draw(rng).domain for _ in range(5000)]
    for domain, share in recipe.shares.items():
        assert drawn.count(domain) / 5000 == pytest.approx(share, abs=0.03)


class Everything(random.Random):
    """Chooses everything by turns, so that nothing is left to chance."""

    def __init__(self) -> None:
        super().__init__(0)
        self.turns: dict[tuple[str, ...], int] = {}

    def choice(self, seq: Any) -> Any:
        turn = self.turns.get(tuple(seq), 0)
        self.turns[tuple(seq)] = turn + 1
        return seq[turn % len(seq)]


def test_every_opening_and_slot_is_filled() -> None:
    recipe, rng = load_recipe("perfectblend"), Everything()
    drawn = {recipe.draw(rng).text for _ in range(20_000)}
    for domain, openings in recipe.openings.items():
        assert rng.turns[tuple(openings)] >= len(openings), domain
    unused = [name for name, values in recipe.slots.items() if tuple(values) not in rng.turns]
    assert not unused
    assert not [text for text in drawn if "{" in text or "}" in text]
    assert len(drawn) > 10_000


def test_the_same_seed_draws_the_same() -> None:
    recipe = load_recipe("perfectblend")
    first, second, other = (
        [recipe.draw(rng) for _ in range(20)]
        for rng in (random.Random(1), random.Random(1), random.Random(2))
    )
    assert first == second != other


@pytest.mark.parametrize(
    ("text", "complete"),
    [("Why is that?", True), ("Go on.", True), ("Run!", True), ("Explain how", False)],
)
def test_an_opening_is_complete_when_it_ends(text: str, complete: bool) -> None:
    assert Opening("chat", text).complete is complete


RECIPE: dict[str, Any] = {
    "schema_version": 1,
    "name": "mine",
    "license": "Apache-2.0",
    "note": "",
    "shares": {"chat": 1.0},
    "systems": ["Be brief."],
    "openings": {"chat": ["{name} and {name} meet {place}"]},
    "slots": {"name": ["Ada", "Bo"], "place": ["in {town}"], "town": ["Riga"]},
}


def test_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(RECIPE))
    recipe = load_recipe(str(tmp_path / "mine.json"))
    texts = {recipe.draw(random.Random(seed)).text for seed in range(50)}
    assert texts == {"Ada and Bo meet in Riga", "Bo and Ada meet in Riga"}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"schema_version": 2}, "schema_version is 2, not 1"),
        ({"shares": {"chat": 0.5}}, "do not add up to 1"),
        ({"shares": {"chat": 1.5, "math": -0.5}}, "not positive"),
        ({"shares": {}}, "do not add up to 1"),
        ({"shares": {"chat": 0.5, "math": 0.5}}, "no openings for math"),
        ({"systems": []}, "no system messages"),
        ({"slots": {}}, "no values for slots name, place"),
        ({"slots": RECIPE["slots"] | {"town": ["{place}"]}}, "slots inside slots"),
        ({"temperature": 1}, "unknown field"),
        ({"openings": {"chat": [1]}}, "Expected `str`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_that_contradicts_itself(
    tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(RECIPE | changes))
    with pytest.raises(DataError) as caught:
        load_recipe(str(path))
    actionable(caught.value, found=found, expected="recipe")
    assert str(path) in caught.value.found and "perfectblend" in caught.value.fix


@pytest.mark.parametrize("content", [None, b"{", b"\xff"], ids=["unknown", "cut", "not-utf8"])
def test_no_such_recipe(tmp_path: Path, content: bytes | None) -> None:
    name = str(tmp_path / "perfectbland")
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_recipe(name)
    actionable(caught.value, found=f"Cannot use recipe {name}", expected="a recipe file")
    assert "Use perfectblend" in caught.value.fix


def test_bare_prompts_in_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = ['"Why is the sea salty?"', '{"prompt": "Name three rivers.", "kind": "chat"}']
    lines += ['{"prompt": [{"role": "user", "content": "Add 2 and 3."}], "domain": "math"}', "7"]
    path.write_text("\n".join(lines))
    scan = load_prompt_files([path], domain="other")
    assert [(draft.domain, draft.turns[0]) for draft in scan.drafts] == [
        ("other", "Why is the sea salty?"),
        ("chat", "Name three rivers."),
        ("math", "Add 2 and 3."),
    ]
    assert scan.broken == 1
