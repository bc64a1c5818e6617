"""Weights that are no numbers: counted by a second opinion, and refused wherever a package passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from dspark_packaging import artifact, smoke
from dspark_packaging import bundle as bundles
from dspark_packaging.errors import PackageError
from dspark_packaging.layout import SINGLE_FILE
from dspark_packaging.manifest import Scan, refuse_not_finite, scan_of
from dspark_packaging.records import open_package
from dspark_packaging.smoke import Loaded, check_accepted
from dspark_sglang.checkpoint import Header, Tensor
from dspark_sglang.cli import package as cli
from dspark_sglang.layouts.base import weights_digest
from tests.packaging.samples import COMMITTED, provenance, put, write_package, write_target

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.float32,  # its two parts
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


# --- counting -------------------------------------------------------------------------------------


def _values(dtype: str) -> bytes:
    """Every bit pattern of small types; random ones of large types, with many that are not finite."""
    size = DTYPES[dtype].itemsize
    if size < 4:
        return np.arange(256**size, dtype=f"<u{size}").tobytes()
    rng = np.random.default_rng(3)
    values = np.frombuffer(rng.bytes(1000 * size), f"<u{size}").copy()
    values[::3] |= {4: 0x7F80_0000, 8: 0x7FF0_0000_0000_0000}[size]
    return values.tobytes()


def _by_torch(dtype: str, raw: bytes) -> int:
    values = torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype])
    values = values if values.dtype == torch.float64 else values.float()
    return int((~torch.isfinite(values)).sum())


def _scanned(header: Header, raw: bytes, piece: int) -> dict[str, int]:
    scan = Scan(header)
    for start in range(0, len(raw), piece):
        scan.feed(memoryview(raw)[start : start + piece])
    return scan.found


@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_that_is_not_finite_is_counted(dtype: str, piece: int) -> None:
    """Also where a piece ends within a value, and where values lie askew."""
    raw = _values(dtype)
    raw = raw if piece > 7 else raw[: 1 << 12] + raw[-(1 << 12) :]
    size = DTYPES[dtype].itemsize * (2 if dtype == "C64" else 1)
    askew, end = 3, 3 + len(raw)
    tensors = {
        "bytes": Tensor("U8", (askew,), (0, askew)),
        "first": Tensor(dtype, (len(raw) // size,), (askew, end)),
        "second": Tensor(dtype, (len(raw) // size,), (end, end + len(raw))),
        "none": Tensor(dtype, (0,), (end + len(raw), end + len(raw))),
    }
    header = Header(tensors=tensors, metadata={}, start=16)
    found = _scanned(header, b"\xff" * (16 + askew) + raw + raw, piece)
    expected = _by_torch(dtype, raw)
    assert expected > 0
    assert found == {"first": expected, "second": expected}


@pytest.mark.parametrize("dtype", ["U8", "I8", "I64", "BOOL", "F4", "F6_E2M3", "F6_E3M2"])
def test_types_without_such_values_are_passed_over(dtype: str) -> None:
    header = Header(tensors={"t": Tensor(dtype, (32,), (0, 24))}, metadata={}, start=8)
    assert _scanned(header, b"\xff" * 32, 5) == {}


def test_other_files_and_damaged_weights_are_left_to_others(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    assert scan_of(tmp_path / "a.json") is None
    assert scan_of(tmp_path / "a.safetensors") is None


def test_the_message_names_tensors_and_counts() -> None:
    found = {f"layer.{number}": number for number in range(1, 6)}
    with pytest.raises(PackageError) as caught:
        refuse_not_finite(Path("model.safetensors"), found)
    assert "1 in layer.1, 2 in layer.2, 3 in layer.3, and some in 2 tensors more" in str(
        caught.value
    )


# --- where it is refused --------------------------------------------------------------------------


def _spoil(path: Path) -> None:
    """One NaN in the first tensor."""
    tensors = load_file(path)
    next(iter(tensors.values())).flat[0] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})


def test_package_refuses_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    _spoil(source / SINGLE_FILE)
    digest = weights_digest(source)
    put(source / "provenance.json", provenance(digest))
    with pytest.raises(PackageError, match="1 in confidence_head"):
        artifact.build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_continued_bundle_refuses_again(tmp_path: Path) -> None:
    """What a first run read is not read again, so it must not be taken for good."""
    target = write_target(tmp_path / "target")
    package = write_package(tmp_path / "package")
    _spoil(target / "model-00002-of-00002.safetensors")
    for _ in range(2):
        with pytest.raises(PackageError, match="NaN or infinite"):
            bundles.build(target, package, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the loaded drafter ---------------------------------------------------------------------------

#: Tokens and rounds of the committed drafter in SGLang on the CPU: as it is, without copies from the text, and
#: with NaN in one of its tensors.
SERVED = {"healthy": (125, 74), "healthy, no copies": (97, 54), "NaN": (92, 92)}


@pytest.mark.parametrize("state", SERVED)
def test_accepted_length_is_held_against_the_measured_one(state: str) -> None:
    tokens, rounds = SERVED[state]
    loaded = Loaded(text="", rounds=rounds, tokens=tokens)
    recorded = open_package(COMMITTED).records.eval
    assert recorded is not None
    if state == "NaN":
        with pytest.raises(PackageError, match=r"1\.00 a round") as caught:
            check_accepted(loaded, recorded)
        assert "1.33, for 2.55 in eval.json" in str(caught.value)
    else:
        check_accepted(loaded, recorded)


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``dspark verify --target`` of the committed drafter, whose server committed so many tokens."""
    from dspark_packaging import verify as checks

    def call(package: Path, tokens: int, rounds: int) -> Any:
        loaded = Loaded(text="Paris", rounds=rounds, tokens=tokens)
        monkeypatch.setattr(smoke, "obstacle", lambda *paths: None)
        monkeypatch.setattr(smoke, "smoke_load", lambda *paths: loaded)
        monkeypatch.setattr(checks, "verify_pair", lambda *paths: True)
        app = typer.Typer()
        app.command()(cli.verify)
        return CliRunner().invoke(app, [str(package), "--target", str(package)])

    return call


def test_verify_refuses_a_drafter_that_drafts_nothing(verify: Callable[..., Any]) -> None:
    done = verify(COMMITTED, 23, 23)
    assert isinstance(done.exception, PackageError)
    assert "23 tokens in 23 rounds, 1.00 a round" in str(done.exception)
    done = verify(COMMITTED, 97, 54)
    assert done.exit_code == 0, done.output
    assert "Accepted length: 1.80" in done.output


def test_verify_says_where_there_is_nothing_to_compare(
    verify: Callable[..., Any], packed: Path
) -> None:
    done = verify(packed, 23, 23)
    assert done.exit_code == 0, done.output
    assert "not compared (no eval.json)" in done.output


def test_the_committed_drafter_is_finite(tmp_path: Path) -> None:
    shutil.copytree(COMMITTED, tmp_path / "copy")
    artifact.build(tmp_path / "copy", tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "checksums.json").read_text())
    assert listed == json.loads((COMMITTED / "checksums.json").read_text())
