"""Packaging: what is written, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from dspark_packaging import artifact
from dspark_packaging.errors import PackageError
from dspark_packaging.manifest import IGNORED, verify_manifest, write_manifest
from dspark_packaging.verify import verify_artifact
from dspark_sglang.cli import package as cli
from dspark_sglang.errors import ArtifactError, CheckpointError, DSparkError
from dspark_sglang.layouts.base import weights_digest
from tests.packaging.samples import (
    COMMITTED,
    GAMMA,
    add_measurements,
    draft_vocabulary,
    edit,
    evaluation,
    provenance,
    put,
    save_weights,
    sts,
    tree,
)
from tests.structure_package import modules_of_the_source_path

ROOT = Path(__file__).parents[2]

# --- build ---------------------------------------------------------------------------------


def test_build_writes_the_whole_folder(packed: Path, source: Path) -> None:
    assert set(tree(packed)) == {
        *("config.json", "model.safetensors", "provenance.json"),
        *("README.md", "LICENSE", "checksums.json"),
    }
    assert (packed / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for name in ("config.json", "model.safetensors"):
        assert (packed / name).read_bytes() == (source / name).read_bytes()
    assert [p.name for p in packed.parent.iterdir() if p.name.startswith(".")] == []


def test_build_is_idempotent_and_works_in_place(packed: Path, source: Path) -> None:
    first = tree(packed)
    artifact.build(source, packed)
    assert tree(packed) == first
    artifact.build(packed, packed)
    assert tree(packed) == first


def test_a_package_passes_few_modules(tmp_path: Path) -> None:
    """Whoever changes how a folder is packaged has to read these, and no more."""
    assert len(modules_of_the_source_path(tmp_path)) <= 10


def test_measurements_added_later_are_picked_up_in_place(packed: Path) -> None:
    add_measurements(packed)
    with pytest.raises(PackageError, match=r"eval\.json, sts\.json, which checksums"):
        verify_artifact(packed)
    done = artifact.build(packed, packed)
    assert (done.calibrated, done.measured) == (True, True)
    assert {"sts.json", "eval.json"} <= set(verify_manifest(packed).files)


def test_source_leftovers_are_not_published(source: Path, tmp_path: Path) -> None:
    (source / "optimizer.pt").write_bytes(pickle.dumps({}))
    (source / "logs").mkdir()
    artifact.build(source, tmp_path / "out")
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_sharded_weights_need_their_index(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    mapped = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, source / file)
        mapped |= dict.fromkeys(part, file)
    put(source / "provenance.json", provenance(weights_digest(source)))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        artifact.build(source, tmp_path / "out")
    index = source / "model.safetensors.index.json"
    put(index, {"metadata": {"total_size": 1}, "weight_map": mapped})
    artifact.build(source, tmp_path / "out")
    put(index, {"weight_map": mapped | {names[0]: mapped[names[-1]]}})
    with pytest.raises(CheckpointError, match="wrong about 1 tensors"):
        artifact.build(source, tmp_path / "out")


def _foreign_file(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def _edited_config(out: Path) -> None:
    edit(out / "config.json", extra=1)


def _unlisted_measurement(out: Path) -> None:
    put(out / "sts.json", {})


def _own_card(out: Path) -> None:
    (out / "README.md").write_text("my words")


def _git_folder(out: Path) -> None:
    (out / ".git").mkdir()


def _no_manifest(out: Path) -> None:
    (out / "checksums.json").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        _foreign_file,
        _edited_config,
        _unlisted_measurement,
        _own_card,
        _git_folder,
        _no_manifest,
    ],
)
def test_build_never_overwrites_what_it_did_not_write(
    packed: Path, source: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(packed)
    before = {p: p.read_bytes() for p in packed.rglob("*") if p.is_file()}
    with pytest.raises(PackageError):
        artifact.build(source, packed)
    assert {p: p.read_bytes() for p in packed.rglob("*") if p.is_file()} == before


def test_failed_build_leaves_the_old_package(packed: Path, source: Path) -> None:
    before = tree(packed)
    tensors = load_file(source / "model.safetensors")
    tensors.pop("fc.weight")
    save_weights(source, tensors)
    put(source / "provenance.json", provenance(weights_digest(source)))
    with pytest.raises(CheckpointError, match=r"no tensor fc\.weight"):
        artifact.build(source, packed)
    assert tree(packed) == before
    assert sorted(p.name for p in packed.parent.iterdir()) == ["out", "source"]


def test_failed_swap_puts_the_old_package_back(
    packed: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(packed)
    rename = Path.rename

    def fail_on_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="no space"):
        artifact.build(source, packed)
    assert tree(packed) == before


def test_new_weights_with_old_provenance_are_refused(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_weights(source, {name: tensor * 2 for name, tensor in tensors.items()})
    with pytest.raises(ArtifactError, match=r"provenance\.json has drafter_sha256"):
        artifact.build(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_licence_needs_its_text(source: Path, tmp_path: Path) -> None:
    edit(source / "provenance.json", license="mit")
    with pytest.raises(PackageError, match="no LICENSE and its licence is mit"):
        artifact.build(source, tmp_path / "out")
    (source / "LICENSE").write_text("MIT, in full")
    artifact.build(source, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT, in full"


# --- manifest ------------------------------------------------------------------------------


def sglang_verifier() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        pytest.skip("SGLang is not installed")
    return Path(spec.origin).parent / "srt" / "utils" / "model_file_verifier.py"


def run_sglang_verifier(folder: Path) -> subprocess.CompletedProcess[str]:
    # The file `python -m sglang.srt.utils.model_file_verifier` runs, without the ten seconds
    # that importing its parent packages takes; -P keeps its folder out of the import path.
    command = [sys.executable, "-P", str(sglang_verifier()), "verify"]
    command += ["--model-path", str(folder), "--model-checksum", str(folder / "checksums.json")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_manifest_leaves_out_what_sglang_leaves_out() -> None:
    text = sglang_verifier().read_text()
    block = re.search(r"IGNORE_PATTERNS = \[(.*?)\]", text, re.DOTALL)
    assert block is not None
    assert tuple(re.findall(r'"(.+?)"', block[1])) == IGNORED


def test_manifest_format(packed: Path) -> None:
    manifest = json.loads((packed / "checksums.json").read_text())
    assert list(manifest) == ["files"]
    assert list(manifest["files"]) == ["config.json", "model.safetensors", "provenance.json"]
    size = (packed / "config.json").stat().st_size
    assert manifest["files"]["config.json"]["size"] == size


def test_sglang_verifies_the_committed_artifact() -> None:
    done = run_sglang_verifier(COMMITTED)
    assert done.returncode == 0, done.stderr
    assert "files verified successfully" in done.stdout


def test_sglang_and_we_refuse_the_same_damage(packed: Path) -> None:
    weights = packed / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(PackageError, match=r"model\.safetensors has SHA-256"):
        verify_artifact(packed)
    done = run_sglang_verifier(packed)
    assert done.returncode != 0
    assert "model.safetensors: mismatch" in done.stderr


@pytest.mark.parametrize("name", ["../escape", "/etc/hosts", "a/b", "..", "checksums.json"])
def test_manifest_refuses_names_outside_the_folder(packed: Path, name: str) -> None:
    put(packed / "checksums.json", {"files": {name: {"sha256": "0" * 64, "size": 1}}})
    with pytest.raises(PackageError, match="plain file names"):
        verify_manifest(packed)


# --- verify --------------------------------------------------------------------------------


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def _renamed_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"fc.weight": [1.0]}))


def _remote_code(folder: Path) -> None:
    (folder / "modeling_dspark.py").write_text("")


def _subfolder(folder: Path) -> None:
    (folder / "original").mkdir()


def _missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def _truncated(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-3])


def _other_gamma(folder: Path) -> None:
    put(folder / "sts.json", sts(weights_digest(folder)) | {"gamma": 5})


def _other_drafters_sts(folder: Path) -> None:
    put(folder / "sts.json", sts("f" * 64))


def _other_vocabulary(folder: Path) -> None:
    put(folder / "draft_vocab.json", draft_vocabulary() | {"vocab_size": 7})


def _other_drafters_eval(folder: Path) -> None:
    put(folder / "eval.json", evaluation("f" * 64))


def _eval_with(folder: Path, **changes: object) -> None:
    value = evaluation(weights_digest(folder))
    value["accepted_length"][0] |= changes
    put(folder / "eval.json", value)


def _rising_positions(folder: Path) -> None:
    _eval_with(folder, by_position=[0.4, 0.5, 0.2])


def _impossible_length(folder: Path) -> None:
    _eval_with(folder, overall=GAMMA + 1.5)


def _misspelt_field(folder: Path) -> None:
    _eval_with(folder, by_postion=[0.1])


def _missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("layers.0.mlp.up_proj.weight")
    save_weights(folder, tensors)


def _no_confidence_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_weights(folder, {n: t for n, t in tensors.items() if "confidence" not in n})


def _wrong_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=16)


def _bundled(folder: Path) -> None:
    edit(folder / "config.json", dspark_block_size=GAMMA)


def _broken_front_matter(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: apache-2.0", "license: apache2"))


def _card_of_another_target(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("base_model: owner/tiny", "base_model: a/b"))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_pickle, PackageError, "pickled"),
        (_remote_code, PackageError, "does not belong"),
        (_subfolder, PackageError, "does not belong"),
        (_missing, PackageError, r"has no config\.json"),
        (_renamed_pickle, CheckpointError, "damaged"),
        (_truncated, CheckpointError, "damaged"),
        (_other_gamma, ArtifactError, "fitted for gamma 5"),
        (_other_drafters_sts, ArtifactError, "fitted for drafter"),
        (_other_vocabulary, ArtifactError, "vocabulary of 7 tokens"),
        (_other_drafters_eval, ArtifactError, r"eval\.json has drafter_sha256"),
        (_rising_positions, ArtifactError, "never rise"),
        (_impossible_length, ArtifactError, "accepted length 4.5"),
        (_misspelt_field, ArtifactError, "by_postion"),
        (_missing_tensor, CheckpointError, r"no tensor layers\.0\.mlp\.up_proj"),
        (_no_confidence_head, CheckpointError, "no confidence head"),
        (_wrong_shape, CheckpointError, r"mlp\.gate_proj"),
        (_bundled, CheckpointError, "configuration has no"),
        (_broken_front_matter, PackageError, "license 'apache2'"),
        (_card_of_another_target, PackageError, "says base_model a/b"),
    ],
)
def test_verify_refuses(
    packed: Path, spoil: Callable[[Path], None], error: type[DSparkError], message: str
) -> None:
    spoil(packed)
    # The checksums are made to match, so that it is the content which is refused.
    write_manifest(packed)
    with pytest.raises(error, match=message):
        verify_artifact(packed)


def test_truncated_download_is_reported_as_one(packed: Path) -> None:
    _truncated(packed)
    with pytest.raises(PackageError, match="bytes"):
        verify_artifact(packed)


def test_verify_ignores_what_git_and_hf_leave(packed: Path) -> None:
    (packed / ".gitattributes").write_text("*.safetensors filter=lfs")
    (packed / ".cache").mkdir()
    verify_artifact(packed)


def test_committed_artifact_verifies() -> None:
    done = verify_artifact(COMMITTED)
    assert (done.name, done.gamma) == ("smollm2-135m-instruct-dspark", 5)


# --- command line --------------------------------------------------------------------------


@pytest.fixture
def run() -> Callable[..., Any]:
    app = typer.Typer()
    for function in (cli.package, cli.verify):
        app.command()(function)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_commands(source: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    done = run("package", source, out)
    assert done.exit_code == 0, done.output
    assert "not calibrated (no sts.json), not measured (no eval.json)" in done.output
    assert "is current" in run("package", out, "--card", "check").output
    assert "was current" in run("package", out, "--card", "write").output
    assert "Verified" in run("verify", out).output
    shutil.rmtree(source)
    for words in (
        ("package", source, out),
        ("package", source, "--card", "write"),
        ("verify", source),
    ):
        error = run(*words).exception
        assert isinstance(error, DSparkError)
        assert "is not a directory" in str(error)
        assert error.fix
