"""How far a long operation over files is: bytes, rate and time left, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tqdm import tqdm

#: Seconds between lines where standard error is no terminal (a log).
_LOG_SECONDS = 20.0


#: Told how many bytes more are done; may be called from several threads.
Meter = Callable[[int], object]
#: Opens a meter for an operation (its name, its bytes).
Progress = Callable[[str, int], AbstractContextManager[Meter]]


@contextmanager
def silent(what: str, total: int) -> Iterator[Meter]:
    """Say nothing: for tests and for work too short to watch."""
    yield lambda nbytes: None


@contextmanager
def shown(what: str, total: int) -> Iterator[Meter]:
    """A bar with rate and time left on a terminal; a line every 20 seconds in a log."""
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        leave=not terminal,
        # Work that is over sooner is not worth a line.
        delay=0.5 if terminal else _LOG_SECONDS,
        mininterval=0.2 if terminal else _LOG_SECONDS,
        # A log keeps every line.
        bar_format=None
        if terminal
        else "{l_bar}{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left\n",
        dynamic_ncols=terminal,
    )
    with bar:
        yield bar.update
