"""Input that packaging has to refuse: each case spoils something and says what must happen.

The cases are run by the tests and by ``make package-check``. Every folder a case did not spoil on
purpose is compared before and after: a refusal touches nothing.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from safetensors.numpy import load_file, save_file

from dspark_packaging import artifact
from dspark_packaging import bundle as bundles
from dspark_packaging.layout import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, SINGLE_FILE
from dspark_packaging.manifest import Manifest, file_entry, listed_names, write_manifest
from dspark_packaging.verify import verify_any
from dspark_sglang.artifacts import write_json
from dspark_sglang.checkpoint import LENGTH_BYTES, read_header
from dspark_sglang.errors import DSparkError
from dspark_sglang.layouts.base import weights_digest
from tests.packaging.samples import (
    COMMIT,
    edit,
    evaluation,
    provenance,
    put,
    sts,
    tree,
    write_package,
    write_target,
    write_tokenizer,
)

SHARD_1, SHARD_2 = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


class World(NamedTuple):
    """A target, a packaged drafter recorded for it, and room."""

    target: Path
    package: Path
    root: Path


class Case(NamedTuple):
    """One refusal."""

    name: str
    #: Changes the world; what comes back is then done and has to be refused.
    spoil: Callable[[World], Callable[[], object]]
    #: Words of the error.
    says: str


class Outcome(NamedTuple):
    """What happened."""

    refused: bool
    error: str
    untouched: bool


def make_world(root: Path) -> World:
    """Fresh folders for one case."""
    target = write_target(root / "target")
    return World(target, write_package(root / "package", target), root)


def run_case(case: Case, root: Path) -> Outcome:
    """Spoil, try, compare."""
    world = make_world(root)
    action = case.spoil(world)
    before = tree(world.target), tree(world.package)
    try:
        action()
    except DSparkError as error:
        untouched = (tree(world.target), tree(world.package)) == before
        made = (root / "out").exists()
        right = case.says in str(error)
        return Outcome(right and not made, str(error), untouched)
    return Outcome(False, "accepted", True)


# --- what is spoiled --------------------------------------------------------------------------


def _verify(world: World, *, relist: bool = True) -> Callable[[], object]:
    """Verify the package; its checksums made to match, so that the content is refused."""
    if relist:
        names = listed_names(world.package)
        entries = {name: file_entry(world.package / name) for name in names}
        write_json(world.package / MANIFEST_FILE, Manifest(files=entries))
    return lambda: verify_any(world.package)


def _bundle(world: World) -> Callable[[], object]:
    return lambda: bundles.build(world.target, world.package, world.root / "out")


def _index(world: World, **mapped: str) -> None:
    path = world.target / INDEX_FILE
    value = json.loads(path.read_text())
    value["weight_map"] |= mapped
    put(path, value)


def _pickle(world: World) -> Callable[[], object]:
    (world.package / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return _verify(world)


def _pickle_as_safetensors(world: World) -> Callable[[], object]:
    (world.target / SHARD_1).write_bytes(pickle.dumps({"w": [1.0] * 64}))
    return _bundle(world)


def _remote_code(world: World) -> Callable[[], object]:
    (world.package / "modeling_dspark.py").write_text("raise SystemExit\n")
    return _verify(world)


def _path_traversal(world: World) -> Callable[[], object]:
    outside = world.root / "outside.safetensors"
    (world.target / SHARD_2).rename(outside)
    names = read_header(outside).tensors
    _index(world, **dict.fromkeys(names, "../outside.safetensors"))
    return _bundle(world)


def _symlink(world: World) -> Callable[[], object]:
    outside = world.root / "outside.safetensors"
    (world.target / SHARD_2).rename(outside)
    (world.target / SHARD_2).symlink_to(outside)
    return _bundle(world)


def _duplicated_key(world: World) -> Callable[[], object]:
    first, second = (load_file(world.target / name) for name in (SHARD_1, SHARD_2))
    name = next(iter(first))
    save_file(second | {name: first[name]}, world.target / SHARD_2)
    return _bundle(world)


def _edit_header(path: Path, change: Callable[[bytes], bytes]) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:LENGTH_BYTES], "little")
    header = change(raw[LENGTH_BYTES : LENGTH_BYTES + size])
    data = raw[LENGTH_BYTES + size :]
    path.write_bytes(len(header).to_bytes(LENGTH_BYTES, "little") + header + data)


def _key_twice_in_a_header(world: World) -> Callable[[], object]:
    def repeat(header: bytes) -> bytes:
        fields = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        name, value = next((n, v) for n, v in fields.items() if n != "__metadata__")
        return header.rstrip()[:-1] + b"," + json.dumps(name).encode() + b":" + bytes(value) + b"}"

    _edit_header(world.target / SHARD_1, repeat)
    return _bundle(world)


def _overlap(world: World) -> Callable[[], object]:
    def overlap(header: bytes) -> bytes:
        fields = json.loads(header)
        names = [name for name in fields if name != "__metadata__"]
        names.sort(key=lambda name: fields[name]["data_offsets"])
        fields[names[1]]["data_offsets"] = fields[names[0]]["data_offsets"]
        return json.dumps(fields).encode()

    _edit_header(world.target / SHARD_1, overlap)
    return _bundle(world)


def _truncated(world: World) -> Callable[[], object]:
    raw = (world.target / SHARD_2).read_bytes()
    (world.target / SHARD_2).write_bytes(raw[:-7])
    return _bundle(world)


def _missing_shard(world: World) -> Callable[[], object]:
    (world.target / SHARD_2).unlink()
    return _bundle(world)


def _key_not_in_the_index(world: World) -> Callable[[], object]:
    tensors = load_file(world.target / SHARD_1)
    save_file(tensors | {"surplus": np.ones(2, np.float32)}, world.target / SHARD_1)
    return _bundle(world)


def _index_names_a_key_too_many(world: World) -> Callable[[], object]:
    _index(world, absent=SHARD_1)
    return _bundle(world)


def _tensors(world: World, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the drafter's tensors, and its records to match."""
    tensors = load_file(world.package / SINGLE_FILE)
    change(tensors)
    save_file(tensors, world.package / SINGLE_FILE, metadata={"format": "pt"})
    digest = weights_digest(world.package)
    put(world.package / "provenance.json", provenance(digest))
    edit(world.package / "target.json", drafter_sha256=digest)


