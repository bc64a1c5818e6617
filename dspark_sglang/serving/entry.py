"""What SGLang's entry points call, in every process it starts.

SGLang logs and swallows any exception of a plugin and then runs its builtin. So this
module imports nothing that can fail, does nothing unless it was asked to, and turns every
failure into ``SystemExit``, which SGLang does not swallow.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

ALGORITHM = "DSPARK"
ENTRY_POINT = "dspark"
PLATFORM = "dspark_sglang.serving.cpu.platform.CpuPlatform"
_FLAG = "--speculative-algorithm"
_SHORTEST_FLAG = "--speculative-al"
#: Frames of SGLang that hold the server arguments while plugins load.
_ARGUMENT_NAMES = ("server_args", "kwargs")


def _algorithm_in_argv(argv: Sequence[str]) -> str | None:
    found = None
    for position, word in enumerate(argv):
        flag, joined, value = word.partition("=")
        # SGLang's parser accepts unambiguous abbreviations.
        if not (_FLAG.startswith(flag) and flag.startswith(_SHORTEST_FLAG)):
            continue
        if joined:
            found = value
        elif position + 1 < len(argv):
            found = argv[position + 1]
    return found


def _algorithm_in_config(argv: Sequence[str]) -> str | None:
    """The algorithm named by ``--config FILE`` (SGLang's YAML arguments file)."""
    for position, word in enumerate(argv):
        path = word.split("=", 1)[1] if word.startswith("--config=") else None
        if word == "--config" and position + 1 < len(argv):
            path = argv[position + 1]
        if path and os.path.isfile(path):  # noqa: PTH113 - keep this module's imports minimal
            import yaml

            with open(path, encoding="utf-8") as handle:  # noqa: PTH123
                loaded = yaml.safe_load(handle)
            if isinstance(loaded, Mapping):
                value = loaded.get("speculative-algorithm", loaded.get("speculative_algorithm"))
                return str(value) if value else None
    return None


def _algorithm_in_frames(frame: FrameType | None) -> str | None:
    """The algorithm in the arguments of the SGLang function that is loading plugins."""
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("sglang."):
            for name in _ARGUMENT_NAMES:
                value = frame.f_locals.get(name)
                if isinstance(value, Mapping):
                    nested = value.get("server_args")
                    found = value.get("speculative_algorithm") or getattr(
                        nested, "speculative_algorithm", None
                    )
                else:
                    found = getattr(value, "speculative_algorithm", None)
                if isinstance(found, str):
                    return found
        frame = frame.f_back
    return None


def requested_algorithm(argv: Sequence[str], frame: FrameType | None) -> str | None:
    """The speculative algorithm this process was asked to run, upper case, or None."""
    found = _algorithm_in_frames(frame) or _algorithm_in_argv(argv) or _algorithm_in_config(argv)
    return found.upper() if found else None


def _stop(error: BaseException) -> SystemExit:
    print(f"dspark: refusing to start: {error}", file=sys.stderr, flush=True)
    return SystemExit(2)


def activate_plugin() -> None:
    """Install our DSPARK where it was asked for, and the CPU platform's hooks where that runs."""
    caller = sys._getframe(1)
    try:
        asked = requested_algorithm(sys.argv, caller) == ALGORITHM
        from sglang.srt.platforms import current_platform

        on_our_cpu = getattr(current_platform, "dspark_cpu", False)
        if not asked and not on_our_cpu:
            return
        from dspark_sglang.config import read_settings
        from dspark_sglang.serving import hooks

        settings = read_settings()
        ours = settings.plugin != "off"
        hooks.install(
            algorithm=asked and ours,
            builtin=asked and not ours and bool(on_our_cpu),
            cpu_platform=bool(on_our_cpu),
        )
    except Exception as error:  # process boundary: SGLang would swallow it and run its builtin
        raise _stop(error) from error


def accelerator_present() -> bool:
    """Whether torch sees any device that SGLang has a platform for."""
    import torch

    if torch.cuda.is_available():
        return True
    for name in ("xpu", "npu", "musa", "mps"):
        module = getattr(torch, name, None)
        if module is not None and getattr(module, "is_available", lambda: False)():
            return True
    return False


def activate_platform() -> str | None:
    """The CPU platform's class path where it is wanted, else None.

    Wanted: named by ``SGLANG_PLATFORM=dspark``, or no accelerator is present and SGLang's
    own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) was not chosen.
    """
    if os.environ.get("SGLANG_PLATFORM") == ENTRY_POINT:
        return PLATFORM
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or accelerator_present():
        return None
    return PLATFORM
