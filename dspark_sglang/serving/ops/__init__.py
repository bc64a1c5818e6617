"""The operations of a round outside the models: the one place where serving meets an implementation of them.

:data:`IMPLEMENTATIONS` names the implementations. One is imported when it is chosen, so a server that runs PyTorch's
imports no kernel and no Triton.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.config import Kernels, Verification
from dspark_sglang.core.accept import Accepted
from dspark_sglang.core.device import to_device
from dspark_sglang.core.draft import DraftBlock, undrafted
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.sampling import Filters
from dspark_sglang.core.seeded import Noise
from dspark_sglang.core.step import Step
from dspark_sglang.core.tensor_parallel import Exchange, Shard
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.sglang_types import DenseDraft, KvPool, Req, SamplingBatchInfo
from dspark_sglang.serving.telemetry import Telemetry

#: Kind to ``module:class``.
IMPLEMENTATIONS = {
    "torch": "dspark_sglang.serving.ops.torch_ops:TorchOps",
    "triton": "dspark_sglang.serving.ops.triton_ops:TritonOps",
}

#: Writes ``[N, layers read * d]`` target states at ``[N]`` positions to ``[N]`` slots, negative ones left out.
WriteKv = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


class SampledRows(msgspec.Struct, frozen=True):
    """The rows of a batch that sample, and their parameters."""

    #: ``[S]`` int64 indices into the batch.
    index: torch.Tensor
    #: ``[S]`` float32 temperatures.
    temperatures: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None
    #: ``[S]`` int64 where SGLang samples by seed (``--enable-deterministic-inference``), else None.
    seeds: torch.Tensor | None = None

    @classmethod
    def of(cls, info: SamplingBatchInfo | None, requests: Sequence[Req]) -> SampledRows | None:
        """The sampled rows of a batch and its sampling information; None when every row is greedy."""
        if info is None or info.is_all_greedy:
            return None
        # SGLang expresses temperature 0 as top_k = 1.
        sampled = [row for row, r in enumerate(requests) if r.sampling_params.top_k > 1]
        index = to_device(torch.tensor(sampled, dtype=torch.int64), info.top_ks.device)

        def rows(values: torch.Tensor) -> torch.Tensor:
            return values.view(-1)[index]

        return cls(
            index=index,
            temperatures=rows(info.temperatures).float(),
            top_k=rows(info.top_ks) if info.need_top_k_sampling else None,
            top_p=rows(info.top_ps) if info.need_top_p_sampling else None,
            min_p=rows(info.min_ps) if info.need_min_p_sampling else None,
            seeds=None if info.sampling_seed is None else rows(info.sampling_seed),
        )

    @property
    def filters(self) -> bool:
        """Whether some row filters its distribution."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def noise(
        self, like: torch.Tensor, positions: torch.Tensor, owner: torch.Tensor | None = None
    ) -> Noise | None:
        """Keys of seeded draws; None where SGLang does not sample by seed.

        Args:
            like: ``[N, M]`` logits of the rows that draw.
            positions: ``[N]`` position of each row's input token.
            owner: ``[N]`` int64 sampled row that each belongs to; None: each its own.
        """
        if self.seeds is None:
            return None

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return values if values is None or owner is None else values[owner]

        seeds = self.seeds if owner is None else self.seeds[owner]
        filters = Filters.of(like, spread(self.top_k), spread(self.top_p), spread(self.min_p))
        return Noise(seeds, positions.to(torch.int64), filters)


class Admitted(NamedTuple):
    """What is sent to verification."""

    #: ``[R]`` integer drafted tokens of each request, and its first packed row, as :class:`Verified` has them.
    lens: torch.Tensor
    first: torch.Tensor
    #: ``[R]`` int32 rows of each request: its anchor's beside them.
    sent: torch.Tensor
    #: ``[R + budget]`` int64 cells ``r * (gamma + 1) + j`` of the ``[R, gamma + 1]`` window, request
    #: after request.
    rows: torch.Tensor


class Verified(NamedTuple):
    """A drafted block after the target has run over it."""

    #: ``[N, V]`` target logits, adjusted as plain decoding would have.
    logits: torch.Tensor
    #: ``[R, gamma]`` int64 drafted tokens.
    drafted: torch.Tensor
    #: The requests that sample; None: all are greedy.
    rows: SampledRows | None
    #: Drafted distributions and the tokens they are over (None: every token in order), as the same operations
    #: gave them in the :class:`~dspark_sglang.core.draft.DraftBlock`; None where no distribution was drawn from.
    probs: torch.Tensor | None
    support: torch.Tensor | None
    lse: torch.Tensor | None
    #: ``[R]`` integer drafted tokens that were sent, and logits row of each request's anchor.
    lens: torch.Tensor
    first: torch.Tensor
    #: ``[R]`` int64 position of each request's anchor.
    anchors: torch.Tensor


