"""What may go wrong in a step without ending the server: contained, counted, said once.

A fault of one request ends that request. A fault of the drafter turns drafting off, and the server goes on as
plain decoding until an operator sets ``dspark_speculation`` again or the drafter is replaced. What is left, every
``raise`` and ``assert`` that a step can reach, stands in ``tests/raises.py``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dspark_sglang.core.round import Bool, Float64
from dspark_sglang.serving.options import never_draft

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import Req

logger = logging.getLogger(__name__)

Kind = Literal["request", "confidence", "exception", "weights", "target"]
#: What each kind counts; labels of the metric ``dspark_faults_total``.
KINDS: dict[Kind, str] = {
    "request": "requests ended because their next token had no distribution",
    "confidence": "requests no longer drafted for, because the drafter's confidence was NaN",
    "exception": "exceptions while drafting or while writing the draft's KV",
    "weights": "times that the drafter's weights were found NaN or infinite",
    "target": "updates after which the target is no longer the one the drafter was made for",
}
#: Requests in a row, with none between them that drafts as it should, that make NaN the drafter's fault: a target
#: that overflows on one prompt gives its drafter NaN for that prompt alone.
_SUSPECTS = 3


class Faults:
    """The faults of one scheduler process."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        #: Why nothing is drafted, by kind of fault; empty while drafting is allowed.
        self._stopped: dict[Kind, str] = {}
        self._suspects = 0
        #: Whether another rank may wait for this one, which a rank that skips its part would leave waiting.
        self.alone = True

    @property
    def stopped(self) -> str | None:
        """Why nothing is drafted; None while drafting is allowed."""
        return "; ".join(self._stopped.values()) or None

    @property
    def broken(self) -> bool:
        """Whether the drafter cannot even take in the target's states."""
        return "exception" in self._stopped or "weights" in self._stopped

    def stop(self, kind: Kind, reason: str, error: BaseException | None = None) -> None:
        """Count a fault of the drafter, and draft nothing from now on."""
        self.counts[kind] += 1
        if kind not in self._stopped:
            logger.error(
                "dspark: drafting is off: %s. The server goes on as plain decoding.",
                reason,
                exc_info=error,
            )
        self._stopped[kind] = reason

    def resume(self, *kinds: Kind) -> None:
        """Allow drafting again, as far as faults of these kinds forbade it; none named: of all."""
        for kind in kinds or tuple(self._stopped):
            self._stopped.pop(kind, None)
        self._suspects = 0

    def screened(
        self, confidence: Float64, drafted: Bool, requests: Sequence[Req]
    ) -> tuple[Float64, Bool]:
        """Confidences of a step, 0 for requests that have one that is none; those are drafted for no more.

        Args:
            confidence: ``[R, gamma]``.
            drafted: ``[R]`` requests whose confidences are the drafter's.
            requests: SGLang's.

        Returns:
            And ``[R]`` which requests those are.
        """
        # NaN is neither.
        sound = ((confidence >= 0.0) & (confidence <= 1.0)).all(axis=1) | ~drafted
        if sound.all():
            self._suspects = 0 if drafted.any() else self._suspects
            return confidence, ~sound
        news = sum(never_draft(requests[row]) for row in np.flatnonzero(~sound))
        self.counts["confidence"] += news
        self._suspects = news if (sound & drafted).any() else self._suspects + news
        if self._suspects >= _SUSPECTS:
            count = self._suspects
            self.stop(
                "confidence", f"the drafter's confidence is NaN for {count} requests in a row"
            )
        return np.where(sound[:, None], confidence, 0.0), ~sound

    @contextlib.contextmanager
    def contained(self, what: str) -> Iterator[None]:
        """A ``with`` block in which an exception of the drafter is a fault; with several ranks it ends the server.

        Args:
            what: is being done.
        """
        try:
            yield
        except Exception as error:
            if not self.alone:
                raise
            self.stop("exception", f"{what} raised {type(error).__name__}: {error}", error)


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
