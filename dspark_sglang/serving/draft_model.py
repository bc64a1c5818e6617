"""What serving asks of SGLang's draft model, whatever layout the drafter has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.models.dspark import DSparkDraftMixin

from dspark_sglang.errors import CompatibilityError
from dspark_sglang.layouts.base import layouts, resolve
from dspark_sglang.serving.sglang_types import DenseDraft, KvInjector, V4Draft
from dspark_sglang.verify_mode import RAGGED


def built(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for SGLang's making of the draft worker: with a confidence head also where whole blocks are verified."""
    with envs.SGLANG_RAGGED_VERIFY_MODE.override(RAGGED):
        return original(*args, **kwargs)


class DraftModel:
    """A dense drafter: layers of its own checkpoint over projected target states."""

    #: SGLang's classes of Markov heads that our drafting reads.
    HEADS: tuple[str, ...] = ("VanillaMarkov", "GatedMarkovHead", "RNNHead")
    #: Prefix of the parameters that a rank needs only where it runs the draft forward.
    LAYERS = "layers."
    #: Whether the draft forward embeds by a module that it is given.
    embeds_by_module = True
    #: Whether our kernel writes the draft's KV where our kernels run.
    kernel_writes = True

    def __init__(self, model: DenseDraft) -> None:
        """Args:
        model: SGLang's draft model, with the target's embedding and LM head.

        Raises:
            CompatibilityError: heads that would be read wrongly.
        """
        self.module = model
        head, confidence = model.markov_head, model.confidence_head
        found = type(head).__name__
        sharded = getattr(head, "vocab_shard", None)
        if found not in self.HEADS or sharded is not None or confidence is None:
            raise CompatibilityError(
                f"The drafter {type(model).__name__} has a {found} "
                f"{'sharded over ranks ' if sharded else ''}and "
                f"{'a' if confidence is not None else 'no'} confidence head.",
                expected=f"an unsharded {' or '.join(self.HEADS)} and a confidence head",
                fix="Serve it with SGLang's builtin: DSPARK_PLUGIN=off.",
            )

    @classmethod
    def runs(cls, model: object) -> bool:
        """Whether this is the adapter of a draft model of SGLang's."""
        return True

    @property
    def projection(self) -> torch.Tensor:
        """``[d, layers read * d]`` weight that makes context rows of target states."""
        weight: torch.Tensor = self.module.fc.weight
        return weight

    @property
    def width(self) -> int:
        """Width ``d`` of draft states."""
        return int(self.projection.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Type of draft states; a quantised projection does not say it."""
        weight = self.projection
        return weight.dtype if weight.element_size() > 1 else torch.bfloat16

    @property
    def reads_target_head(self) -> bool:
        """Whether base logits are the target's LM head over :meth:`head_input`, and nothing more."""
        return type(self.module).compute_base_logits is DSparkDraftMixin.compute_base_logits

    def states(self, raw: torch.Tensor) -> torch.Tensor:
        """``[N, d]`` draft states, which the confidence head reads, of what the draft forward left."""
        return raw

    def head_input(self, states: torch.Tensor) -> torch.Tensor:
        """What the LM head is applied to, ``[N, d]``, of draft states."""
        divisor = self.module.logits_mup_width_multiplier
        return states / divisor if divisor else states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Base logits ``[N, V]`` of draft states, on a server of one rank."""
        logits: torch.Tensor = self.module.compute_base_logits(states)[0]
        return logits

    def writes(self, injector: KvInjector) -> bool:
        """Whether the draft's KV may be written by :meth:`write`, whenever that is convenient.

        Args:
            injector: SGLang's ``TargetHiddenKvInjector``.
        """
        return injector.swa_ring_size is None

    def slots(self, injector: KvInjector, slots: torch.Tensor) -> torch.Tensor:
        """``[N]`` int64 places in the draft's KV of what the target has at ``slots`` ``[N]``, as they are now; -1 stays."""
        return slots

    def write(
        self,
        injector: KvInjector,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Write the draft's KV.

        Args:
            hidden: ``[N, layers read * d]`` target states.
            slots: ``[N]`` int64 of :meth:`slots`; -1: nothing reads what is written of this row.
            positions: ``[N]`` int64.
        """
        # Some of SGLang's writers have no rows to skip; every pool has the dummy slot 0.
        slots = slots.clamp(min=0)
        injector.inject_target_hidden(target_hidden=hidden, cache_loc=slots, positions=positions)

    def embed_with(self, embedding: torch.nn.Module) -> None:
        """Let the draft forward embed by ``embedding``, outside its graph.

        SGLang captures the embedding of every draft that has ``forward_embed``. An exchange in a graph that one rank
        captures alone would wait for the others for ever.
        """
        model = self.module
        model.embed_tokens = embedding  # type: ignore[assignment]  # called like SGLang's
        kind = type(model)
        model.__class__ = type(kind.__name__, (kind,), {"forward_embed": property()})

    def take_parts(self) -> None:
        """Let an update bring some tensors: SGLang's loader wants the confidence head's in every load."""
        load = self.module._load_confidence_weights

        def load_given(*, confidence_weights: object, params_dict: object) -> None:
            if confidence_weights:
                load(confidence_weights=confidence_weights, params_dict=params_dict)

        self.module._load_confidence_weights = load_given

    def forget_copies(self) -> None:
        """The weights were replaced: drop what SGLang has made of them."""
        # The stacked projections that write the draft's KV.
        self.module._stacked_ctx_kv_cache, self.module._fused_kv_write_cache = False, None


class V4DraftModel(DraftModel):
    """DeepSeek-V4's, in the target's checkpoint: stages of attention and experts over several residual streams."""

    HEADS = ("DSparkV4MarkovHead",)
    LAYERS = "stages."
    embeds_by_module = False  # it repeats the embedding into its streams itself
    kernel_writes = False
    module: V4Draft  # type: ignore[assignment]  # SGLang's other class

    @classmethod
    def runs(cls, model: object) -> bool:
        return hasattr(model, "collapse_hc_head")

    @property
    def projection(self) -> torch.Tensor:
        weight: torch.Tensor = self.module.stages[0].main_proj.weight
        return weight

    @property
    def reads_target_head(self) -> bool:
        return True

    def states(self, raw: torch.Tensor) -> torch.Tensor:
        """``[N, d]`` collapse of ``[N, m, d]`` streams, not normed."""
        states: torch.Tensor = self.module.collapse_hc_head(raw)
        return states

    def head_input(self, states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.module.stages[-1].norm(states)
        return normed

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module._logits_from_x_post_hc(states)
        return logits

    def slots(self, injector: KvInjector, slots: torch.Tensor) -> torch.Tensor:
        # The window's pool gives places to others once a request has moved on.
        pool = injector.draft_model_runner.token_to_kv_pool
        found: torch.Tensor = pool.translate_loc_from_full_to_swa(slots)
        return torch.where(slots >= 0, found.to(torch.int64), -1)

    def write(
        self,
        injector: KvInjector,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        with torch.inference_mode():
            self.module.write_target_hidden_kv(
                main_hidden=hidden,
                swa_loc=slots.to(torch.int32),
                positions=positions,
                pool=injector.draft_model_runner.token_to_kv_pool,
            )

    def take_parts(self) -> None:
        self.module._assert_confidence_head_loaded = lambda **_: None

    def forget_copies(self) -> None:
        """SGLang renews its copies of norms after each load."""


def draft_model(model: DenseDraft) -> DraftModel:
    """The layout of SGLang's draft model.

    Raises:
        CompatibilityError: heads that would be read wrongly.
    """
    adapters: list[type[DraftModel]] = [resolve(layout.adapter) for layout in layouts()]
    return next(adapter for adapter in adapters if adapter.runs(model))(model)
