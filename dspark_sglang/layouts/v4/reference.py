"""DeepSeek-V4's target in plain torch: a whole sequence at once, no cache and no SGLang.

Every position ``t`` of a layer sees the last ``window`` latents, its own included, and the
compressed latents of blocks that have ended, block ``b`` of ratio ``r`` from ``t + 1 >= (b+1) r``
on. A compressed latent is, dimension by dimension, a softmax-weighted mean over its block:

    C_b = rope_{b r}(norm(sum_i softmax_i(W_g x_i + a_i) * W_kv x_i))

With ratio 4 blocks overlap: the mean runs over eight rows, where the four of the block before
take the first halves of ``W_kv x``, ``W_g x`` and ``a``, its own the second. There an indexer
chooses ``index_topk`` of the ended blocks, by

    I(t, b) = sum_h w_h(x_t) relu(H q_h(t) . H c_b),        H: the orthonormal Hadamard matrix

where ``c_b`` comes from a compressor of its own. Latents of window and blocks go through one
softmax with a sink, and the output is turned back (:class:`~dspark_sglang.layouts.v4.layers.Attention`).

Experts of the first layers are read from a table by token; weights are the scores' all the same.
Streams and experts are those of :mod:`~dspark_sglang.layouts.v4.layers`.

Written from the published configuration and the papers; ``docs/explanation/v4.md`` compares it with DeepSeek's
own inference code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import linear, rms_norm

from dspark_sglang.layouts.v4.config import TargetShape, V4Shape
from dspark_sglang.layouts.v4.drafter import load_tensors
from dspark_sglang.layouts.v4.layers import (
    Collapse,
    HyperConnection,
    MixtureOfExperts,
    frequencies,
    read,
    turn,
    write,
)
from dspark_sglang.layouts.v4.storage import STORED, Rounding


class Border(NamedTuple):
    """Where a choice of the highest scores ended, for one position of one layer."""

    #: Of compressed blocks, by the indexer; or of experts, by their biased scores.
    what: Literal["blocks", "experts"]
    layer: int
    position: int
    #: Score of the last one chosen less that of the first left out; small: a near-tie.
    gap: float
    #: Number of those two.
    chosen: int
    left_out: int


@dataclass(frozen=True, slots=True)
class Forward:
    """What one pass over ``n`` tokens gives."""

    #: ``[n, V]``.
    logits: torch.Tensor
    #: For each layer ``[n, d]``, the mean of its output streams: what the drafter reads.
    states: list[torch.Tensor]
    #: Of every choice in which something was left out.
    borders: list[Border] = field(default_factory=list)

    def logprobs(self) -> torch.Tensor:
        """``[n, V]`` log-probabilities of the next token."""
        return self.logits.log_softmax(dim=-1)

    def near_ties(self, gap: float) -> list[Border]:
        """Choices that a score error of ``gap`` could turn, smallest gap first."""
        return sorted((b for b in self.borders if b.gap < gap), key=lambda border: border.gap)

    def read_by(self, shape: V4Shape) -> torch.Tensor:
        """``[n, layers * d]``: the states that a drafter of this shape takes, side by side."""
        return torch.cat([self.states[layer] for layer in shape.target_layers], dim=-1)


def hadamard(size: int, dtype: torch.dtype) -> torch.Tensor:
    """The orthonormal ``[size, size]`` matrix of Sylvester's construction; ``size`` a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


