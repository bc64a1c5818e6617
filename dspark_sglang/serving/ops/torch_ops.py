"""The operations in plain PyTorch: what runs on a CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.core.accept import (
    Accepted,
    Round,
    accept_block,
    accept_greedy,
    accept_sampled,
    rows_of,
)
from dspark_sglang.core.draft import DraftBlock, cpu_shortlist, draft_block
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.sampling import UNDECIDED, best, probabilities, sample, target_weights
from dspark_sglang.core.schedule import lengths
from dspark_sglang.core.seeded import seeded_draw
from dspark_sglang.serving.ops import Admitted, Ops, SampledRows, Verified

_METHODS = {"rejection": accept_sampled, "block": accept_block}


class TorchOps(Ops):
    """By :mod:`dspark_sglang.core`."""

    name = "torch"
    #: A draft vocabulary and its rows of W2.
    _gathered: tuple[torch.Tensor, torch.Tensor] | None = None

    def renew(self, markov: MarkovHead, confidence: ConfidenceHead) -> None:
        super().renew(markov, confidence)
        self._gathered = None

    def draft(
        self,
        base: torch.Tensor,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        positions: torch.Tensor,
        rows: SampledRows | None,
        vocabulary: torch.Tensor | None,
    ) -> DraftBlock:
        noise = uniforms = None
        if rows is not None:
            noise = rows.noise(base[: len(rows.index), 0], positions[rows.index])
            if noise is None:
                uniforms = self._uniforms(len(rows.index), base.shape[1])
        shortlist = cpu_shortlist(base.shape[-1], sampled=rows is not None)
        self._telemetry.ran[f"draft:torch-{self.markov.kind}"] += 1
        return draft_block(
            base,
            anchors,
            hidden,
            self.markov,
            temperatures=None if rows is None else rows.temperatures,
            sampled=None if rows is None else rows.index,
            uniforms=uniforms,
            noise=noise,
            shortlist=shortlist,
            vocabulary=vocabulary,
            vocabulary_rows=self._rows(vocabulary) if shortlist is None else None,
        )

    def _rows(self, vocabulary: torch.Tensor | None) -> torch.Tensor | None:
        """Rows of W2 of a draft vocabulary, gathered once."""
        if vocabulary is None:
            return None
        if self._gathered is None or self._gathered[0] is not vocabulary:
            self._gathered = vocabulary, self.markov.w2[vocabulary]
        return self._gathered[1]

    def confidence(self, features: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        self._telemetry.ran["confidence:torch"] += 1
        raw = self.confidence_head.logits(features, previous, self.markov)
        return torch.stack([self.confidence_head.calibrate(raw), raw])

    def admit(
        self,
        survival: npt.NDArray[np.float64],
        order: npt.NDArray[np.int64],
        budget: int,
        device: torch.device,
    ) -> Admitted:
        requests, gamma = survival.shape
        lens = lengths(order, budget, requests=requests)
        self._telemetry.ran["admit:numpy"] += 1
        sent = np.arange(gamma + 1) <= lens[:, None]
        rows = torch.from_numpy(np.flatnonzero(sent))
        return packed(torch.from_numpy(lens).to(device), rows.to(device))

    def admit_there(self, survival: torch.Tensor, budget: int) -> Admitted:
        requests, gamma = survival.shape
        # Positions first: ties go to the earlier one, then to the earlier request.
        order = torch.sort(survival.T.reshape(-1), descending=True, stable=True).indices
        lens = torch.zeros(requests, dtype=torch.int64, device=survival.device)
        lens.scatter_add_(0, order[:budget] % requests, torch.ones_like(order[:budget]))
        self._telemetry.ran["admit:torch"] += 1
        sent = torch.arange(gamma + 1, device=survival.device) <= lens[:, None]
        # As many as are sent, in their order: their number is known without asking the device.
        rows = torch.sort(~sent.view(-1), stable=True).indices[: requests + budget]
        return packed(lens, rows)

    def accept(self, given: Verified) -> Accepted:
        rows = given.rows
        if rows is not None and rows.seeds is not None:
            choice = best(given.logits)
            index, drawn = _seeded_choice(given, rows)
            self._telemetry.ran["accept:torch-seeded"] += 1
            choice = choice.index_copy(0, index, drawn)
            return accept_greedy(choice, given.drafted, given.lens, given.first)
        if rows is None or len(rows.index) < len(given.lens):
            outcome = accept_greedy(best(given.logits), given.drafted, given.lens, given.first)
            self._telemetry.ran["accept:torch-greedy"] += 1
        if rows is None:
            return outcome
        sampled = self._sampled(given, rows)
        self._telemetry.ran[f"accept:torch-{self._verification}"] += 1
        if len(rows.index) == len(given.lens):
            return sampled
        return Accepted(
            count=outcome.count.index_copy(0, rows.index, sampled.count),
            token=outcome.token.index_copy(0, rows.index, sampled.token),
        )

    def _sampled(self, given: Verified, rows: SampledRows) -> Accepted:
        """Verification of the sampled requests, over their own logits rows."""
        if len(given.logits) == len(given.lens):
            return self._plain(given, rows)
        assert given.probs is not None
        # Greedy requests may have copied more tokens than were drafted.
        lens, gamma = given.lens[rows.index], given.probs.shape[1]
        row, owner, start = rows_of(lens, given.first[rows.index])

        def spread(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[owner]

        weights = target_weights(
            given.logits[row].float(),
            rows.temperatures[owner],
            top_k=spread(rows.top_k),
            top_p=spread(rows.top_p),
            min_p=spread(rows.min_p),
        )
        uniforms = self._uniforms(len(lens), gamma + 1)
        drafted = given.drafted[rows.index, :gamma]
        round_ = Round(weights, drafted, given.probs, lens, start, given.support)
        return _METHODS[self._verification](round_, uniforms)

    def _plain(self, given: Verified, rows: SampledRows) -> Accepted:
        """A step without drafted tokens, one row a request: the target's token, as plain decoding draws it."""
        every = len(rows.index) == len(given.lens)
        logits = given.logits if every else given.logits[rows.index]
        weights = target_weights(
            logits.float(), rows.temperatures, top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p
        )
        token = sample(weights, self._uniforms(len(weights), 1)[:, 0])
        return Accepted(count=torch.zeros_like(token), token=token)

    def _uniforms(self, rows: int, width: int) -> torch.Tensor:
        return torch.rand(
            (rows, width),
            dtype=torch.float64,
            device=self._generator.device,
            generator=self._generator,
        )


def packed(lens: torch.Tensor, rows: torch.Tensor) -> Admitted:
    """What is verified, of ``[R]`` int64 drafted tokens of each request and the cells of all."""
    sent = lens + 1
    return Admitted(lens, sent.cumsum(0) - sent, sent.to(torch.int32), rows)


def _seeded_choice(given: Verified, rows: SampledRows) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's own draw at every row of the sampled requests: rows and tokens."""
    row, owner, start = rows_of(given.lens[rows.index], given.first[rows.index])
    probs = probabilities(given.logits[row].float() / rows.temperatures[owner, None])
    within = torch.arange(len(owner), device=row.device) - start[owner]
    noise = rows.noise(probs, given.anchors[rows.index][owner] + within, owner)
    assert noise is not None
    # What has no distribution is NaN throughout.
    return row, seeded_draw(probs, noise).masked_fill(probs[:, 0].isnan(), UNDECIDED)
