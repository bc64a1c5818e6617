"""Steps that are decided before the last ones are known: what they verify, and what is learned from them late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scheduled_world import GAMMA, request
from test_control import ALLOWED, LIMITS, measured, prepared

from dspark_sglang.core.schedule import admission_order, lengths
from dspark_sglang.core.survival import survival
from dspark_sglang.serving.ahead import Ahead
from dspark_sglang.serving.control import COST_ONLINE, COST_UNMEASURED, Control
from dspark_sglang.serving.ops.rows import Admitted
from dspark_sglang.serving.ops.torch_ops import TorchOps
from dspark_sglang.serving.running import StepPlan
from dspark_sglang.serving.telemetry import Telemetry
from dspark_sglang.serving.verifier import Verifier

CPU = torch.device("cpu")


@contextlib.contextmanager
def unwaited(device: torch.device) -> Iterator[None]:
    """On a GPU, fail where the host waits for the device."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def admitted(values: torch.Tensor, budget: int) -> Admitted:
    """What a server admits; nothing else of its operations is used."""
    ops = TorchOps.__new__(TorchOps)
    ops._telemetry = Telemetry(gamma=values.shape[1])
    return ops.admit_there(values, budget)


class Moment:
    """A moment of a machine whose clock only steps move."""

    def __init__(self, now: float) -> None:
        self.now = now

    def wait(self) -> None:
        pass

    def since(self, earlier: Moment) -> float:
        return self.now - earlier.now


