"""The operations as Triton kernels: what runs on CUDA, and in Triton's interpreter in tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_kernels.accept import Accepted as Outcome
from dspark_kernels.accept import DenseDraft, Filters, Keys, ListedDraft, Rows, accept
from dspark_kernels.admit import admit
from dspark_kernels.confidence import Confidence, confidence
from dspark_kernels.markov_step import (
    Candidates,
    Head,
    Sampling,
    draft_among,
    draft_shortlist,
    find_candidates,
    successor_table,
)
from dspark_kernels.support.backend import LAUNCHES, interpreting
from dspark_kernels.support.interpreter import patch_once
from dspark_kernels.support.rounding import round_as_a_gpu
from dspark_kernels.vocab_parallel_accept import Shard, begin
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.device import to_host
from dspark_sglang.core.draft import FOLLOWING, SHORTLIST, DraftBlock
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.tensor_parallel import Exchange
from dspark_sglang.core.tensor_parallel import Shard as Columns
from dspark_sglang.errors import CompatibilityError, NumericsError
from dspark_sglang.serving.ops import (
    Admitted,
    Ops,
    SampledRows,
    ShardedAccept,
    Verified,
    WriteKv,
    selfcheck,
)
from dspark_sglang.serving.ops.kv_writer import KvWriter
from dspark_sglang.serving.ops.supply import Supply
from dspark_sglang.serving.ops.triton_step import TritonStep
from dspark_sglang.serving.sglang_types import DenseDraft as DraftModel
from dspark_sglang.serving.sglang_types import KvPool

#: As a top_k: more than any vocabulary, filters nothing.
_ALL_TOKENS = 2**31 - 1


class Batch(NamedTuple):
    """Parameters spread over all requests of a batch, greedy ones included."""

    #: What they were spread from; None: all requests are greedy.
    rows: SampledRows | None
    #: ``[R]`` float32; 0: greedy.
    temperatures: torch.Tensor
    #: ``[R]`` uint8: whether the distribution a request drafts from is kept for acceptance.
    recorded: torch.Tensor
    #: None where no request has any.
    filters: Filters | None
    #: ``[R]`` int64 and int32: seeds, and whether a request draws by its own; None: none does.
    seeds: torch.Tensor | None
    coupled: torch.Tensor | None

    @classmethod
    def of(cls, rows: SampledRows | None, requests: int, device: torch.device) -> Batch:
        """Spread the parameters of ``rows``."""
        if rows is None:
            greedy = torch.zeros(requests, device=device)
            return cls(None, greedy, greedy.to(torch.uint8), None, None, None)
        own = rows.seeds is not None
        ones = torch.ones(len(rows.index), dtype=torch.int32, device=device)
        return cls(
            rows=rows,
            temperatures=_spread(rows.temperatures, rows.index, requests, 0.0),
            recorded=torch.full((requests,), not own, dtype=torch.uint8, device=device),
            filters=_filters(rows, requests),
            seeds=_spread(rows.seeds, rows.index, requests, 0) if rows.seeds is not None else None,
            coupled=_spread(ones, rows.index, requests, 0) if own else None,
        )


def _spread(values: torch.Tensor, index: torch.Tensor, count: int, rest: float) -> torch.Tensor:
    """``[count]`` with ``values`` at ``index`` and ``rest`` elsewhere."""
    whole = torch.full((count,), rest, dtype=values.dtype, device=values.device)
    return whole.index_copy_(0, index, values)


def _filters(rows: SampledRows, requests: int) -> Filters | None:
    if rows.top_k is None and rows.top_p is None and rows.min_p is None:
        return None
    device = rows.index.device

    def whole(values: torch.Tensor | None, rest: float, dtype: torch.dtype) -> torch.Tensor:
        if values is None:
            return torch.full((requests,), rest, dtype=dtype, device=device)
        return _spread(values.to(dtype), rows.index, requests, rest)

    return Filters(
        top_k=whole(rows.top_k, _ALL_TOKENS, torch.int32),
        top_p=whole(rows.top_p, 1.0, torch.float32),
        min_p=whole(rows.min_p, 0.0, torch.float32),
    )


class TritonOps(Ops):
    """By :mod:`dspark_kernels`. Nothing here waits for the device."""

    name = "triton"
    covers_greedy = True  # distributions of greedy requests hold nothing
    step = TritonStep()

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._supply = Supply(self._generator)
        self._batch: Batch | None = None
        #: Flags of earlier rounds on their way to the host.
        self._flags: deque[tuple[Any, torch.Tensor]] = deque()
        self.renew(self.markov, self.confidence_head)

    @classmethod
    def check(cls, device: torch.device) -> None:
        if device.type != "cuda":
            if not interpreting():
                raise CompatibilityError(
                    f"DSPARK_KERNELS is triton and the device is {device}.",
                    expected="CUDA, or Triton's interpreter",
                    fix="Unset DSPARK_KERNELS, or set TRITON_INTERPRET=1 (slow, for tests).",
                )
            round_as_a_gpu()
            patch_once()
        selfcheck.check_kernels(device)

    def renew(self, markov: MarkovHead, confidence: ConfidenceHead) -> None:
        super().renew(markov, confidence)
        joint = markov.gate or markov.joint or (None, None)
        self._head = Head(markov.w1.detach(), markov.w2.detach(), *joint)
        #: ``[width]`` int64 tokens of this rank's columns.
        self._columns: torch.Tensor | None = None
        #: Made of them when it is first needed.
        self._following: torch.Tensor | None = None

    @property
    def launches(self) -> dict[str, int]:
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
        # Nobody reads the base logits after this: the drafted distribution over all tokens takes their place.
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

    def sharded_draft(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
        shard: Columns,
        size: int,
    ) -> Exchange[DraftBlock]:
        requests, depth, _ = base.shape
        shape = (requests, depth, size)
        cells = requests * depth * size
        if self._columns is None or len(self._columns) != shard.width:
            self._columns = shard.columns(base.device)
        # Tokens, then logits: one record, and so one exchange.
        record = base.new_empty(cells + -(-cells * base.element_size() // 4), dtype=torch.int32)
        tokens = record[:cells].view(shape)
        logits = record[cells:].view(base.dtype)[:cells].view(shape)
        find_candidates(base, self._columns, Candidates(logits, tokens))
        every = yield record
        ranks = len(every)
        tokens = every[:, :cells].view(ranks, *shape).permute(1, 2, 0, 3)
        logits = (
            every[:, cells:].view(base.dtype)[:, :cells].view(ranks, *shape).permute(1, 2, 0, 3)
        )
        among = (requests, depth, ranks * size)
        found = draft_among(
            Candidates(logits.reshape(among), tokens.to(torch.int64).reshape(among)),
            anchors.contiguous(),
            self._head,
            hidden=None if self._head.weight is None else hidden.contiguous(),
            sampling=None if rows is None else self._sampling(rows, positions),
        )
        self._telemetry.ran[f"draft:sharded-triton-{self.markov.kind}"] += 1
        listed = rows is not None and rows.seeds is None
        return DraftBlock(
            tokens=found.tokens,
            previous=found.previous,
            probs=found.probs if listed else None,
            support=found.support if listed else None,
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

    def confidence(self, features: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        head = self.confidence_head
        requests, depth, _ = features.shape
        scores = features.new_empty((2, requests, depth), dtype=torch.float32)
        survival = features.new_empty((requests, depth), dtype=torch.float64)
        confidence(
            features,
            previous.contiguous(),
            head.weight,
            head.bias,
            head.temperatures[:depth],
            w1=self._head.w1 if head.with_markov else None,
            backend="triton",
            out=Confidence(logits=scores[1], confidence=scores[0], survival=survival),
        )
        self._telemetry.ran["confidence:triton"] += 1
        return scores

    def admit(
        self,
        survival: npt.NDArray[np.float64],
        order: npt.NDArray[np.int64],
        budget: int,
        device: torch.device,
    ) -> Admitted:
        values = torch.from_numpy(np.ascontiguousarray(survival)).to(device)
        return self.admit_there(values, budget)

    def admit_there(self, survival: torch.Tensor, budget: int) -> Admitted:
        most = max(0, min(budget, survival.numel()))
        given = self._supply.budget(most, survival.device)
        found = admit(survival.contiguous(), given, backend="triton")
        self._telemetry.ran["admit:triton"] += 1
        rows = found.rows[: len(survival) + most]
        return Admitted(found.lens, found.offsets[:-1], found.sent, rows)

    def anchors(self, requests: int, device: torch.device) -> Admitted:
        if requests not in self._anchors:
            made = super().anchors(requests, device)
            lens, first = made.lens.to(torch.int32), made.first.to(torch.int32)
            self._anchors[requests] = made._replace(lens=lens, first=first)
        return self._anchors[requests]

    def accept(self, given: Verified) -> Accepted:
        """As :meth:`dspark_sglang.serving.ops.Ops.accept` says.

        Raises:
            NumericsError: rows or tokens outside the logits; on CUDA found a round or two later, since the host
                does not wait.
        """
        given_rows, batch, keys, out = self._operands(given)
        found = accept(
            given_rows,
            batch.temperatures,
            self._supply.uniforms(len(given.lens), given.drafted.shape[1] + 1),
            draft=_drafted(given),
            filters=batch.filters,
            keys=keys,
            block=self._verification == "block",
            out=out,
            backend="triton",
        )
        return self._outcome(found, given.rows, "triton")

    def shards(self, device: torch.device) -> ShardedAccept:
        selfcheck.check_sharded(device)
        return self._accept_sharded

    def _accept_sharded(
        self,
        given: Verified,
        rank: int,
        widths: tuple[int, ...],
        run: Callable[[Exchange[Any]], Any],
    ) -> Accepted:
        given_rows, batch, keys, out = self._operands(given)
        rows = given.rows
        searched = rows is not None and not (rows.top_k is None and rows.top_p is None)
        steps = begin(
            given_rows,
            Shard(rank, widths),
            batch.temperatures,
            self._supply.uniforms(len(given.lens), given.drafted.shape[1] + 1),
            draft=_drafted(given),
            filters=batch.filters,
            keys=keys,
            searched=searched,
            out=out,
        )
        return self._outcome(run(steps), rows, "sharded-triton")

    def kv_writer(self, draft: DraftModel, pool: KvPool) -> WriteKv | None:
        made = KvWriter.of(draft, pool)
        return None if made is None else made.write

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
        first, lens = given.first.to(torch.int32), given.lens.to(torch.int32)
        rows = Rows(given.logits, first, lens, given.drafted.contiguous())
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
        host = to_host(flag)
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


def _drafted(given: Verified) -> DenseDraft | ListedDraft | None:
    if given.probs is None:
        return None
    if given.lse is not None:
        return DenseDraft(given.probs, given.lse)
    assert given.support is not None
    return ListedDraft(given.probs, given.support)
