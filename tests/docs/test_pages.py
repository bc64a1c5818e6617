"""What the documents name exists, what they claim was measured, and what is marked to run runs.

A block that begins with ```` ```bash run ```` is run in a checkout; it may start no server and fetch nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dspark_sglang.cli.main import app
from dspark_sglang.config import Settings
from dspark_sglang.serving import admin
from tests import structure
from tests.deploy.sglang_source import sglang_flags
from tests.docs.reference import PAGES, targets

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "deploy/README.md", "loadtests/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
#: What a stranger asks first.
QUESTIONS = ("What is it?", "Does it run on my GPU?", "How do I serve my model?", "Is it active?", "How do I turn it off?")  # fmt: skip
#: Groups of files that documents name without the folder they lie in.
_ROOTS = [
    ROOT / part for part in ("", "dspark_sglang", "kernels", "packaging", "loadtests", "tests")
]
_SGLANG = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])  # type: ignore[union-attr, index]
_FLAGS = frozenset(sglang_flags(_SGLANG))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """What stands behind the fence of every code block, and the block."""
    return iter(re.findall(r"^ *```(.*?)\n(.*?)^ *```", text, flags=re.M | re.S))


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of every shell command of a page, from its blocks and from code in a line."""
    found = [body.replace("\\\n", " ") for kind, body in blocks(text) if kind.startswith("bash")]
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    found += re.findall(r"`((?:dspark|sglang|make|python) [^`]*)`", outside)
    for line in "\n".join(found).splitlines():
        for part in re.split(r"&&|\|\||[;|]|(?<=\s)&(?=\s|$)", line.split(" #")[0]):
            try:
                words = shlex.split(part)
            except ValueError:  # a quote that goes on behind a pipe
                continue
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


# --- what is named exists ------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What links into a page may end with, as GitHub makes it of headings."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
    slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
    return {*slugs, *re.findall(r'<a id="([^"]+)">', text)}


@every_document
def test_every_link_leads_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        if target.startswith(("http", "mailto")):
            continue
        path = document.parent / target if target else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


def _of_sglang(words: set[str]) -> set[str]:
    """Flags of SGLang's server among some, and unique beginnings of one, which it takes."""
    return {w for w in words if w in _FLAGS or sum(flag.startswith(w) for flag in _FLAGS) == 1}


def _check_dspark(words: list[str]) -> None:
    at: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(at, "commands", {}):
        at = at.commands[rest.pop(0)]
    assert not getattr(at, "hidden", False), f"{' '.join(words)}: removed"
    if getattr(at, "commands", None) and rest and re.match(r"[a-z]", rest[0]):
        raise AssertionError(f"{' '.join(words)}: no such command")
    known = {name for one in at.params for name in [*one.opts, *one.secondary_opts]} | {"--help"}
    used = {word.split("=")[0] for word in rest if re.match(r"--[a-z]", word)}
    if at.name == "serve":
        used -= _of_sglang(used)
    assert used <= known, f"{' '.join(words)}: {used - known}"


def _check_module(words: list[str]) -> None:
    if "-m" in words:
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None, module


def _check(words: list[str]) -> None:
    if words[0] == "dspark":
        _check_dspark(words)
    elif words[0] == "make":
        named = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
        assert {*named} <= {name for name, _ in targets()} | {"test-unit", "test-server"}, words
    elif words[:2] == ["sglang", "serve"]:
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= _of_sglang(used), words
    elif Path(words[0]).name in ("python", "torchrun"):
        _check_module(words)


@every_document
def test_every_command_and_flag_exists(document: Path) -> None:
    """But of removed commands that a list of them, or a result of an older version, names."""
    if document.name in ("results.md", *PAGES):
        pytest.skip("generated")
    text = re.sub(r"<!-- generated.*?<!-- end -->", "", document.read_text(), flags=re.S)
    for words in command_lines(text):
        _check(words)


@pytest.mark.parametrize(
    "line",
    ["dspark bnech", "dspark doctor --uri x", "dspark report", "make no-such-target",
     "sglang serve --no-such-flag", "python -m tests.no_such_module"],
)  # fmt: skip
def test_what_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        for words in command_lines(f"```bash\n{line}\n```"):
            _check(words)


@every_document
def test_every_setting_and_key_exists(document: Path) -> None:
    text = document.read_text()
    settings = {f"DSPARK_{name.upper()}" for name in Settings.__struct_fields__}
    assert set(re.findall(r"`(DSPARK_\w+)[=`]", text)) <= settings
    keys = set(re.findall(r"``(dspark_\w+)``", admin.__doc__ or "")) | {
        "dspark_force_budget_frac",
        "dspark_clear_info_records",
    }
    assert set(re.findall(r'"server_args": \{"(\w+)"', text)) <= keys


