"""Plans against real servers: what was computed, and what SGLang allocated on this machine.

``make plan`` writes ``docs/results/plan.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_sglang import targets
from dspark_sglang.artifacts import write_json
from dspark_sglang.cli.main import run
from dspark_sglang.errors import ServerError
from dspark_sglang.planning import hardware
from dspark_sglang.planning import plan as planning
from dspark_sglang.planning.options import Options
from dspark_sglang.planning.sizing import DRAFTER
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.server import COMMON_FLAGS, Server, free_port, serve_command
from tests.planning import tiny
from tests.planning.anchors import anchors
from tests.planning.footprint import MARK

#: Cap of the pools in every server here.
TOKENS = int(COMMON_FLAGS[COMMON_FLAGS.index("--max-total-tokens") + 1])
#: Not weights of the checkpoint.
_ASIDE = ("rotary tables", "packed copies", DRAFTER + "draft vocabulary")
_ENTRY = "[sglang.srt.plugins]\ndspark_footprint = tests.planning.footprint:activate\n"
_QUANTITIES = ("target weights", "drafter weights", "target KV", "draft KV")


class Pair(NamedTuple):
    """A target and its drafter; None where SGLang cannot draft for it."""

    name: str
    target: Path
    drafter: Path | None
    dtype: str


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity of one server, in bytes."""

    computed: int
    allocated: int

    @property
    def error_pct(self) -> float:
        """How far the plan is off."""
        return abs(self.computed - self.allocated) / self.allocated * 100


def pairs(folder: Path, drafter: Path) -> list[Pair]:
    """What is measured: SmolLM2 and tiny targets of two other families.

    Args:
        folder: where the tiny ones are kept.
        drafter: SmolLM2's drafter.
    """
    made = [Pair("smollm2-135m-instruct", targets.ensure_target(), drafter, "bfloat16")]
    for family in tiny.FAMILIES:
        target, own = tiny.ensure(folder / family, family)
        made.append(Pair(f"tiny {family}", target, own, "float32"))
    return made


@contextmanager
def _plugin() -> Iterator[dict[str, str]]:
    """An environment in which servers load :mod:`tests.planning.footprint` as a plugin."""
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "dspark_footprint-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: dspark-footprint\nVersion: 0\n"
        )
        (info / "entry_points.txt").write_text(_ENTRY)
        path = os.pathsep.join([folder, *(entry for entry in sys.path if entry)])
        # Every block verified: no step cost to measure before the server is up.
        yield {"PYTHONPATH": path, "DSPARK_SCHEDULE": "all"}


def allocated(pair: Pair, log: Path) -> dict[str, int]:
    """Bytes a real server of ``pair`` allocated, by quantity.

    Raises:
        ServerError: it did not start, or said nothing.
    """
    port = free_port()
    command = serve_command(pair.target, port, dtype=pair.dtype, drafter=pair.drafter)
    with (
        _plugin() as environment,
        Server(command, port=port, log=log, environment=environment) as server,
    ):
        server.wait_ready()
    found: dict[str, int] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if MARK in line:
            said = json.loads(line[line.index(MARK) + len(MARK) :])
            role = ("draft", "drafter") if said["draft"] else ("target", "target")
            name = f"{role[0]} KV" if said["what"] == "kv" else f"{role[1]} weights"
            found[name] = int(said["bytes"])
    if set(found) != set(quantities(pair)):
        raise ServerError(
            f"The server of {pair.name} reported {sorted(found)}.",
            expected=", ".join(quantities(pair)),
            fix=f"See its log in {log}.",
        )
    return found


def quantities(pair: Pair) -> tuple[str, ...]:
    """What there is to compare."""
    return _QUANTITIES if pair.drafter is not None else _QUANTITIES[::2]


def computed(pair: Pair) -> dict[str, int]:
    """The same quantities by plan."""
    options = Options(dtype=pair.dtype, max_total_tokens=TOKENS, context=256)
    drafter = None if pair.drafter is None else str(pair.drafter)
    made = planning.make(str(pair.target), drafter, hardware.at_hand(), options)
    sums = {"target weights": 0, "drafter weights": 0}
    for part, size in made.weights_by_part.items():
        if part not in _ASIDE:
            sums["drafter weights" if part.startswith(DRAFTER) else "target weights"] += size
    return sums | {name: made.per_gpu_bytes[name] for name in ("target KV", "draft KV")}


def compare(pair: Pair, log: Path) -> dict[str, Compared]:
    """Plan and server side by side."""
    real, ours = allocated(pair, log), computed(pair)
    return {name: Compared(computed=ours[name], allocated=real[name]) for name in quantities(pair)}


def measure(chosen: list[Pair], logs: Path) -> dict[str, Any]:
    """Start a server for each pair; ``plan_error_pct`` is the worst of all quantities."""
    cases = {
        pair.name: compare(pair, logs / f"{pair.name.replace(' ', '-')}.log") for pair in chosen
    }
    errors = [value.error_pct for case in cases.values() for value in case.values()]
    return {
        "plan_error_pct": round(max(errors), 4),
        "anchors": msgspec.to_builtins(anchors()),
        "servers": msgspec.to_builtins(cases),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--drafter", type=Path, default=Path("model_cards/smollm2-135m-instruct-dspark")
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/plan"), help="models and logs")
    arguments = parser.parse_args()
    result = measure(pairs(arguments.runs, arguments.drafter), arguments.runs)
    made = provenance(["python", "-m", "tests.planning.measure", *sys.argv[1:]])
    write_json(
        arguments.out,
        {"machine": machine(), "provenance": msgspec.to_builtins(made), **result},
    )
    print(f"plan_error_pct {result['plan_error_pct']} in {arguments.out}")


if __name__ == "__main__":
    run(main)
