"""What may go wrong in a step without ending the server: contained, counted, said once.

A fault of one request ends that request. A fault of the drafter turns drafting off, and the server goes on as
plain decoding until an operator sets ``dspark_speculation`` again or the drafter is replaced. What is left, every
``raise`` and ``assert`` that a step can reach, stands in :data:`RAISES`.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_sglang.serving.options import never_draft

if TYPE_CHECKING:
    from dspark_sglang.serving.sglang_types import Req

logger = logging.getLogger(__name__)

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
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

    def contained(self, what: str) -> Contained:
        """A ``with`` block in which an exception of the drafter is a fault; with several ranks it ends the server.

        Args:
            what: is being done.
        """
        return Contained(self, what)


class Contained:
    """See :meth:`Faults.contained`."""

    def __init__(self, faults: Faults, what: str) -> None:
        self._faults, self._what = faults, what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or not self._faults.alone:
            return False
        self._faults.stop(
            "exception", f"{self._what} raised {type(error).__name__}: {error}", error
        )
        return True


class Raise(NamedTuple):
    """A function with statements that raise, reachable in a step."""

    #: Module and function.
    where: str
    #: What it means, and whose fault it is.
    means: str
    whose: Literal["request", "drafter", "target", "plugin", "operator"]
    #: What happens.
    then: Literal["never", "contained", "refused", "reference", "ends"]
    #: The test of that.
    test: str


_SERVING = "dspark_sglang.serving"
_CORE = "dspark_sglang.core"
#: Every ``raise`` and ``assert`` of a module that a step runs, by function; ``tests/unit/test_faults.py`` compares
#: it with the source. Of our kernels the whole package is one entry.
RAISES = (
    # A request's or an operator's own: answered with HTTP 400, before anything runs.
    Raise(f"{_SERVING}.options.read_options", "custom_params that mean nothing", "request", "refused",
          "unit/test_requests.py::test_wrong_options_of_a_request_are_refused"),
    Raise(f"{_SERVING}.options.made", "a request that a process could not go on with", "request", "refused",
          "unit/test_http_checks.py"),
    Raise(f"{_SERVING}.options._check_readable", "a value that the scheduler could not read", "request", "refused",
          "unit/test_http_checks.py"),
    Raise(f"{_SERVING}.options._check_labels", "labels that metrics could not take", "request", "refused",
          "unit/test_http_checks.py"),
    Raise(f"{_SERVING}.options._check_values", "a value that can be read and not be used", "request", "refused",
          "unit/test_http_checks.py"),
    Raise(f"{_SERVING}.options.check_samples", "more answers than a process can hold", "request", "refused",
          "unit/test_http_checks.py"),
    Raise(f"{_SERVING}.requests.refusal", "an option of the start-up measurement", "request", "refused",
          "unit/test_requests.py::test_wrong_options_of_a_request_are_refused"),
    Raise(f"{_SERVING}.admin.ask", "memory that cannot be released or taken back now", "operator", "refused",
          "serving/test_start_cases.py"),
    Raise(f"{_SERVING}.admin.Commands.prepare", "a setting that this server has no use for", "operator", "refused",
          "unit/test_commands.py"),
    Raise(f"{_SERVING}.admin.Commands._budget", "a budget that is no share", "operator", "refused",
          "unit/test_commands.py"),
    Raise(f"{_SERVING}.admin._choose", "a setting of no known value", "operator", "refused", "unit/test_commands.py"),
    Raise(f"{_SERVING}.admin.handlers", "how SGLang is told of these", "operator", "refused", "unit/test_commands.py"),
    Raise(f"{_SERVING}.calibration.fit", "too little to fit to", "operator", "refused", "unit/test_calibration.py"),
    Raise(f"{_SERVING}.calibration.KnownCost.read", "a server without a cost file", "operator", "refused",
          "unit/test_commands.py"),
    Raise(f"{_SERVING}.calibration.KnownCost.keep", "a server without a cost file", "operator", "refused",
          "unit/test_commands.py"),
    Raise(f"{_SERVING}.calibration.load_cost", "a cost file that is damaged or of something else", "operator", "refused",
          "unit/test_step_cost.py::test_a_file_of_no_use_is_refused_with_its_reason"),
    Raise(f"{_SERVING}.calibration.require_both_kinds", "a cost that would not be read again", "operator", "refused",
          "unit/test_step_cost.py::test_a_cost_of_one_kind_of_step_is_not_written"),
    Raise(f"{_SERVING}.calibration.save_cost", "a disk that is full or may not be written", "operator", "refused",
          "unit/test_step_cost.py::test_writing_is_all_or_nothing"),
    Raise(f"{_CORE}.schedule.cost_model._Kind.restore", "a cost file edited into nonsense", "operator", "refused",
          "unit/test_core_steps.py"),
    Raise(f"{_CORE}.schedule.cost_model.CostModel.restore", "a cost file of another drafter, or garbled", "operator", "refused",
          "unit/test_core_steps.py"),
    # The drafter's: drafting goes off. With several ranks an exception ends the server, for others would wait.
    Raise(f"{_CORE}.draft.draft_block", "no uniforms were given", "plugin", "contained",
          "serving/test_never_ends.py::test_a_fault_of_the_drafter_is_contained"),
    Raise(f"{_CORE}.heads.MarkovHead.latent", "an rnn head without its state", "plugin", "contained",
          "serving/test_never_ends.py::test_a_fault_of_the_drafter_is_contained"),
    Raise("dspark_kernels.markov_step", "operands that do not fit together", "plugin", "contained",
          "kernels/test_markov_step_edges.py"),
    Raise("dspark_kernels.confidence", "operands that do not fit together", "plugin", "contained",
          "kernels/test_confidence.py"),
    Raise("dspark_kernels.kv_inject", "a pool that our kernel does not write", "plugin", "contained",
          "kernels/test_kv_inject.py"),
    Raise(f"{_SERVING}.weights.contained", "an update that raises where ranks wait for each other", "operator", "ends",
          "unit/test_faults.py::test_an_update_that_raises_fails_on_one_rank_and_ends_several"),
    # What a step never gets to: checked before, or only at start.
    Raise(f"{_CORE}.schedule.survival.check", "a confidence that is none: requests with one do not come so far", "drafter", "never",
          "unit/test_overlap.py::test_confidences_that_are_none_are_explained"),
    Raise(f"{_CORE}.schedule.cost_model.TableCost.__init__", "a cost table out of order: only the simulator has tables", "operator",
          "never", "unit/test_core_cost.py"),
    Raise(f"{_SERVING}.tensor_parallel.Vocabulary.of", "an LM head sharded in an unknown way: at start", "operator", "refused",
          "unit/test_placement.py"),
    Raise(f"{_SERVING}.draft_model.DraftModel.__init__", "heads that would be read wrongly: at start", "operator", "refused",
          "unit/test_draft_model.py"),
    Raise(f"{_SERVING}.tensor_parallel.shard_draft", "heads spread beside a draft vocabulary: at start", "operator", "refused",
          "unit/test_placement.py"),
    Raise(f"{_SERVING}.cpu.attention.CpuAttentionBackend.forward_extend",
          "a target with attention that the CPU has not: its first forward is before the server listens", "target",
          "refused", "serving/test_cpu_attention.py"),
    # The plugin's own mistakes. They say that a step is not what it should be, so nothing of it may be served.
    Raise(f"{_CORE}.tensor_parallel.accept._stats", "no drafted laws", "plugin", "ends", "unit/test_core_sharded.py"),
    Raise(f"{_CORE}.tensor_parallel.accept._sampled", "no drafted laws or uniforms", "plugin", "ends", "unit/test_core_sharded.py"),
    Raise(f"{_SERVING}.overlap.OverlappedRounds.outcome", "an outcome of nothing drafted", "plugin", "ends",
          "unit/test_overlap.py"),
    Raise(f"{_SERVING}.overlap.OverlappedRounds._over", "the other strategy's end of a step", "plugin", "ends",
          "unit/test_overlap.py"),
    Raise(f"{_CORE}.schedule.scheduler.Synchronous._learn", "a round that nobody admitted", "plugin", "ends",
          "unit/test_scheduler.py"),
    Raise(f"{_CORE}.schedule.scheduler.Synchronous._learn_acceptance", "confidences without logits", "plugin", "ends",
          "unit/test_scheduler.py"),
    Raise(f"{_SERVING}.verifier.Verifier.run_compact", "a target that gives no hidden states: seen in the first step, "
          "before the server listens", "plugin", "ends", "contract/test_sglang_contract.py"),
    Raise(f"{_SERVING}.verifier.Verifier.accept_and_finalize", "SGLang's acceptance in the graph", "plugin", "ends",
          "contract/test_sglang_contract.py"),
    Raise(f"{_SERVING}.ops.sharded_ops.ShardedOps._own_laws", "no drafted laws", "plugin", "ends", "serving/test_placement.py"),
    Raise(f"{_SERVING}.ops.sharded_ops._kernels", "operations of another kind: at start", "plugin", "refused",
          "kernels/test_sharded_served.py"),
    Raise(f"{_SERVING}.ops.torch_ops.TorchOps._sampled", "no drafted laws", "plugin", "ends", "unit/test_ops.py"),
    Raise(f"{_SERVING}.ops.torch_ops._seeded_choice", "no seeds", "plugin", "ends", "unit/test_ops.py"),
    Raise(f"{_SERVING}.ops.triton_ops.TritonOps._check_flags", "rows outside the logits that acceptance was given",
          "plugin", "ends", "kernels/test_served.py"),
    Raise(f"{_SERVING}.ops.triton_ops._law", "listed laws without their tokens", "plugin", "ends", "kernels/test_served.py"),
    Raise("dspark_kernels.accept", "operands that do not fit together", "plugin", "ends", "kernels/test_accept.py"),
    Raise("dspark_kernels.vocab_parallel_accept", "operands that do not fit together", "plugin", "ends",
          "kernels/test_vocab_parallel_accept.py"),
    Raise("dspark_kernels.admit", "operands that do not fit together", "plugin", "ends", "kernels/test_admit.py"),
    Raise("dspark_kernels.support", "an operand of the wrong kind, or a backend that is not there", "plugin", "ends",
          "kernels/test_support.py"),
)  # fmt: skip


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
