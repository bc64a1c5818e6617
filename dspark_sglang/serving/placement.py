"""Where the drafter lives in this server, decided alike in every process before anything loads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from dspark_sglang.config import Settings
from dspark_sglang.core import placement as costs
from dspark_sglang.core.placement import Backbone, Placement
from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.base import DrafterConfig, layout_of
from dspark_sglang.layouts.dense.config import DenseConfig
from dspark_sglang.layouts.dense.tensors import dense_tensors
from dspark_sglang.serving.sglang_types import TargetWorker

#: Not of the backbone: on every rank whatever the placement.
_HEADS = ("markov_head.", "confidence_head.", "embed_tokens.", "lm_head.")


class Placed(msgspec.Struct, frozen=True):
    """A placement and why."""

    placement: Placement
    #: Computed microseconds of drafting one block, by placement; empty where none was compared.
    microseconds: dict[str, float]

    @property
    def whole(self) -> bool:
        """Whether a rank that drafts holds the whole backbone."""
        return self.placement != "shard"


def backbone(drafter: DenseConfig, element: int = 2) -> Backbone:
    """Sizes of a drafter's backbone.

    Args:
        element: bytes of one parameter.
    """
    shapes = dense_tensors(drafter)
    parameters = sum(
        int(torch.Size(shape).numel())
        for name, shape in shapes.items()
        if not name.startswith(_HEADS)
    )
    return Backbone(
        layers=drafter.num_layers,
        hidden=drafter.hidden_size,
        heads=drafter.num_heads,
        kv_heads=drafter.num_kv_heads,
        head_dim=drafter.head_dim,
        parameters=parameters,
        gamma=drafter.gamma,
        element=element,
    )


def decide(
    settings: Settings, drafter: DrafterConfig, *, ranks: int, requests: int, device: str
) -> Placed:
    """The placement of a drafter.

    Args:
        ranks: tensor-parallel ranks of the target.
        requests: that run at once at most; ``auto`` compares costs at that load.
        device: its name.

    Raises:
        ConfigError: ``shard`` was asked for and the heads do not divide, or another placement of a bundled drafter.
    """
    if drafter.bundled:
        # SGLang lays a bundled draft out as its target: experts and heads over the same ranks.
        if settings.placement not in ("auto", "shard"):
            raise ConfigError(
                f"DSPARK_PLACEMENT is {settings.placement}, and the drafter is part of the target.",
                expected="shard or auto: it is laid out as the target is",
                fix="Unset DSPARK_PLACEMENT.",
            )
        return Placed("replicate" if ranks == 1 else "shard", {})
    assert isinstance(drafter, DenseConfig)
    sizes = backbone(drafter)
    if settings.placement == "shard" and not sizes.divides(ranks):
        raise ConfigError(
            f"DSPARK_PLACEMENT is shard, and the drafter's {drafter.num_heads} query and "
            f"{drafter.num_kv_heads} key heads do not divide over {ranks} ranks.",
            expected="replicate, single or auto, which work with any number of ranks",
            fix="Unset DSPARK_PLACEMENT.",
        )
    if ranks == 1:
        return Placed("replicate", {})
    if settings.placement != "auto":
        return Placed(settings.placement, {})
    found = costs.seconds(sizes, ranks, requests, costs.machine(device))
    return Placed(costs.choose(found), {name: round(s * 1e6, 1) for name, s in found.items()})


@functools.cache
def device_name(device: str) -> str:
    """The name of the device that a rank runs on."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


#: What this process has settled on before its worker is built; None leaves it to SGLang.
_settled: Placed | None = None


def settled() -> Placement:
    """The placement of this process's draft; SGLang's own is ``shard``."""
    return "shard" if _settled is None else _settled.placement


def settle(settings: Settings, target_worker: TargetWorker) -> Placed | None:
    """Decide in a scheduler process, before SGLang builds the draft; None leaves it to SGLang.

    Raises:
        ConfigError: as :func:`decide`.
        CheckpointError: a drafter that cannot be read.
    """
    global _settled
    from sglang.srt.runtime_context import get_context, get_parallel

    parallel = get_parallel()
    config = target_worker.model_runner.spec_aux_config.draft_model_config
    _settled = None
    if parallel.tp_size > 1 and not parallel.attn_dp_enabled and config is not None:
        raw = config.hf_config.to_dict()
        _settled = decide(
            settings,
            layout_of(raw).read(raw),
            ranks=int(parallel.tp_size),
            requests=int(get_context().resolved_server_args_dict()["max_running_requests"] or 48),
            device=device_name(str(target_worker.device)),
        )
    return _settled


def layout(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for SGLang's choice of the ranks that share the draft model."""
    from sglang.srt.configs.draft_parallel import DraftParallelLayout
    from sglang.srt.distributed.parallel_state import get_self_pp_group

    if _settled is None or not _settled.whole:
        return original(*args, **kwargs)
    # A group of this rank alone, which SGLang makes for drafts that do not span pipeline stages.
    return DraftParallelLayout(tp_group=get_self_pp_group(), attn_tp_size=1)
