"""What may go wrong in a step: contained where it can be, and every statement that raises is known."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("sglang")

from dspark_sglang.serving import weights
from dspark_sglang.serving.faults import KINDS, Faults
from tests.raises import RAISES

ROOT = Path(__file__).resolve().parents[2]
#: Modules of the plugin that no step runs: checks, start-up, files, people.
NOT_IN_A_STEP = {
    "core": {"engine", "drafter", "placement", "sts"},
    "serving": {
        "arguments", "compat", "entry", "hooks", "placement", "warmup",
    },
    "ops": {"__init__", "selfcheck"},
    "cpu": {"patches", "platform"},
}  # fmt: skip
NOT_IN_A_KERNEL = {"reference"}


def raising(path: Path, module: str) -> Iterator[str]:
    """Functions of a module that have a ``raise`` or an ``assert``."""

    def walk(node: ast.AST, inside: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            # A function in a function is its own affair; a method is its class's.
            functions = (ast.FunctionDef, ast.AsyncFunctionDef)
            nested = isinstance(child, ast.ClassDef) or (
                isinstance(child, functions) and not isinstance(node, functions)
            )
            name = f"{inside}.{child.name}" if nested else inside  # type: ignore[attr-defined]
            if isinstance(child, ast.Raise | ast.Assert):
                yield inside
            yield from walk(child, name)

    yield from walk(ast.parse(path.read_text()), module)


def found() -> set[str]:
    """What the source has."""
    every: set[str] = set()
    package = ROOT / "dspark_sglang"
    for folder in (package / "core", package / "serving"):
        for path in folder.rglob("*.py"):
            if "v4" in path.parts or path.stem in NOT_IN_A_STEP.get(path.parent.name, ()):
                continue
            every.update(raising(path, ".".join(path.relative_to(ROOT).with_suffix("").parts)))
    for path in (ROOT / "kernels" / "dspark_kernels").glob("*/*.py"):
        if path.stem not in NOT_IN_A_KERNEL and set(raising(path, "")):
            every.add(f"dspark_kernels.{path.parent.name}")
    return every


def test_every_statement_that_raises_in_a_step_is_listed() -> None:
    listed = [entry.where for entry in RAISES]
    assert len(listed) == len(set(listed))
    assert set(listed) == found()


@pytest.mark.parametrize("entry", RAISES, ids=lambda entry: entry.where)
def test_each_has_a_test_that_exists(entry: Any) -> None:
    path, _, name = entry.test.partition("::")
    source = (ROOT / "tests" / path).read_text()
    assert not name or f"def {name}(" in source


def test_nobodys_request_ends_the_server() -> None:
    assert {entry.then for entry in RAISES if entry.whose == "request"} == {"refused"}
    assert "ends" not in {entry.then for entry in RAISES if entry.whose in ("drafter", "target")}


def test_a_fault_is_said_once_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            with faults.contained("drafting"):
                raise RuntimeError("planted")
    assert faults.counts["exception"] == 3
    assert faults.stopped == "drafting raised RuntimeError: planted" and faults.broken
    assert caplog.text.count("drafting is off") == 1 and "planted" in caplog.text
    faults.resume("target")
    assert faults.broken
    faults.resume()
    assert faults.stopped is None


def test_with_several_ranks_an_exception_ends_the_server() -> None:
    faults = Faults()
    faults.alone = False
    with pytest.raises(RuntimeError, match="planted"), faults.contained("drafting"):
        raise RuntimeError("planted")


def test_an_interruption_is_no_fault() -> None:
    faults = Faults()
    with pytest.raises(KeyboardInterrupt), faults.contained("drafting"):
        raise KeyboardInterrupt
    assert faults.stopped is None


def test_every_kind_is_explained() -> None:
    assert set(KINDS) == {"request", "confidence", "exception", "weights", "target"}
    assert all(text and not text.endswith(".") for text in KINDS.values())


# --- weights -----------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = torch.nn.Parameter(torch.rand(16, generator=generator))
        self.big = torch.nn.Parameter(torch.rand(200, 200, generator=generator))


def test_a_digest_is_of_small_parameters() -> None:
    model = Model()
    first = weights.digest(model)
    model.big.data += 1.0
    assert weights.digest(model) == first
    model.norm.data[3] += 1e-6
    assert weights.digest(model) != first
    assert weights.digest(Model().to(torch.bfloat16)) != first


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite_are_named(value: float, dtype: torch.dtype) -> None:
    model = Model()
    assert weights.unsound(model) is None
    model.big.data[199, 7] = value
    model.big.data = model.big.data.to(dtype)
    assert weights.unsound(model) == "big"


class Own:
    """SGLang's updater of a draft model."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def update_weights_from_tensor(self, named_tensors: Any, load_format: Any = None) -> Any:
        self.given.append(named_tensors)
        return True, "Success"

    def update_weights_from_disk(self, model_path: str, load_format: str) -> Any:
        self.given.append((model_path, load_format))
        return True, "Success"

    def load_weights_from_distributed(self, named_tensors: Any) -> Any:
        self.given.append(named_tensors)
        return True, "Success"


