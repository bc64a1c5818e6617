"""The worker SGLang runs in DSPARK's place: its lifecycle, our algorithm."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.dp_attention import get_dp_tp_group
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.runtime_context import (
    get_context,
    get_exec,
    get_observability,
    get_parallel,
    get_schedule,
    get_spec,
)
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2
from sglang.srt.speculative.ragged_verify import read_ragged_verify_mode

from dspark_sglang import __version__
from dspark_sglang.config import Settings, Verification, read_settings
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.schedule.scheduler import (
    STRATEGIES,
    Overlapped,
    Scheduler,
    Synchronous,
    VerifyAll,
)
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.layouts.base import weights_digest
from dspark_sglang.serving import calibration, placement, requests
from dspark_sglang.serving.admin import Commands
from dspark_sglang.serving.calibration import Calibration, KnownCost
from dspark_sglang.serving.decode import Decoder
from dspark_sglang.serving.draft_kv import contain_prefills, keep_prefills, may_defer
from dspark_sglang.serving.draft_model import draft_model
from dspark_sglang.serving.faults import Faults
from dspark_sglang.serving.ops import Ops, make, resolve
from dspark_sglang.serving.ops.rehearsal import Sizes, rehearse
from dspark_sglang.serving.ops.sharded_ops import ShardedOps
from dspark_sglang.serving.overlap import OverlappedRounds
from dspark_sglang.serving.planner import Planner, buckets, must_verify_all
from dspark_sglang.serving.prompt_lookup import Lookup
from dspark_sglang.serving.proposer import Proposer
from dspark_sglang.serving.rounds import Rounds, SynchronousRounds, VerifyAllRounds
from dspark_sglang.serving.sglang_types import ScheduleBatch, ServerArgs, TargetWorker
from dspark_sglang.serving.telemetry import Metrics, StepObservers, Telemetry
from dspark_sglang.serving.tensor_parallel import Ranks, keep_shards, shard_draft
from dspark_sglang.serving.verifier import Verifier
from dspark_sglang.serving.weights import Weights

logger = logging.getLogger(__name__)

#: Drafting and acceptance draw from different streams than SGLang's sampler.
_SEED_DOMAIN = 0x6A09E667F3BCC908
#: How SGLang's calls meet each strategy.
_ROUNDS: dict[type[Scheduler], type[Rounds]] = {
    VerifyAll: VerifyAllRounds,
    Synchronous: SynchronousRounds,
    Overlapped: OverlappedRounds,
}


class DSparkWorker(DSparkWorkerV2):
    """Builds SGLang's worker, then puts our proposer, planner and verifier in its place."""

    _proposer: Any
    _verify_planner: Any
    _verify_executor: Any
    _verify_epilogue: Any
    #: Seconds that compiling took at start; None: nothing was compiled.
    _compiled_s: float | None = None

    def __init__(
        self,
        server_args: ServerArgs,
        gpu_id: int,
        nccl_port: int,
        target_worker: TargetWorker,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._placed = placement.settle(read_settings(), target_worker)
        super().__init__(server_args, gpu_id, nccl_port, target_worker, *args, **kwargs)
        if not self._hosts_draft:
            return
        self._settings = settings = read_settings()
        self.telemetry = Telemetry(gamma=self.gamma)
        self.faults = Faults()
        self.faults.alone = get_parallel().tp_size == 1
        self.scheduler: Scheduler = self._strategy()(gamma=self.gamma)
        self._remove_folded_parts()
        self._draft = draft_model(self.draft_model)
        drafter = Path(get_spec().speculative_draft_model_path)
        self.drafter_sha256 = weights_digest(drafter) if drafter.is_dir() else None
        self.calibration = Calibration(
            settings, gamma=self.gamma, drafter_sha256=self.drafter_sha256
        )
        temperatures, self._sts_source = self.calibration.read()
        self._install_parts(settings, temperatures)
        self.known_cost = KnownCost(
            settings, self.scheduler, self._fingerprint(), writes=get_parallel().tp_rank == 0
        )
        self.weights = Weights(self, drafter)
        requests.bind(self.scheduler, self.faults)
        self.commands = Commands(self)
        self._metrics: Metrics | None = None
        if get_parallel().tp_rank == 0:
            self._announce()

    def _strategy(self) -> type[Scheduler]:
        """How this server schedules: as it is set, as far as SGLang can run it."""
        adapters = self.model_runner.lora_manager is not None
        reason = must_verify_all(recurrent=self._target_is_mambaish, adapters=adapters)
        if reason is not None:
            logger.warning("dspark: every drafted token is verified: %s.", reason)
        if reason is not None or self._settings.schedule == VerifyAll.name:
            return VerifyAll
        overlaps = not get_schedule().disable_overlap_schedule
        return Overlapped if overlaps else STRATEGIES[self._settings.schedule]

    def report_canary(self, passed: bool) -> None:
        """Show in ``/metrics`` what ``dspark canary`` found."""
        if self._metrics is not None:
            self._metrics.report_canary(passed, time.time())

    def _announce(self) -> None:
        """One line in the log, and a metric where SGLang serves metrics."""
        logger.info(
            "dspark %s is serving DSPARK: gamma=%d, markov=%s, kernels=%s, schedule=%s, sts=%s, "
            "draft vocabulary=%s, placement=%s, heads=%s on %d ranks",
            __version__,
            self.gamma,
            self._ops.markov.kind,
            self._ops.name,
            self.scheduler.name,
            self._sts_source,
            self._drafted_tokens or "whole",
            self._sharding.placement,
            self._sharding.heads,
            self._sharding.ranks.count,
        )
        if get_observability().enable_metrics:
            self._metrics = Metrics(
                {
                    "kernels": self._ops.name,
                    "schedule": self.scheduler.name,
                    "verification": self._verification,
                    "markov": self._ops.markov.kind,
                    "gamma": str(self.gamma),
                }
            )

    @property
    def _drafted_tokens(self) -> int | None:
        """Size of the draft vocabulary; None for the whole vocabulary."""
        tokens = self._sharding.tokens
        return None if tokens is None else len(tokens)

    def _remove_folded_parts(self) -> None:
        """Take SGLang's graph-folded acceptance out, so that ours is what runs on CUDA too."""
        if self._verify_epilogue is not None:
            hooks = self.model_runner.capture_tail_hooks
            hooks.remove(self._verify_epilogue.capture_hook)
        self._verify_epilogue = None
        self._sampling_accept_graph = None
        self._rejection_noise = None

    def _maybe_build_draft_sampler(self) -> None:
        """SGLang's graph-folded draft sampler is never built; ours drafts after the graph."""

    def _install_parts(self, settings: Settings, temperatures: torch.Tensor) -> None:
        generator = torch.Generator(device=self.device)
        seed = settings.seed if settings.seed >= 0 else int(self.target_worker.random_seed)
        generator.manual_seed((seed ^ _SEED_DOMAIN) & 0x7FFFFFFFFFFFFFFF)
        blocks = get_spec().speculative_use_block_verification
        self._verification: Verification = "block" if blocks else settings.verification
        folder = Path(get_spec().speculative_draft_model_path)
        self._sharding = shard_draft(
            self._draft,
            Ranks(get_dp_tp_group(), self.telemetry),
            folder=folder if settings.draft_vocab == "auto" else None,
            mask=self._mask_token_id,
            width=self.query_token_num,
            heads=settings.heads,
            lists=resolve(settings.kernels, torch.device(self.device)) == "triton",
        )
        self._sharding.forget(self._kv_injector)
        self._ops: Ops = make(
            settings.kernels,
            device=torch.device(self.device),
            markov=MarkovHead.from_module(self.draft_model.markov_head),
            confidence=ConfidenceHead.from_module(self.draft_model.confidence_head, temperatures),
            generator=generator,
            verification=self._verification,
            telemetry=self.telemetry,
        )
        if self._sharding.vocabulary is not None:
            self._ops = ShardedOps(
                self._ops,
                self._sharding.vocabulary,
                generator=generator,
                verification=self._verification,
                telemetry=self.telemetry,
                held=self._sharding.held,
            )
            processor = getattr(self.model_runner.model, "logits_processor", None)
            # Logits of another kind of processor stay whole, and are cut to shards.
            if isinstance(processor, LogitsProcessor):
                keep_shards(processor)
        self._install_steps(seed)
        # Positions, slots and anchors of a step in one launch of SGLang's own kernel.
        self._prepare_inputs_once = torch.device(self.device).type == "cuda"

    def _install_steps(self, seed: int) -> None:
        """Put our parts of a step in the place of SGLang's."""
        self._rounds = rounds = _ROUNDS[type(self.scheduler)](
            self.scheduler,
            faults=self.faults,
            telemetry=self.telemetry,
            ops=self._ops,
            ranks=self._sharding.ranks,
            device=torch.device(self.device),
            buckets=buckets(self.model_runner, self.gamma),
        )
        # Under overlap a step begins before the host knows the last tokens.
        knows = get_schedule().disable_overlap_schedule and type(self.scheduler) is not Overlapped
        self._lookup = Lookup() if knows and self._settings.lookup == "auto" else None
        self._proposer = Proposer(
            ops=self._ops,
            sharding=self._sharding,
            rounds=rounds,
            lookup=self._lookup,
            draft_model=self.draft_model,
            draft_model_runner=self.draft_model_runner,
            gamma=self.gamma,
            mask_token_id=self._mask_token_id,
            draft_block_spec_info=self._draft_block_spec_info,
            tp_sync=self._tp_sync,
            random_seed=seed,
            greedy_draft=False,
            dp_moe_sync=self._proposer._dp_moe_sync,
        )
        self._verify_planner = Planner(
            rounds=rounds,
            draft_model=self.draft_model,
            gamma=self.gamma,
            model_runner=self.model_runner,
            device=self.device,
            tp_rank=get_parallel().tp_rank,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
            tp_sync=self._tp_sync,
        )
        self._verify_executor = Verifier(
            planner=self._verify_planner,
            ops=self._ops,
            sharding=self._sharding,
            rounds=rounds,
            target_worker=self.target_worker,
            gamma=self.gamma,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
            model_runner=self.model_runner,
            kv_injector=self._kv_injector,
            tp_sync=self._tp_sync,
        )
        self._decoder = Decoder(self, self._verify_executor, rounds)
        self._observers = StepObservers(self.telemetry, self.scheduler)

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> None:
        if self._hosts_draft:
            with self._draft_context():  # as many KV heads as this rank's draft has
                super().alloc_memory_pool(*args, **kwargs)
            self._defers = self.scheduler.adaptive and self._verify_executor.defers and may_defer()
            contain_prefills(self._kv_injector, self.faults)
            if self._defers:
                keep_prefills(self._kv_injector, self._verify_executor.deferred, self._draft)

    def init_cuda_graphs(self) -> None:
        if not self._hosts_draft:
            return
        if self._sharding.drafts:
            super().init_cuda_graphs()
        if self._ops.name == "triton" and torch.device(self.device).type == "cuda":
            self._compile_kernels()

    def _compile_kernels(self) -> None:
        """Have Triton compile at start whatever steps will ask for; every rank does.

        Raises:
            CompatibilityError: a kernel cannot be compiled or launched here.
        """
        start, before = time.perf_counter(), sum(self._ops.launches.values())
        shard = self._sharding.vocabulary
        whole = int(self.model_runner.model_config.vocab_size)
        sizes = Sizes(
            gamma=self.gamma,
            hidden=self._draft.width,
            dtype=self._draft.dtype,
            columns=whole if shard is None else shard.shard.width,
            whole=whole,
            requests=self.model_runner.max_running_requests,
            seeded=get_exec().deterministic.enable_deterministic_inference,
            device=torch.device(self.device),
        )
        try:
            with torch.inference_mode(), self._draft_context():
                rehearse(self._ops, sizes, self._proposer.base_logits, self._sharding.tokens)
                self._verify_executor.rehearse()
        except Exception as error:
            raise CompatibilityError(
                f"A kernel could not be compiled or launched on {self.device} ({error}).",
                expected="kernels that run on this device",
                fix="Set DSPARK_KERNELS=torch, and report the device and the versions that `dspark doctor` prints.",
            ) from error
        self.telemetry.clear()  # nothing was served
        self._compiled_s = time.perf_counter() - start
        launched = sum(self._ops.launches.values()) - before
        logger.info("dspark: kernels compiled in %.1f s, %d launches.", self._compiled_s, launched)

    def forward_batch_generation(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        prefills = batch.forward_mode.is_extend()  # a decode step leaves another mode behind
        if prefills and self._hosts_draft:
            self._verify_executor.penalties.prefilled(batch.reqs)
        result = super().forward_batch_generation(batch, *args, **kwargs)
        if prefills and result.logits_output is not None:
            result.next_token_ids = requests.told_sampled(result, batch)
        if self._hosts_draft and (self._verify_executor.deferred.full or not self._defers):
            self._draft_up_to_date()
        return result

    def _forward_decode(
        self,
        batch: ScheduleBatch,
        on_publish: Callable[[torch.Tensor], None] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not batch.reqs or batch.forward_mode.is_idle():
            return super()._forward_decode(batch, on_publish, *args, **kwargs)
        rounds = self._rounds
        drafts = rounds.begin(batch).drafts
        if drafts:
            self._draft_up_to_date()  # the bill of decode steps, not of this round
        rounds.started()
        decodes = not drafts and not self._proposer.can_copy(batch.reqs)
        if decodes and self._decoder.takes(batch):
            result = self._decoder.decode(batch, on_publish)
        else:
            result = super()._forward_decode(batch, on_publish, *args, **kwargs)
            result.next_token_ids = self._verify_executor.reported.view(-1)
        rounds.ended()
        if self._metrics is not None:
            self._metrics.update(time.perf_counter(), rounds)
        return result

    def _block_accept_lens(self, *, accept: Any, folded_accept: bool, bs: int) -> torch.Tensor:
        """Tokens committed of each request: none are trimmed."""
        lens: torch.Tensor = accept.commit_lens
        return lens

    def _draft_up_to_date(self) -> None:
        """Commit what prefills and decode steps left for the draft, under the draft's own placement."""
        if self._verify_executor.deferred:
            with self._draft_context():
                self._verify_executor.deferred.flush()

    def _fingerprint(self) -> dict[str, str]:
        """What the cost of this server's steps depends on."""
        runner, device = self.model_runner, torch.device(self.device)
        overlaps = isinstance(self.scheduler, Overlapped)
        return calibration.fingerprint(
            target=str(runner.model_config.model_path),
            drafter=str(get_spec().speculative_draft_model_path),
            drafter_sha256=self.drafter_sha256 or "",
            device=calibration.device_name(device, torch.get_num_threads()),
            tensor_parallel=get_parallel().tp_size,
            dtype=runner.dtype,
            attention=get_context().resolved_server_args_dict().get("attention_backend"),
            kernels=self._ops.name,
            draft_vocabulary=self._drafted_tokens or "whole",
            placement=self._sharding.placement,
            heads=self._sharding.heads,
            gamma=self.gamma,
            timed="by the device, ahead" if overlaps else "by the host",
            blocks=read_ragged_verify_mode().value,
            sglang=importlib.metadata.version("sglang"),
            plugin=__version__,
        )

    def weight_update_runners(self) -> list[tuple[str, Any]]:
        """What SGLang updates of the drafter."""
        return self.weights.runners() if self._hosts_draft else []

    def catch_up(self) -> None:
        """Learn from every step there was, also from one that is still to end."""
        self._rounds.catch_up()

    def clear_info_records(self) -> None:
        """Start counting again; SGLang calls this."""
        if self._hosts_draft:
            self.catch_up()
        super().clear_info_records()

    def set_temperatures(self, temperatures: torch.Tensor, source: str) -> None:
        """Serve with other STS temperatures ``[gamma]`` from the next step on."""
        self._ops.set_temperatures(temperatures.float())
        self._sts_source = source
        self._rounds.recalibrated()

    def dump_info_records(self) -> dict[str, Any] | None:
        """Our status, served by SGLang at ``/server_info``."""
        if not self._hosts_draft:
            return None
        self.catch_up()
        return {
            "active": True,
            "version": __version__,
            "gamma": self.gamma,
            "parts": {
                "proposer": type(self._proposer).__module__,
                "planner": type(self._verify_planner).__module__,
                "verifier": type(self._verify_executor).__module__,
            },
            "markov": self._ops.markov.kind,
            "kernels": self._ops.name,
            "launches": self._ops.launches,
            "kernels_compiled_s": self._compiled_s,
            "sts": self._sts_source,
            "draft_vocabulary": self._drafted_tokens,
            "placement": self._sharding.placement,
            "heads": self._sharding.heads,
            "placement_microseconds": {} if self._placed is None else self._placed.microseconds,
            "ranks": self._sharding.ranks.count,
            "schedule": self.scheduler.name,
            "lookup": self._lookup is not None,
            "verification": self._verification,
            "temperatures": self._ops.temperatures,
            "drafter_sha256": self.drafter_sha256,
            "reliability": self.scheduler.reliability.table(),
            "cost_source": self.known_cost.source,
            "profile_s": self.known_cost.seconds,
            **self.telemetry.snapshot(),
            **self._rounds.snapshot(),
        }