class Ops(abc.ABC):
    """What drafting and verification compute between two forwards.

    Args:
        markov, confidence: the drafter's heads.
        generator: where randomness comes from.
    """

    #: Its key in :data:`IMPLEMENTATIONS`: what runs, in logs, counters and metrics.
    name: str
    #: Whether the distributions of a block are of every request, greedy ones included; else of those that sample.
    covers_greedy = False
    #: The rest of a step.
    step = Step()

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
        #: With the STS temperatures in use.
        self.confidence_head = confidence
        self._generator = generator
        self._verification = verification
        self._telemetry = telemetry
        self._gamma = len(confidence.temperatures)
        self._anchors: dict[int, Admitted] = {}

    @classmethod  # noqa: B027 - PyTorch is right anywhere
    def check(cls, device: torch.device) -> None:
        """Look whether these operations are right on a device, before any is made.

        Raises:
            CompatibilityError: they cannot run there, or give other results than their references.
        """

    @property
    def launches(self) -> dict[str, int]:
        """Kernel launches of this process, by kernel."""
        return {}

    @abc.abstractmethod
    def draft(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
        vocabulary: torch.Tensor | None,
    ) -> DraftBlock:
        """Draft a block a request.

        Args:
            base: ``[R, gamma, V]`` base logits, of the ``vocabulary`` if given.
            hidden: ``[R, gamma, d]`` draft hidden states.
            anchors: ``[R]`` int64 last committed tokens.
            positions: ``[R]`` int64 positions of those.
            rows: the requests that sample; None: all are greedy.
            vocabulary: int64 token of each base logit; None: every token in order.
        """

    def nothing(self, rows: SampledRows | None, requests: int, depth: int = 1) -> DraftBlock:
        """A block of ``depth`` tokens that no sampled request sends to verification: for steps that do not draft.

        Args:
            rows: the requests that sample, of ``requests``.
        """
        count = None
        if rows is not None and rows.seeds is None:
            count = requests if self.covers_greedy else len(rows.index)
        return undrafted(requests, sampled=count, device=self.markov.w1.device, depth=depth)

    @abc.abstractmethod
    def confidence(self, features: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """``[2, R, gamma]`` float32: calibrated confidences, and their raw logits.

        Args:
            features: ``[R, gamma, d]`` draft hidden states.
            previous: ``[R, gamma]`` int64 token before each drafted one.
        """

    def renew(self, markov: MarkovHead, confidence: ConfidenceHead) -> None:
        """Work with heads whose weights have changed; only where every rank has all of them."""
        self.markov, self.confidence_head = markov, confidence

    @property
    def temperatures(self) -> list[float]:
        """STS temperatures in use."""
        return [round(float(value), 4) for value in self.confidence_head.temperatures]

    def set_temperatures(self, temperatures: torch.Tensor) -> None:
        """Calibrate with other STS temperatures, ``[gamma]`` float32, from now on."""
        head = self.confidence_head
        own = temperatures.to(head.temperatures)
        self.confidence_head = dataclasses.replace(head, temperatures=own)

    @abc.abstractmethod
    def admit(
        self,
        survival: npt.NDArray[np.float64],
        order: npt.NDArray[np.int64],
        budget: int,
        device: torch.device,
    ) -> Admitted:
        """Admit the ``budget`` likeliest drafted tokens and lay out the rows to verify.

        Args:
            survival: ``[R, gamma]``, non-increasing along each row.
            order: its admission order.
            budget: tokens over all requests.
            device: where the result is needed.
        """

    @abc.abstractmethod
    def admit_there(self, survival: torch.Tensor, budget: int) -> Admitted:
        """:meth:`admit` where the survivals are, without a wait for the device.

        Args:
            survival: ``[R, gamma]`` float64, non-increasing along each row.
            budget: tokens over all requests, no more than have a survival above 0.
        """

    def anchors(self, requests: int, device: torch.device) -> Admitted:
        """What is verified where no drafted token is: made once for every number of requests."""
        known = self._anchors.get(requests)
        if known is None:
            row = torch.arange(requests, device=device)
            one = torch.ones(requests, dtype=torch.int32, device=device)
            known = Admitted(torch.zeros_like(row), row, one, row * (self._gamma + 1))
            self._anchors[requests] = known
        return known

    @abc.abstractmethod
    def accept(self, given: Verified) -> Accepted:
        """Decide how much of each block is kept, and the token after it."""

    def shards(self, device: torch.device) -> ShardedAccept | None:
        """Acceptance over shards of the vocabulary, checked on this device; None: these have none of their own."""
        return None

    def sharded_draft(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
        shard: Shard,
        size: int,
    ) -> Exchange[DraftBlock] | None:
        """:meth:`draft` from this rank's base logits, in one exchange, over the ``size`` best a rank; every rank has
        the whole heads. None: these operations have none of their own.

        Args:
            base: ``[R, gamma, width]`` base logits of the shard.
        """
        return None

    def kv_writer(self, draft: DenseDraft, pool: KvPool) -> WriteKv | None:
        """What writes the draft's KV to its pool; None leaves it to SGLang."""
        return None


#: :meth:`Ops.accept` of this rank's columns, by rejection sampling, of no seeds with filters: what was verified, with
#: logits and dense distributions of these columns; the rank; the columns of every rank; and what exchanges records.
ShardedAccept = Callable[[Verified, int, tuple[int, ...], Callable[[Exchange[Any]], Any]], Accepted]


def resolve(kernels: Kernels, device: torch.device) -> str:
    """The kind of operations for a device.

    Raises:
        CompatibilityError: Triton's were asked for and it is not installed.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return "torch"
    if importlib.util.find_spec("triton") is None:
        raise CompatibilityError(
            "Triton is not installed.",
            expected="triton, which PyTorch for CUDA brings",
            fix="Install PyTorch for CUDA, or set DSPARK_KERNELS=torch.",
        )
    return "triton"


def make(kernels: Kernels, *, device: torch.device, **given: Any) -> Ops:
    """The operations of a server, checked on its device.

    Args:
        given: arguments of :class:`Ops`.

    Raises:
        CompatibilityError: they cannot run there, or give other results than their references.
    """
    kind: type[Ops] = pkgutil.resolve_name(IMPLEMENTATIONS[resolve(kernels, device)])
    kind.check(device)
    return kind(**given)
