"""The worker SGLang runs in DSPARK's place: its lifecycle, our algorithm."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from sglang.srt.runtime_context import get_observability, get_parallel, get_schedule, get_spec
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2

from dspark_sglang import __version__
from dspark_sglang.artifacts import STS_FILE, read_sts
from dspark_sglang.checkpoint import weights_digest
from dspark_sglang.config import Settings, Verification, read_settings
from dspark_sglang.core.cost import OnlineCost
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.draft_head import DraftHead
from dspark_sglang.serving.metrics import announce
from dspark_sglang.serving.ops import Ops, choose
from dspark_sglang.serving.planner import Planner
from dspark_sglang.serving.proposer import Proposer
from dspark_sglang.serving.telemetry import StepObservers, Telemetry
from dspark_sglang.serving.verifier import Verifier

logger = logging.getLogger(__name__)

#: Drafting and acceptance draw from different streams than SGLang's sampler.
_SEED_DOMAIN = 0x6A09E667F3BCC908
_MARKOV_HEADS = ("VanillaMarkov", "GatedMarkovHead", "RNNHead")


def load_temperatures(settings: Settings, drafter: str, gamma: int) -> tuple[torch.Tensor, str]:
    """STS temperatures for the running drafter and where they came from.

    Returns:
        ``[gamma]`` float32 and the file's path, or ones and ``"none"``.

    Raises:
        ArtifactError: the file named by ``DSPARK_STS``, or the one beside the weights, is damaged
            or belongs to another drafter.
    """
    directory = Path(drafter)
    path = Path(settings.sts) if settings.sts else directory / STS_FILE
    if not settings.sts and not path.is_file():
        return torch.ones(gamma), "none"
    digest = weights_digest(directory) if directory.is_dir() else None
    artifact = read_sts(path, gamma=gamma, drafter_sha256=digest)
    return torch.tensor(artifact.temperatures), str(path)


class DSparkWorker(DSparkWorkerV2):
    """Builds SGLang's worker, then puts our proposer, planner and verifier in its place."""

    _proposer: Any
    _verify_planner: Any
    _verify_executor: Any
    _verify_epilogue: Any
    _draft_head: DraftHead | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self._hosts_draft:
            return
        settings = read_settings()
        self.telemetry = Telemetry(gamma=self.gamma)
        # Under overlap the host only launches a round and cannot time it: verify everything.
        times_rounds = bool(get_schedule().disable_overlap_schedule)
        adaptive = times_rounds and settings.schedule != "all"
        self.cost = OnlineCost() if adaptive else None
        self._schedule = settings.schedule if adaptive else "all"
        self._remove_folded_parts()
        self._require_known_heads()
        given = get_spec().speculative_dspark_confidence_sts_path
        if given:  # SGLang's own flag: its constructor has read and checked the file
            temperatures = self.draft_model.confidence_head.sts_temperatures
            self._sts_source = str(given)
        else:
            temperatures, self._sts_source = load_temperatures(
                settings, get_spec().speculative_draft_model_path, self.gamma
            )
        self._install_parts(settings, temperatures)
        if get_parallel().tp_rank == 0:
            self._announce()

    def _announce(self) -> None:
        """One line in the log, and a metric where SGLang serves metrics."""
        logger.info(
            "dspark %s is serving DSPARK: gamma=%d, markov=%s, kernels=%s, schedule=%s, sts=%s, "
            "draft vocabulary=%s",
            __version__,
            self.gamma,
            self._ops.markov.kind,
            self._ops.name,
            self._schedule,
            self._sts_source,
            self._drafted_tokens or "whole",
        )
        if get_observability().enable_metrics:
            announce(
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
        return None if self._draft_head is None else len(self._draft_head.tokens)

    def _require_known_heads(self) -> None:
        """Refuse drafters whose heads this plugin would read wrongly.

        Raises:
            CompatibilityError: a head of another kind, one sharded over ranks, or none.
        """
        head, confidence = self.draft_model.markov_head, self.draft_model.confidence_head
        found = type(head).__name__
        if found not in _MARKOV_HEADS or head.vocab_shard is not None or confidence is None:
            raise CompatibilityError(
                f"The drafter {type(self.draft_model).__name__} has a {found} "
                f"{'sharded over ranks ' if getattr(head, 'vocab_shard', None) else ''}and "
                f"{'a' if confidence is not None else 'no'} confidence head.",
                expected=f"an unsharded {' or '.join(_MARKOV_HEADS)} and a confidence head",
                fix="Serve it with SGLang's builtin: DSPARK_PLUGIN=off.",
            )

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
        self._ops: Ops = choose.make(
            settings.kernels,
            device=torch.device(self.device),
            markov=MarkovHead.from_module(self.draft_model.markov_head),
            confidence=ConfidenceHead.from_module(self.draft_model.confidence_head, temperatures),
            generator=generator,
            verification=self._verification,
            telemetry=self.telemetry,
        )
        if settings.draft_vocab == "auto":
            folder = Path(get_spec().speculative_draft_model_path)
            self._draft_head = DraftHead.beside(folder, self.draft_model)
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
        proposer.bind(ops=self._ops, telemetry=self.telemetry, head=self._draft_head)
        planner = Planner(
            draft_model=self.draft_model,
            gamma=self.gamma,
            model_runner=self.model_runner,
            device=self.device,
            tp_rank=get_parallel().tp_rank,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
            tp_sync=self._tp_sync,
        )
        lagged = settings.schedule == "lagged"
        planner.bind(cost=self.cost, lagged=lagged, ops=self._ops, telemetry=self.telemetry)
        verifier = Verifier(
            target_worker=self.target_worker,
            gamma=self.gamma,
            verify_num_draft_tokens=self.verify_num_draft_tokens,
            model_runner=self.model_runner,
            kv_injector=self._kv_injector,
            tp_sync=self._tp_sync,
        )
        verifier.bind(planner=planner, ops=self._ops, telemetry=self.telemetry)
        self._proposer, self._verify_planner, self._verify_executor = proposer, planner, verifier
        self._observers = StepObservers(self.telemetry)

    def _forward_decode(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        before = self.telemetry.verified_tokens
        result = super()._forward_decode(batch, *args, **kwargs)
        requests = len(batch.reqs) if batch.reqs is not None else 0
        if requests and self.cost is not None:
            tokens = requests + self.telemetry.verified_tokens - before
            self.cost.observe(tokens, time.perf_counter() - start)
        return result

    def dump_info_records(self) -> dict[str, Any] | None:
        """Our status, served by SGLang at ``/server_info``."""
        if not self._hosts_draft:
            return None
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
            "schedule": self._schedule,
            "verification": self._verification,
            "cost": None if self.cost is None else self.cost.coefficients,
            **self.telemetry.snapshot(),
        }
