"""Steps that are decided before the last ones are known: what they verify, and what is learned from them late."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark_sglang.core.round import StepPlan
from dspark_sglang.core.schedule import admission_order, lengths
from dspark_sglang.core.schedule.admission import survival
from dspark_sglang.core.schedule.scheduler import Overlapped, Scheduler
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.ops import Admitted
from dspark_sglang.serving.ops.torch_ops import TorchOps, packed
from dspark_sglang.serving.overlap import OverlappedRounds
from dspark_sglang.serving.rounds import Block, Rounds, SynchronousRounds, pack, unpack
from dspark_sglang.serving.telemetry import Telemetry
from dspark_sglang.serving.verifier import Verifier
from tests.schedule.scheduled_world import GAMMA, Asked
from tests.schedule.test_scheduler import ALLOWED, LIMITS, measured, prepared

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


def operations(gamma: int = GAMMA) -> TorchOps:
    """What a server admits with; nothing else of its operations is used."""
    ops = TorchOps.__new__(TorchOps)
    ops._telemetry = Telemetry(gamma=gamma)
    ops._gamma, ops._anchors = gamma, {}
    return ops


def admitted(values: torch.Tensor, budget: int) -> Admitted:
    return operations(values.shape[1]).admit_there(values, budget)


class Moment:
    """A moment of a machine whose clock only steps move."""

    def __init__(self, now: float) -> None:
        self.now = now

    def wait(self) -> None:
        pass

    def since(self, earlier: Moment) -> float:
        return self.now - earlier.now


def request(asked: Asked) -> Any:
    """What scheduling reads of an SGLang request."""
    custom = {"workload": asked.workload, "profile": asked.profile}
    custom |= {"max_draft_tokens": asked.max_draft_tokens}
    params = SimpleNamespace(
        custom_params={"dspark": custom}, top_k=1 << 30 if asked.sampled else 1
    )
    return SimpleNamespace(sampling_params=params)


def batch(requests: list[Any], generation: int = 1, slots: int = 128) -> Any:
    """What scheduling reads of an SGLang batch."""
    count = len(requests)
    pool = SimpleNamespace(req_generation=torch.full((slots,), generation))
    return SimpleNamespace(
        reqs=requests,
        seq_lens_cpu=torch.zeros(count, dtype=torch.int64),
        req_pool_indices_cpu=torch.arange(count),
        req_to_token_pool=pool,
    )


def rounds(kind: type[Rounds], scheduler: Scheduler, *, device: torch.device = CPU) -> Rounds:
    return kind(
        scheduler,
        faults=Faults(),
        telemetry=Telemetry(gamma=GAMMA),
        ops=operations(),
        ranks=SimpleNamespace(count=1),  # type: ignore[arg-type]
        device=device,
        buckets=lambda requests: None,
    )


class Server:
    """Runs steps as the worker does: decided, drafted, verified, launched; learned from two steps later.

    They last as :func:`test_scheduler.measured` says.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        acceptance: float = 0.7,
        token: float = 0.0006,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.scheduler, self.device = scheduler, device
        self.token, self.now = token, 0.0
        found = rounds(OverlappedRounds, scheduler, device=device)
        assert isinstance(found, OverlappedRounds)
        self.rounds = found
        if device == CPU:
            self.rounds._moment = lambda: Moment(self.now)
        self.telemetry = self.rounds.telemetry
        self.rng = np.random.default_rng(seed)
        self.acceptance = acceptance

    def step(
        self, requests: list[Any], confidence: np.ndarray | None = None, generation: int = 1
    ) -> tuple[StepPlan, int, np.ndarray]:
        """Plan, budget and drafted tokens verified ``[R]`` of one step."""
        rounds, count = self.rounds, len(requests)
        asked = [request(r) if isinstance(r, Asked) else r for r in requests]
        plan = rounds.begin(batch(asked, generation))
        rounds.started()
        lens = np.zeros(count, dtype=np.int64)
        if plan.drafts:
            if confidence is None:
                confidence = np.full((count, GAMMA), self.acceptance)
            stated = torch.from_numpy(
                np.where(np.arange(GAMMA) < plan.depth, confidence, 0.0)
            ).float()
            stated = stated.to(self.device)
            tokens = torch.zeros((count, GAMMA), dtype=torch.int64, device=self.device)
            with unwaited(self.device):
                rounds.take(
                    Block(tokens, torch.stack([stated, torch.logit(stated, eps=1e-6)]), plan.depth)
                )
                given = rounds.admitted(self.device)
            assert given is not None
            lens = given.lens.cpu().numpy().astype(np.int64)
            kept = self.rng.random((count, GAMMA)) < self.acceptance
            counts = np.minimum(kept.cumprod(axis=1).sum(axis=1), lens)
            pair = torch.from_numpy(np.stack([lens, counts])).to(self.device)
            with unwaited(self.device):
                rounds.outcome(pair)
        else:
            rounds.decoded(count)
        self.now += 0.010 + 0.0005 * count
        self.now += (0.004 + self.token * int(lens.sum())) if plan.drafts else 0.0
        budget = rounds.budget
        rounds.ended()
        assert budget is not None
        return plan, budget, lens


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
    server, rng = Server(measured(Overlapped)), np.random.default_rng(3)
    server.acceptance = 0.4
    requests = [Asked(sampled=bool(row % 2)) for row in range(4)]
    server.scheduler.choose("on")
    for _ in range(200):  # stated 0.9, right in 0.4
        server.step(requests, np.full((4, GAMMA), 0.9))
    server.rounds.catch_up()
    server.rounds.device_survival.outdate()
    plan = server.rounds.begin(batch([request(r) for r in requests]))
    given = rng.choice([0.9, 0.88, 0.5, 0.2], (4, GAMMA))
    found = server.rounds.device_survival.of(torch.from_numpy(given).float(), plan).numpy()
    sampled = np.array([False, True, False, True])
    wanted = survival(server.scheduler.reliability.corrected(given, sampled))
    limits = plan.limits
    allowed = np.arange(GAMMA) < limits[:, None]
    np.testing.assert_allclose(found, np.where(allowed, wanted, 0.0), rtol=1e-5)
    assert np.abs(wanted - survival(given)).max() > 0.05, "nothing was corrected"


