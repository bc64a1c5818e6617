"""Attention over SGLang's paged KV cache with PyTorch's scaled dot product attention.

One forward serves ragged batches: each request has ``q`` query rows and attends to ``kv``
cached positions, the last ``q`` of which are its own rows. Requests of similar shape are
padded together and attended in one call; there is no loop over requests inside a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from dspark_sglang.serving.sglang_types import AttentionLayer, ForwardBatch, ModelRunner

_BIDIRECTIONAL = (AttentionType.ENCODER_ONLY, AttentionType.DECODER_BIDIRECTIONAL)

#: What a call and a key cost, in pairs of a query row and a key: keys are gathered from the cache for each call.
_CALL, _KEY = 16384.0, 16.0
#: Query rows below which padding to the longest costs hardly anything.
_SHORT = 16


class Group(NamedTuple):
    """Requests attended in one call, padded to ``q`` query rows and ``kv`` keys."""

    #: ``[b * q]`` int64 rows of the flat batch (padding repeats a real row); None: all, in order.
    rows: torch.Tensor | None
    #: ``[n]`` positions in ``[b * q]`` that are real rows; None: all.
    real: torch.Tensor | None
    #: ``[b * kv]`` int64 KV slots (padding points at slot 0).
    slots: torch.Tensor
    #: ``[b]`` int64 query rows and cached positions of each request.
    q_lens: torch.Tensor
    kv_lens: torch.Tensor
    batch: int
    q: int
    kv: int
    #: Whether every request fills the padded shape.
    even: bool
    masks: dict[tuple[bool, int, int], torch.Tensor | None]

    def mask(
        self, *, causal: bool, window: int, share: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Additive mask ``[b, 1, share * q, kv]`` (0 or -inf); None where nothing is hidden.

        Built once a step, not once a layer.
        """
        key = (causal, window, share)
        if key not in self.masks:
            mask = self._build(causal=causal, window=window, dtype=dtype)
            if mask is not None and share > 1 and self.q > 1:
                mask = mask.repeat(1, 1, share, 1)
            self.masks[key] = mask
        return self.masks[key]

    def _build(self, *, causal: bool, window: int, dtype: torch.dtype) -> torch.Tensor | None:
        if window < 0 and self.even and (not causal or self.q == 1):
            return None
        key = torch.arange(self.kv)
        row = torch.arange(self.q)
        kv_lens, q_lens = self.kv_lens[:, None], self.q_lens[:, None]
        own = (kv_lens - q_lens + row).clamp(max=self.kv - 1)  # [b, q] the row's own position
        last = own if causal else (kv_lens - 1).expand(-1, self.q)
        visible = key <= last[..., None]
        if window >= 0:
            visible &= key >= (own - window)[..., None]
        # A padded row must see something, or softmax gives NaN and the kernel slows down.
        visible[..., 0] |= ~visible.any(-1)
        hidden = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
        return hidden[:, None]


def group_requests(
    q_lens: Sequence[int], kv_lens: Sequence[int], slots: Sequence[torch.Tensor]
) -> list[Group]:
    """Partition a ragged batch so that calls and padding together cost least.

    Requests with many query rows only meet those with up to twice as many.

    Args:
        q_lens: query rows of each request.
        kv_lens: cached positions of each request, its own rows included.
        slots: ``[kv]`` KV slots of each request.
    """
    similar: dict[int, list[int]] = {}
    for request, q in enumerate(q_lens):
        similar.setdefault((max(q, _SHORT) - 1).bit_length(), []).append(request)
    found = [
        members
        for requests in similar.values()
        for members in _split(sorted(requests, key=lambda i: kv_lens[i]), q_lens, kv_lens)
    ]
    starts = [0]
    for q in q_lens:
        starts.append(starts[-1] + q)
    return [
        _make_group(
            members,
            [q_lens[i] for i in members],
            [kv_lens[i] for i in members],
            [starts[i] for i in members],
            [slots[i] for i in members],
            whole=len(found) == 1,
        )
        for members in found
    ]


def _split(
    ordered: Sequence[int], q_lens: Sequence[int], kv_lens: Sequence[int]
) -> list[list[int]]:
    """Cut requests, shortest cache first, into runs whose padded attention costs least."""
    count, q = len(ordered), max(q_lens[i] for i in ordered)
    each = (_KEY + q) * np.array([kv_lens[i] for i in ordered], dtype=np.float64)
    cost, begins = np.zeros(count + 1), np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        # All requests since a beginning, padded to the last one.
        options = cost[:end] + _CALL + each[end - 1] * np.arange(end, 0, -1)
        begins[end] = options.argmin()
        cost[end] = options[begins[end]]
    runs, end = [], count
    while end:
        # In the order of the batch, as a whole batch has to be.
        runs.append(sorted(ordered[begins[end] : end]))
        end = int(begins[end])
    return runs