class Server:
    """Runs steps as the worker does: decided, drafted, verified, launched; learned from two steps later.

    They last as :func:`test_control.measured` says.
    """

    def __init__(
        self,
        control: Control,
        *,
        acceptance: float = 0.7,
        token: float = 0.0006,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.control, self.device = control, device
        self.token, self.now = token, 0.0
        self.telemetry = Telemetry(gamma=GAMMA)
        self.ahead = Ahead(control, self.telemetry, device)
        if device == CPU:
            self.ahead._moment = lambda: Moment(self.now)
        self.rng = np.random.default_rng(seed)
        self.acceptance = acceptance

    def step(
        self, requests: list[Any], confidence: np.ndarray | None = None, generation: int = 1
    ) -> tuple[StepPlan, int, np.ndarray]:
        """Plan, budget and drafted tokens verified ``[R]`` of one step."""
        control, ahead, count = self.control, self.ahead, len(requests)
        ahead.settle()
        plan = control.begin(requests, 0)
        slots, generations = np.arange(count), np.full(count, generation)
        ahead.decide(slots, generations, pool=128, buckets=None)
        ahead.begin()
        lens = np.zeros(count, dtype=np.int64)
        if plan.draft:
            if confidence is None:
                confidence = np.full((count, GAMMA), self.acceptance)
            stated = torch.from_numpy(
                np.where(np.arange(GAMMA) < plan.depth, confidence, 0.0)
            ).float()
            stated = stated.to(self.device)
            with unwaited(self.device):
                values = ahead.survive(stated, torch.logit(stated, eps=1e-6))
                given = admitted(values, control.running.budget)
            lens = given.lens.cpu().numpy().astype(np.int64)
            kept = self.rng.random((count, GAMMA)) < self.acceptance
            counts = np.minimum(kept.cumprod(axis=1).sum(axis=1), lens)
            round_ = torch.from_numpy(np.stack([lens, counts])).to(self.device)
            with unwaited(self.device):
                ahead.outcome(round_)
        else:
            control.accepted(lens, lens)
        self.now += 0.010 + 0.0005 * count
        self.now += (0.004 + self.token * int(lens.sum())) if plan.draft else 0.0
        ahead.launched()
        return plan, control.running.budget, lens


# --- what is verified ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_device_admits_what_the_host_would(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(1, 12))
    # Few different values: ties have to go the same way.
    values = survival(rng.integers(0, 4, (requests, GAMMA)) / 4 + 0.1 * (seed % 2) * 0.5)
    budget = int(rng.integers(0, values.size + 1))
    found = admitted(torch.from_numpy(np.ascontiguousarray(values)), budget)
    lens = lengths(admission_order(values), budget, requests=requests)
    assert found.lens.tolist() == lens.tolist()
    sent = np.arange(GAMMA + 1) <= lens[:, None]
    assert found.rows.tolist() == np.flatnonzero(sent).tolist()


def test_the_device_ranks_by_corrected_confidences() -> None:
    server, rng = Server(measured()), np.random.default_rng(3)
    server.acceptance = 0.4
    requests = [request(sampled=bool(row % 2)) for row in range(4)]
    server.control.choose("on")
    for _ in range(200):  # stated 0.9, right in 0.4
        server.step(requests, np.full((4, GAMMA), 0.9))
    server.ahead.settle(running=0)
    server.ahead.outdate()
    server.control.begin(requests, 0)
    given = rng.choice([0.9, 0.88, 0.5, 0.2], (4, GAMMA))
    found = server.ahead.survive(torch.from_numpy(given).float(), torch.zeros(4, GAMMA)).numpy()
    sampled = np.array([False, True, False, True])
    wanted = survival(server.control.reliability.corrected(given, sampled))
    limits = server.control.running.plan.limits
    allowed = np.arange(GAMMA) < limits[:, None]
    np.testing.assert_allclose(found, np.where(allowed, wanted, 0.0), rtol=1e-5)
    assert np.abs(wanted - survival(given)).max() > 0.05, "nothing was corrected"


@pytest.mark.parametrize(
    "branch", ["auto", "always", "forced 1", "forced 0.5", "profile", "unmeasured"]
)
def test_no_request_ever_verifies_more_than_it_allows(branch: str) -> None:
    control, requests = prepared(branch)
    server, rng = Server(control, token=0.00001), np.random.default_rng(0)
    seen, whole = np.zeros(len(LIMITS), dtype=np.int64), 0
    for _ in range(300):
        plan, budget, lens = server.step(requests, rng.uniform(0.5, 1.0, (len(LIMITS), GAMMA)))
        whole += plan.whole
        assert lens.sum() == budget
        assert (lens <= np.minimum(ALLOWED, plan.limits)).all()
        seen = np.maximum(seen, lens)
    assert seen.tolist() == ALLOWED.tolist()
    if branch == "auto":
        assert 0 < whole < 10


def test_blocks_to_learn_from_are_verified_whole_in_turn() -> None:
    control = measured(token=0.003)  # little pays
    server, requests, seen = Server(control, token=0.003), [request() for _ in range(8)], []
    for _ in range(400):
        plan, _, lens = server.step(requests)
        if plan.whole:
            seen.append(frozenset(np.flatnonzero(lens == plan.depth).tolist()))
            assert len(seen[-1]) >= 4
    assert len(set(seen)) > 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_operators_budget_holds(share: float) -> None:
    control = measured()
    control.forced = share
    control.choose("on")
    server, requests = Server(control), [request() for _ in range(4)]
    for _ in range(20):
        plan, budget, _ = server.step(requests)
        assert budget == share * 4 * GAMMA
        assert plan.draft is (share > 0.0)


# --- what a budget knows ------------------------------------------------------------------------------


def test_a_budget_reads_nothing_of_its_own_step_and_the_one_before() -> None:
    budgets = []
    for last in (0.05, 0.99):
        control, rng = measured(), np.random.default_rng(2)
        control.choose("on")
        server = Server(control)
        for step in range(9):
            past = rng.uniform(0.3, 0.95, (4, GAMMA))
            _, budget, _ = server.step(
                [request()] * 4, past if step < 7 else np.full((4, GAMMA), last)
            )
        budgets.append(budget)
    assert budgets[0] == budgets[1] > 0


def test_a_budget_follows_what_was_two_steps_ago() -> None:
    budgets = []
    for earlier in (0.05, 0.99):
        control = measured()
        control.choose("on")
        server = Server(control)
        for _ in range(8):
            _, budget, _ = server.step([request()] * 4, np.full((4, GAMMA), earlier))
        budgets.append(budget)
    assert budgets[0] < budgets[1]


def test_a_slots_new_owner_is_not_budgeted_by_the_last() -> None:
    control = measured()
    control.choose("on")
    server = Server(control)
    for _ in range(40):
        server.step([request()] * 2, np.full((2, GAMMA), 0.05))
    low = server.step([request()] * 2, np.full((2, GAMMA), 0.05))[1]
    known = server.ahead._history
    assert known is not None
    before = known.recall(np.arange(2), np.full(2, 1))
    after = known.recall(np.arange(2), np.full(2, 2))
    assert (after != before).any() and low < 2 * GAMMA


# --- what is learned late -----------------------------------------------------------------------------


def test_everything_is_learned_once_and_late() -> None:
    control = measured()
    control.choose("on")
    server, requests = Server(control), [request() for _ in range(4)]
    observed, verified = control.cost.observations, 0
    for step in range(50):
        _, _, lens = server.step(requests)
        verified += int(lens.sum())
        # This one and the one before it may still run.
        assert server.telemetry.rounds == 4 * max(0, step - 1)
    assert control.cost.observations == observed + 48
    server.ahead.settle(running=0)
    assert control.cost.observations == observed + 50
    assert server.telemetry.rounds == 200 and server.telemetry.verified_tokens == verified
    kept = control.committed_tokens
    assert kept == server.telemetry.committed_tokens > 200
    assert control.expected_tokens == pytest.approx(kept, rel=0.1)
    server.ahead.settle(running=0)
    assert server.telemetry.rounds == 200, "a step is learned from once"


def test_what_is_learned_late_belongs_to_its_own_step() -> None:
    """A step of greedy requests is still out when one of sampled ones begins."""
    control = measured()
    control.choose("on")
    server = Server(control)
    greedy, sampling = [request(sampled=False)] * 4, [request()] * 4
    for step in range(200):
        server.step(greedy if step % 2 else sampling, np.full((4, GAMMA), 0.9 if step % 2 else 0.3))
    server.ahead.settle(running=0)
    seen, predicted, *_ = control.reliability._slow
    stated = predicted.sum(axis=(1, 2)) / seen.sum(axis=(1, 2))
    assert stated[0] == pytest.approx(0.9, abs=1e-3)
    assert stated[1] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.9, True), (0.02, False)])
