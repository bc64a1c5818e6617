"""Installing our hooks into SGLang, and proving that they are in.

SGLang logs and swallows a hook that fails to apply. So hooks are applied here, at once, and each
target is then looked up again: what is found must be ours.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from dspark_sglang.config import read_settings
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving import arguments, compat

#: Name, target, function and kind of SGLang's.
Hook = tuple[str, str, Callable[..., Any], str]

#: Functions of serving around SGLang's, by the name of the hook.
AROUND = {
    **dict.fromkeys(compat.WEIGHT_HOOKS, "weights:followed"),
    "weights_tensor": "weights:contained",
    "request": "options:made",
    "commands": "admin:handlers",
    "prepare": "draft_kv:prepare",
    "finish": "requests:finish",
    "grammar": "requests:advance_grammar",
    "validation": "requests:validate",
    "arguments": "arguments:resolve",
    "rank_death": "faults:tell",
    "placement": "placement:layout",
    "draft": "draft_model:built",
}

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
    hooks: list[Hook] = []
    if builtin:
        symbols += (compat.Symbol(compat.HOOKS["arguments"], ("server_args",)),)
        hooks.append(_hook("arguments", later("arguments:resolve_builtin")))
    if algorithm:
        if arguments.serves_http(sys.argv):
            arguments.check(sys.argv[1:])
        symbols += compat.ALGORITHM_SYMBOLS
        hooks += _algorithm_hooks()
    if cpu_platform:
        symbols += compat.CPU_SYMBOLS
    compat.check(symbols, allow_other=read_settings().allow_other_sglang)
    if cpu_platform:
        from dspark_sglang.serving.cpu import patches

        patches.register_backend()
        hooks += patches.hooks(compat.CPU_HOOKS)
    _apply(hooks)


def later(path: str, **more: Any) -> Callable[..., Any]:
    """Calls ``module:function`` of serving with ``more``; imported at the first call, in the processes that make one."""
    resolved = functools.cache(lambda: pkgutil.resolve_name(f"dspark_sglang.serving.{path}"))

    def call(*args: Any, **kwargs: Any) -> Any:
        return resolved()(*args, **kwargs, **more)

    return call


def _hook(name: str, function: Callable[..., Any], kind: str = "AROUND") -> Hook:
    return name, compat.HOOKS[name], function, kind


def _create_worker(original: Callable[..., Any], algorithm: Any, server_args: object) -> Any:
    if not algorithm.is_dspark():
        return original(algorithm, server_args)
    return pkgutil.resolve_name("dspark_sglang.serving.worker:DSparkWorker")


def _algorithm_hooks() -> list[Hook]:
    return [
        *(_hook(name, later(path)) for name, path in AROUND.items()),
        _hook("worker", _create_worker),
        _hook("samples", later("options:check_samples"), "AFTER"),
        *(_hook(n, later("admin:guard", release=n == "release")) for n in ("release", "resume")),
        *(
            _hook(f"ask_{n}", later("admin:ask", release=n == "release"), "REPLACE")
            for n in ("release", "resume")
        ),
    ]


def _apply(hooks: list[Hook]) -> None:
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
