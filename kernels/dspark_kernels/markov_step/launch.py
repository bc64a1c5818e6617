"""Launches of the Markov kernels, in order."""

from __future__ import annotations

import torch
import triton

from dspark_kernels.markov_step import heads, kernel, shortlist
from dspark_kernels.markov_step import plan as plans
from dspark_kernels.markov_step.operands import (
    Draft,
    Head,
    JointWeight,
    Sampling,
    ShortlistDraft,
    joint_weight,
)
from dspark_kernels.support.backend import launched


def _new(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _record(sampling: Sampling | None, wanted: bool) -> int | None:
    """``RECORD``: None where no row is sampled."""
    if sampling is None:
        return None
    if not wanted:
        return 0
    return 1 if sampling.recorded is None else 2


def _context(
    hidden: torch.Tensor | None, head: Head, weight: JointWeight, like: torch.Tensor
) -> torch.Tensor:
    """``W_h h + bias`` of all rows and steps, ``[B * gamma, r or 3r]`` float32; one launch."""
    if hidden is None or head.bias is None:
        return like
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows, outputs = flat.shape[0], head.bias.shape[0]
    context = _new(hidden, (rows, outputs), torch.float32)
    launched("markov_step.project")
    heads.project[(triton.cdiv(outputs, plans.PROJECT), triton.cdiv(rows, plans.PROJECT))](
        flat, weight.hidden, head.bias, context, rows, flat.shape[1], outputs, weight.stride,
        **plans.project_constants(head.w1.element_size()), num_warps=plans.SMALL_WARPS,
    )  # fmt: skip
    return context


class Block:
    """The launches of one block over the whole vocabulary."""

    def __init__(
        self,
        base: torch.Tensor,
        anchors: torch.Tensor,
        head: Head,
        sampling: Sampling | None,
        vocabulary: torch.Tensor | None,
        out: torch.Tensor | None,
        cut: plans.Plan | None = None,
    ) -> None:
        """Operands as in :func:`dspark_kernels.markov_step.draft_block`; ``cut`` overrides the plan."""
        self.base, self.anchors, self.head = base, anchors, head
        self.sampling, self.vocabulary, self.out = sampling, vocabulary, out
        self.rows, self.steps, self.columns = base.shape
        self.shape = head.rank, head.w2.element_size(), self.rows
        self.blocks = triton.cdiv(self.rows, plans.block_b(self.rows, *self.shape[:2]))
        self.cut = cut or plans.plan(
            self.columns, *self.shape[:2], processors=plans.processors(base.device)
        )
        self.weight = joint_weight(head)
        shape = (self.steps, 4, self.cut.chunks, self.rows)
        self.stats = _new(base, shape, torch.float32)
        self.chosen = _new(base, (self.steps, *shape[2:]), torch.int32)

    def run(
        self, hidden: torch.Tensor | None, state: torch.Tensor | None = None
    ) -> tuple[Draft, torch.Tensor | None]:
        """All launches: gamma + 1, and gamma + 1 more for gated and rnn heads.

        Returns:
            The draft, and the state after the last step of an rnn head.
        """
        latents = None
        if self.head.weight is not None:
            latents = _new(self.base, (self.rows, self.head.rank), self.head.w1.dtype)
            context = _context(hidden, self.head, self.weight, self.stats)
        for step in range(self.steps):
            if latents is not None:
                after = self.latent(step, context, state, latents)
                state = after if self.head.kind == "rnn" else None
            self.scan(step, latents)
        return self.finish(), state

    def latent(
        self, step: int, context: torch.Tensor, state: torch.Tensor | None, latents: torch.Tensor
    ) -> torch.Tensor:
        """Write a step's ``latents``; returns the new states ``[B, r]`` float32 of an rnn head."""
        head, weight = self.head, self.weight
        recurrent = head.kind == "rnn"
        states = _new(latents, tuple(latents.shape), torch.float32) if recurrent else self.stats
        constants = plans.latent_constants(*self.shape, recurrent=recurrent)
        grid = triton.cdiv(head.rank, plans.LATENT), triton.cdiv(self.rows, constants["BLOCK_B"])
        launched("markov_step.latent")
        heads.latent[grid](
            head.w1, weight.state, weight.embedded, context[step:],
            self.stats if state is None else state, self.anchors, self.stats, self.chosen,
            latents, states, self.rows, step, self.cut.chunks, int(state is not None),
            weight.stride, self.steps * context.shape[1],
            **constants, num_warps=plans.SMALL_WARPS,
        )  # fmt: skip
        return states

    def scan(self, step: int, latents: torch.Tensor | None) -> None:
        """One step; ``latents`` [B, r] of a gated or rnn head."""
        base, head = self.base[:, step], self.head
        out = base if self.out is None else self.out[:, step]
        keys = self.sampling or Sampling(self.stats, self.anchors, self.anchors)
        launched("markov_step.scan")
        kernel.scan[(self.blocks, self.cut.chunks)](
            base, out, head.w2, head.w1 if latents is None else latents, self.anchors,
            self.anchors if self.vocabulary is None else self.vocabulary,
            keys.temperatures, keys.seeds, keys.positions,
            self.chosen if keys.recorded is None else keys.recorded, self.stats, self.chosen,
            self.rows, self.columns, step, self.cut.tiles, base.stride(0), out.stride(0),
            **plans.scan_constants(
                *self.shape, gather=latents is None, mapped=self.vocabulary is not None,
                record=_record(self.sampling, self.out is not None),
            ) | {"BLOCK_V": self.cut.block_v},
            num_warps=plans.WARPS, num_stages=plans.STAGES,
        )  # fmt: skip

    def finish(self) -> Draft:
        """Reduce the chunks of all steps."""
        shape = (self.rows, self.steps)
        tokens, previous = (_new(self.base, shape, torch.int64) for _ in range(2))
        logit, lse = (_new(self.base, shape, torch.float32) for _ in range(2))
        launched("markov_step.finish")
        kernel.finish[(self.blocks, self.steps)](
            self.stats, self.chosen, self.anchors,
            self.stats if self.sampling is None else self.sampling.temperatures,
            tokens, previous, logit, lse, self.rows, self.steps, self.cut.chunks,
            **plans.finish_constants(*self.shape, sampled=self.sampling is not None),
            num_warps=plans.SMALL_WARPS,
        )  # fmt: skip
        return Draft(tokens, previous, logit, lse, self.out)


def draft_shortlist(
    base: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    hidden: torch.Tensor | None,
    sampling: Sampling | None,
    vocabulary: torch.Tensor | None,
    size: int,
    support_dtype: torch.dtype,
    successors: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    span: int = plans.SPAN,
) -> ShortlistDraft:
    """Three launches, four for gated and rnn heads; ``span`` overrides the columns a program."""
    if successors is not None or out is not None:
        raise NotImplementedError("successors and out by the triton backend")
    rows, steps, columns = base.shape
    weight, bytes_ = joint_weight(head), base.element_size()
    context = _context(hidden, head, weight, anchors)
    constants = plans.select_constants(size, bytes_, span)
    spans = triton.cdiv(columns, span)
    values = _new(base, (rows * steps, spans, constants["CAP"]), base.dtype)
    lanes = _new(base, tuple(values.shape), torch.int16)
    counts = _new(base, (rows * steps, spans), torch.int32)
    # Positions come first in the grid: the other dimensions hold at most 65535 programs.
    launched("markov_step.select")
    shortlist.select[(rows * steps, spans)](
        base, values, lanes, counts, columns, steps, base.stride(0), base.stride(1),
        **constants, num_warps=plans.WARPS,
    )  # fmt: skip
    support = _new(base, (rows, steps, size), support_dtype)
    best = _new(base, (rows, steps, size), base.dtype)
    launched("markov_step.merge")
    shortlist.merge[(rows * steps,)](
        values, lanes, counts, anchors if vocabulary is None else vocabulary, best, support, spans,
        **plans.merge_constants(size, bytes_, columns, mapped=vocabulary is not None, span=span),
        num_warps=plans.WARPS,
    )  # fmt: skip
    return _chain(best, support, context, anchors, head, weight, sampling)


def _chain(
    best: torch.Tensor,
    support: torch.Tensor,
    context: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    weight: JointWeight,
    sampling: Sampling | None,
) -> ShortlistDraft:
    rows, steps, size = best.shape
    vanilla, recurrent = head.kind == "vanilla", head.kind == "rnn"
    tokens, previous = (_new(best, (rows, steps), torch.int64) for _ in range(2))
    probs = _new(best, (rows, steps, size), torch.float32) if sampling is not None else None
    latents = head.w1 if vanilla else _new(best, (rows, head.rank), head.w1.dtype)
    states = _new(best, (rows, head.rank), torch.float32) if recurrent else tokens
    keys = sampling or Sampling(tokens, anchors, anchors)
    launched("markov_step.chain")
    shortlist.chain[(rows,)](
        best, support, head.w1, head.w2, weight.state, weight.embedded, context, anchors,
        keys.temperatures, keys.seeds, keys.positions,
        anchors if keys.recorded is None else keys.recorded,
        tokens, previous, tokens if probs is None else probs, latents, states,
        steps, weight.stride,
        **plans.chain_constants(
            head.rank, size, kind=head.kind, record=_record(sampling, True)
        ),
        num_warps=plans.WARPS,
    )  # fmt: skip
    return ShortlistDraft(tokens, previous, support, best, probs)
