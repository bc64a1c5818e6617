"""The operations as Triton kernels: what runs on CUDA, and in Triton's interpreter in tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dspark_kernels.accept import Accepted as Outcome
from dspark_kernels.accept import DenseDraft, Keys, ListedDraft, Rows, accept
from dspark_kernels.admit import admit
from dspark_kernels.confidence import confidence
from dspark_kernels.markov_step import Head, Sampling, draft_shortlist, successor_table
from dspark_kernels.support.backend import LAUNCHES
from dspark_kernels.vocab_parallel_accept import Shard, begin
from dspark_kernels.vocab_parallel_accept.steps import Steps
from dspark_sglang.config import Verification
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.draft import FOLLOWING, SHORTLIST, DraftBlock, undrafted
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.errors import NumericsError
from dspark_sglang.serving.ops.batch import Batch
from dspark_sglang.serving.ops.calibrated import Calibrated
from dspark_sglang.serving.ops.rows import Admitted, SampledRows, Verified
from dspark_sglang.serving.ops.supply import Supply
from dspark_sglang.serving.telemetry import Telemetry


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
        self.renew(markov, confidence)
        self._supply = Supply(generator)
        self._batch: Batch | None = None
        self._verification = verification
        self._telemetry = telemetry
        #: Flags of earlier rounds on their way to the host.
        self._flags: deque[tuple[Any, torch.Tensor]] = deque()

    def renew(self, markov: MarkovHead, confidence: ConfidenceHead) -> None:
        """See :meth:`dspark_sglang.serving.ops.Ops.renew`."""
        joint = markov.gate or markov.joint or (None, None)
        self.markov, self._confidence = markov, confidence
        self._head = Head(markov.w1.detach(), markov.w2.detach(), *joint)
        #: Made of them when it is first needed.
        self._following: torch.Tensor | None = None

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

    def nothing(self, rows: SampledRows | None, requests: int, depth: int = 1) -> DraftBlock:
        """See :meth:`dspark_sglang.serving.ops.Ops.nothing`."""
        sampled = None if rows is None or rows.seeds is not None else requests
        return undrafted(requests, laws=sampled, device=self._head.w1.device, depth=depth)

    def _sampling(self, rows: SampledRows, positions: torch.Tensor) -> Sampling:
        batch = self._given(rows, len(positions))
        return Sampling(
            temperatures=batch.temperatures,
            # Requests without a seed get a new one every round: draws then repeat nowhere.
            seeds=self._supply.seeds(len(positions)) if batch.seeds is None else batch.seeds,
            positions=positions.to(torch.int64).contiguous(),
            recorded=batch.recorded,
        )

    def _given(self, rows: SampledRows | None, requests: int) -> Batch:
        """Parameters of the running batch, spread over its requests when it is first seen."""
        known = self._batch
        if known is None or known.rows is not rows or len(known.temperatures) != requests:
            self._batch = known = Batch.of(rows, requests, self._head.w1.device)
        return known

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
        return self.admit_there(values, budget)

    def admit_there(self, survival: torch.Tensor, budget: int) -> Admitted:
        """See :meth:`dspark_sglang.serving.ops.Ops.admit_there`."""
        most = max(0, min(budget, survival.numel()))
        given = self._supply.budget(most, survival.device)
        found = admit(survival.contiguous(), given, backend="triton")
        self._telemetry.ran["admit:triton"] += 1
        return Admitted(found.lens, found.rows[: len(survival) + most])

    def accept(self, given: Verified) -> Accepted:
        """See :meth:`dspark_sglang.serving.ops.Ops.accept`.

        Raises:
            NumericsError: rows or tokens outside the logits; on CUDA found a round or two later, since the host
                does not wait.
        """
        given_rows, batch, keys, out = self._operands(given)
        found = accept(
            given_rows,
            batch.temperatures,
            self._supply.uniforms(len(given.lens), given.drafted.shape[1] + 1),
            draft=_law(given),
            filters=batch.filters,
            keys=keys,
            block=self._verification == "block",
            out=out,
            backend="triton",
        )
        return self._outcome(found, given.rows, "triton")

    def accept_sharded(
        self,
        given: Verified,
        rank: int,
        widths: tuple[int, ...],
        run: Callable[[Steps], Outcome],
    ) -> Accepted:
        """The same of this rank's columns; rejection sampling alone, and no seeds with filters.

        Args:
            given: logits and dense laws are this rank's columns, laws of every request of the batch.
            widths: columns of every rank.
            run: exchanges the records.

        Raises:
            NumericsError: as :meth:`accept`, on every rank.
        """
        given_rows, batch, keys, out = self._operands(given)
        rows = given.rows
        searched = rows is not None and not (rows.top_k is None and rows.top_p is None)
        steps = begin(
            given_rows,
            Shard(rank, widths),
            batch.temperatures,
            self._supply.uniforms(len(given.lens), given.drafted.shape[1] + 1),
            draft=_law(given),
            filters=batch.filters,
            keys=keys,
            searched=searched,
            out=out,
        )
        return self._outcome(run(steps), rows, "sharded-triton")

    def _operands(self, given: Verified) -> tuple[Rows, Batch, Keys | None, Outcome]:
        self._check_flags()
        requests, device = len(given.lens), given.logits.device
        batch = self._given(given.rows, requests)
        keys = None
        if batch.seeds is not None and batch.coupled is not None:
            positions = given.anchors.to(torch.int64).contiguous()
            keys = Keys(batch.seeds, positions, batch.coupled)
        count, token = (torch.empty(requests, dtype=torch.int64, device=device) for _ in range(2))
        out = Outcome(count, token, torch.empty(requests, dtype=torch.int32, device=device))
        rows = Rows(given.logits, given.first, given.lens, given.drafted.contiguous())
        return rows, batch, keys, out

    def _outcome(self, found: Outcome, rows: SampledRows | None, how: str) -> Accepted:
        self._watch(found.flag)
        kind = "greedy" if rows is None else "seeded" if rows.seeds is not None else None
        self._telemetry.ran[f"accept:{how}-{kind or self._verification}"] += 1
        return Accepted(count=found.count, token=found.token)

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
            if int(self._flags.popleft()[1].max()):
                raise NumericsError(
                    "Acceptance was given rows or tokens outside the logits.",
                    expected="a row for every token sent to verification",
                    fix="Serve with DSPARK_KERNELS=torch, and report it with the server's log.",
                )


def _law(given: Verified) -> DenseDraft | ListedDraft | None:
    if given.laws is None:
        return None
    if given.lse is not None:
        return DenseDraft(given.laws, given.lse)
    assert given.support is not None
    return ListedDraft(given.laws, given.support)
