"""Bundles: joined without copying, split back byte for byte, continued when interrupted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from safetensors.numpy import load_file, save_file

from dspark_packaging import artifact, smoke, transfer
from dspark_packaging import bundle as bundles
from dspark_packaging.drafter import read_shards
from dspark_packaging.errors import PackageError
from dspark_packaging.records import open_package
from dspark_packaging.signing import sign, verify_signature
from dspark_packaging.smoke import obstacle
from dspark_packaging.transfer import Job, place, silent, workspace
from dspark_packaging.verify import fingerprint, verify_any
from dspark_sglang.artifacts import SCHEMA_VERSION, STSArtifact, write_json
from dspark_sglang.checkpoint import read_header, revision_of
from dspark_sglang.errors import ArtifactError, CheckpointError, DSparkError
from dspark_sglang.layouts.base import weights_digest
from dspark_sglang.provenance import provenance
from tests.packaging import v4_layout
from tests.packaging.cases import CASES, Case, run_case
from tests.packaging.large import fill_disk
from tests.packaging.samples import edit, make_keys, tree, write_package, write_target

WIDTH = v4_layout.Width(experts=2)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small target with index, card and code, and a drafter recorded for it."""
    target = write_target(tmp_path / "target")
    return target, write_package(tmp_path / "package", target)


@pytest.fixture
def v4(tmp_path: Path) -> tuple[Path, Path]:
    """V4-Pro's keys with two experts a layer, tiny tensors, and the packaged drafter."""
    return v4_layout.write_pair(tmp_path, WIDTH, shards=3)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_and_nothing_touched(case: Case, tmp_path: Path) -> None:
    outcome = run_case(case, tmp_path)
    assert outcome.refused, outcome.error
    assert outcome.untouched


def test_an_unspoiled_world_is_accepted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target, package = pair
    bundles.build(target, package, tmp_path / "out")
    assert verify_any(tmp_path / "out").shape == "bundle (folder)"


# --- the folder layout ----------------------------------------------------------------------------


