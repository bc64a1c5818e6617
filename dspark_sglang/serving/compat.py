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


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


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
ALGORITHM_SYMBOLS = (
    *(Symbol(name, ("recv_req",)) for name in (*WEIGHT_HOOKS.values(), HOOKS["weights_tensor"])),
    Symbol("sglang.srt.speculative.base_spec_worker.BaseSpecWorker.weight_update_runners", ()),
    Symbol(f"{_WORKERS_UPDATES}.begin_weight_update", ()),
    Symbol(f"{_WORKERS_UPDATES}.end_weight_update", ("run_post_load",)),
    Symbol(f"{_WORKERS_UPDATES}.load_weights_from_distributed", ("named_tensors",)),
    Symbol(f"{_WORKERS_UPDATES}.update_weights_from_tensor", _split("named_tensors load_format")),
    Symbol("sglang.srt.managers.io_struct.UpdateWeightsFromTensorReqOutput"),
    Symbol(
        "sglang.srt.models.dspark.DSparkDraftMixin._load_confidence_weights",
        _split("confidence_weights params_dict"),
    ),
    Symbol(
        "sglang.srt.managers.schedule_batch.FINISH_ABORT", _split("message status_code err_type")
    ),
    Symbol(
        HOOKS["request"],
        _split("obj input_text input_ids input_embeds mm_inputs token_type_ids"),
    ),
    Symbol(HOOKS["samples"], ()),
    Symbol("sglang.srt.sampling.sampling_params.TOP_K_ALL"),
    Symbol("sglang.srt.managers.io_struct.msgpack_encode", ("obj",)),
    Symbol("sglang.srt.managers.io_struct.msgpack_decode", ("data",)),
    Symbol(HOOKS["release"], ("recv_req",)),
    Symbol(HOOKS["resume"], ("recv_req",)),
    *(
        Symbol(f"{_UPDATES}.{name}")
        for name in ("memory_saver_adapter", "offload_tags", "is_fully_idle", "scheduler")
    ),
    Symbol(HOOKS["ask_release"], _split("obj request")),
    Symbol(HOOKS["ask_resume"], _split("obj request")),
    Symbol("sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop"),
    Symbol("sglang.srt.managers.io_struct.ReleaseMemoryOccupationReqOutput"),
    Symbol("sglang.srt.managers.io_struct.ResumeMemoryOccupationReqOutput"),
    Symbol("sglang.srt.constants.GPU_MEMORY_ALL_TYPES"),
    Symbol("sglang.srt.runtime_context.get_model"),
    Symbol(HOOKS["finish"], ("new_accepted_len",)),
    Symbol(HOOKS["grammar"], _split("req tokens")),
    Symbol(HOOKS["prepare"], _split("batch")),
    Symbol(HOOKS["commands"], ()),
    Symbol(
        "sglang.srt.managers.scheduler_components.internal_state._UpdateHandler",
        _split("validate apply"),
    ),
    Symbol("sglang.srt.managers.scheduler_components.internal_state.UpdateRejected"),
    Symbol("sglang.srt.entrypoints.warmup.warmup", _split("name")),
    Symbol("sglang.srt.entrypoints.warmup.execute_warmups"),
    Symbol(HOOKS["arguments"], _split("server_args")),
    Symbol(HOOKS["worker"], _split("server_args")),
    Symbol(HOOKS["rank_death"], _split("signum frame")),
    Symbol(
        "sglang.srt.utils.watchdog.SubprocessWatchdog.__init__",
        _split("processes process_names interval"),
    ),
    Symbol(HOOKS["placement"], _split("model_spec collapse_cp")),
    # Its annotations name a class that only type checkers import.
    Symbol("sglang.srt.configs.draft_parallel.DraftParallelLayout"),
    Symbol("sglang.srt.distributed.parallel_state.get_self_pp_group", ()),
    Symbol("sglang.srt.layers.dp_attention.get_dp_tp_group", ()),
    Symbol("sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce", _split("input_")),
    Symbol(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather",
        _split("input_ dim output_tensor_list"),
    ),
    Symbol(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.broadcast", _split("input_ src")
    ),
    Symbol(
        "sglang.srt.layers.logits_processor.LogitsProcessor._get_logits",
        _split("hidden_states lm_head logits_metadata embedding_bias use_logits_buffer"),
    ),
    Symbol(
        "sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding._embed_local_shard",
        ("input_",),
    ),
    Symbol("sglang.srt.models.dspark.project_through_lm_head", _split("hidden lm_head")),
    Symbol("sglang.srt.models.dspark.DSparkDraftMixin.compute_base_logits", ("hidden",)),
    Symbol(
        f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.alloc_memory_pool",
        _split("memory_pool_config req_to_token_pool token_to_kv_pool_allocator"),
    ),
    Symbol(f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.init_cuda_graphs", ()),
    Symbol(
        f"{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.inject_prefill",
        _split("placement target_hidden token_indices target_hidden_is_projected"),
    ),
    Symbol(f"{_DSPARK}.dspark_draft.make_next_draft_input", _split("bonus_tokens new_seq_lens")),
    Symbol(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        _split(
            "batch forward_batch pp_proxy_tensors is_verify skip_attn_backend_init "
            "capture_hidden_mode return_kv_loc_plan"
        ),
    ),
    Symbol("sglang.srt.model_executor.forward_batch_info.CaptureHiddenMode"),
    Symbol("sglang.srt.runtime_context.get_memory"),
    Symbol("sglang.srt.runtime_context.get_disagg"),
    Symbol("sglang.srt.environ.envs.SGLANG_DSPARK_EMBED_IN_GRAPH"),
    Symbol("sglang.srt.arg_groups.overrides.resolving_view", _split("server_args")),
    Symbol("sglang.srt.arg_groups.overrides.declare_resolution"),
    Symbol("sglang.srt.runtime_context.get_exec"),
    Symbol("sglang.srt.runtime_context.get_spec"),
    Symbol("sglang.srt.runtime_context.get_observability"),
    Symbol("sglang.srt.runtime_context.get_parallel"),
    Symbol("sglang.srt.runtime_context.get_schedule"),
    Symbol("sglang.srt.models.dspark.DSparkDraftMixin._stacked_ctx_kv_params"),
    Symbol("sglang.srt.models.dflash.DFlashDraftModel.project_target_hidden"),
    Symbol(
        f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.__init__",
        _split("server_args gpu_id nccl_port target_worker draft_worker_cls"),
    ),
    Symbol(
        f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._forward_decode",
        _split("batch on_publish grammar_barrier coordination_plan"),
    ),
    Symbol(f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2._maybe_build_draft_sampler", ()),
    Symbol(f"{_DSPARK}.dspark_worker_v2.DSparkWorkerV2.dump_info_records", ()),
    Symbol(
        f"{_DSPARK}.dspark_draft.DraftBlockProposer.__init__",
        _split(
            "draft_model draft_model_runner gamma mask_token_id draft_block_spec_info tp_sync "
            "random_seed greedy_draft dp_moe_sync"
        ),
    ),
    Symbol(
        f"{_DSPARK}.dspark_draft.DraftBlockProposer.propose",
        _split(
            "batch draft_input verify_window bs device target_model sampling_info anchor_prepared"
        ),
    ),
    Symbol(
        f"{_DSPARK}.dspark_draft.DraftBlockProposer._run_forward",
        _split(
            "batch draft_input verify_window bs device embed_module draft_sampler sampling_info "
            "anchor_prepared"
        ),
    ),
    Symbol(f"{_DSPARK}.dspark_draft.DraftBlockProposer.attach_draft_sampler"),
    Symbol(f"{_DSPARK}.dspark_draft.DraftBlockProposer._base_logits_context", ()),
    Symbol(f"{_DSPARK}.dspark_draft.DraftBlockResult"),
    Symbol(f"{_DSPARK}.dspark_draft.DraftProposal"),
    Symbol(
        f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner.__init__",
        _split("draft_model gamma model_runner device tp_rank verify_num_draft_tokens tp_sync"),
    ),
    Symbol(
        f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner.compute_budget_sync",
        _split("confidence prefix_lens req_pool_indices"),
    ),
    Symbol(
        f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner._schedule_verify_lens",
        _split("req_pool_indices prefix_lens device confidence budget"),
    ),
    Symbol(
        f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner.resolve_verify_token_budget",
        _split("draft_input confidence prefix_lens req_pool_indices"),
    ),
    Symbol(f"{_DSPARK}.dspark_planner.DSparkVerifyPlanner.confidence_budget_prepare", ()),
    Symbol(f"{_DSPARK}.dspark_planner.ragged_capture_num_tokens", ("model_runner",)),
    Symbol("sglang.srt.mem_cache.memory_pool.ReqToTokenPool.__init__"),
    Symbol(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.__init__",
        _split(
            "target_worker gamma verify_num_draft_tokens model_runner kv_injector tp_sync "
            "verify_epilogue simulate_acc_len simulated_correct_len block_verification "
            "rejection_noise"
        ),
    ),
    Symbol(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.run_compact",
        _split(
            "batch layout draft_block_ids draft_tokens bs device sampling_info verify_window "
            "inject_gate"
        ),
    ),
    Symbol(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.run_non_compact",
        _split("batch draft_input verify_ids_2d verify_window sampling_info"),
    ),
    Symbol(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor._run_ragged",
        _split("batch layout ragged_window sampling_info kv_loc_plan"),
    ),
    Symbol(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.accept_and_finalize",
        _split(
            "folded_accept bs verify_ids_2d target_logits draft_block sampling_info draft_input "
            "layout prefix_lens draft_tokens simulate_bonus_sampling_info"
        ),
    ),
    Symbol(
        f"{_DSPARK}.dspark_verify.TargetVerifyExecutor.commit_hidden",
        _split(
            "batch layout hidden_strided verify_window logits_output commit_lens bs run_compact"
        ),
    ),
    Symbol(f"{_DSPARK}.dspark_verify.AcceptOuts"),
    Symbol("sglang.srt.layers.sampler.apply_custom_logit_processor"),
    Symbol(HOOKS["validation"], _split("req enable_overlap")),
    Symbol(
        f"{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.inject_target_hidden",
        _split(
            "target_hidden cache_loc positions cache_loc_2d commit_lens state_slot final_pos "
            "target_hidden_is_projected"
        ),
    ),
    Symbol(f"{_DSPARK}.dspark_kv_inject.TargetHiddenKvInjector.ids_for"),
    Symbol(
        "sglang.kernels.ops.speculative.dspark.dspark_verify_window.RaggedVerifyWindow",
        _split("positions verify_cache_loc verify_ids window_index"),
    ),
    Symbol(
        "sglang.kernels.ops.speculative.dspark.dspark_verify_window.ScatterCompactToStrided.execute"
    ),
)

CPU_SYMBOLS = (
    Symbol(
        CPU_HOOKS["model_config"],
        _split("model trust_remote_code revision model_override_args model_config_parser"),
    ),
    Symbol(CPU_HOOKS["penalties"], _split("vocab_size batch penalizers")),
    Symbol(CPU_HOOKS["softmax"], _split("logits temperatures")),
    Symbol(
        CPU_HOOKS["slots"],
        _split("req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size"),
    ),
    Symbol(
        CPU_HOOKS["last_slots"],
        _split("req_to_token req_pool_indices_tensor prefix_lens_tensor"),
    ),
    Symbol(
        "sglang.srt.mem_cache.allocation.get_last_loc_torch",
        _split("req_to_token req_pool_indices_tensor prefix_lens_tensor"),
    ),
    Symbol(CPU_HOOKS["draft_kv_bundle"], _split("pool")),
    Symbol(CPU_HOOKS["draft_attention"]),
    Symbol(
        CPU_HOOKS["filtered_sampling"],
        _split(
            "probs top_ks top_ps min_ps need_min_p_sampling sampling_seed positions "
            "return_filtered_probs max_top_k"
        ),
    ),
    Symbol(CPU_HOOKS["unfiltered_sampling"], _split("probs sampling_seed positions")),
    Symbol(CPU_HOOKS["seeded_sampling"], _split("logprobs seed positions")),
    Symbol(CPU_HOOKS["batch_invariance"], ()),
    Symbol(CPU_HOOKS["threads"], ("device",)),
    Symbol(f"{_PLATFORM}.get_default_attention_backend", ()),
    Symbol(f"{_PLATFORM}.get_default_speculative_draft_attention_backend", ("algorithm",)),
    Symbol(f"{_PLATFORM}.supports_speculative_algorithm", ("algorithm",)),
    Symbol(
        f"{_PLATFORM}.supports_speculative_draft_attention_backend",
        _split("algorithm backend"),
    ),
    Symbol(f"{_PLATFORM}.get_dispatch_key_name", ()),
    Symbol(f"{_PLATFORM}.get_torch_profiler_activity_str", ()),
    Symbol(f"{_PLATFORM}.get_torch_profiler_activity", ()),
    Symbol(f"{_PLATFORM}.get_kv_pool_cls", ("kind",)),
    Symbol(f"{_PLATFORM}.get_speculative_cache_locs_fn", ()),
    Symbol(f"{_PLATFORM}.apply_server_args_defaults", ("server_args",)),
    Symbol(f"{_PLATFORM}.post_load_model", ("model",)),
    Symbol(f"{_PLATFORM}.init_backend", ()),
    Symbol("sglang.srt.platforms.cpu.CpuDeviceMixin"),
    Symbol("sglang.srt.arg_groups.choices.add_attention_backend_choices"),
    Symbol("sglang.srt.arg_groups.choices.add_draft_attention_backend_choices"),
    Symbol("sglang.srt.arg_groups.choices.add_deterministic_attention_backend_choices"),
    Symbol(
        "sglang.srt.arg_groups.choices.add_radix_supported_deterministic_attention_backend_choices"
    ),
    Symbol("sglang.srt.layers.attention.attention_registry.register_attention_backend"),
    Symbol("sglang.srt.layers.attention.base_attn_backend.AttentionBackend"),
    Symbol("sglang.srt.layers.radix_attention.AttentionType.ENCODER_ONLY"),
    Symbol("sglang.srt.mem_cache.memory_pool.KVWriteLoc.for_batch"),
    Symbol("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup", ()),
    Symbol(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._store_kv_layer",
        _split("layer_idx loc cache_k cache_v"),
    ),
    Symbol(
        "sglang.kernels.fused_op.BaseFusedOp.register_oot_forward",
        _split("op_cls fn platform_key"),
    ),
    Symbol("sglang.srt.layers.layernorm.RMSNorm"),
    Symbol("sglang.srt.layers.activation.SiluAndMul"),
    Symbol("sglang.srt.layers.rotary_embedding.base.RotaryEmbedding"),
    Symbol("sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply"),
)


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