def _missing_key(world: World) -> Callable[[], object]:
    _tensors(world, lambda tensors: tensors.pop("fc.weight"))
    return _verify(world)


def _extra_key(world: World) -> Callable[[], object]:
    _tensors(world, lambda tensors: tensors.update(surplus=np.ones(2, np.float16)))
    return _verify(world)


def _wrong_shape(world: World) -> Callable[[], object]:
    _tensors(world, lambda t: t.update({"norm.weight": np.ones(9, np.float16)}))
    return _verify(world)


def _wrong_dtype(world: World) -> Callable[[], object]:
    _tensors(world, lambda t: t.update({"norm.weight": np.ones(8, np.int16)}))
    return _verify(world)


def _not_a_number(world: World) -> Callable[[], object]:
    _tensors(world, lambda t: t["fc.weight"].flat.__setitem__(slice(1, 4), np.nan))
    return _verify(world)


def _infinite(world: World) -> Callable[[], object]:
    _tensors(world, lambda t: t["norm.weight"].__setitem__(0, -np.inf))
    return lambda: artifact.build(world.package, world.root / "out")


def _infinite_target(world: World) -> Callable[[], object]:
    tensors = load_file(world.target / SHARD_1)
    next(iter(tensors.values()))[0, 0] = np.inf
    save_file(tensors, world.target / SHARD_1)
    (world.package / "target.json").unlink()
    artifact.build(world.package, world.package)
    return _bundle(world)


def _secret(world: World) -> Callable[[], object]:
    (world.package / ".env").write_text("KEY=secret\n")
    return _verify(world)


def _linked_results(world: World) -> Callable[[], object]:
    outside = world.root / "outside"
    outside.mkdir()
    (outside / "accepted-length.yaml").write_text("[]\n")
    (world.package / ".eval_results").symlink_to(outside)
    return _verify(world)


def _results_and_more(world: World) -> Callable[[], object]:
    (world.package / ".eval_results").mkdir()
    (world.package / ".eval_results" / "notes.txt").write_text("not for others\n")
    return _verify(world)


def _wrong_revision(world: World) -> Callable[[], object]:
    value = json.loads((world.package / "provenance.json").read_text())
    value["target"]["revision"] = COMMIT
    put(world.package / "provenance.json", value)
    artifact.build(world.package, world.package)
    # As `hf download --local-dir` records it.
    notes = world.target / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(f"{COMMIT[::-1]}\netag\n0\n")
    return _bundle(world)


def _wrong_gamma(world: World) -> Callable[[], object]:
    put(world.package / "sts.json", sts(weights_digest(world.package)) | {"gamma": 5})
    return _verify(world)


def _foreign_records(world: World) -> Callable[[], object]:
    put(world.package / "eval.json", evaluation("f" * 64))
    return _verify(world)


def _foreign_tokenizer(world: World) -> Callable[[], object]:
    write_tokenizer(world.target, "abcdefghikj")
    return _bundle(world)


def _fine_tuned_target(world: World) -> Callable[[], object]:
    tensors = load_file(world.target / SHARD_1)
    save_file({name: value + 1 for name, value in tensors.items()}, world.target / SHARD_1)
    return _bundle(world)


def _other_target(world: World) -> Callable[[], object]:
    edit(world.target / CONFIG_FILE, hidden_size=16)
    return _bundle(world)


def _tampered_weights(world: World) -> Callable[[], object]:
    raw = bytearray((world.package / SINGLE_FILE).read_bytes())
    raw[-1] ^= 1
    (world.package / SINGLE_FILE).write_bytes(raw)
    return _verify(world, relist=False)


