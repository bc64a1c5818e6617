"""SGLang's own capture code against attention backends that record: which layouts they take, and what ranks exchange.

``DecodeCudaGraphRunner.capture_one_shape`` and what it calls (capture buffers, ragged layouts, hooks) run as they
are, on a CPU, without a graph: a stand-in backend calls the forward twice to warm up and once to capture. What an
attention backend does with a layout is its real code where that runs without CUDA: FlashInfer's refusal, Triton
attention's rows. Of the others the flag ``supports_ragged_verify_graph`` is read from the real class, and they are
taken at its word: rows as the layout says.

Reported are

- *refused*: the backend raises, and the server ends with "Capture cuda graph failed";
- *rows*: attention would read more rows than the tier has;
- *never*: graphs are captured and no batch may replay them;
- *collectives*: ranks capture or run different sequences of exchanges, and wait for each other for ever.

It cannot see: kernels, memory, or backends' code behind the flag.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

GAMMA, MOST = 7, 16
WIDTH, SIZES = GAMMA + 1, (1, 2, 4, 8, 16)
#: Attention backends that a target may be served with on CUDA, by SGLang's names, and their classes; on sm90 and sm120
#: ``trtllm_mha`` runs its other kernel (``xqa``).
BACKENDS = {
    "fa3": "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend",
    "flashinfer": "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend",
    "triton": "sglang.srt.layers.attention.triton_backend.TritonAttnBackend",
    "trtllm_mha": "sglang.srt.layers.attention.trtllm_mha_backend.TRTLLMHAAttnBackend",
    "trtllm_mha xqa": "sglang.srt.layers.attention.trtllm_mha_backend.TRTLLMHAAttnBackend",
}
MODES = ("static", "compact")


class Fault(NamedTuple):
    """Something that goes wrong at capture or afterwards."""

    kind: str
    text: str


class Shape(NamedTuple):
    """One captured graph."""

    #: Requests and rows that it is captured for.
    slots: int
    tokens: int
    #: Rows that attention would read.
    rows: int
    #: Hooks that were called, in order, at each of the runs.
    hooks: tuple[str, ...]
    #: Exchanges that one run makes.
    exchanges: tuple[str, ...]


#: Backends whose code runs here; of the others' modules CUDA extensions are imported.
RUNS = ("flashinfer", "triton")


def backend_class(name: str) -> Any:
    """SGLang's class of an attention backend."""
    module, _, kind = BACKENDS[name].rpartition(".")
    return getattr(importlib.import_module(module), kind)


def _members(name: str) -> list[ast.stmt]:
    """What a backend's class has, read from its source: its module may need CUDA."""
    module, _, kind = BACKENDS[name].rpartition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == kind:
            return node.body
    raise LookupError(f"{module} has no class {kind}")


def takes_ragged(name: str) -> bool:
    """``supports_ragged_verify_graph`` of a backend's class."""
    for line in _members(name):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and line.target.id == "supports_ragged_verify_graph"
        ):
            assert line.value is not None
            return bool(ast.literal_eval(line.value))
    return False  # the base class's


def assert_ragged(name: str) -> None:
    """``_assert_ragged_verify_supported`` of a backend's class that has it, as SGLang wrote it.

    Raises:
        NotImplementedError: what the backend raises.
    """
    wanted = "_assert_ragged_verify_supported"
    for line in _members(name):
        if isinstance(line, ast.FunctionDef) and line.name == wanted:
            made: dict[str, Any] = {}
            exec(compile(ast.Module([line], []), name, "exec"), made)
            made[wanted](SimpleNamespace(is_xqa_impl=name.endswith("xqa")))


