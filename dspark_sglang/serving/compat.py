"""Every SGLang symbol this plugin touches, with the signature it was written against.

One table, three readers: the contract tests, ``dspark doctor``, and the start-up check, which
refuses to run on an SGLang whose symbols differ instead of letting a hook miss silently.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator

import msgspec

from dspark_sglang.errors import CompatibilityError

SGLANG_VERSION = "0.5.23"
_DSPARK = "sglang.srt.speculative.dspark_components"
_PLATFORM = "sglang.srt.platforms.interface.SRTPlatform"


class Symbol(msgspec.Struct, frozen=True):
    """A dotted name and, where it is called or overridden, its parameters (``self`` left out)."""

    name: str
    parameters: tuple[str, ...] | None = None


def _symbols(text: str) -> tuple[Symbol, ...]:
    """Those of lines ``name`` and ``name(parameters)``."""
    lines = (line.rstrip(")").partition("(") for line in text.split("\n") if line)
    return tuple(
        Symbol(name, tuple(given.split()) if called else None) for name, called, given in lines
    )


_UPDATES = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
#: Updates of weights that end with new ones in place.
WEIGHT_HOOKS = {
    "weights_disk": f"{_UPDATES}.update_weights_from_disk",
    "weights_ipc": f"{_UPDATES}.update_weights_from_ipc",
    "weights_end": f"{_UPDATES}.end_weight_update",
}
_CONTROL = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
HOOKS = {
    **WEIGHT_HOOKS,
    "request": "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
    "samples": "sglang.srt.managers.io_struct.GenerateReqInput._handle_parallel_sampling",
    "release": f"{_UPDATES}.release_memory_occupation",
    "resume": f"{_UPDATES}.resume_memory_occupation",
    "ask_release": f"{_CONTROL}.release_memory_occupation",
    "ask_resume": f"{_CONTROL}.resume_memory_occupation",
    "weights_tensor": f"{_UPDATES}.update_weights_from_tensor",
    "commands": "sglang.srt.managers.scheduler_components.internal_state."
    "SchedulerInternalStateController._update_handlers",
    "grammar": "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._accept_grammar_tokens",
    "finish": "sglang.srt.managers.schedule_batch.Req.update_finish_state",
    "prepare": "sglang.srt.speculative.dflash_info_v2.DFlashDraftInputV2.prepare_for_decode",
    "arguments": "sglang.srt.arg_groups.speculative_hook._handle_dspark",
    # The worker's own name for it.
    "placement": "sglang.srt.speculative.dspark_components.dspark_worker_v2."
    "resolve_draft_parallel_layout",
    "draft": "sglang.srt.speculative.dspark_components.dspark_worker_v2.build_draft_tp_worker",
    "rank_death": "sglang.srt.managers.tokenizer_manager.SignalHandler."
    "running_phase_sigquit_handler",
    "worker": "sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker",
    # The scheduler's own name for it: that module has imported the function by now.
    "validation": "sglang.srt.managers.scheduler.validate_dflash_request",
}
CPU_HOOKS = {
    "slots": "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
    "last_slots": "sglang.srt.mem_cache.allocation.get_last_loc",
    "draft_kv_bundle": "sglang.srt.models.dspark.DSparkDraftMixin._fused_kv_write_bundle",
    "draft_attention": "sglang.srt.models.dflash.DFlashAttention.__init__",
    "filtered_sampling": "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch",
    "unfiltered_sampling": "sglang.srt.layers.sampler.sampling_from_probs_torch",
    "seeded_sampling": "sglang.srt.layers.sampler.multinomial_with_seed",
    "softmax": "sglang.srt.layers.sampler.sampler_softmax",
    "model_config": "sglang.srt.configs.model_config.get_config",
    "threads": "sglang.srt.distributed.bootstrap._bind_threads_if_cpu",
    "penalties": "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__",
    "batch_invariance": (
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode"
    ),
}

_WORKERS_UPDATES = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
ALGORITHM_SYMBOLS = _symbols(f"""
{HOOKS["weights_disk"]}(recv_req)
{HOOKS["weights_ipc"]}(recv_req)
{HOOKS["weights_end"]}(recv_req)
{HOOKS["weights_tensor"]}(recv_req)
sglang.srt.speculative.base_spec_worker.BaseSpecWorker.weight_update_runners()
{_WORKERS_UPDATES}.begin_weight_update()
{_WORKERS_UPDATES}.end_weight_update(run_post_load)
{_WORKERS_UPDATES}.load_weights_from_distributed(named_tensors)
{_WORKERS_UPDATES}.update_weights_from_tensor(named_tensors load_format)
sglang.srt.managers.io_struct.UpdateWeightsFromTensorReqOutput
sglang.srt.models.dspark.DSparkDraftMixin._load_confidence_weights(confidence_weights params_dict)
sglang.srt.managers.schedule_batch.FINISH_ABORT(message status_code err_type)
{HOOKS["request"]}(obj input_text input_ids input_embeds mm_inputs token_type_ids)
{HOOKS["samples"]}()
sglang.srt.sampling.sampling_params.TOP_K_ALL
sglang.srt.managers.io_struct.msgpack_encode(obj)
sglang.srt.managers.io_struct.msgpack_decode(data)
{HOOKS["release"]}(recv_req)
{HOOKS["resume"]}(recv_req)
{_UPDATES}.memory_saver_adapter
{_UPDATES}.offload_tags
{_UPDATES}.is_fully_idle
{_UPDATES}.scheduler
{HOOKS["ask_release"]}(obj request)
{HOOKS["ask_resume"]}(obj request)
sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop
sglang.srt.managers.io_struct.ReleaseMemoryOccupationReqOutput
sglang.srt.managers.io_struct.ResumeMemoryOccupationReqOutput
sglang.srt.constants.GPU_MEMORY_ALL_TYPES
sglang.srt.runtime_context.get_model
{HOOKS["finish"]}(new_accepted_len)
{HOOKS["grammar"]}(req tokens)
{HOOKS["prepare"]}(batch)
{HOOKS["commands"]}()
sglang.srt.managers.scheduler_components.internal_state._UpdateHandler(validate apply)
sglang.srt.managers.scheduler_components.internal_state.UpdateRejected
sglang.srt.entrypoints.warmup.warmup(name)
sglang.srt.entrypoints.warmup.execute_warmups
{HOOKS["arguments"]}(server_args)
{HOOKS["worker"]}(server_args)
{HOOKS["rank_death"]}(signum frame)
sglang.srt.utils.watchdog.SubprocessWatchdog.__init__(processes process_names interval)
{HOOKS["placement"]}(model_spec collapse_cp)
sglang.srt.configs.draft_parallel.DraftParallelLayout
sglang.srt.distributed.parallel_state.get_self_pp_group()
sglang.srt.layers.dp_attention.get_dp_tp_group()
sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce(input_)
sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather(input_ dim output_tensor_list)
sglang.srt.distributed.parallel_state.GroupCoordinator.broadcast(input_ src)
sglang.srt.layers.logits_processor.LogitsProcessor._get_logits(hidden_states lm_head logits_metadata embedding_bias use_logits_buffer)
sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding._embed_local_shard(input_)
sglang.srt.models.dspark.project_through_lm_head(hidden lm_head)
sglang.srt.models.dspark.DSparkDraftMixin.compute_base_logits(hidden)
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.alloc_memory_pool(memory_pool_config req_to_token_pool token_to_kv_pool_allocator)
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.init_cuda_graphs()
{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.inject_prefill(placement target_hidden token_indices target_hidden_is_projected)
{_DSPARK}.dspark_draft.make_next_draft_input(bonus_tokens new_seq_lens)
sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation(batch forward_batch pp_proxy_tensors is_verify skip_attn_backend_init capture_hidden_mode return_kv_loc_plan)
sglang.srt.model_executor.forward_batch_info.CaptureHiddenMode
sglang.srt.runtime_context.get_memory
sglang.srt.runtime_context.get_disagg
sglang.srt.arg_groups.overrides.resolving_view(server_args)
sglang.srt.arg_groups.overrides.declare_resolution
sglang.srt.runtime_context.get_exec
sglang.srt.runtime_context.get_spec
sglang.srt.runtime_context.get_observability
sglang.srt.runtime_context.get_parallel
sglang.srt.runtime_context.get_schedule
sglang.srt.models.dspark.DSparkDraftMixin._stacked_ctx_kv_params
sglang.srt.models.dflash.DFlashDraftModel.project_target_hidden
{HOOKS["draft"]}(server_args gpu_id nccl_port target_model_config algo_label attention_backend_override draft_worker_cls random_seed load_group)
sglang.srt.speculative.ragged_verify.read_ragged_verify_mode()
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.__init__(server_args gpu_id nccl_port target_worker draft_worker_cls)
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._forward_decode(batch on_publish grammar_barrier coordination_plan)
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._maybe_build_draft_sampler()
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._prepare_inputs_once
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._block_accept_lens(accept folded_accept bs)
{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.dump_info_records()
{_DSPARK}.dspark_draft.DraftBlockProposer.__init__(draft_model draft_model_runner gamma mask_token_id draft_block_spec_info tp_sync random_seed greedy_draft dp_moe_sync)
{_DSPARK}.dspark_draft.DraftBlockProposer.propose(batch draft_input verify_window bs device target_model sampling_info anchor_prepared)
{_DSPARK}.dspark_draft.DraftBlockProposer._run_forward(batch draft_input verify_window bs device embed_module draft_sampler sampling_info anchor_prepared)
{_DSPARK}.dspark_draft.DraftBlockProposer.attach_draft_sampler
{_DSPARK}.dspark_draft.DraftBlockProposer._base_logits_context()
{_DSPARK}.dspark_draft.DraftBlockResult
{_DSPARK}.dspark_draft.DraftProposal
{_DSPARK}.dspark_planner.DSparkVerifyPlanner.__init__(draft_model gamma model_runner device tp_rank verify_num_draft_tokens tp_sync)
{_DSPARK}.dspark_planner.DSparkVerifyPlanner.compute_budget_sync(confidence prefix_lens req_pool_indices)
{_DSPARK}.dspark_planner.DSparkVerifyPlanner._schedule_verify_lens(req_pool_indices prefix_lens device confidence budget)
{_DSPARK}.dspark_planner.DSparkVerifyPlanner.resolve_verify_token_budget(draft_input confidence prefix_lens req_pool_indices)
{_DSPARK}.dspark_planner.DSparkVerifyPlanner.confidence_budget_prepare()
{_DSPARK}.dspark_planner.DSparkVerifyPlanner.schedule_layout(req_pool_indices prefix_lens device confidence budget global_num_reqs dp_tier_num_tokens)
{_DSPARK}.dspark_planner.DSparkVerifyPlanner.is_compact_mode
sglang.srt.environ.envs.SGLANG_RAGGED_VERIFY_MODE
sglang.srt.arg_groups.model_override_base.attention_backends_of(cfg)
sglang.srt.arg_groups.model_override_base.model_config_of(server_args)
sglang.srt.configs.hybrid_arch.mambaish_config(model_config)
sglang.srt.runtime_context.get_platform
{_DSPARK}.dspark_planner.ragged_capture_num_tokens(model_runner)
sglang.srt.mem_cache.kv_loc_plan.KVLocPlan._cols(ids cols)
sglang.srt.mem_cache.memory_pool.ReqToTokenPool.__init__
{_DSPARK}.dspark_verify.TargetVerifyExecutor.__init__(target_worker gamma verify_num_draft_tokens model_runner kv_injector tp_sync verify_epilogue simulate_acc_len simulated_correct_len block_verification rejection_noise)
{_DSPARK}.dspark_verify.TargetVerifyExecutor.run_compact(batch layout draft_block_ids draft_tokens bs device sampling_info verify_window inject_gate)
{_DSPARK}.dspark_verify.TargetVerifyExecutor.run_non_compact(batch draft_input verify_ids_2d verify_window sampling_info)
{_DSPARK}.dspark_verify.TargetVerifyExecutor._run_ragged(batch layout ragged_window sampling_info kv_loc_plan)
{_DSPARK}.dspark_verify.TargetVerifyExecutor.accept_and_finalize(folded_accept bs verify_ids_2d target_logits draft_block sampling_info draft_input layout prefix_lens draft_tokens simulate_bonus_sampling_info)
{_DSPARK}.dspark_verify.TargetVerifyExecutor.commit_hidden(batch layout hidden_strided verify_window logits_output commit_lens bs run_compact)
{_DSPARK}.dspark_verify.AcceptOuts
sglang.srt.layers.sampler.apply_custom_logit_processor
{HOOKS["validation"]}(req enable_overlap)
{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.inject_target_hidden(target_hidden cache_loc positions cache_loc_2d commit_lens state_slot final_pos target_hidden_is_projected)
{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.ids_for
sglang.kernels.ops.speculative.dspark.dspark_verify_window.RaggedVerifyWindow(positions verify_cache_loc verify_ids window_index)
sglang.kernels.ops.speculative.dspark.dspark_verify_window.ScatterCompactToStrided.execute
""")

CPU_SYMBOLS = _symbols(f"""
{CPU_HOOKS["model_config"]}(model trust_remote_code revision model_override_args model_config_parser)
{CPU_HOOKS["penalties"]}(vocab_size batch penalizers)
{CPU_HOOKS["softmax"]}(logits temperatures)
{CPU_HOOKS["slots"]}(req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size)
{CPU_HOOKS["last_slots"]}(req_to_token req_pool_indices_tensor prefix_lens_tensor)
sglang.srt.mem_cache.allocation.get_last_loc_torch(req_to_token req_pool_indices_tensor prefix_lens_tensor)
{CPU_HOOKS["draft_kv_bundle"]}(pool)
{CPU_HOOKS["draft_attention"]}
{CPU_HOOKS["filtered_sampling"]}(probs top_ks top_ps min_ps need_min_p_sampling sampling_seed positions return_filtered_probs max_top_k)
{CPU_HOOKS["unfiltered_sampling"]}(probs sampling_seed positions)
{CPU_HOOKS["seeded_sampling"]}(logprobs seed positions)
{CPU_HOOKS["batch_invariance"]}()
{CPU_HOOKS["threads"]}(device)
{_PLATFORM}.get_default_attention_backend()
{_PLATFORM}.get_default_speculative_draft_attention_backend(algorithm)
{_PLATFORM}.supports_speculative_algorithm(algorithm)
{_PLATFORM}.supports_speculative_draft_attention_backend(algorithm backend)
{_PLATFORM}.get_dispatch_key_name()
{_PLATFORM}.get_torch_profiler_activity_str()
{_PLATFORM}.get_torch_profiler_activity()
{_PLATFORM}.get_kv_pool_cls(kind)
{_PLATFORM}.get_speculative_cache_locs_fn()
{_PLATFORM}.apply_server_args_defaults(server_args)
{_PLATFORM}.post_load_model(model)
{_PLATFORM}.init_backend()
sglang.srt.platforms.cpu.CpuDeviceMixin
sglang.srt.arg_groups.choices.add_attention_backend_choices
sglang.srt.arg_groups.choices.add_draft_attention_backend_choices
sglang.srt.arg_groups.choices.add_deterministic_attention_backend_choices
sglang.srt.arg_groups.choices.add_radix_supported_deterministic_attention_backend_choices
sglang.srt.layers.attention.attention_registry.register_attention_backend
sglang.srt.layers.attention.base_attn_backend.AttentionBackend
sglang.srt.layers.radix_attention.AttentionType.ENCODER_ONLY
sglang.srt.mem_cache.memory_pool.KVWriteLoc.for_batch
sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup()
sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._store_kv_layer(layer_idx loc cache_k cache_v)
sglang.kernels.fused_op.BaseFusedOp.register_oot_forward(op_cls fn platform_key)
sglang.srt.layers.layernorm.RMSNorm
sglang.srt.layers.activation.SiluAndMul
sglang.srt.layers.rotary_embedding.base.RotaryEmbedding
sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply
""")


def installed_version() -> str:
    """The installed SGLang's version.

    Raises:
        CompatibilityError: SGLang is not installed.
    """
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise CompatibilityError(
            "SGLang is not installed.",
            expected=f"sglang {SGLANG_VERSION}",
            fix='Install it with `pip install "dspark-sglang[gpu]"`, or on CPU with `make install`.',
        ) from None


def _parameters(value: object) -> tuple[str, ...] | None:
    """Parameter names of a callable without ``self``, looking through wrappers."""
    if not callable(value):
        return None
    names = [
        name
        for name, parameter in inspect.signature(inspect.unwrap(value)).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    return tuple(name for name in names if name not in ("self", "cls"))


def resolve(name: str) -> object:
    """The object a dotted name stands for.

    Raises:
        AttributeError: SGLang has no such module or attribute.
        ImportError: a module on the way needs something that is not installed.
    """
    parts = name.split(".")
    module = importlib.import_module(parts[0])
    for depth in range(1, len(parts)):
        path = ".".join(parts[: depth + 1])
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            value: object = module
            for attribute in parts[depth:]:
                value = getattr(value, attribute)
            return value
    return module


def differences(symbols: tuple[Symbol, ...]) -> Iterator[str]:
    """One line for every symbol that is missing or has other parameters than expected."""
    broken = set()
    for symbol in symbols:
        try:
            value = resolve(symbol.name)
        except AttributeError:
            yield f"{symbol.name} does not exist"
            continue
        except ImportError as error:
            if str(error) not in broken:
                broken.add(str(error))
                yield f"{symbol.name} cannot be imported ({error})"
            continue
        if symbol.parameters is None:
            continue
        found = _parameters(value)
        if found != symbol.parameters:
            wanted = ", ".join(symbol.parameters)
            yield f"{symbol.name} takes ({', '.join(found or ())}), expected ({wanted})"


def check(symbols: tuple[Symbol, ...], *, allow_other: bool) -> None:
    """Refuse an SGLang this plugin does not fit.

    Args:
        symbols: what will be used.
        allow_other: accept another release whose symbols all match.

    Raises:
        CompatibilityError: another release, or a symbol that differs.
    """
    version = installed_version()
    if version != SGLANG_VERSION and not allow_other:
        raise CompatibilityError(
            f"SGLang {version} is installed.",
            expected=f"SGLang {SGLANG_VERSION}, the release this plugin was checked against",
            fix="Install it, or set DSPARK_ALLOW_OTHER_SGLANG=1 to run if every symbol matches.",
        )
    wrong = list(differences(symbols))
    if wrong:
        raise CompatibilityError(
            f"SGLang {version} differs from what this plugin uses: {'; '.join(wrong)}.",
            expected=f"the symbols of SGLang {SGLANG_VERSION}",
            fix="Install that release, or run SGLang's builtin with DSPARK_PLUGIN=off.",
        )
