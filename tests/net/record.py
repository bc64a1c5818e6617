"""Write ``docs/results/never-ends.json``: what was measured of "a request never ends the server".

``python -m tests.net.record --net runs/net.json --net runs/net-overlap.json`` runs the tests of every case, of every planted
fault and of the kit, and adds what the net caught.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dspark_sglang.provenance import machine, versions
from tests.raises import RAISES

ROOT = Path(__file__).resolve().parents[2]
NEVER = "tests/serving/test_never_ends.py"
SENT = "tests/serving/test_planted.py"
#: Tests that stand for cases of the issue; each failed before.
CASES = (
    f"{NEVER}::test_a_greedy_request_is_answered_as_plain_decoding_answers_it",
    f"{NEVER}::test_chat_with_a_schema_that_must_not_end_yet",
    f"{NEVER}::test_a_request_that_nothing_can_be_drawn_for_ends_alone",
    f"{NEVER}::test_the_same_in_a_stream",
    f"{NEVER}::test_an_infinite_bias_is_certain_for_requests_that_sample",
    f"{NEVER}::test_sixteen_equal_requests_for_json",
    f"{NEVER}::test_an_update_with_equal_weights_changes_nothing",
    f"{NEVER}::test_an_update_waits_for_requests_as_on_a_plain_server",
    f"{SENT}::test_tensors_of_the_target",
    f"{SENT}::test_tensors_of_the_drafter",
    f"{SENT}::test_tensors_from_a_process_group",
    f"{NEVER}::test_pauses_aborts_and_flushes_at_any_moment",
    "tests/serving/test_start_cases.py",
)
PLANTED = (
    f"{SENT}::test_a_fault_of_the_drafter_is_contained",
    f"{SENT}::test_a_request_whose_logits_are_nan_ends_alone",
    f"{SENT}::test_a_drafter_with_broken_weights_serves_plain_decoding",
    "tests/serving/test_contained.py::test_with_several_ranks_an_exception_ends_the_server",
)


def passed(nodes: tuple[str, ...]) -> tuple[int, int]:
    """How many tests passed, and of how many."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *nodes]
        subprocess.run(command, cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot()[0]
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return count["tests"] - count["failures"] - count["errors"] - count["skipped"], count["tests"]


def kit() -> dict[str, Any]:
    """The four faults of the kit, looked for again."""
    sys.path.insert(0, str(ROOT / "tests" / "deploy"))
    import router
    import tools
    import yaml

    from tests.deploy import manifest_network
    from tests.packaging import test_push
    from tests.packaging.cases import CASES as FOLDERS
    from tests.packaging.cases import run_case

    rendered = (ROOT / "deploy" / "rendered" / "qwen3-8b-1xh100.yaml").read_text()
    documents = [document for document in yaml.safe_load_all(rendered) if document]
    with tempfile.TemporaryDirectory() as folder:
        refused = []
        for case in FOLDERS:
            if case.name in ("not_a_number", "infinite", "infinite_target"):
                own = Path(folder) / case.name
                own.mkdir()
                refused.append(run_case(case, own).refused)
        pushed = Path(folder) / "push"
        pushed.mkdir()
        extra = test_push.push_extra_files(pushed)
    return {
        "policies_unreachable": manifest_network.policies_unreachable(ROOT / "deploy"),
        "router_rogue_refused": router.faults(router.run(tools.router("0.3.2"), documents)) == [],
        "push_extra_files": extra,
        "nan_refused": len(refused) == 3 and all(refused),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--net", type=Path, action="append", default=[], help="a result of tests.net.run"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "never-ends.json")
    given = parser.parse_args()
    nets: list[dict[str, Any]] = [json.loads(path.read_text()) for path in given.net]
    fixed, cases = passed(CASES)
    contained, planted = passed(PLANTED)
    record = {
        "command": "make never-ends",
        "machine": machine(),
        "versions": versions(),
        "cases": {"fixed": fixed, "of": cases},
        "net": {
            key: sum(net[key] for net in nets)
            for key in ("requests", "compared", "different", "ties", "ended")
        },
        "nets": nets,
        "raises_listed": len(RAISES),
        "planted": {"contained": contained, "of": planted},
        "kit": kit(),
    }
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
