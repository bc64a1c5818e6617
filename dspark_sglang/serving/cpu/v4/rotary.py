"""Norms and rotary embedding of V4's queries and latents.

RoPE turns adjacent pairs of the last dimensions by ``freqs_cis`` ``[positions, rope / 2]`` (complex64), SGLang's
table of all positions. Written from SGLang 0.5.23, ``kernels/ops/attention/dsv4/norm_rope.py`` and ``attn.py``.
"""

from __future__ import annotations

import torch

from dspark_sglang.serving.cpu.v4 import pages, require


def rotate(x: torch.Tensor, freqs: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """RoPE of ``[n, ..., rope]`` by ``[n, rope / 2]`` complex factors, in float32."""
    pairs = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2)).contiguous())
    freqs = freqs.conj() if inverse else freqs
    freqs = freqs.view(len(freqs), *([1] * (x.dim() - 2)), freqs.shape[-1])
    return torch.view_as_real(pairs * freqs).flatten(-2)


def rotate_tail(x: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """:func:`rotate` of the last dimensions of ``[n, ..., D]`` rows at ``[n]`` positions."""
    freqs = freqs_cis[positions.long()]
    width = 2 * freqs.shape[-1]
    return torch.cat([x[..., :-width], rotate(x[..., -width:], freqs)], dim=-1)


def norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """RMS norm of the last dimension, in float32."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.float()


def fused_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor | None,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool = False,
) -> None:
    """RoPE of ``[n, heads, rope]`` queries and keys in place."""
    freqs = freqs_cis[positions.long()]
    for x in (q, k):
        if x is not None:
            x.copy_(rotate(x, freqs, inverse=inverse))


def fused_norm_rope_inplace(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    freq_cis: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Norm of ``[n, D]`` latents and RoPE of their last dimensions, in place."""
    kv.copy_(rotate_tail(norm(kv, eps, weight), freq_cis, positions))


def fused_q_norm_rope(
    q_input: torch.Tensor,
    q_output: torch.Tensor,
    eps: float | None,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """``[n, heads, D]`` queries, normed head by head (not where ``eps`` is None) and turned, into ``q_output``."""
    x = q_input.float() if eps is None else norm(q_input, eps)
    q_output.copy_(rotate_tail(x, freqs_cis, positions))


def fused_k_norm_rope_flashmla(
    kv: torch.Tensor,
    kv_weight: torch.Tensor,
    eps: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
    out_loc: torch.Tensor,
    kvcache: torch.Tensor,
    page_size: int,
    layout: object = "v4",
    q: torch.Tensor | None = None,
) -> None:
    """Norm and RoPE of ``[n, 512]`` latents, written at slots ``out_loc`` of a latent cache."""
    require(_is_v4(layout) and q is None, f"a KV cache in layout {layout}")
    latents = rotate_tail(norm(kv, eps, kv_weight), freqs_cis, positions)
    pages.store(kvcache, out_loc, latents, page_size)


def fused_store_cache(
    input: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    page_size: int,
    type: str,
    layout: object = "v4",
    freqs_cis: torch.Tensor | None = None,
) -> None:
    """Write latents (``type`` "flashmla") or indexer keys ("indexer"), normed and turned already."""
    require(_is_v4(layout) and freqs_cis is None, f"a KV cache in layout {layout}")
    write = pages.store if type == "flashmla" else pages.store_index_keys
    write(cache, indices, input, page_size)


def _is_v4(layout: object) -> bool:
    return str(getattr(layout, "value", layout)).lower() == "v4"
