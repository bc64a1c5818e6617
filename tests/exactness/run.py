"""The whole proof: parts in order, each resumable, and the summary of what is there so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from dspark_sglang.artifacts import write_bytes
from dspark_sglang.errors import ConfigError
from dspark_sglang.provenance import commit, machine, versions
from tests.exactness import sampled
from tests.exactness.distribution import Distribution
from tests.exactness.options import Option
from tests.exactness.real import Real, collect
from tests.exactness.sampled import Setting
from tests.exactness.statistics import holm
from tests.exactness.store import Clock, Judged

PARTS = ("options", "mutants", "greedy", "two-sample", "seeded")
#: Chance that a correct plugin fails anywhere among its options.
LEVEL = 1e-3


class Proof(NamedTuple):
    """What to prove and where results go."""

    out: Path
    options: Sequence[Option]
    parts: frozenset[str]
    setting: Setting
    real: Real | None


def choose_parts(names: str) -> frozenset[str]:
    """Parts by comma-separated names; all of them for ``all``.

    Raises:
        ConfigError: an unknown name.
    """
    if names.strip() == "all":
        return frozenset(PARTS)
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if not wanted or not wanted <= set(PARTS):
        raise ConfigError(
            f"--parts is {names!r}.",
            expected="all, or some of " + ", ".join(PARTS),
            fix="Correct --parts.",
        )
    return frozenset(wanted)


def run(proof: Proof, *, clock: Clock) -> dict[str, Any]:
    """Do what is missing while there is time, and write ``summary.json``.

    Returns:
        The summary.
    """
    summary: dict[str, Any] = {
        "options": {},
        "seeded_equal": None,
        "seeded_total": None,
        "greedy_equal": None,
        "greedy_near_ties": None,
        "greedy_total": None,
        "level": LEVEL,
        "machine": machine(),
        "versions": versions(),
        "commit": commit("dspark_sglang"),
    }
    write = proof.out / "summary.json"
    if proof.parts & {"options", "mutants"}:
        summary["options"] = _options(proof, clock)
        write_bytes(write, _encoded(summary))
    if proof.real is not None:
        wanted = set(proof.parts & {"greedy", "two-sample", "seeded"})
        summary |= collect(proof.real, wanted, clock=clock)
    write_bytes(write, _encoded(summary))
    return summary


def _encoded(summary: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n"


def _options(proof: Proof, clock: Clock) -> dict[str, Any]:
    setting, found = proof.setting, dict[str, Judged]()
    model = setting.model()
    if "options" in proof.parts:
        for group in _servers(proof.options):
            for name, piece in sampled.draw(setting, group, clock=clock).items():
                if counts := piece.outputs():
                    option = next(option for option in group if option.name == name)
                    distribution = Distribution(model, option.request)
                    found[name] = sampled.judge("", distribution, counts)
    rejected = holm({name: verdict.p_value for name, verdict in found.items()}, LEVEL)
    killed: dict[str, Judged] = {}
    if "mutants" in proof.parts:
        for option in proof.options:
            verdict = sampled.challenge(setting, option, model, clock=clock)
            if verdict is not None:
                killed[option.name] = verdict
                print(f"mutant of {option.name}: p-value {verdict.p_value:.1e}", flush=True)
    # A mutant must fall to the strictest step of the test that its option passes.
    threshold = LEVEL / max(1, len(proof.options))
    return {
        option.name: _entry(
            option, found.get(option.name), killed.get(option.name), rejected, threshold
        )
        for option in proof.options
        if option.name in found or option.name in killed
    }


def _servers(options: Sequence[Option]) -> list[list[Option]]:
    """Options by the environment of their server."""
    groups: dict[tuple[tuple[str, str], ...], list[Option]] = {}
    for option in options:
        groups.setdefault(tuple(sorted(option.environment.items())), []).append(option)
    return list(groups.values())


def _entry(
    option: Option,
    own: Judged | None,
    mutant: Judged | None,
    rejected: set[str],
    threshold: float,
) -> dict[str, Any]:
    return {
        "p_value": own and own.p_value,
        "samples": own and own.samples,
        "passed": None if own is None else option.name not in rejected,
        "mutant_rejected": None if mutant is None else mutant.p_value <= threshold,
        "degrees_of_freedom": own and own.freedom,
        "impossible": own and own.impossible,
        "mutant": option.mutant,
        "mutant_p_value": mutant and mutant.p_value,
        "mutant_samples": mutant and mutant.samples,
    }


def failures(summary: dict[str, Any]) -> list[str]:
    """What the proof found wrong, one line each."""
    wrong = []
    for name, entry in summary["options"].items():
        if entry["passed"] is False:
            wrong.append(
                f"{name}: p-value {entry['p_value']:.1e}, {entry['impossible']} impossible outputs"
            )
        if entry["mutant_rejected"] is False:
            wrong.append(f"{name}: the mutant {entry['mutant']} was not noticed")
    for part in ("greedy", "retracted", "seeded"):
        total = summary.get(f"{part}_total")
        ties = summary.get(f"{part}_near_ties") or 0
        if total and summary[f"{part}_equal"] + ties < total:
            wrong.append(f"{part}: {total - summary[f'{part}_equal'] - ties} of {total} differ")
    if summary.get("retractions_expected") and not summary["retractions"]:
        wrong.append("retracted: no request was retracted, so nothing was shown")
    both = summary.get("two_sample")
    if both and both["p_value"] < LEVEL:
        wrong.append(f"two-sample: p-value {both['p_value']:.1e}")
    return wrong


def unfinished(proof: Proof, summary: dict[str, Any]) -> list[str]:
    """What there was no time for."""
    left = []
    for option in proof.options:
        entry = summary["options"].get(option.name, {})
        if "options" in proof.parts and (entry.get("samples") or 0) < proof.setting.samples:
            left.append(option.name)
        if "mutants" in proof.parts and entry.get("mutant_rejected") is None:
            left.append(f"mutant of {option.name}")
    left += [key.removesuffix("_complete") for key, done in summary.items() if done is False]
    return left