@every_document
def test_every_source_file_named_exists(document: Path) -> None:
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|toml|jinja))(?::\d+)?`", document.read_text()):  # fmt: skip
        roots = [_SGLANG] if name.startswith("srt/") else [*_ROOTS, document.parent]
        assert any((root / name).exists() for root in roots), name


def test_a_worked_example_touches_at_most_five_source_files() -> None:
    text = (ROOT / "docs" / "explanation" / "changing.md").read_text()
    examples = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert len(examples) == 3
    for name, body in examples:
        files = re.findall(r"^\| `([\w/]+\.py)` \|", body, flags=re.M)
        new = re.findall(r"^\| new: ([\w/]+\.py) \|", body, flags=re.M)
        assert files and len(files + new) <= 5, name
        assert all((ROOT / "dspark_sglang" / file).is_file() for file in files), name


def test_every_command_is_in_the_documents() -> None:
    text = "\n".join(page.read_text() for page in DOCUMENTS if page.name not in PAGES)
    for command in (one for one in app.registered_commands if not one.hidden):
        assert f"dspark {command.name}" in text, command.name


# --- what is marked to run runs -------------------------------------------------------------------


def runnable() -> list[Any]:
    return [
        pytest.param(body, id=f"{name_of(page)}-{number}")
        for page in DOCUMENTS
        for number, (kind, body) in enumerate(blocks(page.read_text()))
        if kind.strip() == "bash run"
    ]


@pytest.mark.costly
@pytest.mark.parametrize("block", runnable())
def test_a_marked_block_runs(tmp_path: Path, block: str) -> None:
    """From the root of the checkout, where ``$OUT`` is an empty folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_some_blocks_are_marked() -> None:
    assert len(runnable()) >= 4


# --- what a stranger reads first ------------------------------------------------------------------


def markdown(summary: dict[str, Any]) -> str:
    """The summary as the table and sentence that the README shows."""
    lines = [
        "| prompts | no speculation | DSPARK | speedup | accepted length |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = [
        (kind, row, summary["accept_length_by_kind"][kind])
        for kind, row in summary["by_kind"].items()
    ]
    rows.append(("**all**", summary, summary["accept_length"]))
    for kind, row, accepted in rows:
        plain, ours = row["baseline_tok_s"], row["dspark_tok_s"]
        lines.append(
            f"| {kind} | {plain:.1f} tok/s | {ours:.1f} tok/s | {ours / plain:.2f}× | {accepted:.2f} |"
        )
    low, high = summary["speedup_ci95"]
    round_low, round_high = summary["round_cost_ci95"]
    lines += [
        "",
        f"Speedup {summary['speedup']:.2f}× (95% over prompts: {low:.2f} to {high:.2f}); a round costs "
        f"{summary['round_cost']:.2f} decode steps ({round_low:.2f} to {round_high:.2f}).",
        f"Greedy text in float32: {summary['identical']} of {summary['compared']} identical. "
        f"Prompt tokens from the radix cache: {summary['cached_share']:.0%}, "
        f"{summary['cached_share_prefix_seen']:.0%} once a prefix had been seen.",
    ]
    return "\n".join(lines)


def test_the_readme_shows_the_committed_measurement() -> None:
    summary = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())
    assert markdown(summary) in README.read_text()
    assert summary["machine"] in README.read_text()


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 90


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_has_one_short_answer(question: str) -> None:
    parts = re.split(r"^## (.*)$", README.read_text(), flags=re.M)
    answers = [
        body for head, body in zip(parts[1::2], parts[2::2], strict=True) if head == question
    ]
    assert len(answers) == 1
    lines = [line for line in answers[0].splitlines() if line.strip() and "```" not in line]
    assert 0 < len(lines) <= 5


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "packaging/README.md"], ids=name_of)
def test_the_fields_terms_are_used(document: Path) -> None:
    """``docs/glossary.md`` has them: distribution, decode step, verify all, fixed budget."""
    if document.name not in ("results.md", *PAGES):
        found = re.findall(r"\b(?:laws?|plain steps?|plain decoding step|forced budget)\b", document.read_text(), re.I)  # fmt: skip
        assert not found


@pytest.mark.parametrize(
    "document", sorted((ROOT / "docs" / "explanation").glob("*.md")), ids=name_of
)
def test_no_sentence_of_an_explanation_is_long(document: Path) -> None:
    assert max(structure.sentences(document.read_text())) <= 30


def test_sentences_are_short() -> None:
    found = [structure.sentences(page.read_text()) for page in structure.pages(ROOT)]
    words = sorted(count for page in found for count in page)
    assert words[len(words) // 2] <= 11
    assert words[-1] <= 30
