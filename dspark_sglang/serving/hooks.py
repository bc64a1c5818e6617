"""Installing our hooks into SGLang, and proving that they are in.

SGLang logs and swallows a hook that fails to apply. So hooks are applied here, at once, and each
target is then looked up again: what is found must be ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dspark_sglang.config import read_settings
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving import arguments, compat

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import (
        DraftInput,
        MemoryRequest,
        Req,
        ScheduleBatch,
        ServerArgs,
        TokenizerManager,
        UpdaterManager,
    )

_installed: dict[str, str] = {}


def installed() -> dict[str, str]:
    """Hook name to SGLang symbol, for everything installed in this process."""
    return dict(_installed)


def install(*, algorithm: bool, builtin: bool, cpu_platform: bool) -> None:
    """Install what was asked for.

    Args:
        algorithm: DSPARK was asked for and shall be ours.
        builtin: DSPARK was asked for and shall be SGLang's, on our CPU platform, which SGLang's own
            argument check refuses.
        cpu_platform: our CPU platform is the active one.

    Raises:
        DSparkError: SGLang differs from what we use, or a hook did not take.
    """
    symbols: tuple[compat.Symbol, ...] = ()
    if builtin:
        symbols += (compat.Symbol(compat.HOOKS["arguments"], ("server_args",)),)
    if algorithm:
        if arguments.serves_http(sys.argv):
            arguments.check(sys.argv[1:])
        symbols += compat.ALGORITHM_SYMBOLS
    if cpu_platform:
        symbols += compat.CPU_SYMBOLS
    compat.check(symbols, allow_other=read_settings().allow_other_sglang)
    hooks: list[tuple[str, str, Callable[..., Any], str]] = []
    if algorithm:
        hooks += _algorithm_hooks()
    if builtin:

        def handle_builtin(original: Callable[[Any], None], server_args: ServerArgs) -> None:
            from dspark_sglang.serving import arguments

            arguments.resolve_builtin(server_args)

        hooks.append(("arguments", compat.HOOKS["arguments"], handle_builtin, "AROUND"))
    if cpu_platform:
        from dspark_sglang.serving.cpu import patches

        patches.register_backend()
        hooks += patches.hooks(compat.CPU_HOOKS)
    _apply(hooks)


def _algorithm_hooks() -> list[tuple[str, str, Callable[..., Any], str]]:
    def handle_arguments(original: Callable[[Any], None], server_args: ServerArgs) -> None:
        from dspark_sglang.serving import arguments

        arguments.resolve(original, server_args)

    def create_worker(original: Callable[..., Any], self: Any, server_args: ServerArgs) -> Any:
        if not self.is_dspark():
            return original(self, server_args)
        from dspark_sglang.serving.worker import DSparkWorker

        return DSparkWorker

    def place(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from dspark_sglang.serving import placement

        return placement.layout(original, *args, **kwargs)

    def tell(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from dspark_sglang.serving import faults

        return faults.tell(original, *args, **kwargs)

    def refuse_inexact(original: Callable[..., Any], req: Req, enable_overlap: bool) -> Any:
        from dspark_sglang.serving import requests

        return original(req, enable_overlap) or requests.refusal(req, enable_overlap)

    def finish(original: Callable[..., Any], req: Req, new_accepted_len: int = 1) -> None:
        from dspark_sglang.serving import requests

        requests.finish(original, req, new_accepted_len)

    def advance(
        original: Callable[..., Any], processor: object, req: Req, tokens: int | list[int]
    ) -> Any:
        from dspark_sglang.serving import requests

        return requests.advance_grammar(original, processor, req, tokens)

    def prepare(
        original: Callable[..., None], draft_input: DraftInput, batch: ScheduleBatch
    ) -> None:
        if not batch.spec_algorithm.is_dspark():
            original(draft_input, batch)
            return
        from dspark_sglang.serving import draft_kv

        draft_kv.prepare(original, draft_input, batch)

    def update_handlers(original: Callable[[Any], Any], controller: object) -> Any:
        from dspark_sglang.serving import admin

        return admin.handlers(original, controller)

    return [
        *_weight_hooks(),
        *_http_hooks(),
        ("commands", compat.HOOKS["commands"], update_handlers, "AROUND"),
        ("prepare", compat.HOOKS["prepare"], prepare, "AROUND"),
        ("finish", compat.HOOKS["finish"], finish, "AROUND"),
        ("grammar", compat.HOOKS["grammar"], advance, "AROUND"),
        ("arguments", compat.HOOKS["arguments"], handle_arguments, "AROUND"),
        ("worker", compat.HOOKS["worker"], create_worker, "AROUND"),
        ("rank_death", compat.HOOKS["rank_death"], tell, "AROUND"),
        ("placement", compat.HOOKS["placement"], place, "AROUND"),
        ("validation", compat.HOOKS["validation"], refuse_inexact, "AROUND"),
    ]


def _weight_hooks() -> list[tuple[str, str, Callable[..., Any], str]]:
    def changed(original: Callable[..., Any], manager: UpdaterManager, recv_req: object) -> Any:
        from dspark_sglang.serving import weights

        return weights.followed(original, manager, recv_req)

    def loaded(original: Callable[..., Any], manager: UpdaterManager, recv_req: object) -> Any:
        from dspark_sglang.serving import weights

        return weights.contained(original, manager, recv_req)

    return [
        *((name, target, changed, "AROUND") for name, target in compat.WEIGHT_HOOKS.items()),
        ("weights_tensor", compat.HOOKS["weights_tensor"], loaded, "AROUND"),
    ]


def _http_hooks() -> list[tuple[str, str, Callable[..., Any], str]]:
    def make(
        original: Callable[..., Any],
        manager: TokenizerManager,
        obj: object,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        from dspark_sglang.serving import options

        return options.made(original, manager, obj, *args, **kwargs)

    def count(result: None, obj: Any) -> None:
        from dspark_sglang.serving import options

        options.check_samples(obj)

    found: list[tuple[str, str, Callable[..., Any], str]] = [
        ("request", compat.HOOKS["request"], make, "AROUND"),
        ("samples", compat.HOOKS["samples"], count, "AFTER"),
    ]
    for name in ("release", "resume"):

        def guard(
            original: Callable[..., Any],
            updater: UpdaterManager,
            recv_req: MemoryRequest,
            *,
            name: str = name,
        ) -> Any:
            from dspark_sglang.serving import admin

            return admin.guard(original, updater, recv_req, release=name == "release")

        async def ask(
            manager: TokenizerManager, obj: object, request: object = None, *, name: str = name
        ) -> None:
            from dspark_sglang.serving import admin

            await admin.ask(manager, obj, release=name == "release")

        found.append((name, compat.HOOKS[name], guard, "AROUND"))
        found.append((f"ask_{name}", compat.HOOKS[f"ask_{name}"], ask, "REPLACE"))
    return found


def _apply(hooks: list[tuple[str, str, Callable[..., Any], str]]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    before = {target: compat.resolve(target) for _, target, _, _ in hooks}
    for _, target, function, kind in hooks:
        HookRegistry.register(target, function, HookType[kind])
    HookRegistry.apply_hooks()
    for name, target, _, _ in hooks:
        if compat.resolve(target) is before[target]:
            raise CompatibilityError(
                f"SGLang did not install our hook on {target}.",
                expected="the hook in place after apply_hooks()",
                fix="See SGLang's log above for the cause, or run its builtin with "
                "DSPARK_PLUGIN=off.",
            )
        _installed[name] = target