class Recording:
    """An attention backend that keeps what it is told; its layouts are taken by the real class's code."""

    def __init__(self, name: str) -> None:
        self.name, self.rows = name, 0
        self.kind = backend_class(name) if name in RUNS else None

    @property
    def supports_ragged_verify_graph(self) -> bool:
        """The real class's flag."""
        return takes_ragged(self.name)

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        """Lay a capture's rows out."""
        layout = batch.spec_info.ragged_verify_layout
        if self.name == "flashinfer" and layout is not None:
            # Raises before it reads anything of itself.
            self.kind.init_forward_metadata_out_graph(self, batch, in_capture)
        elif layout is not None:
            assert_ragged(self.name)
        if self.name == "triton":
            self.rows = self._triton_rows(batch)
        elif layout is not None:
            self.rows = int(layout.qo_indptr_device[-1])
        else:
            self.rows = batch.batch_size * batch.spec_info.draft_token_num

    def init_forward_metadata_in_graph(self, batch: Any) -> None:
        """Nothing of a layout is decided inside a graph."""

    def _triton_rows(self, batch: Any) -> int:
        """Rows as Triton attention's own code lays them out."""
        slots = batch.batch_size
        itself = SimpleNamespace(
            device="cpu", sliding_window_size=None, _verify_mask=None,
            target_verify_num_tokens_per_req=WIDTH,
            qo_indptr=torch.zeros(4 * MOST * WIDTH, dtype=torch.int32),
            mask_indptr=torch.zeros(4 * MOST * WIDTH, dtype=torch.int64),
            cuda_graph_kv_indices=None, window_kv_indptr=None, _fill_kv_indptr_and_indices=lambda *_: None,
        )  # fmt: skip
        itself._target_verify_num_tokens_per_req = lambda spec: (
            self.kind._target_verify_num_tokens_per_req(itself, spec)
        )
        lens = torch.ones(slots, dtype=torch.int64)
        found = self.kind._update_target_verify_buffers(
            itself, None, slots, lens, batch.spec_info, torch.zeros(slots, dtype=torch.int64)
        )
        return int(found[0][-1])


