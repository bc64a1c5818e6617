"""What we read of SGLang's objects: a protocol for each class, with the attributes that serving uses and no others.

SGLang ships no types that we could import. Each protocol names the classes that it describes at the start of its
documentation, and ``tests/contract`` looks there for every attribute. ``R`` requests are in a batch, ``N`` rows in a
forward, ``V`` tokens in the vocabulary and ``d`` numbers in a state.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

# --- requests ---------------------------------------------------------------------------------------


class SamplingParams(Protocol):
    """``sglang.srt.sampling.sampling_params.SamplingParams``: how a request wants its tokens drawn."""

    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    min_new_tokens: int
    min_p: float
    #: 1: greedy; temperature 0 is expressed so.
    top_k: int
    ignore_eos: bool
    stop_token_ids: set[int] | None
    stop_strs: str | list[str] | None
    stop_regex_strs: str | list[str] | None
    #: By token, as text.
    logit_bias: dict[str, float] | None
    custom_params: dict[str, Any] | None


class ReqKv(Protocol):
    """``sglang.srt.managers.schedule_batch.ReqKvInfo``: KV slots of a request."""

    #: Positions with KV, and positions with a slot.
    kv_committed_len: int
    kv_allocated_len: int


class Req(Protocol):
    """``sglang.srt.managers.schedule_batch.Req``: a request in the scheduler process."""

    origin_input_ids: array[int]
    output_ids: array[int]
    sampling_params: SamplingParams
    custom_logit_processor: str | None
    #: HuggingFace's, or None.
    tokenizer: object
    eos_token_ids: set[int] | None
    #: Of the target; None where it is not known.
    vocab_size: int | None
    logprob: Any
    grammar: Any | None
    kv: ReqKv
    decode_batch_idx: int
    #: Why it ends with its next token, or None.
    to_finish: object
    #: Tokens it ended with; None while it runs, or where all count.
    finished_len: int | None
    return_hidden_states: object

    #: Whether it has ended.
    def finished(self) -> bool: ...


# --- a step -----------------------------------------------------------------------------------------


class SamplingBatchInfo(Protocol):
    """``sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo``: how the requests of a batch sample."""

    #: ``[R, 1]`` float32.
    temperatures: torch.Tensor
    #: ``[R]`` int32, float32 and float32.
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    is_all_greedy: bool
    need_top_k_sampling: bool
    need_top_p_sampling: bool
    need_min_p_sampling: bool
    has_custom_logit_processor: bool
    #: ``[R]`` int64; None where draws are not seeded.
    sampling_seed: torch.Tensor | None
    #: ``[R, V]`` float32.
    logit_bias: torch.Tensor | None
    #: ``[n]`` int64 requests that want their sampling mask.
    sampling_mask_batch_indices: torch.Tensor | None


class ForwardMode(Protocol):
    """``sglang.srt.model_executor.forward_batch_info.ForwardMode``: what a forward is for."""

    #: Nothing, beside ranks with requests.
    def is_idle(self) -> bool: ...
    #: Prefill.
    def is_extend(self) -> bool: ...
    #: One token a request.
    def is_decode(self) -> bool: ...
    #: Verification.
    def is_target_verify(self) -> bool: ...


class ReqToTokenPool(Protocol):
    """``sglang.srt.mem_cache.memory_pool.ReqToTokenPool``: which slot each position of a request has."""

    #: ``[pool, context]`` int32.
    req_to_token: torch.Tensor
    #: ``[pool]`` int64 on the host: how often a row was given to another request.
    req_generation: torch.Tensor


class DraftInput(Protocol):
    """``sglang.srt.speculative.dflash_info_v2.DFlashDraftInputV2``: what a batch carries to its next round."""

    #: ``[R]`` int64 anchors.
    bonus_tokens: torch.Tensor
    #: ``[R]`` int32 slots of each request, and their sum.
    nxt_kv_lens_cpu: torch.Tensor | None
    nxt_kv_lens_sum: int | None
    max_top_k: int
    #: None where requests differ.
    uniform_top_k_value: int | None


class ScheduleBatch(Protocol):
    """``sglang.srt.managers.schedule_batch.ScheduleBatch``: the requests of a step."""

    reqs: list[Req]
    forward_mode: ForwardMode
    sampling_info: SamplingBatchInfo | None
    has_grammar: bool
    return_logprob: bool
    #: ``[R]`` int64, or ``[N]`` in a prefill.
    input_ids: torch.Tensor
    #: ``[N]`` int64 slots to write.
    out_cache_loc: torch.Tensor
    #: ``[R]`` int64 positions with KV.
    seq_lens: torch.Tensor
    #: The same on the host, which may lag, and their sum; None where nothing needs them.
    seq_lens_cpu: torch.Tensor | None
    seq_lens_sum: int | None
    #: ``[R]`` int64 rows of the pool, on the device and on the host.
    req_pool_indices: torch.Tensor
    req_pool_indices_cpu: torch.Tensor
    req_to_token_pool: ReqToTokenPool
    spec_info: DraftInput

    #: Give back slots that windows have left.
    def maybe_evict_swa(self) -> None: ...


class LogitsOutput(Protocol):
    """``sglang.srt.layers.logits_processor.LogitsProcessorOutput``: what the target makes of ``N`` rows."""

    #: ``[N, V]``, or a rank's shard of it.
    next_token_logits: torch.Tensor
    #: ``[N, layers read * d]``, captured in every forward that we run.
    hidden_states: torch.Tensor


class GenerationBatchResult(Protocol):
    """``sglang.srt.managers.utils.GenerationBatchResult``: what came of a step."""

    logits_output: LogitsOutput
    #: ``[R]``, or ``[R * (gamma + 1)]`` of a round.
    next_token_ids: torch.Tensor
    kv_loc_plan: object
    #: ``[R]`` int32 tokens kept of each request, and those that it would have kept without a cap.
    accept_lens: torch.Tensor | None
    cap_lens: torch.Tensor | None
    next_draft_input: object
    speculative_num_draft_tokens: int | None
    speculative_output_stride: int | None
    #: ``[R]`` int64 positions with KV now.
    new_seq_lens: torch.Tensor | None


class VerifyWindow(Protocol):
    """``sglang.srt.speculative.dspark_components.dspark_planner.VerifyWindow``: places of whole blocks."""

    #: ``[R, gamma + 1]`` int64.
    positions_2d: torch.Tensor
    #: ``[R * (gamma + 1)]`` int64 slots of the target.
    verify_cache_loc: torch.Tensor
    kv_loc_plan: object


class VerifyLayout(Protocol):
    """``sglang.srt.speculative.ragged_verify.RaggedVerifyLayout``: how many rows of each block are verified."""

    #: ``[R]`` int32, the anchor counted; and on the host, where that is known.
    verify_lens: torch.Tensor
    verify_lens_cpu: list[int] | None
    #: Rows of the graph that will run.
    graph_num_tokens: int


class ForwardBatch(Protocol):
    """``sglang.srt.model_executor.forward_batch_info.ForwardBatch``: what one forward reads."""

    forward_mode: ForwardMode
    #: ``[N]`` int64.
    input_ids: torch.Tensor
    #: ``[R]`` int64.
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    #: ``[R]`` rows of each request in a prefill.
    extend_seq_lens: torch.Tensor
    spec_info: object


# --- the target and the drafter ---------------------------------------------------------------------


class VocabEmbedding(Protocol):
    """``sglang.srt.layers.vocab_parallel_embedding.VocabParallelEmbedding``: an embedding or an LM head."""

    #: ``[tokens of this rank, d]``.
    weight: torch.Tensor
    tp_size: int
    #: Tokens, with and without added ones.
    num_embeddings: int
    org_vocab_size: int
    shard_indices: Any

    #: ``[..., d]`` rows of this rank's tokens, 0 for others.
    def _embed_local_shard(self, input_: torch.Tensor) -> torch.Tensor: ...


class AttentionLayer(Protocol):
    """``sglang.srt.layers.radix_attention.RadixAttention``: the shape of one layer's attention."""

    layer_id: int
    #: Query heads of this rank, and widths of a query and of a value.
    tp_q_head_num: int
    qk_head_dim: int
    v_head_dim: int
    scaling: float
    logit_cap: float
    #: -1: none.
    sliding_window_size: int
    attn_type: object


