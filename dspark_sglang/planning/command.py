"""The command that serves what was planned."""

from __future__ import annotations

import shlex

import msgspec

from dspark_sglang.layouts.memory import Ranks
from dspark_sglang.planning.hardware import Hardware
from dspark_sglang.planning.model import Model
from dspark_sglang.planning.options import Options, needs_marlin
from dspark_sglang.planning.sizing import Reserve

#: Stands for the address of the first node where there are several.
HEAD_NODE = "HEAD_NODE_ADDRESS"
_PORT = 20000


def command(
    model: Model, machine: Hardware, options: Options, layout: Ranks, reserved: Reserve
) -> list[str]:
    """Environment and arguments, one word an entry; on several nodes, those of the first."""
    words = _environment(model, options, layout)
    words += ["sglang", "serve", "--model-path", model.target.name]
    if model.drafter is not None:
        words += ["--speculative-algorithm", "DSPARK"]
        if not model.bundled:
            words += ["--speculative-draft-model-path", model.drafter.name]
    words += _ranks(machine, options, layout)
    words += _kernels(model, machine, options, layout)
    words += ["--max-running-requests", str(options.running)]
    if options.chunked_prefill is not None:
        words += ["--chunked-prefill-size", str(options.chunked_prefill)]
    if options.max_total_tokens is not None:
        words += ["--max-total-tokens", str(options.max_total_tokens)]
    return [*words, "--mem-fraction-static", f"{reserved.mem_fraction:.3f}", *_features(options)]


def _environment(model: Model, options: Options, layout: Ranks) -> list[str]:
    words = []
    if model.drafter is not None and options.builtin:
        words.append("DSPARK_PLUGIN=off")
    elif (
        model.drafter is not None
        and layout.tp > 1
        and options.attention_dp == 1
        and not model.bundled
    ):
        # What the plan sizes; a bundled drafter has no other place.
        words.append("DSPARK_PLACEMENT=shard")
    if layout.shared_experts_whole and options.moe_a2a == "none":
        words.append("SGLANG_SHARED_EXPERT_TP1=1")
    return words


def _ranks(machine: Hardware, options: Options, layout: Ranks) -> list[str]:
    words = []
    if layout.tp > 1:
        words += ["--tp-size", str(layout.tp)]
    if layout.tp > machine.gpus:
        nodes = layout.tp // machine.gpus
        words += ["--nnodes", str(nodes), "--node-rank", "0"]
        words += ["--dist-init-addr", f"{HEAD_NODE}:{_PORT}"]
    if layout.ep > 1:
        words += ["--ep-size", str(layout.ep)]
    if layout.attention_dp > 1:
        words += ["--attn-dp-size", str(layout.attention_dp), "--enable-dp-lm-head"]
    if options.pd != "null":
        words += ["--disaggregation-mode", options.pd]
    return words


def _kernels(model: Model, machine: Hardware, options: Options, layout: Ranks) -> list[str]:
    runner = options.moe_runner
    if runner is None and needs_marlin(options, model, machine, layout):
        runner = "marlin"
    chosen = {
        "--moe-runner-backend": runner,
        "--moe-a2a-backend": None if options.moe_a2a == "none" else options.moe_a2a,
        "--attention-backend": options.attention_backend,
        "--dtype": options.dtype,
        "--kv-cache-dtype": None if options.kv_cache_dtype == "auto" else options.kv_cache_dtype,
        "--page-size": None if options.page_size is None else str(options.page_size),
    }
    return [word for flag, value in chosen.items() if value for word in (flag, value)]


def _features(options: Options) -> list[str]:
    flags = {
        "--enable-lora": options.lora,
        "--enable-hierarchical-cache": options.hicache,
        "--disable-radix-cache": not options.radix_cache,
        "--enable-eplb": options.eplb,
    }
    return [flag for flag, on in flags.items() if on]


#: What the base's own arguments say already, with how many values follow.
_IN_BASE = {"--model-path": 1, "--speculative-algorithm": 1, "--speculative-draft-model-path": 1}


class Planned(msgspec.Struct, frozen=True):
    """The command that ``dspark plan`` recommends."""

    asked: str
    environment: dict[str, str]
    flags: list[str]


def split(command: str, asked: str) -> Planned:
    """Environment and flags of a planned command, without what the base says already."""
    words = shlex.split(command)
    serve = words.index("serve")
    environment = dict(word.split("=", 1) for word in words[: serve - 1])
    rest, flags = words[serve + 1 :], []
    while rest:
        word = rest.pop(0)
        if word in _IN_BASE:
            del rest[: _IN_BASE[word]]
        else:
            flags.append(word)
    return Planned(asked, environment, flags)