def _make_group(
    members: Sequence[int],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    starts: Sequence[int],
    slots: Sequence[torch.Tensor],
    *,
    whole: bool,
) -> Group:
    q, kv = max(q_lens), max(kv_lens)
    even_q, even_kv = min(q_lens) == q, min(kv_lens) == kv
    rows = real = None
    if not (whole and even_q):
        within = torch.arange(q)
        first = torch.tensor(starts)[:, None]
        length = torch.tensor(q_lens)[:, None]
        rows = (first + within.clamp(max=q - 1).minimum(length - 1)).view(-1)
        if not even_q:
            real = (within < length).view(-1).nonzero().view(-1)
    if even_kv:
        packed = slots[0] if len(slots) == 1 else torch.cat(list(slots))
    else:
        padded = slots[0].new_zeros((len(members), kv))
        for index, taken in enumerate(slots):
            padded[index, : taken.numel()] = taken
        packed = padded.view(-1)
    return Group(
        rows=rows,
        real=real,
        slots=packed.long(),
        q_lens=torch.tensor(q_lens),
        kv_lens=torch.tensor(kv_lens),
        batch=len(members),
        q=q,
        kv=kv,
        even=even_q and even_kv,
        masks={},
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Group,
    *,
    scale: float,
    causal: bool,
    window: int = -1,
) -> torch.Tensor:
    """Attention of one group.

    Grouped-query heads are folded into query rows (heads that share a key head become rows
    of it), so keys are never repeated.

    Args:
        query: ``[b * q, heads, dim]``.
        keys: ``[slots, kv_heads, dim]`` the layer's whole key pool.
        values: ``[slots, kv_heads, value_dim]``.

    Returns:
        ``[b * q, heads, value_dim]``.
    """
    batch, q, kv = group.batch, group.q, group.kv
    heads, kv_heads = query.shape[1], keys.shape[1]
    share = heads // kv_heads
    key = keys.index_select(0, group.slots).view(batch, kv, kv_heads, -1).transpose(1, 2)
    value = values.index_select(0, group.slots).view(batch, kv, kv_heads, -1).transpose(1, 2)
    folded = query.view(batch, q, kv_heads, share, -1)
    if q == 1:
        folded = folded.view(batch, kv_heads, share, -1)
    else:
        folded = folded.permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, share * q, -1)
    mask = group.mask(causal=causal, window=window, share=share, dtype=query.dtype)
    out = scaled_dot_product_attention(
        folded, key.to(query.dtype), value.to(query.dtype), attn_mask=mask, scale=scale
    )
    if q == 1:
        return out.reshape(batch, heads, -1)
    out = out.view(batch, kv_heads, share, q, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(batch * q, heads, -1)


class CpuAttentionBackend(AttentionBackend):
    """Decode, extend, ragged target verification and the bidirectional draft block."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self._req_to_token = runner.req_to_token_pool.req_to_token
        self._pool = runner.token_to_kv_pool
        self._groups: list[Group] = []
        self._rows = 0

    def support_triton(self) -> bool:
        return False

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        mode = forward_batch.forward_mode
        requests = forward_batch.req_pool_indices.tolist()
        if mode.is_idle() or not requests:
            self._groups, self._rows = [], 0
            return
        q_lens, kv_lens = self._lengths(forward_batch, len(requests))
        slots = [self._req_to_token[row, :kv] for row, kv in zip(requests, kv_lens, strict=True)]
        self._groups = group_requests(q_lens, kv_lens, slots)
        self._rows = sum(q_lens)

    @staticmethod
    def _lengths(forward_batch: ForwardBatch, batch: int) -> tuple[list[int], list[int]]:
        """Query rows and cached positions (own rows included) of each request."""
        mode = forward_batch.forward_mode
        seq_lens: list[int] = forward_batch.seq_lens.tolist()
        if mode.is_target_verify():
            layout = getattr(forward_batch.spec_info, "ragged_verify_layout", None)
            if layout is None:
                q_lens = [forward_batch.input_ids.shape[0] // batch] * batch
            else:
                q_lens = (layout.verify_lens_cpu or layout.verify_lens.tolist())[:batch]
            return q_lens, [length + q for length, q in zip(seq_lens, q_lens, strict=True)]
        if mode.is_decode():
            return [1] * batch, seq_lens
        return forward_batch.extend_seq_lens.tolist(), seq_lens

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **unsupported: Any,
    ) -> torch.Tensor:
        if unsupported or layer.logit_cap:
            names = sorted(unsupported) + (["logit_cap"] if layer.logit_cap else [])
            raise NotImplementedError(
                f"The CPU attention backend does not support {', '.join(names)}. "
                "Serve this model on a GPU."
            )
        if save_kv_cache and k is not None:
            self._pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch), k, v)
        keys = self._pool.get_key_buffer(layer.layer_id)
        values = self._pool.get_value_buffer(layer.layer_id)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        causal = layer.attn_type not in _BIDIRECTIONAL
        window = layer.sliding_window_size
        width = layer.tp_q_head_num * layer.v_head_dim
        only = self._groups[0] if len(self._groups) == 1 else None
        if only is not None and only.rows is None and query.shape[0] == self._rows:
            out = attend(
                query, keys, values, only, scale=layer.scaling, causal=causal, window=window
            )
            return out.reshape(-1, width)
        result = query.new_zeros((query.shape[0], layer.tp_q_head_num, layer.v_head_dim))
        for group in self._groups:
            rows = torch.arange(self._rows) if group.rows is None else group.rows
            out = attend(
                query.index_select(0, rows),
                keys,
                values,
                group,
                scale=layer.scaling,
                causal=causal,
                window=window,
            )
            if group.real is not None:
                rows, out = rows[group.real], out.index_select(0, group.real)
            result.index_copy_(0, rows, out)
        return result.view(-1, width)

    forward_decode = forward_extend
