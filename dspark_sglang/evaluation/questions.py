"""Prompts to judge by, from any of the files this kit reads."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

import msgspec

from dspark_loadtests.prompts import BALANCED, load_prompts
from dspark_sglang.training.prompts import load_prompt_files


class Question(NamedTuple):
    """One prompt and the domain it is counted in."""

    domain: str
    messages: list[dict[str, str]]


def load_questions(path: Path | None) -> list[Question]:
    """The packaged prompts, or those of a file: the packaged format, ShareGPT, messages, text.

    Of a conversation the first user turn is asked.

    Raises:
        DSparkError: the file cannot be used.
    """
    if path is None or _is_packaged_format(path):
        prompts = load_prompts(path)[: BALANCED if path is None else None]
        return [Question(prompt.kind, prompt.messages()) for prompt in prompts]
    questions = []
    for draft in load_prompt_files([path]).drafts:
        messages = [{"role": "user", "content": draft.turns[0]}]
        if draft.system:
            messages.insert(0, {"role": "system", "content": draft.system})
        questions.append(Question(draft.domain, messages))
    return questions


def calibration_questions() -> list[Question]:
    """The packaged prompts for calibration: the target wrote them, no benchmark here uses them."""
    data = resources.files("dspark_sglang.evaluation").joinpath("data/calibration.jsonl")
    with resources.as_file(data) as path:
        return load_questions(path)


def _is_packaged_format(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    try:
        content = msgspec.json.decode(path.read_bytes())
    except (OSError, ValueError):
        return False  # the other reader says what is wrong
    return isinstance(content, dict) and "schema_version" in content