@pytest.mark.parametrize(
    "branch", ["auto", "always", "budget 1", "budget 0.5", "profile", "unmeasured"]
)
def test_no_request_ever_verifies_more_than_it_allows(branch: str) -> None:
    scheduler, requests = prepared(branch, Overlapped)
    server, rng = Server(scheduler, token=0.00001), np.random.default_rng(0)
    seen, whole = np.zeros(len(LIMITS), dtype=np.int64), 0
    for _ in range(300):
        plan, budget, lens = server.step(requests, rng.uniform(0.5, 1.0, (len(LIMITS), GAMMA)))
        whole += plan.verify_all
        assert lens.sum() == budget
        assert (lens <= np.minimum(ALLOWED, plan.limits)).all()
        seen = np.maximum(seen, lens)
    assert seen.tolist() == ALLOWED.tolist()
    if branch == "auto":
        assert 0 < whole < 10


def test_blocks_to_learn_from_are_verified_whole_in_turn() -> None:
    scheduler = measured(Overlapped, token=0.003)  # little pays
    server, requests, seen = Server(scheduler, token=0.003), [Asked() for _ in range(8)], []
    for _ in range(400):
        plan, _, lens = server.step(requests)
        if plan.verify_all:
            seen.append(frozenset(np.flatnonzero(lens == plan.depth).tolist()))
            assert len(seen[-1]) >= 4
    assert len(set(seen)) > 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_operators_budget_holds(share: float) -> None:
    scheduler = measured(Overlapped)
    scheduler.fix_budget(share)
    scheduler.choose("on")
    server, requests = Server(scheduler), [Asked() for _ in range(4)]
    for _ in range(20):
        plan, budget, _ = server.step(requests)
        assert budget == share * 4 * GAMMA
        assert plan.drafts is (share > 0.0)


