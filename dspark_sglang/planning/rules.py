"""Combinations that SGLang 0.5.23 or this plugin refuses, adds to or notes, each with its source.

A rule is data. ``file`` is inside the ``sglang`` package, or inside this one where it starts with
``dspark_sglang/``; ``text`` stands in that line, which ``tests/contract/test_plan_rules.py`` checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from dspark_sglang.layouts.dense.memory import GEMMA3, GEMMA4
from dspark_sglang.layouts.memory import Ranks
from dspark_sglang.layouts.v4.config import ARCHITECTURE as V4
from dspark_sglang.layouts.v4.memory import is_quantised
from dspark_sglang.planning.hardware import Hardware
from dspark_sglang.planning.model import Model
from dspark_sglang.planning.options import Options, expert_width, needs_marlin
from dspark_sglang.verify_mode import Server, why_whole

Verdict = Literal["refused", "added", "note"]


class Case(msgspec.Struct, frozen=True):
    """What a rule looks at."""

    options: Options
    model: Model
    machine: Hardware
    layout: Ranks

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted."""
        return self.model.drafter is not None

    @property
    def ours(self) -> bool:
        """Whether this plugin drafts, not SGLang's builtin."""
        return self.drafts and not self.options.builtin


class Rule(msgspec.Struct, frozen=True):
    """One rule."""

    id: str
    verdict: Verdict
    applies: Callable[[Case], bool]
    #: What it means here and, where something is refused, what to do.
    message: str
    file: str
    #: None in this package, whose lines move.
    line: int | None
    text: str

    @property
    def source(self) -> str:
        """Where it stands."""
        return self.file if self.line is None else f"{self.file}:{self.line}"


class Finding(msgspec.Struct, frozen=True):
    """A rule that applies."""

    rule: str
    verdict: Verdict
    message: str
    source: str


_SPECULATIVE = "srt/arg_groups/speculative_hook.py"
_PARALLEL = "srt/arg_groups/parallel_hook.py"
_ARGUMENTS = "dspark_sglang/serving/arguments.py"


def _narrow(case: Case, multiple: int) -> bool:
    width = expert_width(case.model, case.layout)
    return width is not None and width % multiple != 0


def _whole(case: Case) -> list[str]:
    """Why this plugin's server verifies whole blocks; empty where it may verify any."""
    if not case.ours or case.machine.on_cpu:
        return []
    return why_whole(
        Server(
            backend=case.options.attention_backend,
            xqa=case.machine.architecture == "sm90",
            lora=case.options.lora,
            attention_dp=case.options.attention_dp,
            moe_a2a=case.options.moe_a2a,
            bundled=case.model.bundled,
        )
    )


def _marlin(case: Case) -> bool:
    automatic = needs_marlin(case.options, case.model, case.machine, case.layout)
    return case.options.moe_runner == "marlin" or automatic


