"""Writing a dense drafter's KV by one kernel."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn.functional import linear

from dspark_kernels.kv_inject import kv_inject, pools
from dspark_kernels.support.errors import OperandError
from dspark_sglang.serving.sglang_types import DenseDraft as DraftModel
from dspark_sglang.serving.sglang_types import KvPool

logger = logging.getLogger(__name__)


class KvWriter:
    """Projects rows through a dense SGLang draft model and writes those that have a slot."""

    def __init__(self, model: DraftModel, pool: KvPool, stacked: dict[str, Any]) -> None:
        """Args:
        model: the draft model.
        pool: its KV pool.
        stacked: the key and value projections of all layers, as the model stacks them.

        Raises:
            OperandError: the pool is laid out in a way the kernel does not write.
        """
        layers = [layer.self_attn for layer in model.layers]
        self._model = model
        self._weight, self._bias = stacked["weight"], stacked["bias"]
        self._gain, self._eps = stacked["k_norm_weight"].contiguous(), float(stacked["eps"])
        self._shape = (len(layers), 2, layers[0].kv_size)
        self._table = layers[0].rotary_emb.cos_sin_cache
        self._pools = pools(
            [pool.get_key_buffer(layer.attn.layer_id) for layer in layers],
            [pool.get_value_buffer(layer.attn.layer_id) for layer in layers],
        )

    @classmethod
    def of(cls, model: DraftModel, pool: KvPool) -> KvWriter | None:
        """The writer of a draft model; None, said once in the log, where SGLang has to write."""
        rotary = model.layers[0].self_attn.rotary_emb
        stacked = model._stacked_ctx_kv_params()
        why = ""
        if stacked is None:
            why = "its projections are quantised or differ between layers"
        elif type(rotary).__name__ != "RotaryEmbedding" or not rotary.is_neox_style:
            why = f"its rotary embedding is a {type(rotary).__name__}"
        elif not (hasattr(pool, "get_key_buffer") and hasattr(pool, "get_value_buffer")):
            why = f"its KV pool is a {type(pool).__name__}"
        if stacked is not None and not why:
            try:
                return cls(model, pool, stacked)
            except OperandError as error:
                why = str(error)
        logger.warning("SGLang writes the draft's KV, not our kernel: %s.", why.rstrip("."))
        return None

    def write(self, hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the rows that have a slot.

        Args:
            hidden: ``[N, layers read * d]`` target hidden states.
            positions: ``[N]`` integer absolute positions.
            slots: ``[N]`` integer slots of the draft's pool; negative: not accepted.
        """
        context = self._model.project_target_hidden(hidden)
        projected = linear(context, self._weight, self._bias).view(-1, *self._shape)
        kv_inject(
            projected[:, :, 0],
            projected[:, :, 1],
            positions.to(torch.int64),
            slots.to(torch.int64),
            self._gain,
            self._table,
            self._pools,
            eps=self._eps,
            backend="triton",
        )
