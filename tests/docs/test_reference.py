"""Pages that are generated are current, and say what is there."""

from __future__ import annotations

import msgspec
import pytest

from dspark_sglang.config import Settings
from dspark_sglang.serving.options import RequestOptions
from dspark_sglang.training.config import TrainConfig
from tests.docs import reference, results


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_page_is_current(name: str) -> None:
    assert (reference.OUT / name).read_text() == reference.PAGES[name]() + "\n", "make reference"


def test_the_page_of_results_is_current() -> None:
    assert results.PAGE.read_text() == results.render(results.RESULTS), "make results"


@pytest.mark.parametrize("kind", [Settings, RequestOptions, TrainConfig])
def test_every_setting_has_a_meaning(kind: type[msgspec.Struct]) -> None:
    for name, _, meaning in reference.fields(kind):
        assert meaning, f"{name} has no #: comment above it"


def test_every_field_of_a_training_run_is_listed_with_its_section() -> None:
    listed = {name.strip("`") for name, _, _ in reference.fields(TrainConfig)}
    assert "optim.lr" in listed and "data.files" in listed
    assert {field.name for field in msgspec.structs.fields(TrainConfig)} <= {
        name.split(".")[0] for name in listed
    }


def test_every_option_has_a_meaning() -> None:
    """But --help: an option without help text is a blank row."""
    import typer

    from dspark_sglang.cli.main import app

    for name, command in reference.leaves(typer.main.get_command(app)):
        assert command.help, name
        for flags, *_, meaning in reference.options(command):
            assert meaning, f"{name} {flags}"
