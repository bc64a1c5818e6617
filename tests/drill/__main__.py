"""Kill, drain, starve and misuse real servers; faults for the canary to find.

A section that passed is not run again under the same settings and source, so an interrupted drill goes on where it
stopped. A full run that left nothing out also writes ``docs/results/drill.json``. Exit code 0: all passed. 1: something
is wrong. 2: it could not be found out.

With ``--url`` a running server is drilled instead: no kill, drain, disk or key. Do not do this to one that serves
people. Its key is read from API_KEY.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dspark_sglang.artifacts import write_json
from dspark_sglang.cli.main import run as run_command
from dspark_sglang.config import read_api_key
from tests.drill import canary as planted
from tests.drill import run as runs
from tests.drill.section import Section
from tests.drill.world import World

ROOT = Path(__file__).resolve().parents[2]
#: Requests of a full run: tiny soak (or that of ``--url``), real soak, right server under the canary; and of a short one.
FULL, SHORT = (10_000, 1_000, 5_000), (300, 50, 96)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m tests.drill", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--only", default="", help="sections, with commas between; default: all")
    add("--short", action="store_true", help="small sizes, to try it out")
    add("--fresh", action="store_true", help="also what has passed before")
    add("--out", type=Path, help="default: runs/drill, or runs/drill-short")
    add("--url", default="", help="drill this running server instead")
    add("--requests", type=int, help="of the soak of --url")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the drill; the exit code.

    Raises:
        DSparkError: it could not be found out.
    """
    given = parser().parse_args(arguments)
    tiny, real, watched = SHORT if given.short else FULL
    options = runs.Options(
        out=given.out or ROOT / "runs" / ("drill-short" if given.short else "drill"),
        drafter=ROOT / "model_cards" / "smollm2-135m-instruct-dspark",
        tiny_requests=given.requests or tiny,
        real_requests=real,
        url=given.url.rstrip("/"),
        api_key=read_api_key(),
    )
    if options.url:
        sections = runs.remote(options)
    else:
        world = World(options.out, options.drafter, options.seed)
        sections = runs.own(world, options) | {
            "canary": partial(planted.canary, world, requests=watched)
        }
    found = show(runs.choose(sections, given.only), options, fresh=given.fresh)
    if not (given.short or given.only or given.url):
        write_json(ROOT / "docs/results/drill.json", {**found, "command": "make drill"})
    return int(not found["passed"])


def show(sections: Mapping[str, runs.Run], options: runs.Options, *, fresh: bool) -> dict[str, Any]:
    """Run sections and say what they found; all of it also in ``drill.json``."""
    began, done = time.monotonic(), list[Section]()
    for section in runs.run(sections, options, fresh=fresh):
        done.append(section)
        print(*_lines(section), sep="\n", flush=True)
    command = shlex.join(["python", "-m", "tests.drill", *sys.argv[1:]])
    found = runs.summary(done, command, time.monotonic() - began)
    write_json(options.out / "drill.json", found)
    print(f"{'passed' if found['passed'] else 'FAILED'}: {options.out}/drill.json")
    return found


def _lines(section: Section) -> list[str]:
    if section.skipped:
        return [f"- {section.name} skipped: {section.skipped}"]
    mark = "WRONG" if section.faults else "ok"
    ends = ", ".join(f"{count} {end}" for end, count in section.ends.items())
    return [
        f"{mark} {section.name} in {section.seconds:.0f} s: {ends}",
        *(f"    {fault}" for fault in section.faults),
    ]


if __name__ == "__main__":
    run_command(main)