class Reference:
    """The target's forward pass.

    ``shape``, ``tensors``, ``rounding`` and the methods may be replaced on an instance, which is how tests
    plant mistakes.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        shape: TargetShape,
        rounding: Rounding = STORED,
    ) -> None:
        """Args:
        tensors: plain weights by their published names, all of one dtype (float32 or float64).
        shape: sizes.
        rounding: what of a server's storage is imitated.
        """
        self.tensors = dict(tensors)
        self.shape = shape
        self.rounding = rounding

    @classmethod
    def load(
        cls, directory: Path, dtype: torch.dtype = torch.float32, rounding: Rounding = STORED
    ) -> Reference:
        """Read a bundle, plain or quantised as published.

        Raises:
            CheckpointError: the configuration is not V4's.
        """
        config, tensors = load_tensors(directory, dtype)
        return cls(tensors, TargetShape.from_config(config), rounding)

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> Forward:
        """Logits, states and borders of ``n`` tokens."""
        layer, t = self.shape.layer, self.tensors
        ids = torch.tensor(tokens)
        streams = t["embed.weight"][ids][:, None].repeat(1, layer.streams, 1)
        states: list[torch.Tensor] = []
        borders: list[Border] = []
        for index in range(self.shape.depth):
            mappings = HyperConnection.of(t, f"layers.{index}.hc_attn_", layer).mappings(streams)
            x = self.norm(read(streams, mappings.pre), f"layers.{index}.attn_norm")
            streams = write(self.attention(x, index, borders), streams, mappings)
            mappings = HyperConnection.of(t, f"layers.{index}.hc_ffn_", layer).mappings(streams)
            x = self.norm(read(streams, mappings.pre), f"layers.{index}.ffn_norm")
            streams = write(self.experts(x, index, ids, borders), streams, mappings)
            states.append(streams.mean(dim=1))
        last = Collapse.of(t, "hc_head_", layer)(streams)
        return Forward(linear(self.norm(last, "norm"), t["head.weight"]), states, borders)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """``[..., D]`` normed with the weight of that name."""
        return rms_norm(x, (x.shape[-1],), self.tensors[f"{name}.weight"], self.shape.layer.eps)

    def speeds(self, ratio: int) -> torch.Tensor:
        """``[rope_dim / 2]`` float64 rotation of a layer of this ratio, its compressor's included."""
        shape = self.shape
        if ratio == 0:
            return frequencies(shape.layer.rope_dim, shape.layer.rope_theta)
        return frequencies(shape.layer.rope_dim, shape.compress_theta, shape.yarn)

    def turn_back(
        self, out: torch.Tensor, positions: torch.Tensor, speeds: torch.Tensor
    ) -> torch.Tensor:
        """``[n, heads, D]`` of attention, whose values carry their positions' rotation."""
        return turn(out, positions, speeds, inverse=True)

    def attention(self, x: torch.Tensor, layer: int, borders: list[Border]) -> torch.Tensor:
        """``[n, d]`` normed rows to ``[n, d]``; borders of this layer's indexer are appended."""
        sizes, t, prefix = self.shape.layer, self.tensors, f"layers.{layer}.attn."
        ratio, count = self.shape.ratios[layer], len(x)
        speeds, positions = self.speeds(ratio), torch.arange(count)
        low = self.norm(linear(x, t[f"{prefix}wq_a.weight"]), f"{prefix}q_norm")
        heads = linear(low, t[f"{prefix}wq_b.weight"]).view(count, sizes.heads, sizes.head_dim)
        heads = rms_norm(heads, (sizes.head_dim,), eps=sizes.eps)
        queries = turn(heads, positions[:, None], speeds)
        latents = self.norm(linear(x, t[f"{prefix}wkv.weight"]), f"{prefix}kv_norm")
        keys = self.rounding.latents(turn(latents, positions, speeds), sizes.rope_dim)
        age = positions[:, None] - positions
        seen = (age >= 0) & (age < sizes.window)
        if ratio:
            more = self.compressed(x, f"{prefix}compressor", ratio, speeds)
            ended = torch.arange(len(more)) < (positions[:, None] + 1) // ratio
            if ratio == 4:
                ended = ended & self.selected(x, low, layer, speeds, ended, borders)
            keys = torch.cat([keys, self.rounding.latents(more, sizes.rope_dim)])
            seen = torch.cat([seen, ended], dim=1)
        scores = torch.einsum("nhd,kd->nhk", queries, keys) * sizes.head_dim**-0.5
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        sink = t[f"{prefix}attn_sink"].view(1, -1, 1).expand(count, -1, 1)
        shares = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        out = self.turn_back(torch.einsum("nhk,kd->nhd", shares, keys), positions[:, None], speeds)
        groups = out.reshape(count, sizes.o_groups, -1)
        wo_a = t[f"{prefix}wo_a.weight"].view(sizes.o_groups, sizes.o_rank, -1)
        made = torch.einsum("ngi,goi->ngo", groups, wo_a).flatten(1)
        return linear(made, t[f"{prefix}wo_b.weight"])

    def compressed(
        self, x: torch.Tensor, prefix: str, ratio: int, speeds: torch.Tensor
    ) -> torch.Tensor:
        """``[n // ratio, D]`` turned latents of the blocks that have ended, from ``[n, d]`` rows."""
        blocks = len(x) // ratio
        ended = x[: blocks * ratio]
        rows, gates = (
            torch.unflatten(
                linear(ended, self.tensors[f"{prefix}.{name}.weight"]), 0, (blocks, ratio)
            )
            for name in ("wkv", "wgate")
        )
        gates = gates + self.tensors[f"{prefix}.ape"]
        if ratio == 4:
            rows, gates = _overlapped(rows, 0.0), _overlapped(gates, float("-inf"))
        mean = (gates.softmax(dim=1) * rows).sum(dim=1)
        return turn(self.norm(mean, f"{prefix}.norm"), torch.arange(blocks) * ratio, speeds)

    def scores(
        self, x: torch.Tensor, low: torch.Tensor, layer: int, speeds: torch.Tensor
    ) -> torch.Tensor:
        """``[n, blocks]`` scores of the indexer, of blocks that have not ended too."""
        shape, prefix = self.shape, f"layers.{layer}.attn.indexer"
        mixed = hadamard(shape.index_dim, x.dtype)
        heads = linear(low, self.tensors[f"{prefix}.wq_b.weight"])
        heads = heads.view(-1, shape.index_heads, shape.index_dim)
        queries = turn(heads, torch.arange(len(x))[:, None], speeds) @ mixed
        keys = self.compressed(x, f"{prefix}.compressor", 4, speeds) @ mixed
        products = torch.einsum(
            "nhd,kd->nhk", self.rounding.index(queries), self.rounding.index(keys)
        )
        weights = linear(x, self.tensors[f"{prefix}.weights_proj.weight"])
        weights = weights * (shape.index_dim * shape.index_heads) ** -0.5
        return torch.sum(self.rectified(products) * weights[..., None], dim=1)

    def rectified(self, products: torch.Tensor) -> torch.Tensor:
        """What the indexer makes of products of queries and keys, before its heads' sum."""
        return products.relu()

    def selected(
        self,
        x: torch.Tensor,
        low: torch.Tensor,
        layer: int,
        speeds: torch.Tensor,
        ended: torch.Tensor,
        borders: list[Border],
    ) -> torch.Tensor:
        """``[n, blocks]`` bool: the blocks that the indexer chooses for each position.

        Args:
            x: ``[n, d]`` normed rows.
            low: ``[n, q_rank]`` low-rank queries.
            layer: of which.
            speeds: of the layer's rotation.
            ended: ``[n, blocks]`` blocks to choose from.
            borders: what this layer left out is appended.
        """
        most = self.shape.index_topk
        if ended.shape[1] <= most:
            return torch.ones_like(ended)
        scores = self.scores(x, low, layer, speeds).masked_fill(~ended, float("-inf"))
        borders += _borders("blocks", layer, scores, most)
        return torch.zeros_like(ended).scatter_(1, scores.topk(most, dim=1).indices, True)

    def experts(
        self, x: torch.Tensor, layer: int, tokens: torch.Tensor, borders: list[Border]
    ) -> torch.Tensor:
        """``[n, d]`` normed rows of ``[n]`` tokens to ``[n, d]``; routing's borders are appended."""
        made = _Experts(self.tensors, layer, self.shape, tokens)
        if layer >= self.shape.hashed and self.shape.layer.active < self.shape.layer.experts:
            borders += _borders("experts", layer, made.biased(x), self.shape.layer.active)
        return made(x)


