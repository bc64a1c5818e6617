"""Triton's interpreter, made to patch Triton's language once instead of at every call of a function.

A launch patches the language before its programs run. The interpreter of Triton 3.8 does the same
again whenever a kernel calls a device function, and looks up numpy's type in a new table for each
value. That took half the time of a kernel made of functions.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_numpy_type = interpreter._get_np_dtype
#: Modules of device functions whose language has been patched, which lasts.
_patched: set[str] = set()
#: numpy's type by the name of a scalar type.
_types: dict[str, Any] = {}


def patch_once() -> None:
    """Make this process's interpreter patch the language once for every module of functions.

    Lasting, and without effect on results or on compiled kernels. Calling it again changes nothing.
    """
    interpreter._get_np_dtype = _known_type
    interpreter.InterpretedFunction.__call__ = _call


def _known_type(kind: Any) -> Any:
    """What :func:`interpreter._get_np_dtype` returns, looked up by name."""
    scalar = kind.scalar
    if scalar.name not in _types:
        _types[scalar.name] = _numpy_type(scalar)
    return _types[scalar.name]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function within a launch."""
    module = self.fn.__globals__["__name__"]
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
