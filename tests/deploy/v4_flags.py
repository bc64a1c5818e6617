"""Flags of the overlays that serve DeepSeek-V4: which of them a tiny bundle can be started with on CPU cores.

Read from ``deploy/rendered``, which ``test_observability.py`` holds against the overlays. A flag that is in neither table
fails ``test_v4_flags.py``, so that a new one has to be thought about.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "deploy"))

from manifest_model import Context, arguments, environment, serves  # noqa: E402

RENDERED = ROOT / "deploy" / "rendered"
#: What the CPU platform takes as it stands in the overlay.
AS_IT_STANDS = frozenset(
    {
        "--speculative-algorithm", "--served-model-name", "--weight-version", "--enable-metrics",
        "--api-key", "--max-running-requests", "--chunked-prefill-size", "--mem-fraction-static",
    }
)  # fmt: skip
#: What it takes with another value, ``{}`` being filled in by :func:`words`: one machine, two ranks, a tiny bundle.
REDUCED = {
    "--model-path": "{bundle}",
    "--speculative-draft-model-path": "{bundle}",
    "--host": "127.0.0.1",
    "--port": "{port}",
    "--tp-size": "2",
    "--nnodes": "1",
    "--node-rank": "0",
    "--dist-init-addr": "127.0.0.1:{dist_port}",
}
#: What cannot be started here, and why.
NEEDS = {
    "--moe-runner-backend": "CUDA: Marlin's fp4 experts are a kernel for Hopper",
    "--rdma": "InfiniBand or RoCE devices between GPU nodes, for NCCL",
}
#: Not in the overlays: on CPU cores the pool is sized by the machine's memory unless it is capped.
ADDED = ("--device", "cpu", "--max-total-tokens", "16384")
#: Variables that reach the server as they stand in the overlay.
_VARIABLES = ("DSPARK_PLUGIN", "DSPARK_SCHEDULE", "SGLANG_")


class FlagSet(NamedTuple):
    """The flags of one overlay's server."""

    #: In order, each with its values, reduced where :data:`REDUCED` says so.
    served: tuple[tuple[str, tuple[str, ...]], ...]
    #: Flags that need CUDA or other hardware, and why.
    needs: dict[str, str]
    environment: dict[str, str]


def is_v4(overlay: str) -> bool:
    """Whether an overlay serves DeepSeek-V4, by what it serves."""
    return any("deepseek-v4" in "".join(values) for _, values in _servers(overlay)[0][0])


def overlays() -> list[str]:
    """Names of the overlays that serve DeepSeek-V4."""
    return [path.stem for path in sorted(RENDERED.glob("*.yaml")) if is_v4(path.stem)]


def _servers(overlay: str) -> list[tuple[list[tuple[str, list[str]]], dict[str, str]]]:
    """Flags and environment of every server of an overlay, the first node's first."""
    documents = list(yaml.safe_load_all((RENDERED / f"{overlay}.yaml").read_text()))
    context = Context(documents, {}, frozenset())
    found = [
        (arguments(container, context), environment(container, context))
        for workload in context.workloads()
        for container in workload.containers
        if serves(container)
    ]
    # Only the first node listens for clients, so only it has their key.
    return sorted(found, key=lambda one: "--api-key" not in dict(one[0]))


def flags(overlay: str) -> set[str]:
    """Every flag that any server of an overlay has."""
    return {name for given, _ in _servers(overlay) for name, _ in given}


def flag_set(overlay: str) -> FlagSet:
    """The flags of an overlay's first server, told apart.

    Raises:
        KeyError: a flag that no table here has.
    """
    given, values = _servers(overlay)[0]
    served: list[tuple[str, tuple[str, ...]]] = []
    needs: dict[str, str] = {}
    for name, words in given:
        if name in REDUCED:
            served.append((name, (REDUCED[name],)))
        elif name in AS_IT_STANDS:
            served.append((name, tuple(words)))
        else:
            needs[name] = NEEDS[name]
    kept = {name: value for name, value in values.items() if name.startswith(_VARIABLES)}
    return FlagSet(tuple(served), needs, kept)


FLAGS = {overlay: flag_set(overlay) for overlay in overlays()}


def words(overlay: str, bundle: Path, port: int, dist_port: int) -> list[str]:
    """What follows ``dspark serve`` to start a tiny bundle as an overlay does."""
    named = {"bundle": str(bundle), "port": str(port), "dist_port": str(dist_port)}
    found = [
        word.format(**named) for name, values in FLAGS[overlay].served for word in (name, *values)
    ]
    return [*found, *ADDED]
