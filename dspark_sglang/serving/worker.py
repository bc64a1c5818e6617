"""The worker SGLang runs in DSPARK's place: its lifecycle, our algorithm."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from sglang.srt.layers.dp_attention import get_dp_tp_group
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.runtime_context import (
    get_context,
    get_observability,
    get_parallel,
    get_schedule,
    get_spec,
)
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

from dspark_sglang import __version__
from dspark_sglang.checkpoint import weights_digest
from dspark_sglang.config import (
    COST_AUTO,
    COST_ONLINE,
    Settings,
    Verification,
    read_settings,
)
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.steps import CostModel
from dspark_sglang.errors import ArtifactError, ConfigError
from dspark_sglang.serving import cost_store, placement, requests, sts_refit
from dspark_sglang.serving.ahead import Ahead
from dspark_sglang.serving.commands import Commands
from dspark_sglang.serving.compat import installed_version
from dspark_sglang.serving.context import contain_prefills, keep_prefills, may_lag
from dspark_sglang.serving.control import COST_UNKEPT, COST_UNMEASURED, Control
from dspark_sglang.serving.draft_model import draft_model
from dspark_sglang.serving.lookup import Lookup
from dspark_sglang.serving.metrics import Metrics
from dspark_sglang.serving.ops import Ops, choose
from dspark_sglang.serving.ops.sharded_ops import ShardedOps
from dspark_sglang.serving.plain import PlainDecoder
from dspark_sglang.serving.planner import Planner
from dspark_sglang.serving.proposer import Proposer
from dspark_sglang.serving.ranks import Ranks, keep_shards
from dspark_sglang.serving.running import StepPlan
from dspark_sglang.serving.seat import seat
from dspark_sglang.serving.served import whole_blocks
from dspark_sglang.serving.sts_load import load_temperatures
from dspark_sglang.serving.telemetry import StepObservers, Telemetry
from dspark_sglang.serving.verifier import Verifier
from dspark_sglang.serving.weights import Weights

logger = logging.getLogger(__name__)

#: Drafting and acceptance draw from different streams than SGLang's sampler.
_SEED_DOMAIN = 0x6A09E667F3BCC908


class DSparkWorker(DSparkWorkerV2):
    """Builds SGLang's worker, then puts our proposer, planner and verifier in its place."""

    _proposer: Any
    _verify_planner: Any
    _verify_executor: Any
    _verify_epilogue: Any

    def __init__(
        self,
        server_args: Any,
        gpu_id: int,
        nccl_port: int,
        target_worker: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._placed = placement.settle(read_settings(), target_worker)
        super().__init__(server_args, gpu_id, nccl_port, target_worker, *args, **kwargs)
        if not self._hosts_draft:
            return
        self._settings = settings = read_settings()
        self.telemetry = Telemetry(gamma=self.gamma)
        overlaps = not get_schedule().disable_overlap_schedule
        reason = whole_blocks(str(self.device))
        fixed = reason is not None or settings.schedule == "all"
        if reason is not None:
            logger.warning("dspark: every drafted token is verified: %s.", reason)
        self._schedule = "all" if fixed else "lagged" if overlaps else settings.schedule
        self.control = Control(gamma=self.gamma, adaptive=not fixed)
        self.control.faults.alone = get_parallel().tp_size == 1
        self._ahead: Ahead | None = None
        if self._schedule == "lagged":
            self._ahead = Ahead(self.control, self.telemetry, torch.device(self.device))
        self._remove_folded_parts()
        self._draft = draft_model(self.draft_model)
        drafter = str(get_spec().speculative_draft_model_path)
        self.drafter_sha256 = weights_digest(Path(drafter)) if Path(drafter).is_dir() else None
        given = get_spec().speculative_dspark_confidence_sts_path
        if given:  # SGLang's own flag: its constructor has read and checked the file
            temperatures = self.draft_model.confidence_head.sts_temperatures
            self._sts_source = str(given)
        else:
            temperatures, self._sts_source = load_temperatures(
                settings, drafter, self.gamma, self.drafter_sha256
            )
        self._install_parts(settings, temperatures)
        self._known_cost(settings)
        self.weights = Weights(self, Path(drafter))
        requests.bind(self.control)
        self.commands = Commands(self)
        self._metrics: Metrics | None = None
        if get_parallel().tp_rank == 0:
            self._announce()

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
            self._schedule,
            self._sts_source,
            self._drafted_tokens or "whole",
            self._seat.placement,
            self._seat.heads,
            self._seat.ranks.count,
        )
        if get_observability().enable_metrics:
            self._metrics = Metrics(
                {
                    "kernels": self._ops.name,
                    "schedule": self._schedule,
                    "verification": self._verification,
                    "markov": self._ops.markov.kind,
                    "gamma": str(self.gamma),
                }
            )

    @property
    def _drafted_tokens(self) -> int | None:
        """Size of the draft vocabulary; None for the whole vocabulary."""
        tokens = self._seat.tokens
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
        self._seat = seat(
            self._draft,
            Ranks(get_dp_tp_group(), self.telemetry),
            folder=folder if settings.draft_vocab == "auto" else None,
            mask=self._mask_token_id,
            width=self.query_token_num,
            heads=settings.heads,
        )
        self._seat.forget(self._kv_injector)
        self._ops: Ops = choose.make(
            settings.kernels,
            device=torch.device(self.device),
            markov=MarkovHead.from_module(self.draft_model.markov_head),
            confidence=ConfidenceHead.from_module(self.draft_model.confidence_head, temperatures),
            generator=generator,
            verification=self._verification,
            telemetry=self.telemetry,
        )
        if self._seat.vocabulary is not None:
            self._ops = ShardedOps(
                self._ops,
                self._seat.vocabulary,
                generator=generator,
                verification=self._verification,
                telemetry=self.telemetry,
                held=self._seat.held,
            )
            processor = getattr(self.model_runner.model, "logits_processor", None)
            # Logits of another kind of processor stay whole, and are cut to shards.
            if isinstance(processor, LogitsProcessor):
                keep_shards(processor)
        self._install_steps(seed)

    def _install_steps(self, seed: int) -> None:
        """Put our parts of a step in the place of SGLang's."""
        proposer = Proposer(
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
        planner = Planner(
            draft_model=self.draft_model,
            gamma=self.gamma,
            model_runner=self.model_runner,
            device=self.device,
            tp_rank=get_parallel().tp_rank,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
            tp_sync=self._tp_sync,
        )
        shared: dict[str, Any] = {
            "ops": self._ops,
            "telemetry": self.telemetry,
            "control": self.control,
            "ahead": self._ahead,
        }
        planner.bind(**shared)
        # Under overlap a step begins before the host knows the last tokens.
        knows = self._ahead is None and get_schedule().disable_overlap_schedule
        self._lookup = Lookup() if knows and self._settings.lookup == "auto" else None
        proposer.bind(**shared, seat=self._seat, planner=planner, lookup=self._lookup)
        verifier = Verifier(
            target_worker=self.target_worker,
            gamma=self.gamma,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
            model_runner=self.model_runner,
            kv_injector=self._kv_injector,
            tp_sync=self._tp_sync,
        )
        verifier.bind(**shared, seat=self._seat, planner=planner)
        self._proposer, self._verify_planner, self._verify_executor = proposer, planner, verifier
        self._plain = PlainDecoder(self, verifier, self.control, self.telemetry)
        self._observers = StepObservers(self.telemetry, self.control)

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> None:
        if self._hosts_draft:
            with self._draft_context():  # as many KV heads as this rank's draft has
                super().alloc_memory_pool(*args, **kwargs)
            self._lags = self.control.adaptive and self._verify_executor.lags and may_lag()
            contain_prefills(self._kv_injector, self.control.faults)
            if self._lags:
                keep_prefills(self._kv_injector, self._verify_executor.lagging, self._draft)

    def init_cuda_graphs(self) -> None:
        if self._hosts_draft and self._seat.drafts:
            super().init_cuda_graphs()

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        prefills = batch.forward_mode.is_extend()  # a decode step leaves another mode behind
        result = super().forward_batch_generation(batch, *args, **kwargs)
        if prefills and result.logits_output is not None:
            result.next_token_ids = requests.told_sampled(result, batch)
        if self._hosts_draft and (self._verify_executor.lagging.full or not self._lags):
            self._draft_up_to_date()
        return result

    def _forward_decode(self, batch: Any, on_publish: Any, *args: Any, **kwargs: Any) -> Any:
        if not batch.reqs or batch.forward_mode.is_idle():
            return super()._forward_decode(batch, on_publish, *args, **kwargs)
        self._decide(batch)
        if self.control.running.plan.draft:
            self._draft_up_to_date()  # the bill of plain steps, not of this round
        if self._ahead is not None:
            self._ahead.begin()
        start = time.perf_counter()
        plain = not self.control.running.plan.draft and not self._proposer.can_copy(batch.reqs)
        if plain and self._plain.takes(batch):
            result = self._plain.decode(batch, on_publish)
        else:
            result = super()._forward_decode(batch, on_publish, *args, **kwargs)
            result.next_token_ids = self._verify_executor.reported.view(-1)
        now = time.perf_counter()
        if self._ahead is not None:
            self._ahead.launched()
        else:
            self.telemetry.took(now - start, self.control.running.plan.draft)
            self.control.finished(now - start, now)
        if self._metrics is not None:
            self._metrics.update(now, self.telemetry, self.control)
        return result

    def _decide(self, batch: Any) -> None:
        """Decide what the step of ``batch`` does; all ranks run the same forwards, whatever their clocks say."""
        control, ahead = self.control, self._ahead
        if ahead is not None:
            ahead.settle()
        known = batch.seq_lens_cpu
        lens = [r.kv.kv_committed_len for r in batch.reqs] if known is None else known.tolist()
        plan = control.begin(batch.reqs, sum(lens))
        if ahead is not None:
            self._verify_planner.decide_ahead(batch)
            ahead.agree(self._seat.ranks)
        elif self._ranks > 1 and control.adaptive:
            packed = self._seat.ranks.broadcast(plan.packed(self.device), "plan")
            control.running.plan = StepPlan.unpacked(packed)

    def _draft_up_to_date(self) -> None:
        """Commit what prefills and plain steps left for the draft, under the draft's own placement."""
        if self._verify_executor.lagging:
            with self._draft_context():
                self._verify_executor.lagging.flush()

    def _known_cost(self, settings: Settings) -> None:
        """Take over a step cost that was measured before, where there is one.

        Raises:
            ArtifactError: the file named by ``DSPARK_COST`` is damaged or of something else.
        """
        self._ranks = get_parallel().tp_size
        self.cost_path: Path | None = None
        self.cost_fingerprint: dict[str, str] = {}
        self.profile_s: float | None = None
        if not self.control.adaptive or settings.cost == COST_ONLINE:
            return
        runner, device = self.model_runner, torch.device(self.device)
        self.cost_fingerprint = cost_store.fingerprint(
            target=str(runner.model_config.model_path),
            drafter=str(get_spec().speculative_draft_model_path),
            drafter_sha256=self.drafter_sha256 or "",
            device=cost_store.device_name(device, torch.get_num_threads()),
            tensor_parallel=self._ranks,
            dtype=runner.dtype,
            attention=get_context().resolved_server_args_dict().get("attention_backend"),
            kernels=self._ops.name,
            draft_vocabulary=self._drafted_tokens or "whole",
            placement=self._seat.placement,
            heads=self._seat.heads,
            gamma=self.gamma,
            timed="by the host" if self._ahead is None else "by the device, ahead",
            sglang=installed_version(),
            plugin=__version__,
        )
        if settings.cost != COST_AUTO:
            path = Path(settings.cost)
            known = cost_store.load(path, self.cost_fingerprint, self.control.cost)
            self.profile_s, self.control.cost_source = known.seconds, settings.cost
            return
        self.cost_path = cost_store.place(settings, self.cost_fingerprint)
        cached = cost_store.load_cached(self.cost_path, self.cost_fingerprint, self.control.cost)
        self.profile_s = None if cached is None else cached.seconds
        found = COST_UNMEASURED if cached is None else str(self.cost_path)
        self.control.cost_source = found

    def weight_update_runners(self) -> list[tuple[str, Any]]:
        """What SGLang updates of the drafter."""
        return self.weights.runners() if self._hosts_draft else []

    def catch_up(self) -> None:
        """Learn from every step there was, also from one that is still to end."""
        if self._ahead is not None:
            self._ahead.settle(running=0)

    def clear_info_records(self) -> None:
        """Start counting again; SGLang calls this."""
        if self._hosts_draft:
            self.catch_up()
        super().clear_info_records()

    def plan_no_sts(self) -> Callable[[], None]:
        """What serves without calibration."""
        return lambda: self.set_temperatures(torch.ones(self.gamma), "none")

    def plan_sts_file(self) -> Callable[[], None]:
        """What serves with the STS file as it is now.

        Raises:
            ArtifactError: it is damaged or belongs to another drafter.
        """
        given = get_spec().speculative_dspark_confidence_sts_path
        settings = msgspec.structs.replace(self._settings, sts=str(given or self._settings.sts))
        drafter = str(get_spec().speculative_draft_model_path)
        temperatures, source = load_temperatures(settings, drafter, self.gamma, self.drafter_sha256)
        return lambda: self.set_temperatures(temperatures, source)

    def plan_sts_refit(self) -> Callable[[], None]:
        """What serves with STS fitted to what was verified lately.

        Raises:
            ConfigError: too little was verified yet.
        """
        found = sts_refit.fit(self.control.reliability.blocks)
        source = f"fitted in service to {found.blocks} blocks"
        return lambda: self.set_temperatures(torch.tensor(found.temperatures), source)

    def plan_cost_file(self) -> Callable[[], None]:
        """What schedules by the cost file as it is now.

        Raises:
            ArtifactError: there is none, it is damaged, or it is of something else.
        """
        named = self._settings.cost not in (COST_AUTO, COST_ONLINE)
        path = Path(self._settings.cost) if named else self.cost_path
        if path is None:
            raise cost_store.missing("DSPARK_COST=auto or a path")
        found = CostModel(gamma=self.gamma)
        cost_store.load(path, self.cost_fingerprint, found)
        return lambda: self.control.cost.restore(found.state())

    def plan_save_cost(self) -> Callable[[], None]:
        """What keeps the step cost as it is known now for the next start of such a server.

        It ends the measurement at start-up, whatever came of that.

        Raises:
            ConfigError: there is no place for it, or another start would refuse it; the latter not
                while measuring, whose end must not fail.
            ArtifactError: the disk is full or may not be written; not while measuring either.
        """
        if self.cost_path is None:
            raise cost_store.missing("DSPARK_COST=auto")
        path = self.cost_path
        if self.control.measuring:
            return lambda: self._end_measurement(path)
        # Written here already: what cannot be written has to be refused, and applying may not fail.
        self._save_cost(path)
        return lambda: setattr(self.control, "cost_source", str(path))

    def _end_measurement(self, path: Path) -> None:
        self.profile_s = self.control.measured() or self.profile_s
        try:
            self._save_cost(path)
        except ConfigError as error:
            logger.warning("%s It is learned while serving, and measured at the next start.", error)
            self.control.cost_source = COST_ONLINE
        except ArtifactError as error:
            logger.warning("%s The cost is used, and measured again at the next start.", error)
            self.control.cost_source = COST_UNKEPT
        else:
            self.control.cost_source = str(path)

    def _save_cost(self, path: Path) -> None:
        cost_store.require_both_kinds(self.control.cost)
        if get_parallel().tp_rank == 0:
            cost = self.control.cost
            cost_store.save(path, self.cost_fingerprint, cost, seconds=self.profile_s)

    def set_temperatures(self, temperatures: torch.Tensor, source: str) -> None:
        """Serve with other STS temperatures from the next step on."""
        self._ops.set_temperatures(temperatures.float())
        self._sts_source = source
        self.control.reliability.forget()
        if self._ahead is not None:
            self._ahead.outdate()

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
            "sts": self._sts_source,
            "draft_vocabulary": self._drafted_tokens,
            "placement": self._seat.placement,
            "heads": self._seat.heads,
            "placement_microseconds": {} if self._placed is None else self._placed.microseconds,
            "ranks": self._seat.ranks.count,
            "schedule": self._schedule,
            "lookup": self._lookup is not None,
            "verification": self._verification,
            "temperatures": self._ops.temperatures,
            "drafter_sha256": self.drafter_sha256,
            "reliability": self.control.reliability.table(),
            "profile_s": self.profile_s,
            **self.telemetry.snapshot(),
            **self.control.snapshot(),
        }