def test_folder_bundle_links_weights_and_splits_back(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    target, package = pair
    before = tree(target), tree(package)
    done = bundles.build(target, package, tmp_path / "bundle", bundles.Options(method="link"))
    assert done.left_out == ["modeling_tiny.py"]
    assert done.written_bytes == 0
    for path in target.glob("*.safetensors"):
        assert path.samefile(tmp_path / "bundle" / path.name)
    assert (tmp_path / "bundle" / "config.json").read_bytes() == before[0]["config.json"]
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Not a new model: the same checkpoint" in card
    assert "--speculative-draft-model-path DIR" not in card.split("```")[1]
    parts = bundles.split(tmp_path / "bundle", tmp_path / "parts")
    assert parts.original
    assert parts.lost == 1
    del before[0]["modeling_tiny.py"]
    assert (tree(parts.target), tree(parts.drafter)) == before


def test_a_drafter_in_both_places_is_refused(v4: tuple[Path, Path], tmp_path: Path) -> None:
    """In the mtp layout nothing would look into ``dspark/``, and pushing would send it."""
    bundles.build(*v4, tmp_path / "bundle")
    (tmp_path / "bundle" / "dspark").mkdir()
    with pytest.raises(PackageError, match="holds a folder dspark"):
        verify_any(tmp_path / "bundle")


def test_bundle_leaves_the_sources_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = [tree(folder) for folder in pair]
    modes = [path.stat().st_mode for folder in pair for path in sorted(folder.rglob("*"))]
    bundles.build(*pair, tmp_path / "bundle")
    assert [tree(folder) for folder in pair] == before
    assert modes == [p.stat().st_mode for folder in pair for p in sorted(folder.rglob("*"))]


def test_a_bundle_in_the_hub_cache_verifies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """There every file is a link to a blob, also those in ``dspark/``."""
    bundles.build(*pair, tmp_path / "bundle")
    cache = tmp_path / "models--someone--tiny"
    snapshot = cache / "snapshots" / ("a" * 40)
    (cache / "blobs").mkdir(parents=True)
    for number, name in enumerate(tree(tmp_path / "bundle")):
        blob = cache / "blobs" / str(number)
        blob.write_bytes((tmp_path / "bundle" / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert verify_any(snapshot).shape == "bundle (folder)"


def test_a_bundle_can_be_signed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundles.build(*pair, bundle)
    private, public = make_keys(tmp_path / "keys")
    sign(bundle, private)
    verify_any(bundle)
    verify_signature(bundle, public)
    (bundle / "dspark" / "README.md").unlink()
    with pytest.raises(PackageError, match="does not hold"):
        verify_signature(bundle, public)


def test_an_output_that_is_taken_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").write_text("x")
    with pytest.raises(PackageError, match="not empty"):
        bundles.build(*pair, tmp_path / "bundle")
    with pytest.raises(PackageError, match="inside each other"):
        bundles.build(*pair, pair[0] / "bundle")


# --- the mtp layout -------------------------------------------------------------------------------


def test_v4_pro_layout_packs_verifies_and_splits(v4: tuple[Path, Path], tmp_path: Path) -> None:
    target, drafter = v4
    before = tree(target), tree(drafter)
    done = bundles.build(target, drafter, tmp_path / "bundle")
    bundle = tmp_path / "bundle"
    assert done.verified.shape == "bundle (mtp)"
    shards = read_shards(bundle)
    stages = Counter(name.split(".")[1] for name in shards.tensors if name.startswith("mtp."))
    assert set(stages) == {"0", "1", "2"}
    assert {int(n.split(".")[1]) for n in shards.tensors if n.startswith("layers.")} == set(
        range(61)
    )
    assert "mtp.2.markov_head.markov_w1.weight" in shards.tensors
    config = json.loads((bundle / "config.json").read_text())
    assert config["dspark_target_layer_ids"] == [58, 59, 60]
    new = [p.name for p in bundle.iterdir() if p.suffix == ".safetensors" and p.stat().st_nlink < 2]
    assert new == []
    verify_any(bundle)
    parts = bundles.split(bundle, tmp_path / "parts")
    assert parts.original
    assert (tree(parts.target), tree(parts.drafter)) == before
    verify_any(parts.drafter)


def test_a_v4_drafter_has_one_identity_alone_in_a_bundle_and_when_it_is_served(
    v4: tuple[Path, Path], tmp_path: Path
) -> None:
    target, drafter = v4
    bundle = tmp_path / "bundle"
    bundles.build(target, drafter, bundle)
    served = weights_digest(bundle)
    assert open_package(bundle).drafter.digest == served == weights_digest(drafter)
    # What a server has fitted lies beside the weights, and belongs to them.
    sts = STSArtifact(schema_version=SCHEMA_VERSION, gamma=v4_layout.GAMMA, drafter_sha256=served,
                      temperatures=[1.0] * v4_layout.GAMMA, target="v4", blocks=1, ece_before=0.1,
                      ece_after=0.1, provenance=provenance(["dspark", "calibrate"]))  # fmt: skip
    write_json(bundle / "sts.json", sts)
    assert open_package(bundle).records.sts is not None
    write_json(bundle / "sts.json", msgspec.structs.replace(sts, drafter_sha256="0" * 64))
    with pytest.raises(ArtifactError, match=r"sts\.json"):
        open_package(bundle)


def test_a_bundle_is_not_packaged_as_a_drafter(v4: tuple[Path, Path], tmp_path: Path) -> None:
    target, drafter = v4
    bundles.build(target, drafter, tmp_path / "bundle", bundles.Options(method="copy"))
    (tmp_path / "bundle" / "dspark_bundle.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        artifact.build(tmp_path / "bundle", tmp_path / "out")
    assert "--split" in caught.value.fix and not (tmp_path / "out").exists()


def test_a_v4_bundle_is_loaded_on_a_cpu_where_it_fits(
    v4: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sglang")
    target = v4[0]
    assert "SGLang's DeepseekV4ForCausalLM has 512" in str(obstacle(target, None))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"head_dim": 512}))
    assert obstacle(target, None) is None
    free = 3 << 30
    monkeypatch.setattr(smoke.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert "GiB of memory are needed" in str(obstacle(target, None))


def test_a_next_token_layer_is_replaced_only_when_told(tmp_path: Path) -> None:
    _, drafter = v4_layout.write_pair(tmp_path, WIDTH, shards=3, fingerprint=False)
    target = v4_layout.write_target(tmp_path / "with-mtp", WIDTH, shards=3, next_token=True)
    before = tree(target)
    with pytest.raises(PackageError, match="--replace-mtp"):
        bundles.build(target, drafter, tmp_path / "out")
    options = bundles.Options(replace_mtp=True)
    done = bundles.build(target, drafter, tmp_path / "out", options)
    assert tree(target) == before
    assert done.methods["link"] >= 4
    assert done.written_bytes > 0
    stored = read_shards(tmp_path / "out").tensors
    assert "mtp.0.e_proj.weight" not in stored
    assert "next-token layer is replaced" in (tmp_path / "out" / "README.md").read_text()
    parts = bundles.split(tmp_path / "out", tmp_path / "parts")
    assert not parts.original
    assert parts.lost > 0
    whole, kept = read_shards(target), read_shards(parts.target)
    assert set(whole.tensors) - set(kept.tensors) == {n for n in whole.tensors if "mtp." in n}


def test_a_bundle_of_another_origin_is_split_by_names(
    v4: tuple[Path, Path], tmp_path: Path
) -> None:
    target, drafter = v4
    bundles.build(target, drafter, tmp_path / "bundle", bundles.Options(method="copy"))
    bundle = tmp_path / "bundle"
    for name in sorted(path.name for path in bundle.iterdir()):
        if name.startswith(("target-", "drafter-", "dspark_", "checksums")):
            (bundle / name).unlink(missing_ok=True)
    _mix(bundle)
    (bundle / "provenance.json").unlink()
    with pytest.raises(PackageError, match="no records of"):
        verify_any(bundle)
    stored = _all_bytes(bundle)
    parts = bundles.split(bundle, tmp_path / "parts")
    assert not parts.original
    assert set(read_shards(parts.target).tensors) == set(read_shards(target).tensors)
    assert _all_bytes(parts.target) | _all_bytes(parts.drafter) == stored
    config = json.loads((parts.target / "config.json").read_text())
    assert not [key for key in config if key.startswith("dspark_")]


def _mix(bundle: Path) -> None:
    """Put a tensor of the drafter into a shard of the target."""
    index = bundle / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    first, second = "model-00001-of-00003.safetensors", "dspark-00001-of-00002.safetensors"
    name = next(n for n, file in value["weight_map"].items() if file == second)
    moved = _bytes(bundle, name, second)
    tensor = read_header(bundle / second).tensors[name]
    raw = (bundle / first).read_bytes()
    header = read_header(bundle / first)
    end = max(t.data_offsets[1] for t in header.tensors.values())
    both = header.tensors | {
        name: type(tensor)(tensor.dtype, tensor.shape, (end, end + len(moved)))
    }
    from dspark_packaging.transfer import write_subset
    from dspark_sglang.checkpoint import encode_header

    (bundle / first).write_bytes(encode_header(both, {}) + raw[header.start :] + moved)
    rest = [n for n in read_header(bundle / second).tensors if n != name]
    write_subset(bundle / second, bundle / "fresh", rest, lambda nbytes: None)
    (bundle / "fresh").replace(bundle / second)
    value["weight_map"][name] = first
    index.write_text(json.dumps(value))


def _bytes(folder: Path, name: str, file: str) -> bytes:
    header = read_header(folder / file)
    first, last = header.tensors[name].data_offsets
    return (folder / file).read_bytes()[header.start + first : header.start + last]


def _all_bytes(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        header, raw = read_header(path), path.read_bytes()
        for name, tensor in header.tensors.items():
            first, last = (header.start + offset for offset in tensor.data_offsets)
            found[name] = raw[first:last]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mtp.1.attn.wq_a.scale"), "without a scale"),
        (lambda t: t.pop("mtp.2.confidence_head.proj.weight"), "no tensor mtp.2.confidence"),
        (lambda t: t.update({"mtp.3.attn_norm.weight": t["mtp.0.attn_norm.weight"]}), "not imply"),
        (lambda t: t.update({"mtp.1.ffn.gate.scale": t["mtp.0.attn.wq_a.scale"]}), "not imply"),
        (
            lambda t: t.update({"mtp.1.attn.wkv.weight": t["mtp.1.attn.wkv.weight"][:2]}),
            "mtp.1.attn.wkv.weight is F8_E4M3",
        ),
    ],
    ids=["no-scale", "no-head", "extra-stage", "scale-of-plain", "shape"],
)
def test_v4_drafter_is_checked_key_by_key(
    tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    source = v4_layout.write_drafter(tmp_path / "source", WIDTH, shards=1)
    tensors: dict[str, torch.Tensor] = load(source / "model-00001-of-00001.safetensors")
    change(tensors)
    (source / "model-00001-of-00001.safetensors").unlink()
    (source / "model.safetensors.index.json").unlink()
    save(
        {name: value.contiguous().clone() for name, value in tensors.items()},
        source / "model.safetensors",
    )
    edit(source / "provenance.json", drafter_sha256=weights_digest(source))
    with pytest.raises(CheckpointError, match=message):
        artifact.build(source, tmp_path / "out")


# --- interruption ---------------------------------------------------------------------------------


def test_a_copy_that_was_cut_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PIECE", 1000)
    content = os.urandom(20_500)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "out").mkdir()
    seen = 0

    def cut(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes
        if seen > 10_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place(Job(tmp_path / "a", "b"), tmp_path / "out", "copy", cut)
    assert not (tmp_path / "out" / "b").exists()
    again: list[int] = []
    assert place(Job(tmp_path / "a", "b"), tmp_path / "out", "copy", again.append) == "copy"
    assert (tmp_path / "out" / "b").read_bytes() == content
    assert sum(again) == len(content)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


def test_holes_stay_holes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as stream:
        stream.write(b"head")
        stream.truncate(64 << 20)
    place(Job(tmp_path / "sparse", "copy"), tmp_path, "copy", lambda nbytes: None)
    assert (tmp_path / "copy").stat().st_size == 64 << 20
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "copy").read_bytes()[:4] == b"head"


def test_another_file_system_is_copied_to(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    (tmp_path / "a").write_bytes(b"x" * 100)
    out = elsewhere / f"dspark-test-{os.getpid()}"
    out.mkdir()
    try:
        with pytest.raises(PackageError, match="cannot hold a link"):
            place(Job(tmp_path / "a", "b"), out, "link", lambda nbytes: None)
        assert place(Job(tmp_path / "a", "b"), out, "auto", lambda nbytes: None) == "copy"
        assert (out / "b").read_bytes() == b"x" * 100
    finally:
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def test_an_interrupted_bundle_is_continued(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, package = pair
    out = tmp_path / "bundle"

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundles, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            bundles.build(target, package, out)
    assert not out.exists()
    done = bundles.build(target, package, out)
    assert done.resumed
    assert done.methods == {"there": sum(done.methods.values())}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    verify_any(out)


def test_changed_sources_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(KeyboardInterrupt), workspace(tmp_path / "out", [tmp_path / "a"]) as space:
        (space.folder / "half").write_text("x")
        raise KeyboardInterrupt
    (tmp_path / "a").write_bytes(b"22")
    with workspace(tmp_path / "out", [tmp_path / "a"]) as space:
        assert not space.resumed
        assert list(space.folder.iterdir()) == []


def test_one_process_at_a_time_builds_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    with (
        pytest.raises(PackageError, match="Another process"),
        workspace(tmp_path / "out", [tmp_path / "a"]),
        workspace(tmp_path / "out", [tmp_path / "a"]),
    ):
        pytest.fail("two at once")


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_build_continued(tmp_path: Path) -> None:
    assert fill_disk(tmp_path) == (True, True, True)


# --- fingerprints ---------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_the_sharding(tmp_path: Path) -> None:
    target = write_target(tmp_path / "two", shards=2)
    other = write_target(tmp_path / "one", shards=1)
    tensors = {k: v for p in target.glob("*.safetensors") for k, v in load_file(p).items()}
    save_file(tensors, other / "model-00001-of-00001.safetensors")
    one, two = (fingerprint(folder, drafter_sha256="0" * 64) for folder in (other, target))
    assert one == two


def test_revisions_are_read_from_where_hf_puts_them(tmp_path: Path) -> None:
    commit = "a" * 40
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert revision_of(snapshot) == commit
    notes = tmp_path / "local" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(f'{commit}\n"etag"\n1.0\n')
    assert revision_of(tmp_path / "local") == commit
    assert revision_of(tmp_path) is None


def test_a_drafter_is_not_recorded_for_a_target_it_does_not_fit(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    source = write_package(tmp_path / "package").with_name("package-source")
    (target / "config.json").write_text(json.dumps({"hidden_size": 9, "vocab_size": 11}))
    with pytest.raises(DSparkError, match="hidden_size is 8"):
        artifact.build(source, tmp_path / "out", artifact.Options(target=target), progress=silent)
