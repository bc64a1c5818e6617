"""``.eval_results/accepted-length.yaml``: accepted lengths in the Hub's format for results.

Format: https://huggingface.co/docs/hub/eval-results, written and read through ``huggingface_hub``.
An entry has to name a dataset of the Hub. Prompts that are no dataset there are named by the
project's own identifier, and the notes say so.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from dspark_packaging.errors import PackageError
from dspark_packaging.layout import EVAL_RESULTS, RESULTS_FILE
from dspark_packaging.schemas import EVAL_FILE, EvalArtifact, read_eval_as_it_is
from dspark_sglang.artifacts import write_bytes

_DATASET = "dspark-sglang/packaged-prompts"


def entries(measured: EvalArtifact) -> list[EvalResultEntry]:
    """One entry for each temperature and kind of prompt, and for all prompts together."""
    made = []
    date = measured.provenance.created
    for row in measured.accepted_length:
        values: list[tuple[str, float]] = [("all", row.overall), *row.by_kind.items()]
        for kind, value in values:
            made.append(
                EvalResultEntry(
                    dataset_id=_DATASET,
                    task_id=f"accepted-length-{kind}-temperature-{row.temperature:g}",
                    value=value,
                    date=date if "T" in date else None,
                    notes=f"{measured.prompts}; not a dataset of the Hub. {measured.definition} "
                    f"Hardware: {measured.hardware}. Command: {measured.provenance.command}",
                )
            )
    return made


def results_yaml(measured: EvalArtifact) -> str:
    """The file's content."""
    return yaml.safe_dump(
        eval_result_entries_to_yaml(entries(measured)), sort_keys=False, allow_unicode=True
    )


def write_eval_results(directory: Path, home: Path | None = None) -> None:
    """Write the file from ``eval.json``, or remove it where nothing was measured.

    Args:
        directory: the package; the Hub looks at its top only.
        home: where ``eval.json`` lies, if not there.
    """
    path = directory / EVAL_RESULTS / RESULTS_FILE
    source = (home or directory) / EVAL_FILE
    if source.is_file():
        write_bytes(path, results_yaml(read_eval_as_it_is(source)).encode())
        return
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def check_eval_results(directory: Path, home: Path | None = None) -> None:
    """Check that the file says what ``eval.json`` says, and that the Hub's client reads it.

    Raises:
        PackageError: it differs, holds more, or is there without a measurement.
    """
    folder = directory / EVAL_RESULTS
    source = (home or directory) / EVAL_FILE
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    wanted = [RESULTS_FILE] if source.is_file() else []
    fix = f"Run `dspark package {directory} {directory}`."
    if not present:  # packages made before there was one, and partial downloads
        return
    if present != wanted:
        raise PackageError(
            f"{folder} holds {', '.join(present)}.",
            expected=", ".join(wanted) or f"nothing: there is no {EVAL_FILE}",
            fix=fix,
        )
    text = (folder / RESULTS_FILE).read_text(encoding="utf-8", errors="replace")
    if text != results_yaml(read_eval_as_it_is(source)):
        raise PackageError(
            f"{folder / RESULTS_FILE} is not what {EVAL_FILE} says.",
            expected="the results generated from it",
            fix=fix,
        )
    parse_eval_result_entries(yaml.safe_load(text))
