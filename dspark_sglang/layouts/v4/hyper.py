"""Hyper-connections: several residual streams around each sublayer (mHC).

With streams ``R`` [m, d] and a sublayer ``F``, from ``n = R / rms(R)`` (over all m d numbers):

    (p, q, c) = W n                                 m, m and m x m numbers
    pre  = sigmoid(s_0 p + b_p) + eps
    post = 2 sigmoid(s_1 q + b_q)
    comb = sinkhorn(s_2 c + b_c)
    y    = F(sum_j pre[j] R[j])
    R'[i] = post[i] y + sum_j comb[j, i] R[j]

``comb`` is close to doubly stochastic, so mixing neither grows nor shrinks the streams' sum. After
the last layer the streams are collapsed with a ``pre`` of their own. Source: SGLang 0.5.23,
``models/deepseek_v4.py`` (``hc_pre``, ``hc_post``, ``hc_head_torch``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import linear, rms_norm


class Mappings(NamedTuple):
    """How one sublayer reads and writes the streams."""

    #: ``[..., m]``.
    pre: torch.Tensor
    #: ``[..., m]``.
    post: torch.Tensor
    #: ``[..., m, m]``: from stream (row) to stream (column).
    comb: torch.Tensor


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """A nearly doubly stochastic matrix: rows and columns are normalised in turn, columns last.

    Args:
        logits: ``[..., m, m]``.
        iterations: normalisations of the columns; the first follows a softmax over rows.
        eps: added to the softmax and to every divisor.
    """
    matrix = torch.softmax(logits, dim=-1) + eps
    matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + eps)
    return matrix


def read(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """``[..., m, d]`` streams weighted by ``[..., m]`` and summed: ``[..., d]``."""
    return (pre[..., None] * streams).sum(dim=-2).to(streams.dtype)


def write(output: torch.Tensor, streams: torch.Tensor, mappings: Mappings) -> torch.Tensor:
    """The next ``[..., m, d]`` streams from a sublayer's ``[..., d]`` output."""
    mixed = torch.einsum("...ji,...jd->...id", mappings.comb, streams.to(mappings.comb.dtype))
    return (mappings.post[..., None] * output[..., None, :] + mixed).to(streams.dtype)


def _mixes(streams: torch.Tensor, weight: torch.Tensor, norm_eps: float) -> torch.Tensor:
    flat = streams.flatten(-2).to(weight.dtype)
    return linear(rms_norm(flat, (flat.shape[-1],), eps=norm_eps), weight)


@dataclass(frozen=True, slots=True)
class HyperConnection:
    """Predicts the mappings of one sublayer.

    Attributes:
        weight: ``[(2 + m) m, m d]``; computation runs in its dtype (float32 in checkpoints).
        base: ``[(2 + m) m]``.
        scale: ``[3]``.
        iterations: of :func:`sinkhorn`.
        eps, norm_eps: added to ``pre`` and in :func:`sinkhorn`; in the norm.
    """

    weight: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    iterations: int
    eps: float
    norm_eps: float

    def mappings(self, streams: torch.Tensor) -> Mappings:
        """The mappings for streams ``[..., m, d]``."""
        m = streams.shape[-2]
        parts = torch.split(_mixes(streams, self.weight, self.norm_eps), [m, m, m * m], dim=-1)
        bases = torch.split(self.base, [m, m, m * m])
        pre, post, comb = (
            scale * part + base for scale, part, base in zip(self.scale, parts, bases, strict=True)
        )
        return Mappings(
            pre=torch.sigmoid(pre) + self.eps,
            post=2.0 * torch.sigmoid(post),
            comb=sinkhorn(comb.unflatten(-1, (m, m)), self.iterations, self.eps),
        )


@dataclass(frozen=True, slots=True)
class Collapse:
    """The streams after the last layer as one.

    Attributes:
        weight: ``[m, m d]``.
        base: ``[m]``.
        scale: ``[1]``.
        eps, norm_eps: as in :class:`HyperConnection`.
    """

    weight: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor
    eps: float
    norm_eps: float

    def __call__(self, streams: torch.Tensor) -> torch.Tensor:
        """``[..., m, d]`` to ``[..., d]``."""
        mixes = _mixes(streams, self.weight, self.norm_eps)
        return read(streams, torch.sigmoid(self.scale * mixes + self.base) + self.eps)
