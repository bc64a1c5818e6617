"""The simulator's twin of a server, what is compared with it, and the document, without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from dspark_sglang.artifacts import Provenance, write_json
from dspark_sglang.core.schedule.cost_model import CostModel
from dspark_sglang.core.sts import BINS
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.provenance import machine
from dspark_sglang.simulate.costs import Overheads, learned
from tests.simulate.simulated_times import Fixed
from tests.simulation import __main__ as command
from tests.simulation import published, twin
from tests.simulation.published import rows
from tests.simulation.twin import Observed, Parameters


@pytest.fixture(scope="module")
def cost() -> CostModel:
    return learned(Fixed(gamma=5, step=0.04, round_=0.06), requests=16, context=100)


def test_what_a_server_counted_is_drawn_as_often() -> None:
    seen = np.zeros((2, 2, BINS))
    seen[1, 0, 2], seen[1, 0, BINS - 1], seen[1, 1, 5] = 300.0, 100.0, 50.0
    stated = seen * ((np.arange(BINS) + 0.5) / BINS)
    kept = seen * 0.25
    kept[1, 0, BINS - 1] = 90.0
    table = {"seen": seen.tolist(), "predicted": stated.tolist(), "kept": kept.tolist()}
    law = twin.from_reliability(table, sampled=True)
    likely = law.confidence[:, 0] > 0.9
    assert likely.mean() == pytest.approx(0.25, abs=0.01)
    assert law.chance[likely, 0].mean() == pytest.approx(0.9)
    assert law.chance[~likely, 0].mean() == pytest.approx(0.25)
    with pytest.raises(ArtifactError, match="Let it serve longer"):
        twin.from_reliability(table, sampled=False)


def observed(users: int, *, steps: int, step_s: float, wall_s: float, began: int) -> Observed:
    return Observed(
        users=users, tok_s=100.0, tpot_s=0.05, ttft_s=0.1, budget=2.0, accept_length=1.7, drafting=1.0,
        wall_s=wall_s, step_s=step_s, steps=steps, began=began,
    )  # fmt: skip


def test_what_lies_between_steps_is_found_again() -> None:
    true = Overheads(step=0.004, request=0.0005, prefill_step=0.1)
    blocks = []
    for users, steps, began in ((1, 300, 8), (8, 200, 30), (32, 120, 70)):
        prefills = began - users + 1
        rest = true.step * steps + true.request * steps * users + true.prefill_step * prefills
        blocks.append(observed(users, steps=steps, step_s=9.0, wall_s=9.0 + rest, began=began))
    found = twin.overheads(blocks)
    assert found.step == pytest.approx(true.step)
    assert found.request == pytest.approx(true.request)
    assert found.prefill_step == pytest.approx(true.prefill_step)
    for few in (blocks[:1], blocks[1:]):
        with pytest.raises(ConfigError, match="where prefill is timed"):
            twin.overheads(few)


def fitted(cost: CostModel, **changes: Any) -> Parameters:
    seen = np.zeros((2, 5, BINS))
    seen[1, :, BINS // 2] = 500.0
    table = {
        "seen": seen.tolist(),
        "predicted": (seen * 0.5).tolist(),
        "kept": (seen * 0.5).tolist(),
    }
    known: dict[str, Any] = {
        "machine": machine(), "target": "t", "drafter_sha256": "d", "dtype": "bfloat16", "temperature": 1.0,
        "speculation": "on", "slots": 32, "max_tokens": 32, "cost": cost.state(), "fingerprint": {},
        "reliability": table, "reference_s": 0.05, "overheads": Overheads(step=0.01, prefill_request=0.05),
        "answer_tokens": [32], "prompt_tokens": [60],
        "fitted": [observed(8, steps=1, step_s=1, wall_s=2, began=1)],
        "provenance": Provenance(created="now", command="c", versions={}),
    }  # fmt: skip
    return Parameters(**{**known, **changes})


def test_a_lone_user_of_the_twin_is_as_fast_as_its_parts_say(cost: CostModel) -> None:
    one = twin.predict(fitted(cost), 1, seconds=120.0)
    length = sum(0.5**k for k in range(6))
    assert one.budget == 5 and one.accept_length == pytest.approx(length, rel=0.03)
    assert one.tpot_ms is not None
    assert one.tpot_ms[0] == pytest.approx(1e3 * 0.07 / length, rel=0.06)
    seconds = 0.05 + 0.01 + 31 * 1e-3 * one.tpot_ms[0]
    assert one.tok_s == pytest.approx(32 / seconds, rel=0.05)


def test_parameters_come_back_and_belong_to_a_machine(tmp_path: Path, cost: CostModel) -> None:
    path = tmp_path / "p.json"
    write_json(path, fitted(cost))
    assert twin.read(path, here=True) == fitted(cost)
    write_json(path, fitted(cost, machine="another"))
    assert twin.read(path).machine == "another"
    with pytest.raises(ArtifactError, match="was fitted on another"):
        twin.read(path, here=True)
    with pytest.raises(ArtifactError, match="simulate-fit"):
        twin.read(tmp_path / "none.json")


def test_loads_that_were_fitted_are_no_check(cost: CostModel) -> None:
    command.check_loads(fitted(cost), [2, 3])
    for loads in ([2, 8], [64]):
        with pytest.raises(ConfigError, match="not fitted"):
            command.check_loads(fitted(cost), loads)


def test_errors_are_relative_and_the_worst_counts(cost: CostModel, tmp_path: Path) -> None:
    one = twin.predict(fitted(cost), 2, seconds=60.0)
    assert one.tpot_ms is not None
    base = observed(2, steps=1, step_s=1, wall_s=2, began=1)
    off = msgspec.structs.replace(
        base, tok_s=one.tok_s / 1.1, tpot_s=one.tpot_ms[1] / 1e3 / 0.95, budget=one.budget
    )
    # The same on a machine that takes twice as long for everything.
    slow = msgspec.structs.replace(off, tok_s=off.tok_s / 2, tpot_s=off.tpot_s * 2, reference_s=0.1)
    found = twin.compare(one, [slow, slow], 0.05)
    assert found.error_pct == {"throughput": 10.0, "tpot": -5.0, "budget": 0.0}
    assert found.slowdown == 2.0
    assert twin.worst([found]) == {"throughput": 10.0, "tpot": 5.0, "budget": 0.0}
    command.write([found], fitted(cost), Path("p.json"), tmp_path)
    assert published.read(tmp_path)["sim_error_pct"]["throughput"] == 10.0


def test_check_without_a_server_shows_predictions(
    tmp_path: Path,
    cost: CostModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "p.json"
    write_json(path, fitted(cost))
    words = [
        "simulation",
        "check",
        "--parameters",
        str(path),
        "--concurrency",
        "2",
        "--simulate-only",
    ]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    assert "drafting" in capsys.readouterr().out


def test_the_committed_result_has_the_assumptions_of_the_code() -> None:
    found = json.loads((command.ROOT / "docs" / "results" / "simulation.json").read_text())
    assert found["assumptions"] == json.loads(msgspec.json.encode(rows()))