# --- what a budget knows ------------------------------------------------------------------------------


def test_a_budget_reads_nothing_of_its_own_step_and_the_one_before() -> None:
    budgets = []
    for last in (0.05, 0.99):
        scheduler, rng = measured(Overlapped), np.random.default_rng(2)
        scheduler.choose("on")
        server = Server(scheduler)
        for step in range(9):
            past = rng.uniform(0.3, 0.95, (4, GAMMA))
            _, budget, _ = server.step(
                [Asked()] * 4, past if step < 7 else np.full((4, GAMMA), last)
            )
        budgets.append(budget)
    assert budgets[0] == budgets[1] > 0


def test_a_budget_follows_what_was_two_steps_ago() -> None:
    budgets = []
    for earlier in (0.05, 0.99):
        scheduler = measured(Overlapped)
        scheduler.choose("on")
        server = Server(scheduler)
        for _ in range(8):
            _, budget, _ = server.step([Asked()] * 4, np.full((4, GAMMA), earlier))
        budgets.append(budget)
    assert budgets[0] < budgets[1]


def test_a_slots_new_owner_is_not_budgeted_by_the_last() -> None:
    scheduler = measured(Overlapped)
    scheduler.choose("on")
    server = Server(scheduler)
    for _ in range(40):
        server.step([Asked()] * 2, np.full((2, GAMMA), 0.05))
    low = server.step([Asked()] * 2, np.full((2, GAMMA), 0.05))[1]
    assert isinstance(scheduler, Overlapped)
    known = scheduler.history
    before = known.recall(np.arange(2), np.full(2, 1))
    after = known.recall(np.arange(2), np.full(2, 2))
    assert (after != before).any() and low < 2 * GAMMA


# --- what is learned late -----------------------------------------------------------------------------


def test_everything_is_learned_once_and_late() -> None:
    scheduler = measured(Overlapped)
    scheduler.choose("on")
    server, requests = Server(scheduler), [Asked() for _ in range(4)]
    observed, verified = scheduler.cost.observations, 0
    for step in range(50):
        _, _, lens = server.step(requests)
        verified += int(lens.sum())
        # This one and the one before it may still run.
        assert server.telemetry.rounds == 4 * max(0, step - 1)
    assert scheduler.cost.observations == observed + 48
    server.rounds.catch_up()
    assert scheduler.cost.observations == observed + 50
    assert server.telemetry.rounds == 200 and server.telemetry.verified_tokens == verified
    kept = scheduler.committed_tokens
    assert kept == server.telemetry.committed_tokens > 200
    assert scheduler.expected_tokens == pytest.approx(kept, rel=0.1)
    server.rounds.catch_up()
    assert server.telemetry.rounds == 200, "a step is learned from once"


def test_what_is_learned_late_belongs_to_its_own_step() -> None:
    """A step of greedy requests is still out when one of sampled ones begins."""
    scheduler = measured(Overlapped)
    scheduler.choose("on")
    server = Server(scheduler)
    greedy, sampling = [Asked(sampled=False)] * 4, [Asked()] * 4
    for step in range(200):
        server.step(greedy if step % 2 else sampling, np.full((4, GAMMA), 0.9 if step % 2 else 0.3))
    server.rounds.catch_up()
    seen, predicted, *_ = scheduler.reliability._slow
    stated = predicted.sum(axis=(1, 2)) / seen.sum(axis=(1, 2))
    assert stated[0] == pytest.approx(0.9, abs=1e-3)
    assert stated[1] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.9, True), (0.02, False)])
def test_drafting_stops_where_it_does_not_pay(acceptance: float, drafts: bool) -> None:
    scheduler = measured(Overlapped)
    server = Server(scheduler, acceptance=acceptance)
    plans = [server.step([Asked()] * 4)[0] for _ in range(400)]
    share = np.mean([plan.drafts for plan in plans[200:]])
    assert share > 0.9 if drafts else share < 0.1
    assert scheduler.policy.drafting(4, True) is drafts


