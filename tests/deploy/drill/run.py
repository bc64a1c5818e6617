"""``make drill``: every section of ``dspark drill``, and the canary against planted faults.

Results go to ``runs/drill`` and, of a full run that left nothing out, to ``docs/results/drill.json``.
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(Path(__file__).parent))

import canary as planted  # noqa: E402

from dspark_sglang.artifacts import write_json  # noqa: E402
from dspark_sglang.cli.drill import show  # noqa: E402
from dspark_sglang.drill import run as runs  # noqa: E402
from dspark_sglang.drill.world import World  # noqa: E402
from dspark_sglang.errors import DSparkError  # noqa: E402

#: Requests of a full run: tiny soak, real soak, right server under the canary; and of a short one.
FULL, SHORT = (10_000, 1_000, 5_000), (300, 50, 96)


def main(
    only: Annotated[str, typer.Option(help="Sections, with commas between. Default: all.")] = "",
    short: Annotated[bool, typer.Option("--short", help="Small sizes, to try it out.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Also what has passed before.")] = False,
    out: Annotated[Path | None, typer.Option(help="Default: runs/drill, or runs/drill-short.")] = None,
) -> None:  # fmt: skip
    """Run the drill. Exit code 0: all passed. 1: something is wrong. 2: it could not be found out."""
    tiny, real, watched = SHORT if short else FULL
    folder = out or ROOT / "runs" / ("drill-short" if short else "drill")
    drafter = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"
    options = runs.Options(out=folder, drafter=drafter, tiny_requests=tiny, real_requests=real)
    world = World(folder, drafter, options.seed)
    sections = {
        **runs.own(world, options),
        "canary": partial(planted.canary, world, requests=watched),
    }
    found = show(runs.choose(sections, only), options, fresh=fresh)
    if not (short or only):
        write_json(ROOT / "docs/results/drill.json", {**found, "command": "make drill"})
    if not found["passed"]:
        raise typer.Exit(1)


def _terminate(number: int, frame: object) -> None:
    """End like an interrupt, so that servers and mounts are cleaned up."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    try:
        typer.run(main)
    except DSparkError as error:
        print(f"drill: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