class Draft(Protocol):
    """``sglang.srt.models.dspark.DSparkDraftModel`` and ``sglang.srt.models.deepseek_v4_dspark.DeepseekV4ForCausalLMDSpark``."""

    embed_tokens: VocabEmbedding
    lm_head: VocabEmbedding
    markov_head: Any
    confidence_head: torch.nn.Module | None

    #: Every parameter, shared ones too.
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


class DenseDraft(Draft, Protocol):
    """``sglang.srt.models.dspark.DSparkDraftModel``: a drafter with a checkpoint of its own."""

    fc: Any
    layers: Sequence[Any]
    logits_mup_width_multiplier: float | None
    #: Copies of projections that it makes by itself.
    _stacked_ctx_kv_cache: object
    _fused_kv_write_cache: object
    _load_confidence_weights: Callable[..., None]

    #: ``[N, V]`` of draft states, and more.
    def compute_base_logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]: ...
    #: ``[N, d]`` context rows of ``[N, layers read * d]`` target states.
    def project_target_hidden(self, target_hidden: torch.Tensor) -> torch.Tensor: ...
    #: Key and value projections of all layers in one; None where they cannot be.
    def _stacked_ctx_kv_params(self) -> dict[str, Any] | None: ...


class V4Draft(Draft, Protocol):
    """``sglang.srt.models.deepseek_v4_dspark.DeepseekV4ForCausalLMDSpark``: a drafter in its target's checkpoint."""

    stages: Sequence[Any]
    _assert_confidence_head_loaded: Callable[..., None]
    #: Writes the draft's KV of ``N`` rows.
    write_target_hidden_kv: Callable[..., None]

    #: ``[N, d]`` of ``[N, m, d]`` residual streams.
    def collapse_hc_head(self, x: torch.Tensor) -> torch.Tensor: ...
    #: ``[N, V]``.
    def _logits_from_x_post_hc(self, x_post_hc: torch.Tensor) -> torch.Tensor: ...