def test_the_measurement_at_start_is_learned_from() -> None:
    scheduler = Overlapped(gamma=GAMMA)
    scheduler.measurement.begin()
    server = Server(scheduler)
    for _ in range(64):
        server.step([Asked(profile=True)] * 4)
    server.rounds.catch_up()
    assert scheduler.measurement.end(scheduler.cost) > 0.0
    assert scheduler.cost.comparable


def test_a_confidence_that_is_none_ends_the_drafts_of_its_request() -> None:
    scheduler = measured(Overlapped)
    scheduler.choose("on")
    server = Server(scheduler)
    broken = np.full((2, GAMMA), 0.5)
    broken[1, 2] = np.nan
    requests = [request(Asked()), request(Asked())]
    server.step(requests, broken)
    survivals = server.rounds.survival
    assert survivals is not None and torch.isfinite(survivals).all()
    assert survivals[1].tolist() == sorted(survivals[1].tolist(), reverse=True)
    server.rounds.catch_up()
    assert server.rounds.faults.counts == {"confidence": 1}
    assert server.rounds.begin(batch(requests)).limits.tolist() == [GAMMA, 0]


# --- what both ways share -----------------------------------------------------------------------------


def answered(own: Rounds, requests: list[Any], confidence: np.ndarray) -> np.ndarray:
    """Drafted tokens verified ``[R]`` of the next step, which is then over."""
    plan = own.begin(batch(requests))
    own.started()
    count, lens = len(requests), np.zeros(len(requests), dtype=np.int64)
    if plan.drafts:
        stated = torch.from_numpy(confidence).float()
        own.take(Block(torch.zeros((count, GAMMA)).long(), stated.expand(2, -1, -1), plan.depth))
        found = own.admitted(CPU)
        assert found is not None
        lens = found.lens.numpy().astype(np.int64)
        assert lens.sum() == own.budget
    own.outcome(torch.from_numpy(np.stack([lens, lens])))
    own.ended()
    return lens


def drafting() -> Rounds:
    scheduler = measured()
    scheduler.choose("on")
    return rounds(SynchronousRounds, scheduler)


@pytest.mark.parametrize("bad", [np.nan, 1.5, -0.1])
def test_confidences_that_are_none_are_explained(bad: float) -> None:
    """A request whose drafts have none verifies nothing and drafts no more; the others are served as before."""
    own, requests = drafting(), [request(Asked()), request(Asked())]
    lens = answered(own, requests, np.array([[0.9, bad, 0.5, 0.5, 0.5], [0.9] * 5]))
    assert lens[0] == 0 and lens[1] > 0
    assert own.begin(batch(requests)).limits.tolist() == [0, GAMMA]
    assert own.faults.counts == {"confidence": 1}
    assert own.faults.stopped is None
    assert np.isfinite(own.scheduler.reliability.shift()).all()


def test_a_drafter_without_confidence_for_anybody_is_turned_off_and_on_again() -> None:
    own, nothing = drafting(), np.full((2, GAMMA), np.nan)
    for _ in range(2):
        requests = [request(Asked()), request(Asked())]
        assert not answered(own, requests, nothing).any()
        # Until its requests have gone a request alone is no proof against the drafter.
    assert own.faults.counts == {"confidence": 5}  # four requests, and the drafter
    assert "NaN for 4 requests" in str(own.faults.stopped)
    assert not own.begin(batch([request(Asked())])).drafts
    assert own.snapshot()["drafting"] is False
    own.faults.resume()
    assert own.begin(batch([request(Asked())])).drafts and own.snapshot()["drafting"] is True


def test_requests_without_confidence_between_sound_ones_are_no_fault_of_the_drafter() -> None:
    own = drafting()
    for _ in range(20):
        for value in (np.nan, 0.5):
            answered(own, [request(Asked())], np.full((1, GAMMA), value))
    assert own.faults.counts == {"confidence": 20}
    assert own.faults.stopped is None


