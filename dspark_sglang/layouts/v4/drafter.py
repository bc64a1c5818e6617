"""The V4 drafter in plain torch: a reference for the module bundled in DeepSeek-V4 checkpoints.

Context rows are target states, projected and normed once; each layer makes its latents from them
directly, without hyper-connections or the layer's norm. Block rows run through three layers of
attention and experts, each between hyper-connections. Every row of a block sees the last
``window`` context positions before the anchor and all rows of its block.

A V4 target has several residual streams itself; the states read are their mean over the streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, rms_norm

from dspark_sglang.checkpoint import Tensor, read_config, weight_files
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.errors import CheckpointError
from dspark_sglang.layouts.base import Stored, compare
from dspark_sglang.layouts.v4.config import V4Shape
from dspark_sglang.layouts.v4.layers import (
    Attention,
    Collapse,
    HyperConnection,
    MixtureOfExperts,
    read,
    write,
)
from dspark_sglang.layouts.v4.storage import EXACT, STORED, Rounding, dequantised
from dspark_sglang.layouts.v4.tensors import usual, v4_tensors

Tensors = Mapping[str, torch.Tensor]


class V4Drafter:
    """Forward passes over a V4 checkpoint's ``mtp.*`` tensors."""

    def __init__(
        self,
        tensors: Tensors,
        shape: V4Shape,
        mask_row: torch.Tensor,
        rounding: Rounding = EXACT,
    ) -> None:
        """Args:
        tensors: as :func:`check_tensors` returns them.
        mask_row: ``[d]`` embedding of the mask token.
        rounding: of the latents of context and block; SGLang keeps them in fp8 (``STORED``).
        """
        self.shape = shape
        self._t = tensors
        self._mask_row = mask_row
        self._last = f"mtp.{shape.layers - 1}."
        self._attention = [
            Attention(tensors, f"mtp.{i}.attn.", shape, rounding) for i in range(shape.layers)
        ]
        self._experts = [
            MixtureOfExperts(tensors, f"mtp.{i}.ffn.", shape) for i in range(shape.layers)
        ]
        self.markov = MarkovHead(
            w1=tensors[f"{self._last}markov_head.markov_w1.weight"],
            w2=tensors[f"{self._last}markov_head.markov_w2.weight"],
        )
        weight = tensors[f"{self._last}confidence_head.proj.weight"].float().view(-1)
        self.confidence = ConfidenceHead(
            weight=weight,
            bias=weight.new_zeros(()),  # V4's confidence head has none
            with_markov=shape.confidence_with_markov,
            temperatures=torch.ones(shape.gamma),
        )

    @classmethod
    def load(
        cls,
        tensors: Tensors,
        shape: V4Shape,
        embedding: torch.Tensor,
        rounding: Rounding = EXACT,
    ) -> V4Drafter:
        """Build from checkpoint tensors and the target's ``[V, d]`` embedding.

        Raises:
            CheckpointError: a tensor is missing, unknown, quantised or of the wrong shape.
        """
        return cls(check_tensors(tensors, shape), shape, embedding[shape.mask_token], rounding)

    @property
    def gamma(self) -> int:
        """Tokens drafted a round."""
        return self.shape.gamma

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), self._t[f"{name}.weight"], self.shape.eps)

    def context(self, target_hidden: torch.Tensor) -> torch.Tensor:
        """``[S, layers * d]`` concatenated target states to ``[S, d]`` context rows."""
        projected = linear(target_hidden, self._t["mtp.0.main_proj.weight"])
        return self._norm(projected, "mtp.0.main_norm")

    def hidden(
        self, context: torch.Tensor, anchors: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        """Final hidden states of one block at every anchor of one sequence, before the last norm.

        Args:
            context: ``[S, d]`` context rows of positions 0..S-1.
            anchors: ``[A]`` int64 anchor positions; the block at anchor ``a`` sees context
                ``a - window .. a - 1``.
            embedding: ``[A, d]`` embedding of the token at each anchor.

        Returns:
            ``[A, gamma, d]``; row ``k`` predicts the token at ``anchor + k + 1``. The confidence
            head reads these; :meth:`base_logits` norms them first.
        """
        shape = self.shape
        rows = self._mask_row.to(context.dtype).repeat(len(anchors), shape.rows, 1)
        rows[:, 0] = embedding.to(context.dtype)
        own = anchors[:, None] + torch.arange(shape.rows, device=anchors.device)
        positions = torch.arange(context.shape[0], device=anchors.device)
        age = anchors[:, None] - positions
        visible = (age >= 1) & (age <= shape.window)
        streams = rows[:, :, None].repeat(1, 1, shape.streams, 1)
        for layer, (attention, experts) in enumerate(
            zip(self._attention, self._experts, strict=True)
        ):
            latents = attention.latents(context, positions)
            mappings = HyperConnection.of(self._t, f"mtp.{layer}.hc_attn_", shape).mappings(streams)
            x = self._norm(read(streams, mappings.pre), f"mtp.{layer}.attn_norm")
            streams = write(attention(x, own, latents, visible), streams, mappings)
            mappings = HyperConnection.of(self._t, f"mtp.{layer}.hc_ffn_", shape).mappings(streams)
            x = self._norm(read(streams, mappings.pre), f"mtp.{layer}.ffn_norm")
            streams = write(experts(x), streams, mappings)
        collapse = Collapse.of(self._t, f"{self._last}hc_head_", shape)
        return collapse(streams)[:, shape.rows - shape.gamma :]

    def base_logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``[..., d]`` final hidden states, normed, through the target's ``[V, d]`` LM head."""
        return linear(self._norm(hidden, f"{self._last}norm"), head)


def check_tensors(tensors: Tensors, shape: V4Shape) -> dict[str, torch.Tensor]:
    """The drafter's tensors under their usual names; others of the checkpoint are left out.

    Raises:
        CheckpointError: quantised storage, a missing or unknown ``mtp.*`` tensor, or a wrong shape.
    """
    found = {usual(name): value for name, value in tensors.items() if name.startswith("mtp.")}
    for name, value in found.items():
        if name.endswith(".scale") or not value.is_floating_point() or value.element_size() < 2:
            raise CheckpointError(
                f"{name} ({value.dtype}) belongs to quantised storage (fp8 or mxfp4).",
                expected="plain tensors of 16 bits or more: the reference reads no scales",
                fix="Dequantise the mtp.* tensors first (weight times scale, block by block).",
            )
    wanted = {name: Stored("", size) for name, size in v4_tensors(shape).items()}
    held = {name: Tensor("", tuple(value.shape), (0, 0)) for name, value in found.items()}
    compare(held, wanted, where="The checkpoint")
    return found


def load_tensors(
    directory: Path, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and all tensors of a bundle, dequantised, floats in ``dtype``.

    Raises:
        CheckpointError: no ``config.json``.
    """
    config = read_config(directory, role="target")
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        found |= load_file(path)
    return config, {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in dequantised(found.items(), dtype)
    }


def load(
    directory: Path,
    dtype: torch.dtype,
    embedding: torch.Tensor | None = None,
    rounding: Rounding = STORED,
) -> V4Drafter:
    """The drafter of a bundle; ``embedding`` is its own unless given.

    Raises:
        CheckpointError: configuration or tensors do not fit.
    """
    config, tensors = load_tensors(directory, dtype)
    shape = V4Shape.from_config(config)
    own = tensors["embed.weight"] if embedding is None else embedding
    return V4Drafter.load(tensors, shape, own, rounding)