class KvPool(Protocol):
    """``sglang.srt.mem_cache.memory_pool.MHATokenToKVPool``: keys and values by slot."""

    #: ``[slots, heads, width]``.
    def get_key_buffer(self, layer_id: int) -> torch.Tensor: ...
    #: ``[slots, heads, width]``.
    def get_value_buffer(self, layer_id: int) -> torch.Tensor: ...


class ModelConfig(Protocol):
    """``sglang.srt.configs.model_config.ModelConfig``."""

    hf_config: Any
    vocab_size: int


class ModelRunner(Protocol):
    """``sglang.srt.model_executor.model_runner.ModelRunner``: runs one model."""

    model: torch.nn.Module
    req_to_token_pool: ReqToTokenPool
    #: :class:`KvPool`, or of another class, as the model needs.
    token_to_kv_pool: Any
    spec_aux_config: Any


class TargetModel(Protocol):
    """``sglang.srt.models.qwen3.Qwen3ForCausalLM`` and ``sglang.srt.models.llama.LlamaForCausalLM``, and others like them."""

    #: The embedding.
    def get_input_embeddings(self) -> torch.nn.Module: ...


class TargetWorker(Protocol):
    """``sglang.srt.managers.tp_worker.TpModelWorker``: the target of a scheduler process."""

    device: str
    model_runner: ModelRunner


class PrefillPlacement(Protocol):
    """``sglang.srt.speculative.dspark_components.dspark_kv_inject.PrefillPlacement``: places of prefilled rows."""

    #: ``[N]`` slots and positions.
    cache_loc: torch.Tensor
    positions: torch.Tensor

    #: Those rows alone.
    def select(self, token_indices: torch.Tensor) -> PrefillPlacement: ...


class KvInjector(Protocol):
    """``sglang.srt.speculative.dspark_components.dspark_kv_inject.TargetHiddenKvInjector``: writes the draft's KV."""

    draft_model: DenseDraft
    draft_model_runner: ModelRunner
    #: Takes a :class:`PrefillPlacement`, ``target_hidden``, ``token_indices`` and ``target_hidden_is_projected``.
    inject_prefill: Callable[..., None]

    #: Slots of a request's ring; None where its KV is not one.
    @property
    def swa_ring_size(self) -> int | None: ...
    #: ``[N]`` slots of the draft's pool for a step's plan.
    def ids_for(self, plan: object) -> torch.Tensor: ...
    #: Write the draft's KV of ``N`` rows.
    def inject_target_hidden(
        self, *, target_hidden: torch.Tensor, cache_loc: torch.Tensor, positions: torch.Tensor
    ) -> None: ...


class LogitsProcessor(Protocol):
    """``sglang.srt.layers.logits_processor.LogitsProcessor``: from the target's states to logits."""

    do_tensor_parallel_all_gather: bool
    #: ``[N, V]`` of ``[N, d]``, the LM head and metadata.
    _get_logits: Callable[..., torch.Tensor]


