"""The operations as Triton kernels: what runs on CUDA, and in Triton's interpreter in tests."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dspark_kernels.accept import DenseDraft, Filters, Keys, ListedDraft, Rows, accept
from dspark_kernels.admit import admit
from dspark_kernels.confidence import confidence
from dspark_kernels.markov_step import Head, Sampling, draft_shortlist, successor_table
from dspark_kernels.support.backend import LAUNCHES
from dspark_sglang.config import Verification
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.draft import FOLLOWING, SHORTLIST, DraftBlock, undrafted
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.errors import NumericsError
from dspark_sglang.serving.ops.calibrated import Calibrated
from dspark_sglang.serving.ops.rows import Admitted, SampledRows, Verified
from dspark_sglang.serving.telemetry import Telemetry

_FLAGS = {
    1: "a law of the target or the drafter that is NaN, infinite or without mass",
    2: "rows or tokens outside the logits it was given",
}


class TritonOps(Calibrated):
    """:class:`dspark_sglang.serving.ops.Ops` by :mod:`dspark_kernels`.

    Laws of a block cover every request of the batch, in its order; those of greedy requests hold
    nothing. Nothing here waits for the device.
    """

    name = "triton"

    def __init__(
        self,
        *,
        markov: MarkovHead,
        confidence: ConfidenceHead,
        generator: torch.Generator,
        verification: Verification,
        telemetry: Telemetry,
    ) -> None:
        self.markov = markov
        joint = markov.gate or markov.joint or (None, None)
        self._head = Head(markov.w1.detach(), markov.w2.detach(), *joint)
        self._confidence = confidence
        self._generator = generator
        self._verification = verification
        self._telemetry = telemetry
        self._following: torch.Tensor | None = None
        #: Flags of earlier rounds on their way to the host.
        self._flags: deque[tuple[Any, torch.Tensor]] = deque()

    @property
    def launches(self) -> dict[str, int]:
        """See :attr:`dspark_sglang.serving.ops.Ops.launches`."""
        return dict(LAUNCHES)

    def draft(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
        vocabulary: torch.Tensor | None,
    ) -> DraftBlock:
        """See :meth:`dspark_sglang.serving.ops.Ops.draft`."""
        # Nobody reads the base logits after this: the drafted law over all tokens takes their place.
        # Over a draft vocabulary it is listed instead: acceptance knows tokens, not columns.
        dense = rows is not None and rows.seeds is None and vocabulary is None
        base = base.contiguous()
        found = draft_shortlist(
            base,
            anchors.contiguous(),  # a column of SGLang's block
            self._head,
            size=min(SHORTLIST, base.shape[-1]),
            hidden=None if self._head.weight is None else hidden.contiguous(),
            sampling=None if rows is None else self._sampling(rows, positions),
            vocabulary=vocabulary,
            support_dtype=torch.int64,
            successors=self._successors(vocabulary),
            out=base if dense else None,
            backend="triton",
        )
        self._telemetry.ran[f"draft:triton-{self.markov.kind}"] += 1
        listed = rows is not None and rows.seeds is None and not dense
        return DraftBlock(
            tokens=found.tokens,
            previous=found.previous,
            probs=found.logits if dense else found.probs if listed else None,
            support=found.support if listed else None,
            lse=found.lse if dense else None,
        )

    def _successors(self, vocabulary: torch.Tensor | None) -> torch.Tensor | None:
        """What follows each token by bias alone, found once; None where bias depends on more."""
        if self.markov.kind != "vanilla":
            return None
        if self._following is None:
            columns = len(self._head.w2) if vocabulary is None else len(vocabulary)
            size = min(FOLLOWING, 1 << (columns.bit_length() - 1))
            self._following = successor_table(self._head, size, vocabulary)
        return self._following

    def nothing(self, rows: SampledRows | None, requests: int) -> DraftBlock:
        """See :meth:`dspark_sglang.serving.ops.Ops.nothing`."""
        sampled = None if rows is None or rows.seeds is not None else requests
        return undrafted(requests, laws=sampled, device=self._head.w1.device)

    def _sampling(self, rows: SampledRows, positions: torch.Tensor) -> Sampling:
        count, device = len(positions), positions.device
        # Requests without a seed get a new one every round: draws then repeat nowhere.
        fresh = torch.randint(
            1 << 62, (count,), dtype=torch.int64, device=device, generator=self._generator
        )
        own = rows.seeds is not None
        return Sampling(
            temperatures=_spread(rows.temperatures, rows.index, count, 0.0),
            seeds=fresh if rows.seeds is None else fresh.index_copy(0, rows.index, rows.seeds),
            positions=positions.to(torch.int64).contiguous(),
            recorded=torch.full((count,), 0 if own else 1, dtype=torch.uint8, device=device),
        )

    def confidence(
        self, features: torch.Tensor, previous: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`dspark_sglang.serving.ops.Ops.confidence`."""
        head = self._confidence
        found = confidence(
            features,
            previous.contiguous(),
            head.weight,
            head.bias,
            head.temperatures[: features.shape[1]],
            w1=self._head.w1 if head.with_markov else None,
            backend="triton",
        )
        self._telemetry.ran["confidence:triton"] += 1
        return found.confidence, found.logits

    def admit(
        self,
        survival: npt.NDArray[np.float64],
        order: npt.NDArray[np.int64],
        budget: int,
        device: torch.device,
    ) -> Admitted:
        """See :meth:`dspark_sglang.serving.ops.Ops.admit`."""
        values = torch.from_numpy(np.ascontiguousarray(survival)).to(device)
        allowed = torch.full((1,), budget, dtype=torch.int32, device=device)
        found = admit(values, allowed, backend="triton")
        self._telemetry.ran["admit:triton"] += 1
        total = len(survival) + max(0, min(budget, survival.size))
        return Admitted(found.lens, found.rows[:total])

    def accept(self, given: Verified) -> Accepted:
        """See :meth:`dspark_sglang.serving.ops.Ops.accept`.

        Raises:
            NumericsError: a law that cannot be decided on; on CUDA found a round or two later,
                since the host does not wait.
        """
        self._check_flags()
        rows, requests = given.rows, len(given.lens)
        device = given.logits.device
        width = given.drafted.shape[1] + 1
        if rows is None:
            temperatures = torch.zeros(requests, device=device)
            uniforms = torch.empty((requests, width), dtype=torch.float64, device=device)
        else:
            temperatures = _spread(rows.temperatures, rows.index, requests, 0.0)
            uniforms = torch.rand(
                (requests, width), dtype=torch.float64, device=device, generator=self._generator
            )
        found = accept(
            Rows(
                given.logits,
                given.first.to(torch.int32),
                given.lens.to(torch.int32),
                given.drafted.contiguous(),
            ),
            temperatures,
            uniforms,
            draft=_law(given),
            filters=None if rows is None else _filters(rows, requests, given.logits.shape[1]),
            keys=None if rows is None else _keys(rows, requests, given.anchors),
            block=self._verification == "block",
            backend="triton",
        )
        self._watch(found.flag)
        kind = "greedy" if rows is None else "seeded" if rows.seeds is not None else None
        self._telemetry.ran[f"accept:triton-{kind or self._verification}"] += 1
        return Accepted(count=found.count.long(), token=found.token)

    def _watch(self, flag: torch.Tensor) -> None:
        if flag.device.type == "cpu":
            self._flags.append((None, flag))
            self._check_flags()
            return
        host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._flags.append((arrived, host))

    def _check_flags(self) -> None:
        while self._flags and (self._flags[0][0] is None or self._flags[0][0].query()):
            worst = int(self._flags.popleft()[1].max())
            if worst:
                raise NumericsError(
                    f"Acceptance was given {_FLAGS.get(worst, f'something it flags as {worst}')}.",
                    expected="finite logits with at least one allowed token",
                    fix="Check the model's weights and dtype, and the request's grammar and "
                    "logit_bias.",
                )


