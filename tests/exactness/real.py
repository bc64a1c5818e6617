"""The parts of the proof that need a real target: greedy, seeded and sampled text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tests.exactness import prompts, texts
from tests.exactness.distribution import Output
from tests.exactness.statistics import two_sample
from tests.exactness.store import Answers, Clock
from tests.exactness.texts import CHUNK, Phase

#: KV slots of the server that must retract, and how boldly it admits requests.
_FEW = ("--max-total-tokens", "1900", "--schedule-conservativeness", "0.05")
_CHUNKED = ("--chunked-prefill-size", str(CHUNK))
_SEEDED = ("--enable-deterministic-inference", "--sampling-backend", "pytorch")
BF16_PROMPTS = 36
SEEDED_PROMPTS = 32


class Real(NamedTuple):
    """What to ask of the real target."""

    out: Path
    target: Path
    drafter: Path
    greedy_prompts: int
    draws: int

    def encoder(self) -> prompts.Encoder:
        """The target's tokenizer."""
        return prompts.Encoder(self.target)


def pair(real: Real, name: str, dtype: str, flags: tuple[str, ...], **more: Any) -> list[Phase]:
    """The same requests without and with DSPARK."""
    plain = {**more, "aborts": False}
    return [
        Phase(f"{name}-plain", real.target, None, dtype, flags, **plain),
        Phase(f"{name}-dspark", real.target, real.drafter, dtype, flags, **more),
    ]


def phases(real: Real, parts: set[str]) -> dict[str, list[Phase]]:
    """Servers and their requests, by part: the plain one first."""
    encoder = real.encoder()
    asks = tuple(prompts.greedy(encoder, real.greedy_prompts))
    retracted = tuple(prompts.retracted(encoder, min(prompts.RETRACTED, real.greedy_prompts)))
    bf16 = tuple(msgspec.structs.replace(ask, at_once=4) for ask in asks[:BF16_PROMPTS])
    seeded = tuple(prompts.seeded(encoder, min(SEEDED_PROMPTS, real.greedy_prompts)))
    made: dict[str, list[Phase]] = {}
    if "greedy" in parts:
        made["greedy"] = pair(real, "greedy", "float32", _CHUNKED, asks=asks, aborts=True)
        made["retracted"] = pair(real, "retracted", "float32", _FEW, asks=retracted)
        made["bf16"] = pair(real, "bf16", "bfloat16", (), asks=bf16)
    if "two-sample" in parts:
        prompt = tuple(asks[0].tokens)
        made["two-sample"] = pair(
            real, "two-sample", "float32", ("--max-running-requests", "32"),
            asks=(), prompt=prompt, draws=real.draws,
        )  # fmt: skip
    if "seeded" in parts:
        made["seeded"] = pair(real, "seeded", "float32", _SEEDED, asks=seeded)
    return made


def collect(real: Real, parts: set[str], *, clock: Clock) -> dict[str, Any]:
    """Ask every server what is missing and compare; the entries of the summary."""
    entries: dict[str, Any] = {}
    for part, both in phases(real, parts).items():
        answers = [texts.collect(phase, real.out, clock=clock) for phase in both]
        done = all(texts.complete(p, a) for p, a in zip(both, answers, strict=True))
        entries |= _compare(part, both[0], answers, real.target)
        entries[f"{_entry(part)}_complete"] = done
    return entries


def _entry(part: str) -> str:
    """How the entries of a part in the summary begin."""
    return part.replace("-", "_")


def _compare(part: str, phase: Phase, answers: list[Answers], target: Path) -> dict[str, Any]:
    plain, ours = answers
    name = _entry(part)
    if part == "two-sample":
        first, second = (_outputs(piece) for piece in answers)
        if not first or not second:
            return {name: None}
        test = two_sample(first, second)
        samples = [sum(first.values()), sum(second.values())]
        return {name: {"p_value": test.p_value, "freedom": test.freedom, "samples": samples}}
    same, total = texts.equal(phase.asks, plain, ours)
    entries: dict[str, Any] = {f"{name}_equal": same, f"{name}_total": total}
    if part != "bf16":
        found = texts.differences(phase.asks, plain, ours, target)
        entries[f"{name}_near_ties"] = sum(d.near_tie for d in found) if part != "seeded" else 0
        entries[f"{name}_different"] = [d._asdict() for d in found]
    if part == "retracted":
        entries["retractions"] = ours.events.get("retracted", 0)
        entries["retractions_expected"] = total >= prompts.RETRACTED
    if part == "greedy":
        entries["greedy_aborts"] = ours.events.get("aborted", 0)
    return entries


def _outputs(piece: Answers) -> dict[Output, int]:
    return {tuple(map(int, name.split())): count for name, count in piece.drawn.items()}