def test_drafting_stops_where_it_does_not_pay(acceptance: float, drafts: bool) -> None:
    control = measured()
    server = Server(control, acceptance=acceptance)
    plans = [server.step([request()] * 4)[0] for _ in range(400)]
    share = np.mean([plan.draft for plan in plans[200:]])
    assert share > 0.9 if drafts else share < 0.1
    assert control.policy.drafting(4, True) is drafts


def test_the_measurement_at_start_is_learned_from() -> None:
    control = Control(gamma=GAMMA, adaptive=True)
    control.cost_source = COST_UNMEASURED
    server = Server(control)
    for _ in range(64):
        server.step([request(profile=True)] * 4)
    server.ahead.settle(running=0)
    assert control.measured() > 0.0
    control.cost_source = COST_ONLINE
    assert control.cost.comparable


def test_a_confidence_that_is_none_ends_the_drafts_of_its_request() -> None:
    control = measured()
    control.choose("on")
    server = Server(control)
    broken = np.full((2, GAMMA), 0.5)
    broken[1, 2] = np.nan
    requests = [request(), request()]
    server.step(requests, broken)
    assert torch.isfinite(server.ahead.survival).all()
    assert server.ahead.survival[1].tolist() == sorted(
        server.ahead.survival[1].tolist(), reverse=True
    )
    server.ahead.settle(running=0)
    assert control.faults.counts == {"confidence": 1}
    assert control.begin(requests, 0).limits.tolist() == [GAMMA, 0]


@pytest.mark.gpu
def test_on_a_gpu_steps_are_decided_as_on_a_host_and_timed_by_events() -> None:
    sent = []
    for device in (CPU, torch.device("cuda")):
        control, rng = measured(), np.random.default_rng(4)
        control.choose("on")
        control.forced = 0.6
        server = Server(control, device=device)
        requests = [request(sampled=bool(row % 2)) for row in range(6)]
        found = [server.step(requests, rng.uniform(0.2, 1.0, (6, GAMMA)))[2] for _ in range(40)]
        server.ahead.settle(running=0)
        assert server.telemetry.rounds == 240 and server.telemetry.seconds["round"] > 0.0
        sent.append(np.stack(found))
    assert (sent[0] == sent[1]).all()


def test_batches_beyond_captured_graphs_verify_what_was_admitted() -> None:
    """SGLang then runs whole blocks, whatever was scheduled: more than was drafted must not count."""
    verifier = Verifier.__new__(Verifier)
    verifier.gamma = GAMMA
    verifier._planner = SimpleNamespace(lens=torch.tensor([2, 0, 1], dtype=torch.int32))
    assert verifier._drafted_lens(None, 3, CPU).tolist() == [2, 0, 1]
    verifier._planner.lens = None  # everything is verified
    assert verifier._drafted_lens(None, 3, CPU).tolist() == [GAMMA] * 3
