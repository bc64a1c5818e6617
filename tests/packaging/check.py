"""``make package-check``: every promise of packaging, tried, in one JSON file.

Needs PyPI once, for two releases of the Hub's client; the Hub itself is a local stand-in.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from dspark_packaging.errors import PackageError
from dspark_sglang import targets
from dspark_sglang.artifacts import SCHEMA_VERSION, write_json
from dspark_sglang.config import read_settings
from dspark_sglang.errors import DSparkError
from dspark_sglang.provenance import machine, versions
from tests.packaging.cases import CASES, run_case
from tests.packaging.large import fill_disk, in_process, make_large, pack_large, v4_layout
from tests.packaging.round_trip import round_trip
from tests.packaging.samples import COMMITTED
from tests.packaging.v4_layout import Width

Say = Callable[[str], None]
COMMAND = "make package-check"


def check(artifact: Path, target: Path, work: Path | None, say: Say) -> dict[str, Any]:
    """Run everything; the summary is the content of ``runs/package/summary.json``.

    Args:
        artifact: the packaged drafter that makes the round trip.
        target: its target.
        work: where scratch files go (about 3 GB; sparse files look larger); None: a temporary folder.
        say: told each step.

    Raises:
        DSparkError: a step failed that has no outcome of its own.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=work, prefix="package-check.") as scratch:
        root = Path(scratch)
        refused, untouched = _cases(root, say)
        say("a disk that fills up")
        full = fill_disk(root / "full")
        refused["disk_full"] = full.refused and full.resumed
        untouched = untouched and full.untouched
        say("V4-Pro's keys: pack, verify, split")
        verified, same, tensors = v4_layout(root / "v4", Width(), 64)
        say("more than 100 GB in sparse files")
        in_process(make_large, root / "large")
        large = in_process(pack_large, root / "large")
        say(f"{large.bytes / 1e9:.0f} GB: {large.pack_s} s, peak {large.peak_rss_gb} GB of memory")
        (root / "trip").mkdir()
        trip = round_trip(
            artifact, target, root / "trip", read_settings().cache_path / "clients", say
        )
    refused["interrupted_upload"] = trip.interrupted_push_resumed
    refused["public_repository"] = trip.public_repository_refused
    return {
        "schema_version": SCHEMA_VERSION,
        "round_trip_served": trip.served,
        "split_back_identical": same and large.split_back_identical,
        "v4_pro_layout_verified": verified,
        "v4_pro_layout_tensors": tensors,
        "peak_rss_gb": large.peak_rss_gb,
        "refused": refused,
        "sources_untouched": untouched,
        "large": msgspec.to_builtins(large),
        "round_trip": msgspec.to_builtins(trip),
        "seconds": round(time.monotonic() - start),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "command": COMMAND,
    }


def _cases(root: Path, say: Say) -> tuple[dict[str, bool], bool]:
    refused: dict[str, bool] = {}
    untouched = True
    for case in CASES:
        folder = root / "cases" / case.name
        folder.mkdir(parents=True)
        outcome = run_case(case, folder)
        refused[case.name] = outcome.refused
        untouched = untouched and outcome.untouched
        if not (outcome.refused and outcome.untouched):
            say(f"case {case.name}: {outcome.error}")
    say(f"{sum(refused.values())} of {len(refused)} kinds of bad input refused")
    return refused, untouched


def require_good(summary: dict[str, Any]) -> None:
    """Raise unless everything held.

    Raises:
        PackageError: what did not.
    """
    trip = summary["round_trip"]
    wrong = [name for name, refused in summary["refused"].items() if not refused]
    wrong += [
        name
        for name in (
            "round_trip_served",
            "split_back_identical",
            "v4_pro_layout_verified",
            "sources_untouched",
        )
        if not summary[name]
    ]
    wrong += [name for name in ("private_by_default", "token_never_printed") if not trip[name]]
    wrong += [name for name, same in trip["clients"].items() if not same]
    wrong += ["peak_rss_gb"] if summary["peak_rss_gb"] > 1.0 else []
    if wrong:
        raise PackageError(
            f"package-check failed: {', '.join(wrong)}.",
            expected="every check to hold",
            fix="The lines above and runs/package/summary.json say more.",
        )


def main() -> int:
    """Run it and write ``summary.json``; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/package"), help="for summary.json")
    parser.add_argument("--artifact", type=Path, default=COMMITTED, help="makes the round trip")
    parser.add_argument("--target", type=Path, help="its target; default: the demo's")
    parser.add_argument("--work", type=Path, help="scratch folder (3 GB, a file system with holes)")
    given = parser.parse_args()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        target = given.target or targets.ensure_target(progress=say)
        summary = check(given.artifact, target, given.work, say)
        write_json(given.out / "summary.json", summary)
        say(f"Wrote {given.out / 'summary.json'} ({summary['seconds']} s).")
        require_good(summary)
    except DSparkError as error:
        say(f"package-check: error: {error}")
        return 2
    say(f"All held; {len(summary['refused'])} kinds of bad input refused or resumed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
