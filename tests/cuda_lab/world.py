"""SGLang around a DSPARK worker on a fake device: both workers run their own code from ``propose`` to ``commit``.

Real here: both workers' constructors and their ``_forward_decode``, SGLang's draft model methods, planner, layouts,
verify window and KV writing, our operations and kernels' host code. Stand-ins: the two models' forwards, which are
graph replays; the KV pool and its slots; the process groups, which count. SGLang's ``ForwardBatch.init_new`` and
the graph runner's ``load_batch`` are not run: both workers pay for them alike, but for the packed slots of a ragged
window, which are looked up here as ``init_new`` does.

Sizes are Qwen3-8B's: V = 151,936, d = 4096, 5 layers read, 5 draft layers of 8 heads of 128, rank 256, gamma = 7.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.cuda_lab.fake_device import FakeDevice

VOCABULARY, HIDDEN, READ, GAMMA, RANK = 151_936, 4096, 5, 7, 256
LAYERS, HEADS, HEAD = 5, 8, 128
MOST, CONTEXT = 64, 4096


class RotaryEmbedding:
    """Plain rotation, as far as KV writing reads it; both workers ask for a class of this name."""

    is_neox_style, rotary_dim, position_start = True, HEAD, 0

    def __init__(self, device: FakeDevice) -> None:
        self.cos_sin_cache = device.empty(CONTEXT, HEAD)


class Group:
    """Ranks that exchange nothing, and count."""

    def __init__(self, device: FakeDevice, ranks: int, rank: int = 0) -> None:
        self.device, self.world_size, self.rank_in_group = device, ranks, rank
        self.ranks, self.cpu_group, self.rank = list(range(ranks)), self, rank
        self.unique_name, self.is_last_rank, self.is_first_rank = "lab", True, True
        self.device_group = self

    def size(self) -> int:
        return self.world_size

    def broadcast(self, values: torch.Tensor, src: int = 0) -> torch.Tensor:
        if self.world_size > 1:
            self.device.collective("broadcast")
        return values

    def broadcast_host(self, values: torch.Tensor, src: int = 0, group: Any = None) -> None:
        """Between the hosts of all ranks, in the place of ``torch.distributed.broadcast``."""
        self.device._note("host-collective", "broadcast")

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            self.device.collective("all_reduce")
        return values

    def all_gather(self, values: torch.Tensor, dim: int = -1) -> torch.Tensor:
        if self.world_size == 1:
            return values
        self.device.collective("all_gather")
        shape = list(values.shape)
        shape[dim] *= self.world_size
        made = values.new_empty(shape)
        known = getattr(values, "_lab_value", None)
        if known is not None:
            made._lab_value = known.expand(self.world_size)  # type: ignore[attr-defined]
        return made


class Pool:
    """The draft's KV, a layer's keys and values a slot."""

    def __init__(self, device: FakeDevice, slots: int, heads: int) -> None:
        shape = (slots, heads, HEAD)
        self._kv = [
            [device.empty(*shape, dtype=torch.bfloat16) for _ in range(2)] for _ in range(LAYERS)
        ]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self._kv[layer_id][0]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self._kv[layer_id][1]


class Translator:
    """Slots as they are, and the window of a step; its one launch is both workers' alike."""

    def __init__(self, device: FakeDevice) -> None:
        from sglang.srt.mem_cache.kv_loc_plan import IdSpace, IdSpaceKind

        self._device = device
        self._space = IdSpace(key=(IdSpaceKind.FULL, None))
        self._full = IdSpaceKind.FULL
        self.req_to_token = device.empty(MOST, CONTEXT, dtype=torch.int32)

    def space(self, kind: Any) -> Any:
        return self._space if kind is self._full else None

    def plan_uniform_extend(self, *, req_pool_indices: Any, width: int, **given: Any) -> Any:
        from sglang.srt.mem_cache.kv_loc_plan import KVLocPlan

        slots = self._device.empty(len(req_pool_indices) * width, dtype=torch.int64)
        self._device.triton("assign_extend_cache_locs", None)
        return KVLocPlan(
            source=self,  # type: ignore[arg-type]
            req_pool_indices=req_pool_indices,
            seq_lens=given["seq_lens"],
            seq_lens_cpu=given["seq_lens_cpu"],
            write_virtual=slots,
            read_extent=width,
        )


