"""V4's attention as the draft layers use it: one latent a position, a window, no compression.

A position's latent ``l = rope(norm(W_kv x))`` [D] is key and value of every head, so the
value carries the rotation of its position; the output is turned back by the query's:

    q_h = rope(unit(W_qb norm(W_qa x))_h)
    a   = softmax over the visible l and a sink:  q_h . l / sqrt(D),  sink_h
    o_h = rope^-1(sum a l)
    out = W_ob [W_oa,1 o_(heads of group 1); W_oa,2 o_(heads of group 2); ...]

RoPE turns adjacent pairs of a head's last dimensions. The sink takes a share of the softmax and
adds nothing. Source: SGLang 0.5.23, ``models/deepseek_v4_dspark.py`` (``DSparkAttention``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import linear, rms_norm

from dspark_sglang.layouts.v4.rotate import frequencies, turn
from dspark_sglang.layouts.v4.shape import V4Shape
from dspark_sglang.layouts.v4.stored import EXACT, Rounding


class Attention:
    """One layer's attention over tensors somebody else owns."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        prefix: str,
        shape: V4Shape,
        rounding: Rounding = EXACT,
    ) -> None:
        """Args:
        tensors: hold ``{prefix}wq_a.weight`` and so on.
        prefix: of the layer.
        shape: sizes.
        rounding: of the latents, as a server's cache keeps them.
        """
        self.shape = shape
        self._speeds = frequencies(shape.rope_dim, shape.rope_theta)
        self._rounding = rounding
        self._t = tensors
        self._prefix = prefix

    def _weight(self, name: str) -> torch.Tensor:
        return self._t[f"{self._prefix}{name}.weight"]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), self._weight(name), self.shape.eps)

    def _rotate(
        self, x: torch.Tensor, positions: torch.Tensor, inverse: bool = False
    ) -> torch.Tensor:
        return turn(x, positions, self._speeds, inverse=inverse)

    def latents(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys that are also values: ``[..., d]`` rows at positions ``[...]`` to ``[..., D]``."""
        made = self._rotate(self._norm(linear(x, self._weight("wkv")), "kv_norm"), positions)
        return self._rounding.latents(made, self.shape.rope_dim)

    def queries(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` rows at positions ``[...]`` to ``[..., heads, D]``."""
        shape = self.shape
        low = self._norm(linear(x, self._weight("wq_a")), "q_norm")
        heads = linear(low, self._weight("wq_b")).view(*x.shape[:-1], shape.heads, shape.head_dim)
        heads = rms_norm(heads, (shape.head_dim,), eps=shape.eps)
        return self._rotate(heads, positions[..., None])

    def __call__(
        self, x: torch.Tensor, own: torch.Tensor, context: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """Attend from block rows to context and to each other.

        Args:
            x: ``[A, rows, d]`` normed block rows.
            own: ``[A, rows]`` int64 their positions.
            context: ``[S, D]`` latents of the context.
            visible: ``[A, S]`` bool context each block sees.

        Returns:
            ``[A, rows, d]``.
        """
        shape, (blocks, rows) = self.shape, own.shape
        shared = context.expand(blocks, *context.shape)
        keys = torch.cat([shared, self.latents(x, own)], dim=1)
        seen = torch.cat([visible, visible.new_ones(blocks, rows)], dim=1)
        scores = torch.einsum("arhd,akd->arhk", self.queries(x, own), keys) * shape.head_dim**-0.5
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        sink = self._t[f"{self._prefix}attn_sink"].to(scores.dtype)
        scores = torch.cat([scores, sink[:, None].expand(blocks, rows, -1, 1)], dim=-1)
        shares = torch.softmax(scores, dim=-1)[..., :-1]
        out = self._rotate(torch.einsum("arhk,akd->arhd", shares, keys), own[..., None], True)
        groups = out.reshape(blocks, rows, shape.o_groups, -1)
        low = self._weight("wo_a").view(shape.o_groups, shape.o_rank, -1)
        made = torch.einsum("argi,goi->argo", groups, low).flatten(-2)
        return linear(made, self._weight("wo_b"))
