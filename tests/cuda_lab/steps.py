"""Steps of a served batch on a fake device, and what they cost: the cases of the ledger."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch

from tests.cuda_lab.fake_device import FakeDevice, Seen
from tests.cuda_lab.world import GAMMA, World

Kind = Literal["greedy", "sampled", "filtered", "penalised"]
KINDS: tuple[Kind, ...] = ("greedy", "sampled", "filtered", "penalised")
#: As a top_k: more than any vocabulary, SGLang's way to say that all tokens may be drawn.
ALL = 1 << 30
#: Steps that are run before one is counted: what is made once is made by then.
WARM = 2


def request(kind: Kind, index: int) -> Any:
    """A request as SGLang's scheduler has it."""
    penalised = kind == "penalised"
    params = SimpleNamespace(
        frequency_penalty=0.3 if penalised else 0.0, presence_penalty=0.0, repetition_penalty=1.0,
        min_new_tokens=0, min_p=0.0, ignore_eos=False, stop_token_ids=None, stop_strs=None,
        stop_regex_strs=None, logit_bias=None, custom_params=None, max_new_tokens=512,
        top_k=1 if kind == "greedy" else 20 if kind == "filtered" else ALL,
        temperature=1.0,
    )  # fmt: skip
    return SimpleNamespace(
        rid=str(index), origin_input_ids=[1] * 100, output_ids=[1] * 8, sampling_params=params,
        custom_logit_processor=None, tokenizer=SimpleNamespace(eos_token_id=2), lora_id=None,
        eos_token_ids={2, 3}, vocab_size=None, grammar=None, to_finish=None, finished_len=None,
        kv=SimpleNamespace(kv_committed_len=108, kv_allocated_len=160), decode_batch_idx=0,
        return_hidden_states=False, finished=lambda: False, input_embeds=None,
        multimodal_inputs=None,
    )  # fmt: skip


class Sampling(SimpleNamespace):
    """``SamplingBatchInfo``."""

    def __len__(self) -> int:
        return len(self.temperatures)


def sampling(device: FakeDevice, kind: Kind, requests: int) -> Any:
    """``SamplingBatchInfo`` of a batch of one kind."""
    greedy, filtered = kind == "greedy", kind == "filtered"
    penalties = device.empty(requests, 151_936) if kind == "penalised" else None
    return Sampling(
        temperatures=device.empty(requests, 1), top_ks=device.empty(requests, dtype=torch.int32),
        top_ps=device.empty(requests), min_ps=device.empty(requests),
        is_all_greedy=greedy, is_any_greedy=greedy, need_top_k_sampling=filtered,
        need_top_p_sampling=filtered, need_min_p_sampling=False, has_custom_logit_processor=False,
        sampling_seed=None, logit_bias=None, sampling_mask_batch_indices=None,
        acc_additive_penalties=penalties, acc_linear_penalties=penalties,
        acc_scaling_penalties=None, penalizer_orchestrator=None, vocab_mask=None,
        grammar_mask=None, grammars=None,
    )  # fmt: skip


def batch(world: World, kind: Kind, requests: int) -> Any:
    """``ScheduleBatch`` of a decode step."""
    device = world.device
    lens = torch.full((requests,), 108, dtype=torch.int64)
    return SimpleNamespace(
        reqs=[request(kind, i) for i in range(requests)],
        forward_mode=SimpleNamespace(
            is_extend=lambda: False, is_idle=lambda: False, is_decode=lambda: True
        ),
        spec_algorithm=None, sampling_info=sampling(device, kind, requests), has_grammar=False,
        return_logprob=False, seq_lens=device.empty(requests, dtype=torch.int64),
        # Attention that needs no lengths on the host is given none under overlap.
        seq_lens_cpu=None if world.overlap else lens, seq_lens_sum=None,
        req_pool_indices=device.empty(requests, dtype=torch.int64),
        req_pool_indices_cpu=torch.arange(requests), req_to_token_pool=world.runner.req_to_token_pool,
        spec_info=draft_input(device, requests), input_ids=None, out_cache_loc=None,
        global_num_tokens=None, global_num_tokens_for_logprob=None, is_extend_in_batch=False,
        can_run_decode_cuda_graph=True, dp_spec_prefill_coordination_applied=False,
        forward_iter=0, spec_verify_tier_num_tokens=0, mamba_track_indices=None,
        global_spec_verify_tier_num_tokens=None, tree_cache=None, orig_seq_lens=None,
    )  # fmt: skip


def draft_input(device: FakeDevice, requests: int) -> Any:
    """What the last step left: ``DFlashDraftInputV2``."""
    from sglang.srt.speculative.draft_worker_common import make_draft_input_v2

    with device.ignored():
        made = make_draft_input_v2(
            bonus_tokens=device.empty(requests, dtype=torch.int64),
            new_seq_lens=device.empty(requests, dtype=torch.int64),
        )
    made.nxt_kv_lens_cpu = torch.full((requests,), 160, dtype=torch.int32)
    made.nxt_kv_lens_sum = 160 * requests
    made.max_top_k, made.uniform_top_k_value = 20, 20
    return made


def run(world: World, given: Any) -> Any:
    """One step of a batch, as the scheduler's loop calls it."""
    given.spec_info = draft_input(world.device, len(given.reqs))
    world.device.step += 1
    made = world.worker._forward_decode(given, lambda *_, **__: None)
    if world.ours:
        faults = world.worker.faults
        assert faults.stopped is None and not any(faults.counts.values()), faults.counts
    return made


class Step(NamedTuple):
    """What one step asked of the device."""

    launches: int
    waits: int
    pageable: int
    collectives: int
    seen: tuple[Seen, ...]

    @classmethod
    def of(cls, device: FakeDevice) -> Step:
        waits = len(device.of("wait"))
        return cls(
            device.count(), waits, len(device.of("pageable")), len(device.of("collective")),
            tuple(device.seen),
        )  # fmt: skip


def measure(world: World, kind: Kind, requests: int, *, drafts: bool = True) -> tuple[Step, Step]:
    """A step of a standing batch, and the first one after its requests have changed."""
    if world.ours and world.worker.scheduler.adaptive:
        world.worker.commands.prepare("dspark_speculation", 1.0 if drafts else 0.0)()
    standing = batch(world, kind, requests)
    for _ in range(WARM):
        run(world, standing)
    world.device.clear()
    run(world, standing)
    steady = Step.of(world.device)
    changed = batch(world, kind, requests)
    world.device.clear()
    run(world, changed)
    first = Step.of(world.device)
    world.device.clear()
    return steady, first


__all__ = ["GAMMA", "KINDS", "Kind", "Step", "batch", "measure", "request", "run"]
