"""A drill's sections in order, what they found on disk, and all of it in one file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from dspark_sglang.artifacts import write_json
from dspark_sglang.errors import ConfigError
from dspark_sglang.provenance import machine, versions
from tests.drill.clients import Address, malformed, slow
from tests.drill.crash import RESTART_S, drain, kills
from tests.drill.disk import disk
from tests.drill.key import key
from tests.drill.section import Findings, Section, Tell, teller
from tests.drill.soak import GROWTH_PCT, Plan, soak
from tests.drill.world import Pair, World, memory, started
from tests.exactness.store import key as digest

Run = Callable[[Tell], Findings]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One drill."""

    out: Path
    drafter: Path
    seed: int = 0
    #: Requests of the soaks: of the tiny pair (or of the server at ``url``), and of the real one.
    tiny_requests: int = 10_000
    real_requests: int = 1_000
    #: A running server instead of own ones: only what needs no hand on its processes.
    url: str = ""
    api_key: str | None = None


def _served(world: World, name: str, part: Callable[..., Findings], tell: Tell, pair: Pair = "tiny",
            *, flags: tuple[str, ...] = (), watch: bool = False, **more: Any) -> Findings:  # fmt: skip
    """A section against a server of its own, which has to outlive it."""
    tell("starting a server")
    server = world.server(name, pair=pair, flags=flags)
    with started(server):
        if watch:
            more["read"] = partial(memory, server)
        found = part(Address(server.url), tell=tell, **more)
        found.expect(server.alive(), f"the server stopped: {server.log}")
    return found


def own(world: World, options: Options) -> dict[str, Run]:
    """Every section, against servers started for it."""
    seed = options.seed
    tiny = Plan(requests=options.tiny_requests, seed=seed)
    real = Plan(requests=options.real_requests, tokens=12, prompts=32, seed=seed)
    # A cache too small for the prompts, so that it has to let go of some all the time.
    small = ("--max-total-tokens", "6144")
    return {
        "kill-tiny": partial(kills, world, pair="tiny"),
        "kill-real": partial(kills, world, pair="real"),
        "drain": partial(drain, world),
        "disk": partial(disk, world),
        "slow": partial(_served, world, "slow", slow, seed=seed + 2),
        "malformed": partial(_served, world, "malformed", malformed, seed=seed + 3),
        "key": partial(key, world),
        "soak-tiny": partial(_served, world, "soak-tiny", soak, plan=tiny, flags=small, watch=True),
        "soak-real": partial(_served, world, "soak-real", soak, pair="real", plan=real, watch=True),
    }


def remote(options: Options) -> dict[str, Run]:
    """The sections that a server somewhere else can be put through."""
    address = Address(options.url, options.api_key)
    return {
        "slow": partial(slow, address, seed=options.seed + 2),
        "malformed": partial(malformed, address, seed=options.seed + 3),
        "soak": partial(soak, address, Plan(requests=options.tiny_requests, seed=options.seed)),
    }


def choose(sections: Mapping[str, Run], only: str) -> dict[str, Run]:
    """The sections named, with commas between; all of them where none is.

    Raises:
        ConfigError: there is none of a name.
    """
    names = [name.strip() for name in only.split(",") if name.strip()] or list(sections)
    unknown = [name for name in names if name not in sections]
    if unknown:
        raise ConfigError(
            f"There is no section {', '.join(unknown)}.",
            expected=f"some of {', '.join(sections)}",
            fix="Name some of these, with commas between.",
        )
    return {name: sections[name] for name in names}


def _kept(path: Path, wanted: str) -> Section | None:
    """A section of an earlier run that passed under the same settings and source."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(path.read_bytes(), type=Section)
        if known.key == wanted and not known.faults and not known.skipped:
            return known
    return None


def run(sections: Mapping[str, Run], options: Options, *, fresh: bool) -> Iterator[Section]:
    """Run what has not passed yet, or everything if ``fresh``; each is kept as soon as it ends."""
    settings = (options.seed, options.tiny_requests, options.real_requests, options.url)
    for name, part in sections.items():
        path = options.out / "sections" / f"{name}.json"
        wanted = digest(name, *settings)
        known = None if fresh else _kept(path, wanted)
        if known is None:
            known = part(teller(name)).section(name, wanted)
            write_json(path, known)
        yield known


def summary(sections: list[Section], command: str, seconds: float) -> dict[str, Any]:
    """What docs/results/drill.json holds; None where the section did not run."""
    by_name = {section.name: section for section in sections if not section.skipped}
    restarts = [max(section.figures["restart_s"].values()) for section in sections
                if section.figures.get("restart_s")]  # fmt: skip
    soaks = [section for section in sections if section.name.startswith("soak")]
    grown = [s.figures["rss_growth_pct_per_1000"] for s in soaks
             if "rss_growth_pct_per_1000" in s.figures]  # fmt: skip
    canary = by_name.get("canary")
    return {
        "drain_lost": by_name["drain"].figures["drain_lost"] if "drain" in by_name else None,
        "lost_tokens": sum(section.lost_tokens for section in sections),
        "restart_s": max(restarts, default=None),
        "soak_requests": sum(section.figures.get("requests", 0) for section in soaks),
        "rss_growth_pct_per_1000": max(grown, default=None),
        "hangs": sum(section.hangs for section in sections),
        "canary": canary.figures.get("canary") if canary else None,
        "limits": {"restart_s": RESTART_S, "rss_growth_pct_per_1000": GROWTH_PCT},
        "passed": all(not section.faults for section in sections),
        "skipped": {section.name: section.skipped for section in sections if section.skipped},
        "sections": {
            section.name: {
                "seconds": section.seconds, "faults": section.faults, "ends": section.ends,
                **section.figures,
            }
            for section in sections
        },
        "seconds": round(seconds, 1), "command": command, "machine": machine(),
        "versions": versions(),
    }  # fmt: skip