class _Experts(MixtureOfExperts):
    """A target layer's, where a table of tokens chooses in the first layers."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        layer: int,
        shape: TargetShape,
        tokens: torch.Tensor,
    ) -> None:
        super().__init__(tensors, f"layers.{layer}.ffn.", shape.layer)
        self._tokens = tokens if layer < shape.hashed else None

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tokens is None:
            return super().route(x)
        chosen = self._t[f"{self._prefix}gate.tid2eid"][self._tokens].long()
        return chosen, self.weights(self.scores(x), chosen)


def _borders(
    what: Literal["blocks", "experts"], layer: int, scores: torch.Tensor, most: int
) -> list[Border]:
    """Borders of the ``most`` best of ``[n, m]`` scores; -inf: not to be chosen."""
    best = scores.topk(most + 1, dim=1)
    gaps = best.values[:, most - 1] - best.values[:, most]
    left = torch.isfinite(best.values[:, most])
    return [
        Border(what, layer, position, float(gaps[position]), *best.indices[position, -2:].tolist())
        for position in torch.nonzero(left).flatten().tolist()
    ]


def _overlapped(blocks: torch.Tensor, before: float) -> torch.Tensor:
    """``[B, r, 2 D]`` to ``[B, 2 r, D]``: the block before with its first halves, then its own.

    Args:
        blocks: rows or gates.
        before: stands for the block before the first.
    """
    first, second = blocks.chunk(2, dim=-1)
    earlier = torch.cat([torch.full_like(first[:1], before), first[:-1]])
    return torch.cat([earlier, second], dim=1)
