"""The parts of V4's layers, in plain torch: RoPE, attention of the draft layers, hyper-connections, experts.

Source: the published configurations, and SGLang 0.5.23, ``models/deepseek_v4.py`` (``hc_pre``, ``hc_post``,
``hc_head_torch``), ``models/deepseek_v4_dspark.py`` (``DSparkAttention``), ``models/deepseek_v2.py``
(``DeepseekV2MoE``) and ``layers/moe/topk.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import linear, rms_norm, silu, softplus

from dspark_sglang.layouts.v4.config import V4Shape, Yarn
from dspark_sglang.layouts.v4.storage import EXACT, Rounding


def frequencies(dims: int, theta: float, yarn: Yarn | None = None) -> torch.Tensor:
    """``[dims / 2]`` float64 radians a position: pair ``i`` turns by ``position * theta^(-2 i / dims)``.

    YaRN divides the frequencies that make less than ``beta_slow`` turns over the original context by ``factor``, keeps
    those that make more than ``beta_fast``, and mixes both in between; V4 leaves amplitudes and the attention scale
    alone. Angles are float64: at position 10^5 float32 would be off by 10^-2.

    Args:
        dims: even; dimensions that turn.
        theta: base.
        yarn: stretches slow pairs; None: none.
    """
    base = theta ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    if yarn is None:
        return base

    def pair(turns: float) -> float:
        """The (fractional) pair that makes so many turns over the original context."""
        return dims * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), dims - 1)
    steps = torch.arange(dims // 2, dtype=torch.float64) - low
    slow = (steps / (high - low if high > low else 1e-3)).clamp(0, 1)
    return base / yarn.factor * slow + base * (1 - slow)


def turn(
    x: torch.Tensor, positions: torch.Tensor, speeds: torch.Tensor, *, inverse: bool = False
) -> torch.Tensor:
    """Turn adjacent pairs of the last dimensions.

    Args:
        x: ``[..., D]``.
        positions: integers that broadcast with ``x`` without its last dimension.
        speeds: ``[k]`` float64 of :func:`frequencies`; the last ``2 k`` dimensions turn.
        inverse: turn back instead.

    Returns:
        As ``x``, in its dtype.
    """
    angle = positions[..., None].double() * speeds.to(x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    sin = -sin if inverse else sin
    still, pairs = torch.tensor_split(x, [x.shape[-1] - 2 * len(speeds)], dim=-1)
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([still, turned.flatten(-2)], dim=-1)


class Attention:
    """A draft layer's attention: one latent a position, a window, no compression; tensors are somebody else's.

    A position's latent ``l = rope(norm(W_kv x))`` [D] is key and value of every head, so the value carries the
    rotation of its position; the output is turned back by the query's:

        q_h = rope(unit(W_qb norm(W_qa x))_h)
        a   = softmax over the visible l and a sink:  q_h . l / sqrt(D),  sink_h
        o_h = rope^-1(sum a l)
        out = W_ob [W_oa,1 o_(heads of group 1); W_oa,2 o_(heads of group 2); ...]

    RoPE turns adjacent pairs of a head's last dimensions. The sink takes a share of the softmax and adds nothing.
    """

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
    """Hyper-connections (mHC): several residual streams ``R`` [m, d] around each sublayer ``F``.

    From ``n = R / rms(R)`` (over all m d numbers):

        (p, q, c) = W n                                 m, m and m x m numbers
        pre  = sigmoid(s_0 p + b_p) + eps
        post = 2 sigmoid(s_1 q + b_q)
        comb = sinkhorn(s_2 c + b_c)
        y    = F(sum_j pre[j] R[j])
        R'[i] = post[i] y + sum_j comb[j, i] R[j]

    ``comb`` is close to doubly stochastic, so mixing neither grows nor shrinks the streams' sum.

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

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], prefix: str, shape: V4Shape
    ) -> HyperConnection:
        """That of ``{prefix}fn``, ``{prefix}base`` and ``{prefix}scale``."""
        weight, base, scale = (tensors[f"{prefix}{name}"] for name in ("fn", "base", "scale"))
        return cls(weight, base, scale, shape.sinkhorn_iters, shape.hc_eps, shape.eps)

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

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], prefix: str, shape: V4Shape) -> Collapse:
        """As :meth:`HyperConnection.of`."""
        weight, base, scale = (tensors[f"{prefix}{name}"] for name in ("fn", "base", "scale"))
        return cls(weight, base, scale, shape.hc_eps, shape.eps)

    def __call__(self, streams: torch.Tensor) -> torch.Tensor:
        """``[..., m, d]`` to ``[..., d]``."""
        mixes = _mixes(streams, self.weight, self.norm_eps)
        return read(streams, torch.sigmoid(self.scale * mixes + self.base) + self.eps)


class MixtureOfExperts:
    """One layer's experts, over tensors somebody else owns: a biased choice, unbiased weights, shared ones on top.

    s   = sqrt(softplus(W_g x))
    top = the k experts of largest s + bias
    w_e = route_scale * s_e / sum over top of s       (no division without ``normalise``)
    y   = shared(x) + sum over top of w_e expert_e(x)
    expert(x) = W_2 (silu(min(W_1 x, limit)) * clamp(W_3 x, -limit, limit))
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str, shape: V4Shape) -> None:
        """``tensors`` holds ``{prefix}gate.weight`` and so on."""
        self.shape = shape
        self._t = tensors
        self._prefix = prefix

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of ``[N, d]`` rows: ``[N, k]`` int64 and their ``[N, k]`` weights."""
        chosen = self.biased(x).topk(self.shape.active, dim=-1).indices
        return chosen, self.weights(self.scores(x), chosen)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, experts]``, from which weights are made."""
        return softplus(linear(x, self._t[f"{self._prefix}gate.weight"])).sqrt()

    def biased(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, experts]``, by which experts are chosen."""
        return self.scores(x) + self._t[f"{self._prefix}gate.bias"]

    def weights(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """``[N, k]`` weights of the chosen experts from ``[N, experts]`` unbiased scores."""
        weights = scores.gather(-1, chosen)
        if self.shape.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.shape.route_scale

    def expert(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """One expert (``experts.3``, ``shared_experts``) over ``[N, d]`` rows."""
        gate, up = (
            linear(x, self._t[f"{self._prefix}{name}.{part}.weight"]) for part in ("w1", "w3")
        )
        limit = self.shape.swiglu_limit
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return linear(silu(gate) * up, self._t[f"{self._prefix}{name}.w2.weight"])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` normed rows to ``[..., d]``."""
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(flat)
        out = self.expert(flat, "shared_experts")
        for index in torch.unique(chosen).tolist():
            row, slot = (chosen == index).nonzero(as_tuple=True)
            made = self.expert(flat[row], f"experts.{index}") * weights[row, slot, None]
            out = out.index_add(0, row, made.to(out.dtype))
        return out.view(x.shape)