class Group(Protocol):
    """``sglang.srt.distributed.parallel_state.GroupCoordinator``: ranks that exchange tensors."""

    world_size: int
    rank_in_group: int
    #: Of the whole server.
    ranks: list[int]
    cpu_group: torch.distributed.ProcessGroup

    #: The source's values on every rank.
    def broadcast(self, input_: torch.Tensor, src: int = 0) -> torch.Tensor: ...
    #: The sum.
    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor: ...
    #: All values, joined along a dimension.
    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor: ...


# --- processes, and what they are asked -------------------------------------------------------------


class ServerArgs(Protocol):
    """``sglang.srt.server_args.ServerArgs``, or SGLang's view of it with what is resolved so far."""

    host: str
    port: int
    device: str
    dtype: str
    model_path: str
    trust_remote_code: bool
    attention_backend: str | None
    tp_size: int
    pp_size: int
    attn_dp_size: int
    enable_dp_attention: bool
    enable_hierarchical_cache: bool
    enable_memory_saver: bool
    disaggregation_mode: str
    disable_overlap_schedule: bool
    sleep_on_idle: bool
    max_running_requests: int | None
    min_free_slots_delay: int | None
    #: Names, separated by commas.
    warmups: str | None
    speculative_draft_model_path: str | None
    speculative_draft_model_revision: str | None
    speculative_num_draft_tokens: int | None
    speculative_dspark_block_size: int | None
    speculative_dspark_sps_table_path: str | None
    speculative_dspark_align_verify_tokens_to_graph_tier: bool


class SglangScheduler(Protocol):
    """``sglang.srt.managers.scheduler.Scheduler``: SGLang's, of one scheduler process."""

    #: Ours where the server runs DSPARK.
    draft_worker: object
    _engine_paused: bool


class MemoryRequest(Protocol):
    """``sglang.srt.managers.io_struct.ReleaseMemoryOccupationReqInput`` and ``sglang.srt.managers.io_struct.ResumeMemoryOccupationReqInput``."""

    #: Kinds of memory; None: all.
    tags: list[str] | None


class UpdaterManager(Protocol):
    """``sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager``: weights and memory."""

    draft_worker: object
    memory_saver_adapter: Any
    #: Kinds of memory that are released.
    offload_tags: set[str]
    is_fully_idle: Callable[..., bool]
    scheduler: SglangScheduler | None


class WeightUpdater(Protocol):
    """``sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater``: loads into one model."""

    update_weights_from_disk: Callable[..., tuple[bool, str]]
    update_weights_from_tensor: Callable[..., tuple[bool, str]]

    #: Whether that went well, and what to say.
    def load_weights_from_distributed(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> tuple[bool, str]: ...
    #: Before the first part of an update.
    def begin_weight_update(self) -> None: ...
    #: After the last one.
    def end_weight_update(self, *, run_post_load: bool) -> None: ...


class TokenizerManager(Protocol):
    """``sglang.srt.managers.tokenizer_manager.TokenizerManager``: takes requests in the HTTP process."""

    model_config: ModelConfig
    enable_metrics: bool
    gracefully_exit: bool
    _subprocess_watchdog: Any | None
    #: Ask every scheduler.
    release_memory_occupation_communicator: Callable[[object], Awaitable[list[Any]]]
    resume_memory_occupation_communicator: Callable[[object], Awaitable[list[Any]]]

    #: Listen to the schedulers, if that has not begun.
    def auto_create_handle_loop(self) -> None: ...
    #: Answers to a ``GenerateReqInput``.
    def generate_request(self, obj: object, request: object) -> AsyncIterator[dict[str, Any]]: ...
    #: End a request that is known.
    def abort_request(self, rid: str) -> None: ...
    #: Status of every scheduler.
    async def get_internal_state(self) -> list[dict[str, Any]]: ...
    #: Send a ``SetInternalStateReq``.
    async def set_internal_state(self, obj: object) -> list[bool]: ...
    #: Forget every prefix.
    async def flush_cache(self) -> object: ...


class TokenizedRequest(Protocol):
    """``sglang.srt.managers.io_struct.TokenizedGenerateReqInput``: what the scheduler is sent."""

    sampling_params: SamplingParams
    positional_embed_overrides: object
    return_logprob: bool
