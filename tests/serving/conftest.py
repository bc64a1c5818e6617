"""Real SGLang servers, started once for the tests of a file: more than a few do not lie in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.placement import UNEVEN
from dspark_sglang import targets
from dspark_sglang.server import Server, free_port, serve_command
from tests.tiny_models import ensure_models

ROOT = Path(__file__).resolve().parents[2]
DRAFTER = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"


#: A pool that sixteen short requests fill: the servers of two groups of tests lie in memory at once.
SMALL = ["--max-total-tokens", "8192"]


class Pair(NamedTuple):
    """The same target in float32, without speculation and with DSPARK."""

    plain: Server
    dspark: Server


@pytest.fixture(scope="session")
def target() -> Path:
    return targets.ensure_target()


@pytest.fixture(scope="session")
def drafter() -> Path:
    return DRAFTER


@pytest.fixture(scope="module")
def servers(
    target: Path, drafter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    logs = tmp_path_factory.mktemp("servers")
    started = []
    try:
        for name, draft in (("plain", None), ("dspark", drafter)):
            port = free_port()
            # a small model at temperature 1 can fill its answer with the white space JSON allows
            extra = [*SMALL, "--enable-metrics", "--constrained-json-disable-any-whitespace"]
            command = serve_command(target, port, dtype="float32", drafter=draft, extra=extra)
            started.append(Server(command, port=port, log=logs / f"{name}.log").start())
        for server in started:
            server.wait_ready()
        yield Pair(*started)
    finally:
        for server in started:
            server.stop()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny target whose nine query heads only a whole drafter can serve on several ranks, and its drafter."""
    return ensure_models(tmp_path_factory.mktemp("models"), 3, UNEVEN)