class Exchanges:
    """A group of ranks as one of them sees it: what it takes part in, in order."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's sum."""
        self.made.append("all_reduce")
        return values

    def broadcast(self, values: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank 0's values."""
        self.made.append("broadcast")
        return values

    def all_gather(self, values: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """All values."""
        self.made.append("all_gather")
        return values


def runner(
    backend: Recording, *, mode: str, forward: Callable[..., Any], hooks: Sequence[Any] = (),
    draft: bool = False, model: Any = None,
) -> Any:  # fmt: skip
    """SGLang's runner with the parts that capturing one shape uses."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    class Runner(DecodeCudaGraphRunner):
        """Without a constructor, which needs a model."""

        def __init__(self) -> None:
            pass

    made = Runner()
    width = GAMMA if draft else WIDTH
    rows = MOST * width
    names = (
        "input_ids",
        "req_pool_indices",
        "seq_lens",
        "seq_lens_cpu",
        "out_cache_loc",
        "positions",
    )
    slots = {name: torch.ones(rows, dtype=torch.int64) for name in names}

    def slot(name: str) -> Any:
        by_request = name in ("req_pool_indices", "seq_lens", "seq_lens_cpu")
        return SimpleNamespace(
            slice_for=lambda bs, tokens: (
                (slots[name][: bs if by_request else tokens]) if name in slots else None
            )
        )

    made.buffers = SimpleNamespace(
        next_token_logits_buffer=torch.zeros(rows, 4), aux_hidden_states=None, rids_int=None,
        bootstrap_room_ids_int=None, num_token_non_padded=None, global_num_tokens_gpu=None,
        global_num_tokens_for_logprob_gpu=None, ngram_embedding_info=None, pp_proxy_tensors=None,
        input_embeds=torch.zeros(rows, 4), custom_mask=None,
    )  # fmt: skip
    made.buffer_registry = SimpleNamespace(get_slot=slot, has_slot=lambda name: name in slots)
    algorithm = SimpleNamespace(
        is_eagle=lambda: False, is_standalone=lambda: False, is_dflash_family=lambda: True,
        is_dspark=lambda: True, is_ngram=lambda: False, is_speculative=lambda: True,
    )  # fmt: skip
    made.model_runner = SimpleNamespace(
        spec_algorithm=algorithm, is_draft_worker=draft, attn_backend=backend,
        attn_tp_sequence_sharded=lambda tokens: False, lora_manager=None, canary_manager=None,
        kv_index_translator=SimpleNamespace(bind_runner_slots=lambda batch: None),
        hisparse_coordinator=None, capture_tail_hooks=list(hooks), capture_head_hooks=[],
        model=model or SimpleNamespace(),
    )  # fmt: skip
    made.attn_backend, made.device = backend, "cpu"
    made.device_module = SimpleNamespace(is_current_stream_capturing=lambda: False)
    made.capture_forward_mode, made.capture_hidden_mode = (
        ForwardMode.TARGET_VERIFY, CaptureHiddenMode.FULL,
    )  # fmt: skip
    made.captured_req_width, made.capture_bs, made.max_bs = width, list(SIZES), MOST
    made.ragged_verify_mode = mode == "compact" and not draft
    made.capture_num_tokens = [bs * width for bs in SIZES] if made.ragged_verify_mode else None
    made._captured_ragged_layouts = {}
    for name, value in {
        "pp_size": 1, "enable_prefill_cp": False, "enable_pdmux": False, "num_dp_ranks": 1,
        "require_mlp_tp_gather": False, "require_attn_tp_gather": False, "require_mlp_sync": False,
        "dllm_uses_input_embeds": False, "dllm_input_preparation": None, "is_encoder_decoder": False,
        "enable_two_batch_overlap": False, "speculative_num_draft_tokens": WIDTH,
        "_metadata_prep_fork": None, "_metadata_prep_fork_resolved": True,
        "in_graph_metadata_prep_done": None,
    }.items():  # fmt: skip
        setattr(made, name, value)
    made.tbo_plugin = SimpleNamespace(capture_one_batch_size=lambda *_, **__: None)
    made.deepep_adapter = SimpleNamespace(capture=lambda **_: None)
    made.forward = forward
    return made


@contextlib.contextmanager
def published() -> Iterator[None]:
    """SGLang's configuration of one rank, and its mask policy, which asks for CUDA."""
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner
    from sglang.srt.runtime_context import get_context, get_parallel
    from sglang.srt.speculative import dflash_utils

    with (
        get_context().override_server_args(device="cpu", speculative_algorithm="DSPARK"),
        get_parallel().override(tp_rank=0, attn_tp_rank=0, attn_tp_size=1),
        mock.patch.object(dflash_utils, "resolve_dflash_verify_mask_policy", lambda _: ("", False)),
        mock.patch.object(
            decode_cuda_graph_runner, "maybe_flashinfer_autotune_speculative_draft",
            lambda *_, **__: None,
        ),
        mock.patch.object(decode_cuda_graph_runner, "enable_num_token_non_padded", lambda: False),
        mock.patch.object(decode_cuda_graph_runner, "set_dp_buffer_len", lambda *_: None),
        mock.patch.object(decode_cuda_graph_runner, "set_is_extend_in_batch", lambda *_: None),
    ):  # fmt: skip
        yield


def captured(given: Any, group: Exchanges | None = None) -> list[Shape]:
    """Capture every size, the largest first, as SGLang does.

    Raises:
        NotImplementedError: what the backend raises.
    """
    found: list[Shape] = []
    called: list[str] = []
    hooks = given.model_runner.capture_tail_hooks
    given.model_runner.capture_tail_hooks = [_named(hook, called) for hook in hooks]
    for size in reversed(SIZES):
        seen: list[tuple[str, ...]] = []

        def capture_one(key: Any, run_once: Callable[[], Any], **_: Any) -> None:
            for _ in range(3):  # twice to warm up
                before = len(group.made) if group is not None else 0
                run_once()
                seen.append(tuple(group.made[before:]) if group is not None else ())  # noqa: B023

        given.backend = SimpleNamespace(capture_one=capture_one)
        called.clear()
        given.capture_one_shape(size, given.forward)
        tokens = size * given.captured_req_width
        slots = given._ragged_capture_slots(tokens) if given.ragged_verify_mode else size
        found.append(
            Shape(slots, tokens, given.attn_backend.rows, tuple(called), seen[-1] if seen else ())
        )
    return found


def _named(hook: Any, called: list[str]) -> Any:
    def call(*args: Any) -> None:
        called.append(getattr(hook, "__name__", type(hook).__name__))
        hook(*args)

    return call


def check(name: str, mode: str) -> list[Fault]:
    """Faults of a target with an attention backend in a mode."""
    backend = Recording(name)

    def forward(input_ids: Any, positions: Any, batch: Any) -> Any:
        return SimpleNamespace(next_token_logits=None, hidden_states=None)

    with published():
        given = runner(backend, mode=mode, forward=forward)
        try:
            shapes = captured(given)
        except NotImplementedError as error:
            return [Fault("refused", str(error))]
        found = [
            Fault("rows", f"{s.rows} rows of {s.slots} requests in a tier of {s.tokens}")
            for s in shapes
            if s.rows > s.tokens
        ]
        if mode == "compact" and not given._can_run_ragged_verify_graph(
            SimpleNamespace(
                batch_size=1, encoder_lens=None, can_run_decode_cuda_graph=True,
                capture_hidden_mode=given.capture_hidden_mode,
            ),
            SimpleNamespace(graph_num_tokens=WIDTH),
        ):  # fmt: skip
            found.append(Fault("never", f"{name} replays no ragged graph"))
    return found


def same_exchanges(ranks: Sequence[Sequence[str]]) -> list[Fault]:
    """Whether ranks take part in the same exchanges in the same order."""
    return [
        Fault("collectives", f"rank {rank} makes {list(made)}, rank 0 {list(ranks[0])}")
        for rank, made in enumerate(ranks)
        if list(made) != list(ranks[0])
    ]


def draft_exchanges(*, placement: str, ours: bool, ranks: int = 2) -> list[list[str]]:
    """What each rank exchanges while the draft's graphs are captured.

    Args:
        placement: of the draft: with ``single`` rank 0 alone captures it.
        ours: whether it embeds as our worker has it; else in its forward, through the target's sharded embedding, as
            SGLang's does while it has ``forward_embed``.
    """
    from dspark_sglang.serving.draft_model import DraftModel

    found = []
    for rank in range(ranks):
        group = Exchanges()

        class Draft:
            """The draft's forward, with the target's sharded embedding."""

            def forward_embed(self, ids: torch.Tensor) -> torch.Tensor:
                return group.all_reduce(ids)  # noqa: B023

        model = Draft()
        if ours:
            DraftModel.embed_with(SimpleNamespace(module=model), torch.nn.Identity())  # type: ignore[arg-type]

        def forward(input_ids: Any, positions: Any, batch: Any, input_embeds: Any = None) -> Any:
            if input_embeds is None:
                model.forward_embed(input_ids)  # noqa: B023
            return SimpleNamespace(next_token_logits=None, hidden_states=None)

        if placement != "single" or rank == 0:
            with published():
                given = runner(
                    Recording("fa3"), mode="static", forward=forward, draft=True, model=model
                )
                captured(given, group)
        found.append(group.made)
    return found


def chosen(name: str) -> str:
    """The mode that our servers are started in with a backend."""
    from dspark_sglang import verify_mode

    backend, _, kernel = name.partition(" ")
    return verify_mode.choose(
        None, verify_mode.why_whole(verify_mode.Server(backend=backend, xqa=bool(kernel)))
    )
