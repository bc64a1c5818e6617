"""Record golden traces, or compare new ones with those that are stored.

``python -m tests.golden.record``: all of them; names after it: some. ``--check`` stores nothing and shows the first
step that differs; ``--exact`` asks for the same bytes, which only the machine that recorded owes.
``--servers 2`` starts as many at once (each takes about 3 GB; they are asked in turn).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.golden import scenario, servers, simulated, trace

NAMES = (*simulated.CASES, *scenario.CASES)


def recorded(names: Sequence[str], *, at_once: int) -> Iterator[tuple[str, str]]:
    """Names and new traces, as they come.

    Args:
        at_once: servers that are started together.
    """
    for name in names:
        if name in simulated.CASES:
            yield name, simulated.record(simulated.CASES[name])
    served = [scenario.CASES[name] for name in names if name in scenario.CASES]
    for first in range(0, len(served), at_once):
        yield from servers.record(served[first : first + at_once]).items()


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or compare; exit 1 where a trace differs or is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--check", action="store_true", help="compare, and store nothing")
    parser.add_argument("--exact", action="store_true", help="with --check: byte for byte")
    parser.add_argument("--servers", type=int, default=1, help="started at once")
    parser.add_argument(
        "--json", type=Path, help="with --check: write steps and whether they are equal"
    )
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"{unknown[0]} is no trace: {', '.join(NAMES)}")
    wrong = steps = 0
    for name, text in recorded(given.names or NAMES, at_once=given.servers):
        if not given.check:
            path = trace.save(name, text)
            print(f"{name}: {path.stat().st_size} bytes", flush=True)
        elif not trace.path_of(name).exists():
            wrong += 1
            print(f"{name}: nothing is stored to compare with", flush=True)
        else:
            found = trace.compare(name, trace.load(name), text, exact=given.exact)
            wrong += not found.equal
            steps += len(trace.decode(text)) - 2  # a first line and a last one
            print(found.report, flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps({"steps": steps, "equal": not wrong}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
