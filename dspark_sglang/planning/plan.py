"""A plan: does it fit, what takes the memory, how many requests, and with which command."""

from __future__ import annotations

import shlex
from typing import Any

import msgspec

from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.memory import Loading, Ranks, by_part
from dspark_sglang.planning import options as given
from dspark_sglang.planning.command import command
from dspark_sglang.planning.hardware import MIB, Hardware
from dspark_sglang.planning.model import Model, load
from dspark_sglang.planning.options import DEFAULT_CONTEXT, Options
from dspark_sglang.planning.rules import Case, Finding, apply
from dspark_sglang.planning.sizing import DRAFTER, Sized, Sizer

#: What every figure here is.
LABEL = "computed, not run"
#: Contexts that concurrency is given for.
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)


class DrafterCost(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a drafter's weights over all ranks, each counted once."""

    gross: int
    #: Of the MTP layer that a checkpoint without DSpark has in its place; 0 where there is none.
    mtp_layer: int
    net: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A plan for one machine. All bytes are of one GPU unless said otherwise."""

    target: str
    drafter: str | None
    hardware: Hardware
    tp: int
    attention_dp: int
    ep: int
    fits: bool = False
    #: Bytes left after the least that has to fit; negative: missing.
    headroom: int = 0
    #: The least that has to fit.
    requests: int
    context: int
    per_gpu_bytes: dict[str, int] = {}
    weights_by_part: dict[str, int] = {}
    drafter_bytes: DrafterCost | None
    #: Tokens of context that all requests of the server can hold together.
    tokens: int = 0
    #: Context length to requests at once.
    max_concurrency: dict[str, int] = {}
    #: Fewest ranks that the least fits on; None: none of them.
    smallest_tp: int | None = None
    mem_fraction_static: float = 0.0
    #: Environment and arguments; on several nodes that of the first. Empty where it is refused.
    command: str = ""
    findings: list[Finding]
    label: str = LABEL

    @property
    def refused(self) -> list[Finding]:
        """Why no server would start like this."""
        return [finding for finding in self.findings if finding.verdict == "refused"]


def make(
    target: str,
    drafter: str | None,
    machine: Hardware,
    options: Options | None = None,
    *,
    config_only: bool = False,
) -> Plan:
    """Plan a server.

    Args:
        target: model directory (configuration and index; weights are not read), or a published name.
        drafter: the same for a stand-alone drafter; None: the one the target bundles.
        machine: what it will run on.
        options: what is fixed beforehand.
        config_only: trust the configuration without an index.

    Raises:
        DSparkError: the input is wrong, or nothing can be said about it.
    """
    options = options or Options()
    given.check(options)
    loading = Loading(
        dtype=options.dtype,
        blackwell=machine.architecture == "sm100",
        marlin=options.moe_runner == "marlin",
        kv_element=given.kv_element(options),
        config_only=config_only,
        on_cpu=machine.on_cpu,
    )
    model = load(target, drafter, loading)
    if options.tp is not None and options.tp > machine.ranks:
        raise ConfigError(
            f"--tp is {options.tp}.",
            expected=f"at most {machine.ranks}, the GPUs of {machine.name}",
            fix="Choose a larger --hardware.",
        )
    if any(_marlin(model, machine, options)):
        model = load(
            target, drafter, msgspec.structs.replace(loading, marlin=True, config_only=True)
        )
    return _Planner(model, machine, options).plan()


def _marlin(model: Model, machine: Hardware, options: Options) -> list[bool]:
    """Whether narrow experts ask for Marlin's kernel, on the ranks that will be tried first."""
    ranks = [options.tp] if options.tp else list(given.candidates(machine))[:1]
    return [
        given.needs_marlin(options, model, machine, given.layout(options, model, tp))
        for tp in ranks
        if tp % options.attention_dp == 0 and tp % options.ep == 0
    ]


class _Planner:
    """Tries numbers of ranks for one model on one machine."""

    def __init__(self, model: Model, machine: Hardware, options: Options) -> None:
        self.model = model
        self.machine = machine
        self.options = options
        self.context = options.context or min(model.context, DEFAULT_CONTEXT)
        if self.context > model.context:
            raise ConfigError(
                f"--context is {self.context}.",
                expected=f"at most {model.context}, the model's longest",
                fix="Choose a shorter one.",
            )

    def plan(self) -> Plan:
        """The plan for the ranks asked for, or for as many as the machine has and the model takes."""
        wanted = [self.options.tp] if self.options.tp else list(given.candidates(self.machine))
        findings: dict[int, list[Finding]] = {tp: self._findings(tp) for tp in wanted}
        allowed = [tp for tp in wanted if not _refused(findings[tp])]
        if not allowed:
            layout = given.layout(self.options, self.model, wanted[0])
            layout = msgspec.structs.replace(layout, ep=self.options.ep)
            return self._plan(layout, findings[wanted[0]])
        sized = self._sizes(allowed)
        fitting = [tp for tp, found in sized.items() if found.headroom >= 0]
        chosen = next(iter(sized))
        return self._result(sized[chosen], findings[chosen], min(fitting, default=None))

    def _sizes(self, allowed: list[int]) -> dict[int, Sized]:
        """Those numbers of ranks that the weights can be shared over; an error if there is none."""
        sizer = Sizer(self.model, self.machine, self.options, self.context)
        found: dict[int, Sized] = {}
        for tp in allowed:
            try:
                found[tp] = sizer.size(tp)
            except ConfigError:
                if not found and tp == allowed[-1]:
                    raise
        return found

    def _findings(self, tp: int) -> list[Finding]:
        layout = given.layout(self.options, self.model, tp)
        return apply(Case(self.options, self.model, self.machine, layout))

    def _result(self, sized: Sized, findings: list[Finding], smallest: int | None) -> Plan:
        layout, reserved, pools = sized.layout, sized.reserved, sized.pools
        if sized.options != self.options:
            findings = [*findings, _tightened(sized.options)]
        drafted = sum(size for part, size in sized.weights.items() if part.startswith(DRAFTER))
        parts = {
            "target weights": sum(sized.weights.values()) - drafted,
            "drafter weights": drafted,
            "target KV": pools.target_bytes,
            "draft KV": pools.draft_bytes,
            "graphs": reserved.graphs,
            "runtime": self.machine.memory_mib * MIB - self.machine.usable,
        }
        # What the fraction keeps free, less what graphs take of it: eager steps live in this.
        free = self.machine.memory_mib * MIB - sum(parts.values())
        kept = round(self.machine.usable * (1 - reserved.mem_fraction)) - reserved.graphs
        parts["activations"] = max(0, min(kept, free)) if sized.headroom >= 0 else kept
        parts["unused"] = max(0, free - parts["activations"])
        return self._plan(
            layout,
            findings,
            fits=sized.headroom >= 0,
            headroom=sized.headroom,
            per_gpu_bytes=parts,
            weights_by_part=sized.weights,
            tokens=pools.tokens * layout.attention_dp,
            max_concurrency=self._concurrency(pools.tokens, sized),
            smallest_tp=smallest,
            mem_fraction_static=reserved.mem_fraction,
            command=shlex.join(command(self.model, self.machine, sized.options, layout, reserved)),
        )

    def _concurrency(self, tokens: int, sized: Sized) -> dict[str, int]:
        most, groups = sized.options.running, sized.layout.attention_dp
        reach = [length for length in CONTEXTS if length < self.model.context]
        window = self.model.gamma + 1
        return {
            str(length): min(most, tokens // (length + window) * groups)
            for length in (*reach, self.model.context)
        }

    def _drafter_cost(self) -> DrafterCost | None:
        if not self.model.draft_tensors:
            return None
        gross, replaced = (
            sum(by_part(tensors, Ranks()).values())
            for tensors in (self.model.draft_tensors, self.model.mtp_tensors)
        )
        return DrafterCost(gross=gross, mtp_layer=replaced, net=gross - replaced)

    def _plan(self, layout: Ranks, findings: list[Finding], **sized: Any) -> Plan:
        """A plan; without what was sized it says only why there is none."""
        return Plan(
            target=self.model.target.name,
            drafter=self.model.drafter.name if self.model.drafter else None,
            hardware=self.machine,
            tp=layout.tp,
            attention_dp=layout.attention_dp,
            ep=layout.ep,
            requests=self.options.requests,
            context=self.context,
            drafter_bytes=self._drafter_cost(),
            findings=findings,
            **sized,
        )


def _tightened(options: Options) -> Finding:
    return Finding(
        "tighter",
        "added",
        f"With SGLang's defaults it would not fit: the command takes prompts in steps of "
        f"{options.chunked_prefill} tokens and at most {options.running} requests at once.",
        "srt/arg_groups/memory_hook.py:67",
    )


def _refused(findings: list[Finding]) -> bool:
    return any(finding.verdict == "refused" for finding in findings)