def test_the_drafter_takes_tensors_of_its_own_names_alone() -> None:
    own = Own()
    updater = weights.DraftUpdater(own, ["fc.weight", "embed_tokens.weight"], whole=True)
    theirs = [("model.layers.0.mlp.weight", 1), ("embed_tokens.weight", 2), ("lm_head.weight", 3)]
    for load in (updater.update_weights_from_tensor, updater.load_weights_from_distributed):
        assert load(theirs)[0] and not updater.loaded
        assert load([*theirs, ("fc.weight", 4)]) == (True, "Success")
        assert updater.loaded
        updater.loaded = False
    assert own.given == [[("fc.weight", 4)]] * 2
    assert updater.update_weights_from_disk("/anywhere", "auto")[0]
    assert updater.update_weights_from_ipc(None)[0] and not updater.loaded


def test_a_drafter_in_the_targets_files_is_loaded_with_them(tmp_path: Path) -> None:
    own = Own()
    updater = weights.DraftUpdater(own, ["mtp.0.a"], whole=True, bundled=True)
    for name, kept in (("layers.0.a", True), ("mtp.0.a", False)):
        save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
        assert updater.update_weights_from_disk(str(tmp_path), "auto")[0]
        assert updater.loaded is not kept
    assert own.given == [(str(tmp_path), "auto")]
    assert updater.update_weights_from_disk(str(tmp_path / "none"), "auto")[0]


def test_a_bucket_is_taken_apart_by_its_names() -> None:
    own = Own()
    updater = weights.DraftUpdater(own, ["fc.weight"], whole=True)
    entries = [SimpleNamespace(name="fc.weight"), SimpleNamespace(name="model.norm.weight")]
    bucket = {"flattened_tensor": 7, "metadata": entries}
    assert updater.update_weights_from_tensor(bucket, "flattened_bucket")[0]
    assert own.given == [{"flattened_tensor": 7, "metadata": entries[:1]}]


def test_a_drafter_in_pieces_is_not_updated() -> None:
    updater = weights.DraftUpdater(Own(), ["fc.weight"], whole=False)
    done, message = updater.update_weights_from_tensor([("fc.weight", 1)])
    assert not done and "DSPARK_PLACEMENT=replicate" in message


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_that_raises_fails_on_one_rank_and_ends_several(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "get_parallel", lambda: SimpleNamespace(tp_size=ranks))
    manager = SimpleNamespace()

    def original(manager: Any, request: Any) -> Any:
        raise ValueError("a shape")

    if ranks > 1:
        with pytest.raises(ValueError, match="a shape"):
            weights.contained(original, manager, None)
        return
    answer = weights.contained(original, manager, None)
    assert not answer.success and "ValueError: a shape" in answer.message