def _spread(values: torch.Tensor, index: torch.Tensor, count: int, rest: float) -> torch.Tensor:
    """``[count]`` with ``values`` at ``index`` and ``rest`` elsewhere."""
    whole = torch.full((count,), rest, dtype=values.dtype, device=values.device)
    return whole.index_copy(0, index, values)


def _law(given: Verified) -> DenseDraft | ListedDraft | None:
    if given.laws is None:
        return None
    if given.lse is not None:
        return DenseDraft(given.laws, given.lse)
    assert given.support is not None
    return ListedDraft(given.laws, given.support)


def _filters(rows: SampledRows, requests: int, size: int) -> Filters | None:
    if rows.top_k is None and rows.top_p is None and rows.min_p is None:
        return None
    device = rows.index.device

    def whole(values: torch.Tensor | None, rest: float, dtype: torch.dtype) -> torch.Tensor:
        if values is None:
            return torch.full((requests,), rest, dtype=dtype, device=device)
        return _spread(values.to(dtype), rows.index, requests, rest)

    return Filters(
        top_k=whole(rows.top_k, size, torch.int32),
        top_p=whole(rows.top_p, 1.0, torch.float32),
        min_p=whole(rows.min_p, 0.0, torch.float32),
    )


def _keys(rows: SampledRows, requests: int, anchors: torch.Tensor) -> Keys | None:
    if rows.seeds is None:
        return None
    ones = torch.ones(len(rows.index), dtype=torch.int32, device=rows.index.device)
    return Keys(
        seeds=_spread(rows.seeds, rows.index, requests, 0),
        positions=anchors.to(torch.int64).contiguous(),
        coupled=_spread(ones, rows.index, requests, 0),
    )
