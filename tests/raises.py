"""Every ``raise`` and ``assert`` of a module that a step runs, by function; of our kernels a package is one entry.

``tests/serving/test_contained.py`` compares the table with the source.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


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
RAISES = (
    # A request's or an operator's own: answered with HTTP 400, before anything runs.
    Raise(f"{_SERVING}.options.read_options", "custom_params that mean nothing", "request", "refused",
          "serving/test_requests.py::test_wrong_options_of_a_request_are_refused"),
    Raise(f"{_SERVING}.options.made", "a request that a process could not go on with", "request", "refused",
          "serving/test_http_checks.py"),
    Raise(f"{_SERVING}.options._check_readable", "a value that the scheduler could not read", "request", "refused",
          "serving/test_http_checks.py"),
    Raise(f"{_SERVING}.options._check_labels", "labels that metrics could not take", "request", "refused",
          "serving/test_http_checks.py"),
    Raise(f"{_SERVING}.options._check_values", "a value that can be read and not be used", "request", "refused",
          "serving/test_http_checks.py"),
    Raise(f"{_SERVING}.options.check_samples", "more answers than a process can hold", "request", "refused",
          "serving/test_http_checks.py"),
    Raise(f"{_SERVING}.requests.refusal", "an option of the start-up measurement", "request", "refused",
          "serving/test_requests.py::test_wrong_options_of_a_request_are_refused"),
    Raise(f"{_SERVING}.admin.ask", "memory that cannot be released or taken back now", "operator", "refused",
          "serving/test_start_cases.py"),
    Raise(f"{_SERVING}.admin.Commands.prepare", "a setting that this server has no use for", "operator", "refused",
          "serving/test_commands.py"),
    Raise(f"{_SERVING}.admin.Commands._budget", "a budget that is no share", "operator", "refused",
          "serving/test_commands.py"),
    Raise(f"{_SERVING}.admin._choose", "a setting of no known value", "operator", "refused", "serving/test_commands.py"),
    Raise(f"{_SERVING}.admin.handlers", "how SGLang is told of these", "operator", "refused", "serving/test_commands.py"),
    Raise(f"{_SERVING}.calibration.fit", "too little to fit to", "operator", "refused", "serving/test_calibration.py"),
    Raise(f"{_SERVING}.calibration.KnownCost.read", "a server without a cost file", "operator", "refused",
          "serving/test_commands.py"),
    Raise(f"{_SERVING}.calibration.KnownCost.keep", "a server without a cost file", "operator", "refused",
          "serving/test_commands.py"),
    Raise(f"{_SERVING}.calibration.load_cost", "a cost file that is damaged or of something else", "operator", "refused",
          "serving/test_step_cost.py::test_a_file_of_no_use_is_refused_with_its_reason"),
    Raise(f"{_SERVING}.calibration.require_both_kinds", "a cost that would not be read again", "operator", "refused",
          "serving/test_step_cost.py::test_a_cost_of_one_kind_of_step_is_not_written"),
    Raise(f"{_SERVING}.calibration.save_cost", "a disk that is full or may not be written", "operator", "refused",
          "serving/test_step_cost.py::test_writing_is_all_or_nothing"),
    Raise(f"{_CORE}.schedule.cost_model._Kind.restore", "a cost file edited into nonsense", "operator", "refused",
          "schedule/test_steps.py"),
    Raise(f"{_CORE}.schedule.cost_model.CostModel.restore", "a cost file of another drafter, or garbled", "operator", "refused",
          "schedule/test_steps.py"),
    # The drafter's: drafting goes off. With several ranks an exception ends the server, for others would wait.
    Raise(f"{_CORE}.draft.draft_block", "no uniforms were given", "plugin", "contained",
          "serving/test_planted.py::test_a_fault_of_the_drafter_is_contained"),
    Raise(f"{_CORE}.heads.MarkovHead.latent", "an rnn head without its state", "plugin", "contained",
          "serving/test_planted.py::test_a_fault_of_the_drafter_is_contained"),
    Raise("dspark_kernels.markov_step", "operands that do not fit together", "plugin", "contained",
          "kernels/test_markov_step_edges.py"),
    Raise("dspark_kernels.confidence", "operands that do not fit together", "plugin", "contained",
          "kernels/test_confidence.py"),
    Raise("dspark_kernels.kv_inject", "a pool that our kernel does not write", "plugin", "contained",
          "kernels/test_kv_inject.py"),
    Raise(f"{_SERVING}.weights.contained", "an update that raises where ranks wait for each other", "operator", "ends",
          "serving/test_contained.py::test_an_update_that_raises_fails_on_one_rank_and_ends_several"),
    Raise(f"{_SERVING}.faults.Faults.contained", "an exception where ranks wait for each other", "plugin", "ends",
          "serving/test_contained.py::test_with_several_ranks_an_exception_ends_the_server"),
    # What a step never gets to: checked before, or only at start.
    Raise(f"{_CORE}.schedule.admission.check", "a confidence that is none: requests with one do not come so far", "drafter", "never",
          "serving/test_overlapped.py::test_confidences_that_are_none_are_explained"),
    Raise(f"{_CORE}.schedule.cost_model.TableCost.__init__", "a cost table out of order: only the simulator has tables", "operator",
          "never", "schedule/test_cost.py"),
    Raise(f"{_SERVING}.tensor_parallel.Vocabulary.of", "an LM head sharded in an unknown way: at start", "operator", "refused",
          "serving/test_drafter_placement.py"),
    Raise(f"{_SERVING}.draft_model.DraftModel.__init__", "heads that would be read wrongly: at start", "operator", "refused",
          "serving/test_draft_model.py"),
    Raise(f"{_SERVING}.tensor_parallel.shard_draft", "heads spread beside a draft vocabulary: at start", "operator", "refused",
          "serving/test_drafter_placement.py"),
    Raise(f"{_SERVING}.cpu.attention.CpuAttentionBackend.forward_extend",
          "a target with attention that the CPU has not: its first forward is before the server listens", "target",
          "refused", "serving/test_cpu_attention.py"),
    # The plugin's own mistakes. They say that a step is not what it should be, so nothing of it may be served.
    Raise(f"{_CORE}.tensor_parallel.accept._stats", "no drafted distributions", "plugin", "ends", "core/test_sharded.py"),
    Raise(f"{_CORE}.tensor_parallel.accept._sampled", "no drafted distributions or uniforms", "plugin", "ends", "core/test_sharded.py"),
    Raise(f"{_SERVING}.overlap.OverlappedRounds.outcome", "an outcome of nothing drafted", "plugin", "ends",
          "serving/test_overlapped.py"),
    Raise(f"{_SERVING}.overlap.OverlappedRounds._over", "the other strategy's end of a step", "plugin", "ends",
          "serving/test_overlapped.py"),
    Raise(f"{_CORE}.schedule.scheduler.Synchronous._learn", "a round that nobody admitted", "plugin", "ends",
          "schedule/test_scheduler.py"),
    Raise(f"{_CORE}.schedule.scheduler.Synchronous._learn_acceptance", "confidences without logits", "plugin", "ends",
          "schedule/test_scheduler.py"),
    Raise(f"{_SERVING}.verifier.Verifier.run_compact", "a target that gives no hidden states: seen in the first step, "
          "before the server listens", "plugin", "ends", "contract/test_sglang_contract.py"),
    Raise(f"{_SERVING}.verifier.Verifier.accept_and_finalize", "SGLang's acceptance in the graph", "plugin", "ends",
          "contract/test_sglang_contract.py"),
    Raise(f"{_SERVING}.ops.sharded_ops.ShardedOps._own_probs", "no drafted distributions", "plugin", "ends", "serving/test_placement.py"),
    Raise(f"{_SERVING}.ops.triton_ops.TritonOps.check", "kernels that cannot run on the device: at start", "operator", "refused",
          "serving/test_ops.py::test_kernels_on_a_cpu_need_the_interpreter"),
    Raise(f"{_SERVING}.ops.torch_ops.TorchOps._sampled", "no drafted distributions", "plugin", "ends", "serving/test_ops.py"),
    Raise(f"{_SERVING}.ops.torch_ops._seeded_choice", "no seeds", "plugin", "ends", "serving/test_ops.py"),
    Raise(f"{_SERVING}.ops.triton_ops.TritonOps._check_flags", "rows outside the logits that acceptance was given",
          "plugin", "ends", "kernels/test_served.py"),
    Raise(f"{_SERVING}.ops.triton_ops._drafted", "listed distributions without their tokens", "plugin", "ends", "kernels/test_served.py"),
    Raise("dspark_kernels.accept", "operands that do not fit together", "plugin", "ends", "kernels/test_accept.py"),
    Raise("dspark_kernels.vocab_parallel_accept", "operands that do not fit together", "plugin", "ends",
          "kernels/test_vocab_parallel_accept.py"),
    Raise("dspark_kernels.penalise", "operands that do not fit together", "plugin", "ends", "kernels/test_penalise.py"),
    Raise(f"{_SERVING}.worker.DSparkWorker._compile_kernels", "a kernel that cannot be compiled: at start", "operator", "refused",
          "cuda_lab/test_specialisations.py::test_a_kernel_that_cannot_be_compiled_ends_the_start"),
    Raise("dspark_kernels.admit", "operands that do not fit together", "plugin", "ends", "kernels/test_admit.py"),
    Raise("dspark_kernels.support", "an operand of the wrong kind, or a backend that is not there", "plugin", "ends",
          "kernels/test_support.py"),
)  # fmt: skip
