"""Prompts to train on: from files of several formats, and drawn from recipes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dspark_sglang.errors import DataError
from dspark_sglang.training.prompts import Draft, load_prompt_files, load_recipe, recipe_names
from tests.layouts.drafter_samples import actionable
from tests.training.training_data_samples import ANSWER

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
    drawn = {recipe.draw(rng).turns[0] for _ in range(25_000)}
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
def test_an_opening_is_complete_when_it_ends(text: str, complete: bool, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RECIPE | {"openings": {"chat": [text]}}))
    draft = load_recipe(str(tmp_path / "one.json")).draw(random.Random(0))
    assert (draft.turns, draft.continued) == ((text,), not complete)


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
    texts = {recipe.draw(random.Random(seed)).turns[0] for seed in range(50)}
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