def _tampered_manifest(world: World) -> Callable[[], object]:
    path = world.package / "checksums.json"
    value = json.loads(path.read_text())
    entry = value["files"].pop("config.json")
    put(path, {"files": value["files"] | {"../config.json": entry}})
    return _verify(world, relist=False)


def _tampered_bundle(world: World) -> Callable[[], object]:
    bundle = world.root / "bundle"
    bundles.build(world.target, world.package, bundle)
    inside = bundle / "dspark"
    card = inside / "provenance.json"
    value = json.loads(card.read_text()) | {"sglang": "9.9.9"}
    card.unlink()  # it is a hard link
    put(card, value)
    # The inner checksums are made to match, which the bundle's record notices.
    (inside / "checksums.json").unlink()
    write_manifest(inside)
    return lambda: verify_any(bundle)


def _figure_without_source(world: World) -> Callable[[], object]:
    edit(world.package / "provenance.json", limits=["It is 3.2x faster than plain decoding."])
    return lambda: artifact.build(world.package, world.root / "out")


def _tampered_signature(world: World) -> Callable[[], object]:
    from dspark_packaging.signing import sign, verify_signature
    from tests.packaging.samples import make_keys

    private, public = make_keys(world.root / "keys")
    sign(world.package, private)
    path = world.package / "model.sig"
    value = json.loads(path.read_text())
    payload = value["dsseEnvelope"]["payload"]
    swapped = "B" if payload[40] != "B" else "C"
    value["dsseEnvelope"]["payload"] = payload[:40] + swapped + payload[41:]
    put(path, value)
    return lambda: verify_signature(world.package, public)


def _signed_then_changed(world: World) -> Callable[[], object]:
    from dspark_packaging.signing import sign, verify_signature
    from tests.packaging.samples import make_keys

    private, public = make_keys(world.root / "keys")
    sign(world.package, private)
    with (world.package / "LICENSE").open("a") as stream:
        stream.write("and more\n")
    return lambda: verify_signature(world.package, public)


def _foreign_key(world: World) -> Callable[[], object]:
    from dspark_packaging.signing import sign, verify_signature
    from tests.packaging.samples import make_keys

    private, _ = make_keys(world.root / "keys")
    _, public = make_keys(world.root / "others")
    sign(world.package, private)
    return lambda: verify_signature(world.package, public)


CASES = (
    Case("pickle", _pickle, "pickled"),
    Case("pickle_as_safetensors", _pickle_as_safetensors, "damaged"),
    Case("remote_code", _remote_code, "does not belong"),
    Case("path_traversal", _path_traversal, "plain names"),
    Case("symlink", _symlink, "is a link to"),
    Case("duplicated_key", _duplicated_key, "stored twice"),
    Case("key_twice_in_a_header", _key_twice_in_a_header, "twice"),
    Case("overlapping_offsets", _overlap, "overlaps"),
    Case("truncated_shard", _truncated, "truncated"),
    Case("missing_shard", _missing_shard, "which is not there"),
    Case("key_not_in_the_index", _key_not_in_the_index, "leaves out surplus"),
    Case("index_names_a_key_too_many", _index_names_a_key_too_many, "does not hold it"),
    Case("missing_key", _missing_key, "no tensor fc.weight"),
    Case("extra_key", _extra_key, "does not imply"),
    Case("wrong_shape", _wrong_shape, "norm.weight"),
    Case("wrong_dtype", _wrong_dtype, "norm.weight is I16"),
    Case("not_a_number", _not_a_number, "3 in fc.weight"),
    Case("infinite", _infinite, "1 in norm.weight"),
    Case("infinite_target", _infinite_target, "NaN or infinite values: 1 in model."),
    Case("secret", _secret, "holds .env"),
    Case("linked_results", _linked_results, "holds .eval_results"),
    Case("results_and_more", _results_and_more, "holds .eval_results/notes.txt"),
    Case("wrong_revision", _wrong_revision, "is revision"),
    Case("wrong_gamma", _wrong_gamma, "gamma 5"),
    Case("foreign_records", _foreign_records, "drafter_sha256"),
    Case("foreign_tokenizer", _foreign_tokenizer, "another tokenizer"),
    Case("fine_tuned_target", _fine_tuned_target, "another revision or a fine-tune"),
    Case("other_target", _other_target, "hidden_size"),
    Case("tampered_weights", _tampered_weights, "SHA-256"),
    Case("tampered_manifest", _tampered_manifest, "plain file names"),
    Case("tampered_bundle", _tampered_bundle, "dspark_bundle.json says"),
    Case("figure_without_source", _figure_without_source, "no measurement behind it"),
    Case("tampered_signature", _tampered_signature, "does not hold"),
    Case("signed_then_changed", _signed_then_changed, "LICENSE changed"),
    Case("foreign_key", _foreign_key, "does not hold"),
)
