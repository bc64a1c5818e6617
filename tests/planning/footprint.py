"""Says in the server's log how many bytes its models and pools really take.

Not one of this package's own entry points: ``tests.planning.measure`` names it as a plugin for
the servers it starts, so that plans are compared with sums over the very tensors in the scheduler.
"""

from __future__ import annotations

import json
from typing import Any

#: What a line of it starts with; the rest is JSON.
MARK = "dspark footprint: "
_LOADED = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
_POOLS = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.configure"


def activate() -> None:
    """Report after every model load and every making of pools in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_LOADED, _after_load, HookType.AFTER)
    HookRegistry.register(_POOLS, _after_pools, HookType.AFTER)


def _say(**values: int | bool | str) -> None:
    print(MARK + json.dumps(values), flush=True)


def _after_load(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
    _say(what="weights", draft=bool(self.is_draft_worker), bytes=weights)


def _after_pools(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    sizes = result.token_to_kv_pool.get_kv_size_bytes()
    total = sum(sizes) if isinstance(sizes, tuple) else sizes
    _say(what="kv", draft=bool(self.is_draft_worker), bytes=int(total))