RULES = (
    Rule("dp-lm-head", "added", lambda case: case.drafts and case.options.attention_dp > 1,
         "Attention data parallelism with DSPARK needs --enable-dp-lm-head; the command has it.",
         _SPECULATIVE, 676, "DSpark with dp attention requires --enable-dp-lm-head."),
    Rule("dp-a2a", "refused",
         lambda case: (case.drafts and case.options.attention_dp > 1
             and case.options.moe_a2a not in ("none", "megamoe", "mori")),
         "DSPARK with attention data parallelism takes --moe-a2a-backend none, megamoe or mori.",
         _SPECULATIVE, 679, "DSpark with dp attention supports moe_a2a_backend"),
    Rule("dp-divides", "refused", lambda case: case.layout.tp % case.options.attention_dp != 0,
         "--attn-dp-size has to divide --tp-size.",
         _PARALLEL, 326, "assert cfg.tp_size % cfg.attn_dp_size == 0"),
    Rule("ep-divides", "refused", lambda case: case.layout.tp % case.options.ep != 0,
         "--ep-size has to divide --tp-size.",
         "srt/runtime_context.py", 308, "tp_size == moe_ep_size * moe_dp_size"),
    Rule("a2a-ep", "note", lambda case: case.options.moe_a2a != "none",
         "An all-to-all of experts makes --ep-size the number of ranks and keeps shared experts whole on every rank.",
         "srt/arg_groups/overrides.py", 1619, '{"ep_size": view.tp_size}'),
    Rule("pd-plugin", "refused", lambda case: case.ours and case.options.pd != "null",
         "This plugin refuses PD disaggregation. Serve without it, or with DSPARK_PLUGIN=off (--builtin).",
         _ARGUMENTS, None, "--disaggregation-mode"),
    Rule("eplb-needs-ep", "refused", lambda case: case.options.eplb and case.options.ep == 1,
         "--enable-eplb needs --ep-size above 1.",
         _PARALLEL, 791, "assert resolved_view(server_args).ep_size > 1"),
    Rule("eplb-copies", "note", lambda case: case.options.eplb,
         "Redundant experts (--ep-num-redundant-experts) are not in these figures.",
         "srt/models/deepseek_v2.py", 751, "get_exec().moe.ep_num_redundant_experts"),
    Rule("v4-page", "refused",
         lambda case: (case.model.architecture == V4 and case.options.page_size not in (None, case.model.page_size)),
         "DeepSeek-V4 takes --page-size 256. Leave it out.",
         "srt/mem_cache/kv_cache_configurator.py", 2070, "page_size must be 256"),
    Rule("v4-backend", "refused",
         lambda case: case.model.architecture == V4 and case.options.attention_backend not in (None, "dsv4"),
         "DeepSeek-V4 has an attention backend of its own, dsv4. Leave --attention-backend out.",
         "srt/arg_groups/model_overrides/deepseek_v4.py", 24, '"attention_backend": "dsv4"'),
    Rule("v4-groups", "refused",
         lambda case: (case.model.architecture == V4
             and int(case.model.target.config["o_groups"]) % case.layout.attention_tp != 0),
         "The groups of the output projection (o_groups) do not divide over these ranks. Choose a smaller --tp or "
         "--attention-dp.",
         "srt/models/deepseek_v4.py", 1037, "self.n_groups // self.attn_tp_size"),
    Rule("v4-fp4-width", "refused",
         lambda case: (case.model.architecture == V4 and case.machine.architecture == "sm90" and not _marlin(case)
             and _narrow(case, 128)),
         "Experts are too narrow on one rank for Hopper's fp4 kernel (multiples of 128). Use --ep or "
         "--moe-runner-backend marlin.",
         "srt/layers/quantization/mxfp4_flashinfer_cutlass_moe.py", 70, "Mxfp4FlashinferCutlassMoEMethod requires hidden_size and"),
    Rule("v4-marlin", "added", lambda case: case.options.moe_runner is None and _marlin(case),
         "Experts are narrower than 128 on one rank: the command takes --moe-runner-backend marlin.",
         "srt/layers/quantization/mxfp4_marlin_moe.py", 83, "Hopper repacking pads the loaded"),
    Rule("marlin-hopper", "refused",
         lambda case: case.options.moe_runner == "marlin" and case.machine.architecture != "sm90",
         "Marlin's fp4 experts need Hopper (sm90). Leave --moe-runner-backend out.",
         "srt/layers/quantization/mxfp4_marlin_moe.py", 161, "MXFP4 Marlin requires SM90"),
    Rule("shared-experts-whole", "added",
         lambda case: case.layout.shared_experts_whole and case.options.moe_a2a == "none",
         "Shared experts do not divide into whole fp8 blocks: SGLANG_SHARED_EXPERT_TP1=1 keeps them whole on every "
         "rank.",
         "srt/models/deepseek_v2.py", 886, "envs.SGLANG_SHARED_EXPERT_TP1.get()"),
    Rule("v4-plain", "refused",
         lambda case: (case.model.architecture == V4 and not is_quantised(case.model.target.config)
             and not case.machine.on_cpu),
         "DeepSeek-V4 in plain weights is planned for CPUs only. Use the published checkpoint, or --hardware with a "
         "CPU.",
         "dspark_sglang/layouts/v4/memory.py", None, "def on_cpu("),
    Rule("v4-plugin", "note", lambda case: case.ours and case.model.bundled and not case.machine.on_cpu,
         "This plugin drafts with the bundled drafter. That was never run on a GPU: it is tested on a CPU with a "
         "tiny bundle.",
         "dspark_sglang/serving/draft_model.py", None, "class V4DraftModel"),
    Rule("whole-blocks", "note", lambda case: bool(_whole(case)),
         "SGLang verifies whole blocks here (SGLANG_RAGGED_VERIFY_MODE=static): a step drafts and verifies all of it, or, on one "
         "rank without LoRA, decodes. "
         "Steps that verify what pays need --attention-backend fa3, fa4 or, on Blackwell, trtllm_mha, and no LoRA, nor "
         "attention data parallelism with a drafter of its own or an expert all-to-all.",
         "srt/layers/attention/base_attn_backend.py", 65, "supports_ragged_verify_graph: bool = False"),
    Rule("capture", "refused", lambda case: case.drafts and case.model.architecture == GEMMA3,
         "SGLang's Gemma 3 cannot hand its states to a drafter. Serve it without DSPARK.",
         "srt/model_executor/model_runner_components/attention_backend_setup.py", 70, "set_dspark_layers_to_capture nor set_dflash_layers_to_capture"),
    Rule("gemma4-backend", "note",
         lambda case: (case.ours and case.model.architecture == GEMMA4 and not case.machine.on_cpu
             and case.options.attention_backend is None),
         "For Gemma 4 SGLang may choose Triton, which verifies whole blocks only. With --attention-backend fa4 or "
         "trtllm_mha steps verify what pays.",
         "srt/arg_groups/model_hook.py", 658, "Gemma4 only supports"),
    Rule("gemma4-cpu", "refused", lambda case: case.machine.on_cpu and case.model.architecture == GEMMA4,
         "SGLang does not take this plugin's CPU attention for Gemma 4. Choose --hardware with GPUs.",
         "srt/arg_groups/model_hook.py", 658, "Gemma4 only supports"),
    Rule("hicache-radix", "refused", lambda case: case.options.hicache and not case.options.radix_cache,
         "--enable-hierarchical-cache and --disable-radix-cache exclude each other.",
         "srt/arg_groups/kv_cache_hook.py", 395, "enable-hierarchical-cache and disable-radix-cache"),
    Rule("hicache-host", "note", lambda case: case.options.hicache,
         "HiCache keeps a copy in host memory, twice the device pool unless told otherwise; it is not in these "
         "figures.",
         "srt/arg_groups/hicache_hook.py", 121, "buffer_only"),
    Rule("running-default", "note", lambda case: case.drafts and case.model.architecture != V4,
         "Without --max-running-requests SGLang sets 48 for DSPARK.",
         _SPECULATIVE, 856, "max_running_requests=48"),
    Rule("running-default-v4", "note", lambda case: case.model.architecture == V4,
         "Without --max-running-requests SGLang sets 256 for DeepSeek-V4, drafting or not, and every request takes "
         "fixed memory.",
         "srt/arg_groups/deepseek_v4_hook.py", 142, "max_running_requests=256"),
    Rule("v4-draft-budget", "note", lambda case: case.model.bundled and case.drafts,
         "SGLang budgets one draft layer of V4's window pool and allocates one for each stage; the rest comes out of"
         " its reserve.",
         "srt/model_executor/pool_configurator.py", 1253, "draft_layers = 1"),
    Rule("draft-heads", "refused",
         lambda case: (case.drafts and not case.model.bundled
             and any(heads % case.layout.tp for heads in case.model.heads[1:])),
         "The drafter's attention heads do not divide over these ranks: this plugin then keeps it whole on a rank, "
         "which is not planned, and the builtin cannot serve it. Choose another --tp.",
         "srt/models/dflash.py", 215, "assert self.total_num_heads % tp_size == 0"),
    Rule("heads", "refused",
         lambda case: (case.layout.tp % case.options.attention_dp == 0
             and case.model.heads[0] % case.layout.attention_tp != 0),
         "The target's attention heads do not divide over these ranks. Choose another --tp.",
         "srt/models/llama.py", 183, "assert self.total_num_heads % tp_size == 0"),
    Rule("cpu-ranks", "refused",
         lambda case: case.machine.on_cpu and (case.layout.tp > 1 or case.options.attention_dp > 1),
         "Several ranks of the CPU platform are not planned. Leave --tp and --attention-dp out.",
         _ARGUMENTS, None, "--dp-size with attention data parallelism"),
)  # fmt: skip


def apply(case: Case) -> list[Finding]:
    """Every rule that applies, in their order."""
    return [
        Finding(rule.id, rule.verdict, rule.message, rule.source)
        for rule in RULES
        if rule.applies(case)
    ]
