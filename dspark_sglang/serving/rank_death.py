"""One line that says which process of a server died, before SGLang ends what is left of it.

SGLang watches its processes and ends all of them when one dies. Its log then holds the tracebacks of
those that lost their peer, and where those come first, nothing about the process that died.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def died(handler: Any) -> list[tuple[str, int, int]]:
    """Name, process id and exit code of a server's processes that have ended by themselves."""
    manager = handler.tokenizer_manager
    watchdog = manager._subprocess_watchdog
    if watchdog is None or manager.gracefully_exit:  # asked to stop, and so were its processes
        return []
    known = zip(watchdog._names, watchdog._processes, strict=True)
    return [(name, p.pid, p.exitcode) for name, p in known if p.exitcode not in (None, 0)]


def tell(original: Callable[..., Any], handler: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for SGLang's handling of a process that failed: say which, then end as it does."""
    for name, pid, code in died(handler):
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(
            f"dspark: error: {name} (pid {pid}) {how}. Expected every rank to run: the others cannot "
            "go on, and the server stops. Look for a process killed for memory in the kernel's log, "
            "then start it again.",
            file=sys.stderr,
            flush=True,
        )
    return original(handler, *args, **kwargs)
