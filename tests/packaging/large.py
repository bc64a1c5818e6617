"""Bundles too large to copy, and a disk that fills up: run in processes of their own."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_packaging import bundle as bundles
from dspark_packaging.errors import PackageError
from dspark_packaging.layout import visible_entries
from dspark_packaging.transfer import shown, silent, write_subset
from dspark_packaging.verify import verify_any
from dspark_sglang.checkpoint import read_header
from tests.packaging.samples import tree
from tests.packaging.v4_layout import Width, write_pair

#: DeepSeek-V4-Pro's keys, wide enough for more than 100 GB.
WIDE = Width(hidden=2560, expert=1024, heads=64, head=128, rank=256, markov=128)
_SHARDS = 64
_LIMIT = 1 << 20


class Large(msgspec.Struct, frozen=True, kw_only=True):
    """What packing a sparse layout took."""

    bytes: int
    tensors: int
    files: int
    pack_s: float
    split_s: float
    #: Bytes that were newly written on disk for the bundle.
    written_bytes: int
    rewritten_shard_bytes: int
    split_back_identical: bool
    peak_rss_gb: float


class Full(NamedTuple):
    """A disk that filled up, and the same command afterwards."""

    refused: bool
    resumed: bool
    untouched: bool


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``function`` in a fresh interpreter, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def make_large(root: Path, width: Width = WIDE, shards: int = _SHARDS) -> None:
    """Write the sparse layout; in a process of its own, so that packing is measured alone."""
    write_pair(root, width, shards=shards, sparse=True)


def pack_large(root: Path, shards: int = _SHARDS) -> Large:
    """Pack and split what :func:`make_large` wrote; call through :func:`in_process`.

    Raises:
        DSparkError: a step failed.
    """
    target, drafter = root / "target", root / "drafter"
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in _files(target, drafter)}
    start = time.monotonic()
    done = bundles.build(target, drafter, root / "bundle", progress=shown)
    packed = time.monotonic()
    parts = bundles.split(root / "bundle", root / "parts")
    split = time.monotonic()
    # One shard without its first tensor: what replacing tensors writes anew.
    shard = target / f"model-00002-of-{shards:05d}.safetensors"
    names = sorted(read_header(shard).tensors)[1:]
    write_subset(shard, root / "rewritten.safetensors", names, lambda nbytes: None)
    rewritten = (root / "rewritten.safetensors").stat().st_size
    links = [p for p in _files(root / "bundle") if p.stat().st_nlink == 1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Large(
        bytes=done.verified.nbytes,
        tensors=done.verified.tensors,
        files=len(done.verified.files),
        pack_s=round(packed - start, 1),
        split_s=round(split - packed, 1),
        written_bytes=sum(path.stat().st_size for path in links),
        rewritten_shard_bytes=rewritten,
        split_back_identical=_same(target, parts.target)
        and _same(drafter, parts.drafter)
        and before == {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in before},
        peak_rss_gb=round(peak * 1024 / 1e9, 3),
    )


def _files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in visible_entries(folder) if path.is_file()]


def _same(one: Path, other: Path) -> bool:
    """Weights are the same files; everything else has the same bytes."""
    if [p.name for p in visible_entries(one)] != [p.name for p in visible_entries(other)]:
        return False
    return all(
        path.samefile(other / path.name)
        if path.suffix == ".safetensors"
        else path.read_bytes() == (other / path.name).read_bytes()
        for path in _files(one)
    )


def _limited(target: Path, drafter: Path, out: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT, _LIMIT))
    try:
        bundles.build(target, drafter, out, bundles.Options(method="copy"))
    except PackageError as error:
        return str(error)
    return ""


def fill_disk(root: Path) -> Full:
    """Copy into a place where files may not grow beyond a megabyte, then without the limit."""
    target, drafter = write_pair(root, Width(experts=2), shards=4)
    before = tree(target), tree(drafter)
    said = in_process(_limited, target, drafter, root / "bundle")
    refused = "cannot grow" in said and not (root / "bundle").exists()
    done = bundles.build(
        target, drafter, root / "bundle", bundles.Options(method="copy"), progress=silent
    )
    verify_any(root / "bundle")
    parts = bundles.split(root / "bundle", root / "parts", method="copy")
    whole = (tree(parts.target), tree(parts.drafter)) == before
    return Full(
        refused=refused,
        resumed=done.resumed and whole,
        untouched=(tree(target), tree(drafter)) == before,
    )


def v4_layout(root: Path, width: Width, shards: int) -> tuple[bool, bool, int]:
    """Pack, verify and split V4-Pro's keys with random bytes.

    Returns:
        Whether it verified, whether splitting gave back every byte, and the tensors.
    """
    target, drafter = write_pair(root, width, shards=shards)
    before = tree(target), tree(drafter)
    bundles.build(target, drafter, root / "bundle")
    verified = verify_any(root / "bundle")
    parts = bundles.split(root / "bundle", root / "parts")
    same = (tree(parts.target), tree(parts.drafter)) == before
    shutil.rmtree(root)
    return verified.shape == "bundle (mtp)", same, verified.tensors
