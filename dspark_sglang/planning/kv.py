"""Bytes of key-value pools: what a token and a request take, and what SGLang makes of a budget.

Source: SGLang 0.5.23, ``model_executor/pool_configurator.py`` and ``mem_cache/deepseek_v4_memory_pool.py``.
"""

from __future__ import annotations

import math

import msgspec

from dspark_sglang.layouts.memory import CompressedKv, DraftKv, Kv, Ranks, SlidingKv

#: A compressed page and its alignment: 448 fp8 values, 64 bfloat16, 8 bytes of scales a token.
_LATENT_BYTES, _PAGE_ALIGN = 448 + 64 * 2 + 8, 576
#: Tokens a page of DeepSeek-V4 has, and every other model by default.
COMPRESSED_PAGE, DEFAULT_PAGE = 256, 1
#: Tokens between two evictions from a sliding window (SGLANG_SWA_EVICTION_INTERVAL).
_EVICTION_INTERVAL = 128


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What of a server's arguments decides about pools."""

    max_running: int
    draft_tokens: int
    page_size: int = DEFAULT_PAGE
    chunked_prefill: int = 8192
    swa_ratio: float = 0.8
    overlap: bool = True
    radix_cache: bool = True
    pd_decode: bool = False
    #: Tokens the operator caps the pool at; None: what memory holds.
    max_tokens: int | None = None


class Pools(msgspec.Struct, frozen=True, kw_only=True):
    """Pools of one rank."""

    #: Tokens of context in all, over all requests of one attention group.
    tokens: int
    #: Bytes of the target's pools and of the drafter's.
    target_bytes: int
    draft_bytes: int
    #: Bytes of the budget that SGLang counts them as.
    charged: int
    #: Slots of sliding windows; 0 without any.
    window_tokens: int = 0


def _up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit


def _down(value: float, unit: int) -> int:
    return int(value) // unit * unit


def page_bytes(tokens: int) -> int:
    """Bytes of a page of ``tokens`` compressed latents."""
    return _up(tokens * _LATENT_BYTES, _PAGE_ALIGN)


def window_slots(window: int, serving: Serving, attention_dp: int) -> int:
    """Slots of sliding windows that ``max_running`` requests can hold live."""
    page = serving.page_size
    trailing = window + _EVICTION_INTERVAL * serving.draft_tokens + page
    if serving.overlap:
        decoding = 2 * serving.draft_tokens
    else:
        decoding = _up(serving.draft_tokens, page) if page > 1 else serving.draft_tokens
    requests = max(1, serving.max_running // attention_dp)
    slots = (trailing + decoding) * requests
    if serving.pd_decode:
        return slots
    return slots + (2 if serving.overlap else 1) * serving.chunked_prefill + page


def size(kv: Kv, draft: DraftKv, *, budget: float, serving: Serving, layout: Ranks) -> Pools:
    """Pools that SGLang makes of ``budget`` bytes (or of ``serving.max_tokens``)."""
    if isinstance(kv, CompressedKv):
        return _compressed(kv, draft, budget=budget, serving=serving, layout=layout)
    if isinstance(kv, SlidingKv):
        return _sliding(kv, draft, budget=budget, serving=serving, layout=layout)
    target, drafted = kv.token_bytes(layout), _draft_bytes(draft, layout)
    tokens = _tokens(budget / (target + drafted), serving)
    rows = tokens + serving.page_size
    return Pools(
        tokens=tokens,
        target_bytes=rows * target,
        draft_bytes=rows * drafted,
        charged=tokens * (target + drafted),
    )


def _draft_bytes(draft: DraftKv, layout: Ranks) -> int:
    return draft.full.token_bytes(layout) if draft.full is not None else 0


def _tokens(most: float, serving: Serving) -> int:
    wanted = most if serving.max_tokens is None else min(most, serving.max_tokens)
    return max(0, _down(wanted, serving.page_size))


def _sliding(
    kv: SlidingKv, draft: DraftKv, *, budget: float, serving: Serving, layout: Ranks
) -> Pools:
    full, window = kv.full.token_bytes(layout), kv.sliding.token_bytes(layout)
    drafted = _draft_bytes(draft, layout)
    tokens = _tokens(budget / (full + serving.swa_ratio * window + drafted), serving)
    slots = _down(tokens * serving.swa_ratio, serving.page_size)
    page = serving.page_size
    return Pools(
        tokens=tokens,
        target_bytes=(tokens + page) * full + (slots + page) * window,
        draft_bytes=(tokens + page) * drafted,
        charged=round(tokens * (full + serving.swa_ratio * window + drafted)),
        window_tokens=slots,
    )


def compressed_token_bytes(kv: CompressedKv, page: int = COMPRESSED_PAGE) -> float:
    """Bytes one token of context adds to the compressed pools of all layers."""
    index = kv.index_dim + kv.index_dim // 128 * 4
    quarter = page_bytes(page // 4) / (page // 4)
    sparse = page_bytes(page // 128) / (page // 128)
    return kv.count(4) * (quarter + index) / 4 + kv.count(128) * sparse / 128


def compressed_slot_bytes(kv: CompressedKv, page: int = COMPRESSED_PAGE) -> float:
    """Bytes one slot of the windows takes in all layers, with the states of compression by 4."""
    state = 4 * (kv.head_dim + kv.index_dim) * 4
    ring = 16 / page
    return kv.layers * page_bytes(page) / page + kv.count(4) * ring * state


def compressed_request_bytes(kv: CompressedKv, requests: int) -> int:
    """Bytes of the states of compression by 128 of ``requests`` requests."""
    rows = _up((requests + 1) * 256 + 257, 128)
    return rows * 2 * kv.head_dim * 4 * kv.count(128)


def _compressed(
    kv: CompressedKv, draft: DraftKv, *, budget: float, serving: Serving, layout: Ranks
) -> Pools:
    page, running = serving.page_size, max(1, serving.max_running // layout.attention_dp)
    slots = window_slots(kv.window, serving, layout.attention_dp)
    tails = 4 * running if serving.radix_cache else 0
    slots = _up(slots + tails * (kv.window + page), page)
    # SGLang reserves one draft layer; there are as many as the drafter has stages.
    reserve = (kv.layers + (draft.compressed_stages > 0)) / kv.layers
    states = compressed_request_bytes(kv, running)
    slot, token = compressed_slot_bytes(kv, page), compressed_token_bytes(kv, page)
    fixed = states + slots * slot * reserve
    tokens = _tokens(max(0.0, budget - fixed) / (token * reserve), serving)
    return Pools(
        tokens=tokens,
        target_bytes=round((tokens + page) * token + (slots + page) * slot + states),
        draft_bytes=round((slots + page) * draft.compressed_stages * page_bytes(page) / page),
        charged=round(fixed + tokens * token * reserve),
        window_tokens=slots,
    )
