"""Launches of the Markov kernels, in order."""

from __future__ import annotations

import torch
import triton

from dspark_kernels.markov_step import chain, heads, kernel, shortlist
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
from dspark_kernels.support.checks import in_units


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


class Shortlist:
    """The launches of one block over the best of each position and their successors."""

    def __init__(
        self,
        base: torch.Tensor,
        anchors: torch.Tensor,
        head: Head,
        sampling: Sampling | None,
        vocabulary: torch.Tensor | None,
        size: int,
        successors: torch.Tensor | None,
        out: torch.Tensor | None,
        span: int,
    ) -> None:
        """Operands as in :func:`dspark_kernels.markov_step.draft_shortlist`."""
        self.base, self.anchors, self.head = base, anchors, head
        self.sampling, self.vocabulary = sampling, vocabulary
        self.size, self.successors, self.out, self.span = size, successors, out, span
        self.rows, self.steps, self.columns = base.shape
        self.follow = 0 if successors is None else successors.shape[1]
        self.extended = self.follow > 0 or out is not None
        self.spans = triton.cdiv(self.columns, span)
        self.weight = joint_weight(head)
        # Stand in for tensors that are not read.
        self.keys = sampling or Sampling(anchors, anchors, anchors)
        self.flags = anchors if self.keys.recorded is None else self.keys.recorded
        self.names = anchors if vocabulary is None else vocabulary
        shape = (self.rows * self.steps, self.spans)
        tail = out is not None
        self.tops, self.masses = (
            _new(base, shape, torch.float32) if tail else anchors for _ in range(2)
        )

    def run(self, hidden: torch.Tensor | None, support_dtype: torch.dtype) -> ShortlistDraft:
        """Three launches, four for gated and rnn heads."""
        context = _context(hidden, self.head, self.weight, self.anchors)
        shape = (self.rows, self.steps, self.size + self.follow)
        support = _new(self.base, shape, support_dtype)
        best = _new(self.base, shape, self.base.dtype)
        places = support
        if self.extended:
            places = _new(self.base, (*shape[:2], self.size), torch.int32)
        self.merge(self.select(), best, places)
        return self.chain(best, places, support, context)

    @property
    def tail(self) -> int:
        """``RECORD`` of the rows whose base tail is drawn from."""
        return _record(self.sampling, self.out is not None) or 0

    def select(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What can be among the best of each span: values, lanes, counts."""
        base, positions = self.base, self.rows * self.steps
        constants = plans.select_constants(self.size, base.element_size(), self.span, self.tail)
        values = _new(base, (positions, self.spans, constants["CAP"]), base.dtype)
        lanes = _new(base, tuple(values.shape), torch.int16)
        counts = _new(base, (positions, self.spans), torch.int32)
        # Positions come first in the grid: the other dimensions hold at most 65535 programs.
        unit, strides = in_units(base.stride()[:2])
        launched("markov_step.select")
        shortlist.select[(positions, self.spans)](
            base, self.keys.temperatures, self.flags, values, lanes, counts, self.tops, self.masses,
            self.columns, self.steps, *strides, UNIT=unit,
            **constants, num_warps=plans.WARPS,
        )  # fmt: skip
        return values, lanes, counts

    def merge(
        self,
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        best: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """The best of each position: their logits, and their tokens (columns for ``extended``)."""
        mapped = self.vocabulary is not None and not self.extended
        constants = plans.merge_constants(
            self.size, self.base.element_size(), self.columns,
            follow=self.follow, mapped=mapped, record=self.tail, span=self.span,
        )  # fmt: skip
        launched("markov_step.merge")
        shortlist.merge[(self.rows * self.steps,)](
            *found, self.names, self.keys.temperatures, self.flags, best, places,
            self.tops, self.masses, self.spans, self.steps, **constants, num_warps=plans.WARPS,
        )  # fmt: skip

    def chain(
        self, best: torch.Tensor, places: torch.Tensor, support: torch.Tensor, context: torch.Tensor
    ) -> ShortlistDraft:
        """All steps of each request."""
        head, base, keys, out = self.head, self.base, self.keys, self.out
        vanilla, recurrent = head.kind == "vanilla", head.kind == "rnn"
        shape = (self.rows, self.steps)
        tokens, previous = (_new(best, shape, torch.int64) for _ in range(2))
        listed = self.sampling is not None and out is None
        probs = _new(best, tuple(best.shape), torch.float32) if listed else None
        lse = None if out is None else _new(best, shape, torch.float32)
        latents = head.w1 if vanilla else _new(best, (self.rows, head.rank), head.w1.dtype)
        states = _new(best, (self.rows, head.rank), torch.float32) if recurrent else tokens
        stored = base if out is None else out
        unit, strides = in_units((*base.stride()[:2], *stored.stride()[:2]))
        launched("markov_step.chain")
        chain.chain[(self.rows,)](
            best, places, support, head.w1, head.w2, self.weight.state, self.weight.embedded,
            context, self.anchors, self.names,
            self.anchors if self.successors is None else self.successors,
            keys.temperatures, keys.seeds, keys.positions, self.flags,
            base, stored, self.tops, self.masses,
            tokens, previous, tokens if probs is None else probs, tokens if lse is None else lse,
            latents, states, self.steps, self.columns, self.spans, head.w2.shape[0],
            *strides, self.weight.stride, UNIT=unit,
            **plans.chain_constants(
                head.rank, self.size, base.element_size(), self.columns, kind=head.kind,
                record=_record(self.sampling, True), follow=self.follow, tail=out is not None,
                mapped=self.vocabulary is not None, span=self.span,
            ),
            num_warps=plans.WARPS,
        )  # fmt: skip
        return ShortlistDraft(tokens, previous, support, best, probs, out, lse)


def candidates(
    base: torch.Tensor, tokens: torch.Tensor, size: int, best: torch.Tensor, names: torch.Tensor
) -> None:
    """The ``size`` best of each position, their logits to ``best`` and tokens to ``names``; two launches."""
    unread = Head(base[0], base[0])
    block = Shortlist(base, tokens, unread, None, tokens, size, None, None, plans.SPAN)
    block.merge(block.select(), best, names)


def draft_among(
    best: torch.Tensor,
    names: torch.Tensor,
    anchors: torch.Tensor,
    head: Head,
    hidden: torch.Tensor | None,
    sampling: Sampling | None,
) -> ShortlistDraft:
    """One launch over candidates that are known, two for gated and rnn heads."""
    size = best.shape[2]
    block = Shortlist(best, anchors, head, sampling, None, size, None, None, plans.SPAN)
    return block.chain(best, names, names, _context(hidden, head, block.weight, anchors))


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
    block = Shortlist(base, anchors, head, sampling, vocabulary, size, successors, out, span)
    return block.run(hidden, support_dtype)
