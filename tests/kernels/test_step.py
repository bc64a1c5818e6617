"""The small operations of a step: kernels against :mod:`dspark_sglang.core.step`, bit for bit."""

from __future__ import annotations

import pytest
import torch

from dspark_kernels import step as kernels
from dspark_kernels.support.errors import OperandError
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.schedule.scheduler import ADMISSIBLE, before_all
from dspark_sglang.core.step import Finished, Step
from dspark_sglang.core.sts import BINS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEP = Step()
SHAPES = [(1, 1), (1, 7), (3, 5), (8, 7), (17, 4)]
IDS = [f"R{requests}-gamma{gamma}" for requests, gamma in SHAPES]


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) & 0xFFFF)


def same(found: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> None:
    for ours, wanted in zip(found, right, strict=True):
        assert ours.dtype == wanted.dtype and torch.equal(ours.cpu(), wanted.cpu())


def moved(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


# --- survival ------------------------------------------------------------------------------------


def corrected(requests: int, gamma: int) -> list[torch.Tensor]:
    """Confidences, some at the edges and some of them no numbers, and what they are corrected by."""
    random = generator(requests, gamma)
    confidence = torch.rand(requests, gamma, generator=random)
    edge = torch.tensor([0.0, 1.0, float("nan"), 1e-30, 1.0 - 2**-24])
    where = torch.rand(requests, gamma, generator=random) < 0.4
    pick = torch.randint(len(edge), (requests, gamma), generator=random)
    confidence = torch.where(where, edge[pick], confidence)
    limits = torch.randint(gamma + 1, (requests,), generator=random)
    kinds, first = (torch.randint(2, (requests,), generator=random) for _ in range(2))
    shift = (torch.rand(2, gamma, BINS, generator=random) - 0.5) * 0.4
    whole = torch.from_numpy(before_all(gamma))
    return moved(confidence, torch.stack([limits, kinds, first]), shift, whole)


@pytest.mark.parametrize(("requests", "gamma"), SHAPES, ids=IDS)
def test_survivals_are_those_of_pytorch(requests: int, gamma: int) -> None:
    given = corrected(requests, gamma)
    found = kernels.survival(*given, least=ADMISSIBLE)
    same((found,), (STEP.survival(*given),))
    # What ranks by them needs more: they never rise along a request, and 0 means that none may be verified.
    assert (found.diff(dim=1) <= 0).all()
    position = torch.arange(gamma, device=DEVICE)
    assert ((found > 0) == (position < given[1][0][:, None])).all()


# --- the rows to verify --------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, 1, 300])
@pytest.mark.parametrize(("requests", "gamma"), SHAPES, ids=IDS)
def test_windows_are_those_of_pytorch(requests: int, gamma: int, spare: int) -> None:
    random = generator(requests, gamma, spare)
    cells = requests * (gamma + 1)
    sent = torch.rand(requests, gamma + 1, generator=random) < 0.6
    sent[:, 0] = True
    block = torch.randint(150_000, (requests, gamma + 3), generator=random)
    positions, slots = (torch.randint(9, 9999, (cells,), generator=random) for _ in range(2))
    tokens = torch.randint(150_000, (requests, gamma), generator=random)
    index = sent.view(-1).nonzero().view(-1)
    given = moved(index, block, tokens, positions, slots)
    given[1] = given[1][:, 0]  # a column of SGLang's block
    found = kernels.window(*given, rows=len(index) + spare)
    same(found, STEP.window(*given, rows=len(index) + spare))


# --- the outcome ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 1, 3, 8, 19])
@pytest.mark.parametrize(("requests", "gamma"), SHAPES, ids=IDS)
def test_outcomes_are_those_of_pytorch(requests: int, gamma: int, width: int | None) -> None:
    random = generator(requests, gamma, width or 0)
    lens = torch.randint(gamma + 1, (requests,), generator=random)
    count = (torch.rand(requests, generator=random) * (lens + 1)).long()
    token = torch.randint(-1, 12, (requests,), generator=random)
    drafted = torch.randint(12, (requests, gamma), generator=random)
    before = torch.randint(5000, (requests,), generator=random)
    stops = None
    if width is not None:
        stops = torch.randint(12, (requests, width), generator=random)
        stops = stops.masked_fill(torch.rand(stops.shape, generator=random) < 0.7, -1).to(DEVICE)
    count, token, drafted, lens, before = moved(count, token, drafted, lens, before)
    found = kernels.finish(count, token, drafted, stops, lens.to(torch.int32), before)
    same(found, STEP.finish(Accepted(count, token), drafted, stops, lens, before))


def test_a_run_ends_at_its_first_stop_token() -> None:
    drafted = torch.tensor([[5, 7, 9], [5, 7, 9], [5, 7, 9]], device=DEVICE)
    stops = torch.tensor([[7, 9], [9, -1], [-1, -1]], device=DEVICE)
    count, token = torch.tensor([3, 2, 3], device=DEVICE), torch.tensor([1, 2, -1], device=DEVICE)
    lens, before = torch.tensor([3, 3, 3], device=DEVICE), torch.tensor([10, 20, 30], device=DEVICE)
    found = Finished(*kernels.finish(count, token, drafted, stops, lens, before))
    assert found.pair.tolist() == [[3, 3, 3], [1, 2, 3]]
    assert found.reported.tolist() == [[5, 7, 9, 0], [5, 7, 2, 0], [5, 7, 9, -1]]
    assert found.tokens[2].tolist() == [5, 7, 9, 0]
    assert found.lens.tolist() == [12, 23, 34]
    assert found.bonus.tolist() == [7, 2, 0]


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "gamma"), SHAPES, ids=IDS)
def test_kept_rows_are_those_of_pytorch(requests: int, gamma: int) -> None:
    random = generator(requests, gamma)
    width = gamma + 1
    lens = torch.randint(width, (requests,), generator=random)
    cells = (torch.arange(width) <= lens[:, None]).view(-1).nonzero().view(-1)
    committed = ((torch.rand(requests, generator=random) * (lens + 1)).long() + 1).to(torch.int32)
    slots, positions = (
        torch.randint(9999, (requests * width,), generator=random) for _ in range(2)
    )
    given = moved(cells, committed, slots, positions)
    found = kernels.kept(*given)
    same(found, STEP.kept(*given))
    assert int((found[0] >= 0).sum()) == int(committed.sum())


def test_wrong_operands_are_named() -> None:
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(OperandError, match="committed has dtype int64"):
        kernels.kept(zeros, zeros, zeros, zeros)
    with pytest.raises(OperandError, match=r"positions has shape \[2\]"):
        kernels.window(zeros, zeros, zeros[:, None], zeros, zeros, rows=2)