class GraphRunner:
    """SGLang's graphs of one model: hooks run at capture, nothing is launched at replay.

    Args:
        forward: what a replay leaves behind for a batch of some requests and rows.
        ragged: whether graphs are keyed by tokens.
    """

    def __init__(self, device: FakeDevice, model_runner: Any, *, width: int, ragged: bool) -> None:
        self.device, self.model_runner = device, model_runner
        self.capture_bs = [1, 2, 4, 8, 16, 32, 64]
        self.max_bs, self.ragged_verify_mode = MOST, ragged
        self.captured_req_width = width
        self.capture_num_tokens = [bs * width for bs in self.capture_bs]

    def can_run_graph(self, batch: Any) -> bool:
        return True

    def load_batch(self, batch: Any) -> None:
        """Copies inputs to the graph's buffers: both workers' alike."""

    def stage_verify_metadata_early(self, **_: Any) -> None:
        pass


class Buffers:
    """Static inputs and outputs of one model's graphs."""

    def __init__(self, device: FakeDevice, width: int, ranks: int) -> None:
        rows = MOST * width
        self.width = width
        self.logits = device.empty(rows, VOCABULARY // ranks)
        self.states = device.empty(rows, HIDDEN * READ, dtype=torch.bfloat16)
        self.ids, self.positions, self.slots = (
            device.empty(rows, dtype=torch.int64) for _ in range(3)
        )
        self.lens, self.pool = (device.empty(MOST, dtype=torch.int64) for _ in range(2))

    def sliced(self, bs: int) -> tuple[Any, Any]:
        """``ForwardBatch`` and output of a capture of ``bs`` requests."""
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        rows, draft = bs * self.width, self.width == GAMMA
        states = self.states[:rows, : HIDDEN if draft else None]
        batch = SimpleNamespace(
            batch_size=bs, input_ids=self.ids[:rows], positions=self.positions[:rows],
            out_cache_loc=self.slots[:rows], seq_lens=self.lens[:bs],
            req_pool_indices=self.pool[:bs], spec_info=None,
            forward_mode=SimpleNamespace(is_target_verify=lambda: True),
        )  # fmt: skip
        logits = None if draft else self.logits[:rows]
        return batch, LogitsProcessorOutput(next_token_logits=logits, hidden_states=states)


def draft_module(device: FakeDevice, ranks: int, *, confidence: bool) -> Any:
    """SGLang's dense draft model without its layers' forward."""
    from sglang.srt.models.dspark import DSparkConfidenceHead, Qwen3DSparkModel, VanillaMarkov

    model = Qwen3DSparkModel.__new__(Qwen3DSparkModel)
    torch.nn.Module.__init__(model)

    def frozen(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(device.empty(*shape, dtype=torch.bfloat16), requires_grad=False)

    def linear(out: int, into: int) -> Any:
        made = torch.nn.Linear(1, 1, bias=False, device="meta")
        made.weight, made.in_features, made.out_features = frozen(out, into), into, out
        return made

    markov = VanillaMarkov.__new__(VanillaMarkov)
    torch.nn.Module.__init__(markov)
    markov.vocab_size, markov.markov_rank = VOCABULARY, RANK
    markov.markov_w1 = torch.nn.Embedding(1, 1, device="meta")
    markov.markov_w1.weight = frozen(VOCABULARY, RANK)
    markov.markov_w2 = linear(VOCABULARY, RANK)
    model.markov_head = markov
    model.confidence_head = None
    if confidence:
        head = DSparkConfidenceHead(hidden_size=HIDDEN, markov_rank=RANK)
        head.proj.weight = torch.nn.Parameter(device.empty(1, HIDDEN + RANK), requires_grad=False)
        head.proj.bias = torch.nn.Parameter(device.empty(1), requires_grad=False)
        model.confidence_head = head
    model.gamma, model.sample_from_anchor, model.block_size = GAMMA, True, GAMMA
    model.is_nemotron_35_draft, model.quantizable = False, False
    model.logits_mup_width_multiplier = None
    model._fused_kv_write_cache, model._base_logits_gatherer = None, None
    model.num_context_features = READ
    model.fc = linear(HIDDEN, READ * HIDDEN)
    model.hidden_norm = lambda x: _norm(device, x)
    heads = max(1, HEADS // ranks)
    rotary = RotaryEmbedding(device)
    layers = []
    for index in range(LAYERS):
        qkv = linear((4 * heads + 2 * heads) * HEAD, HIDDEN)
        layers.append(
            SimpleNamespace(
                self_attn=SimpleNamespace(
                    qkv_proj=SimpleNamespace(
                        weight=qkv.weight, bias=None, quant_method=_unquantized()
                    ),
                    q_size=4 * heads * HEAD,
                    kv_size=heads * HEAD,
                    head_dim=HEAD,
                    num_kv_heads=heads,
                    k_norm=SimpleNamespace(weight=frozen(HEAD), variance_epsilon=1e-6),
                    rotary_emb=rotary,
                    attn=SimpleNamespace(layer_id=index, k_scale=None, v_scale=None),
                )
            )
        )
    object.__setattr__(model, "layers", layers)
    return model


def _unquantized() -> Any:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    return UnquantizedLinearMethod()


def _norm(device: FakeDevice, states: torch.Tensor) -> torch.Tensor:
    device.triton("rmsnorm", None)
    return torch.empty_like(states)


class Head(torch.nn.Module):
    """The target's LM head or embedding, whole or this rank's part of it."""

    def __init__(self, device: FakeDevice, ranks: int, rank: int) -> None:
        from sglang.srt.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        super().__init__()
        own = VOCABULARY // ranks
        self.weight = torch.nn.Parameter(
            device.empty(own, HIDDEN, dtype=torch.bfloat16), requires_grad=False
        )
        self.quant_method = UnquantizedEmbeddingMethod()
        self.tp_size, self.num_embeddings, self.org_vocab_size = ranks, VOCABULARY, VOCABULARY
        self.num_embeddings_per_partition, self.bias = own, None
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=rank * own, org_vocab_end_index=(rank + 1) * own
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.weight)

    def _embed_local_shard(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.weight)


class World:
    """One rank of a server.

    Args:
        ours: our worker; else SGLang's own.
        ranks: tensor-parallel ranks.
        settings: of this package, by field.
        mode: in which SGLang verifies; None: each worker's own.
    """

    def __init__(
        self, device: FakeDevice, *, ours: bool, ranks: int = 1, overlap: bool = True,
        settings: dict[str, str] | None = None, attention: str = "fa3", mode: str | None = None,
    ) -> None:  # fmt: skip
        self.device, self.ours, self.ranks, self.overlap = device, ours, ranks, overlap
        self.mode = mode or ("compact" if ours else "static")
        self.group = Group(device, ranks)
        self._stack = contextlib.ExitStack()
        self._settings = {"DSPARK_COST": "online"} | (settings or {})
        self._attention = attention
        self._tokens = 0

    def __enter__(self) -> World:
        with self._stack:  # undone where the server does not start
            enter = self._stack.enter_context
            enter(torch.inference_mode())
            enter(mock.patch.dict(os.environ, self._environment()))
            self._publish(enter)
            enter(self.device)
            self.worker = self._build(enter)
            self.device.clear()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    # -- SGLang's process ------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        return {"SGLANG_RAGGED_VERIFY_MODE": self.mode} | self._settings

    def _publish(self, enter: Callable[[Any], Any]) -> None:
        from sglang.srt.runtime_context import get_context, get_parallel

        enter(
            get_context().override_server_args(
                device="cuda",
                tp_size=self.ranks,
                speculative_algorithm="DSPARK",
                speculative_num_draft_tokens=GAMMA + 1,
                speculative_draft_model_path="a-drafter",
                disable_overlap_schedule=not self.overlap,
                max_running_requests=MOST,
                attention_backend=self._attention,
                sampling_backend="flashinfer",
                cuda_graph_config=SimpleNamespace(
                    decode=SimpleNamespace(backend="full", bs=[1, 2, 4, 8, 16, 32, MOST])
                ),
            )
        )
        group = self.group
        enter(
            get_parallel().override(
                tp_rank=0, tp_group=group, pp_group=Group(self.device, 1), pp_rank=0,
                attn_tp_rank=0, attn_tp_group=group, attn_dp_rank=0, attn_tp_size=self.ranks,
            )
        )  # fmt: skip

    def _build(self, enter: Callable[[Any], Any]) -> Any:
        from sglang.srt.speculative.dspark_components import dspark_worker_v2 as v2

        device = self.device
        self._make_outputs()
        self.draft = draft_module(device, self.ranks, confidence=self.ours)
        self.translator = Translator(device)
        config = SimpleNamespace(
            hf_text_config=SimpleNamespace(model_type="qwen3"),
            hf_config=SimpleNamespace(),
            vocab_size=VOCABULARY,
            model_path="a-target",
            linear_attn_registry_result=None,
        )
        pools = SimpleNamespace(
            req_to_token=self.translator.req_to_token,
            req_generation=torch.ones(MOST, dtype=torch.int64),
        )
        self.head = Head(device, self.ranks, 0)
        target = torch.nn.Module()
        target.lm_head = self.head
        target.get_input_embeddings = lambda: self.head
        self.runner = runner = SimpleNamespace(
            model=target, model_config=config, device="cuda", is_draft_worker=False,
            req_to_token_pool=pools, token_to_kv_pool=None, kv_index_translator=self.translator,
            spec_algorithm=SimpleNamespace(is_dspark=lambda: True),
            spec_aux_config=SimpleNamespace(draft_model_config=None),
            ngram_embedding_manager=SimpleNamespace(
                enabled=False, update_after_verify=lambda **_: None
            ),
            attn_backend=SimpleNamespace(
                make_forward_metadata_from_raw_verify=None, needs_cpu_seq_lens=False
            ),
            capture_tail_hooks=[], capture_head_hooks=[], dtype=torch.bfloat16, lora_manager=None,
            max_running_requests=MOST,
        )  # fmt: skip
        runner.decode_cuda_graph_runner = GraphRunner(
            device, runner, width=GAMMA + 1, ragged=self.mode == "compact"
        )
        self.target = target_worker = SimpleNamespace(
            model_runner=runner, device="cuda", random_seed=1,
            forward_batch_generation=self._target_forward,
        )  # fmt: skip
        draft_runner = SimpleNamespace(
            model=self.draft, device="cuda", is_draft_worker=True,
            model_config=SimpleNamespace(hf_config=SimpleNamespace()),
            token_to_kv_pool=Pool(device, 4096, max(1, HEADS // self.ranks)),
            kv_index_translator=self.translator, capture_tail_hooks=[], capture_head_hooks=[],
            attn_backend=SimpleNamespace(needs_cpu_seq_lens=False),
            forward=self._draft_forward, req_to_token_pool=pools,
            weight_updater=SimpleNamespace(),
        )  # fmt: skip
        draft_runner.decode_cuda_graph_runner = GraphRunner(
            device, draft_runner, width=GAMMA, ragged=False
        )
        self.draft_runner = draft_runner
        bundle = SimpleNamespace(
            draft_worker=SimpleNamespace(
                alloc_memory_pool=lambda **_: None, init_attention_backends=lambda: None,
                init_cuda_graphs=self._capture,
            ),
            draft_model_runner=draft_runner, draft_model=self.draft,
            resolved_attention_backend=self._attention,
        )  # fmt: skip
        runtime = SimpleNamespace(
            gamma=GAMMA, verify_num_draft_tokens=GAMMA + 1, mask_token_id=VOCABULARY - 1
        )
        enter(mock.patch.object(torch.distributed, "broadcast", self.group.broadcast_host))
        for name, value in {
            "build_draft_tp_worker": lambda **_: bundle,
            "resolve_runtime_config": lambda **_: runtime,
            "draft_is_deepseek_v4": lambda: False,
            "mambaish_config": lambda _: None,
            "model_draft_parallel_spec": _single,
            "draft_pp_context": contextlib.nullcontext,
            "is_cuda_alike": lambda: True,
            "is_cuda": lambda: True,
            "get_pp_stage_load_group": lambda: None,
        }.items():
            enter(mock.patch.object(v2, name, value))
        from sglang.srt.speculative.dflash_info import DFlashVerifyInput
        from sglang.srt.speculative.spec_tp_sync import SpecTpSync

        enter(mock.patch.object(SpecTpSync, "available_memory_gb", lambda *_, **__: 40.0))

        enter(mock.patch.object(DFlashVerifyInput, "prepare_for_verify", _prepare))
        kind: Any = v2.DSparkWorkerV2
        if self.ours:
            kind = self._our_worker(enter)
        worker = kind(SimpleNamespace(), 0, 0, target_worker)
        worker.alloc_memory_pool()
        worker.init_attention_backends()
        worker.init_cuda_graphs()
        return worker

    @staticmethod
    def _our_worker(enter: Callable[[Any], Any]) -> Any:
        from dspark_sglang.serving import worker
        from dspark_sglang.serving.ops import selfcheck

        # They compare values, and there are none.
        for name in ("check_kernels", "check_sharded"):
            enter(mock.patch.object(selfcheck, name, lambda *_: None))
        return worker.DSparkWorker

    # -- forwards --------------------------------------------------------------------------------

    def _capture(self, **_: Any) -> None:
        """Both models' graphs, as SGLang captures them: largest first, each hook run to warm up and then captured."""
        for runner, width in ((self.draft_runner, GAMMA), (self.runner, GAMMA + 1)):
            graphs = runner.decode_cuda_graph_runner
            buffers = Buffers(self.device, width, self.ranks)
            for bs in reversed(graphs.capture_bs):
                batch, output = buffers.sliced(bs)
                for hook in runner.capture_tail_hooks:
                    with self.device.ignored():
                        hook(graphs, output, batch, bs * width)
                    with self.device.capture():
                        hook(graphs, output, batch, bs * width)

    def _draft_forward(self, batch: Any) -> Any:
        states = self._draft_states[: batch.batch_size * GAMMA]
        self.device.replayed(states)
        output = SimpleNamespace(hidden_states=states, next_token_logits=None)
        return SimpleNamespace(logits_output=output, can_run_graph=True)

    def _target_forward(self, batch: Any = None, *, forward_batch: Any = None, **given: Any) -> Any:
        rows = self._rows if forward_batch is not None else len(batch.seq_lens)
        # Graphs hold verification: a decode step must not find one.
        plan = self._plan
        if forward_batch is None:
            assert self.runner.decode_cuda_graph_runner is None
            with self.device.ignored():  # SGLang's own
                plan = self.translator.plan_uniform_extend(
                    req_pool_indices=batch.req_pool_indices, width=1,
                    seq_lens=batch.seq_lens, seq_lens_cpu=batch.seq_lens_cpu,
                )  # fmt: skip
        logits, states = self._logits[:rows], self._states[:rows]
        self.device.replayed(logits, states)
        return SimpleNamespace(
            logits_output=SimpleNamespace(next_token_logits=logits, hidden_states=states),
            can_run_cuda_graph=True,
            kv_loc_plan=plan,
            next_token_ids=self.device.empty(rows, dtype=torch.int32),
        )

    def _make_outputs(self) -> None:
        """What graphs write, each replay to the same place."""
        device, rows = self.device, MOST * (GAMMA + 1)
        # Float32 at the head of a buffer, as a logits processor of the target leaves them. SGLang's gathers whole
        # rows in the graph; ours leaves each rank its own columns.
        width = VOCABULARY // (self.ranks if self.ours else 1)
        self._logits = device.empty(rows, width)
        self._states = device.empty(rows, READ * HIDDEN, dtype=torch.bfloat16)
        self._draft_states = device.empty(MOST * GAMMA, HIDDEN, dtype=torch.bfloat16)

    _rows = 0
    _plan: Any = None


def _single(*_: Any, **__: Any) -> Any:
    from sglang.srt.configs.draft_parallel import DraftParallelSpec, DraftTPExecution

    return DraftParallelSpec(tp_execution=DraftTPExecution.SINGLE_GROUP)


def _prepare(given: Any, batch: Any, target_worker: Any, **_: Any) -> tuple[Any, bool]:
    """The write slots of a verification; everything else that SGLang prepares is both workers' alike."""
    runner = target_worker.model_runner
    given.kv_loc_plan.write_ids(runner.kv_index_translator, cols=given.kv_loc_cols)
    world = target_worker.forward_batch_generation.__self__
    world._rows, world._plan = len(given.draft_token), given.kv_loc_plan
    return given, True


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    """Where nothing has to be entered."""
    yield