def test_a_draft_that_failed_leaves_a_decode_step() -> None:
    """As the proposer leaves it: the block was taken in, or not, and is given up."""
    for kind, scheduler in (
        (SynchronousRounds, measured()),
        (OverlappedRounds, measured(Overlapped)),
    ):
        scheduler.choose("on")
        own = rounds(kind, scheduler)
        own.begin(batch([request(Asked())] * 2))
        own.started()
        half = torch.full((2, GAMMA), 0.9)
        own.take(Block(torch.zeros((2, GAMMA)).long(), half.expand(2, -1, -1), GAMMA))
        own.running.decodes()
        found = own.admitted(CPU)
        assert found is not None and found.lens.tolist() == [0, 0] and own.budget == 0
        assert found.rows.tolist() == [0, GAMMA + 1]
        own.outcome(torch.zeros((2, 2), dtype=torch.int64))
        own.ended()
        own.catch_up()
        assert scheduler.plain_steps == 1 and own.telemetry.plain_rounds == 2


@pytest.mark.parametrize("kind", ["auto", "profile", "verify all", "decode"])
def test_ranks_unpack_the_plan_that_was_packed(kind: str) -> None:
    scheduler = measured(Overlapped, token=0.00001)
    scheduler.choose("off" if kind == "decode" else "on")
    asked = [Asked(profile=kind == "profile"), Asked(max_draft_tokens=2), Asked()]
    if kind == "profile":
        scheduler.measurement.begin()
    plan = rounds(OverlappedRounds, scheduler).begin(batch([request(r) for r in asked]))
    if kind == "verify all":
        plan = dataclasses.replace(plan, verify_all=True, first=np.array([0, 2]), budget=9)
    packed = pack(plan)
    other = dataclasses.replace(
        plan, limits=np.zeros(3, dtype=np.int64), depth=9, budget=1, first=np.array([1])
    )
    found = unpack(packed, other)
    assert packed.dtype == torch.int64
    for field in dataclasses.fields(plan):
        own, theirs = getattr(plan, field.name), getattr(found, field.name)
        assert np.array_equal(own, theirs) and type(own) is type(theirs), field.name


@pytest.mark.gpu
def test_on_a_gpu_steps_are_decided_as_on_a_host_and_timed_by_events() -> None:
    sent = []
    for device in (CPU, torch.device("cuda")):
        scheduler, rng = measured(Overlapped), np.random.default_rng(4)
        scheduler.choose("on")
        scheduler.fix_budget(0.6)
        server = Server(scheduler, device=device)
        requests = [Asked(sampled=bool(row % 2)) for row in range(6)]
        found = [server.step(requests, rng.uniform(0.2, 1.0, (6, GAMMA)))[2] for _ in range(40)]
        server.rounds.catch_up()
        assert server.telemetry.rounds == 240 and server.telemetry.seconds["round"] > 0.0
        sent.append(np.stack(found))
    assert (sent[0] == sent[1]).all()


def test_batches_beyond_captured_graphs_verify_what_was_admitted() -> None:
    """SGLang then runs whole blocks, whatever was scheduled: more than was drafted must not count."""
    verifier = Verifier.__new__(Verifier)
    verifier.gamma = GAMMA
    verifier.verify_num_draft_tokens, verifier._packed = GAMMA + 1, None
    rows = torch.tensor([0, 1, 2, GAMMA + 1, 2 * GAMMA + 2, 2 * GAMMA + 3])
    known = packed(torch.tensor([2, 0, 1]), rows)
    verifier._planner = SimpleNamespace(admitted=known)
    every = [0, GAMMA + 1, 2 * GAMMA + 2]
    assert [part.tolist() for part in verifier._sent(None, 3, CPU)] == [[2, 0, 1], every]
    verifier._planner.admitted = None  # everything is verified
    assert [part.tolist() for part in verifier._sent(None, 3, CPU)] == [[GAMMA] * 3, every]
