"""Servers of the tiny V4 bundle with the flags of an overlay, and whether what they say is the target's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import httpx

from dspark_sglang.layouts.v4.reference import Reference
from dspark_sglang.server import Server, free_ports
from tests.deploy import v4_flags
from tests.v4.servers import clear_prompts, greedy

#: Lengths of the prompts, how many of each, and new tokens of each answer.
_LENGTHS, _EACH, _NEW = (40, 300), 4, 16


class Found(NamedTuple):
    """What a server with an overlay's flags answered."""

    #: Of so many answers, every token of so many is the reference's most likely one.
    equal: int
    total: int
    #: Tokens a round, and whether any draft was verified.
    accepted: float
    drafted: bool


def server(overlay: str, bundle: Path, log: Path) -> Server:
    """``dspark serve`` of ``bundle`` with the overlay's flags and environment, not started."""
    port, dist_port = free_ports(2)
    flags = v4_flags.words(overlay, bundle, port, dist_port)
    command = [str(Path(sys.executable).with_name("dspark")), "serve", *flags, "--dtype", "float32"]
    of = Server(command, port=port, log=log, environment=v4_flags.FLAGS[overlay].environment)
    of.http.headers["Authorization"] = f"Bearer {flags[flags.index('--api-key') + 1]}"
    return of


def ask(of: Server, reference: Reference) -> Found:
    """Greedy answers of a server that is up, against the reference's most likely tokens."""
    of.update(dspark_speculation=1)
    prompts = [p for length in _LENGTHS for p in clear_prompts(reference, length, _EACH)]
    answers = greedy(of, prompts, _NEW, at_once=4)
    equal = 0
    for tokens, answer in zip(prompts, answers, strict=True):
        best = reference([*tokens, *answer[:-1]]).logits[len(tokens) - 1 :].argmax(-1)
        equal += best.tolist() == answer
    record = of.record()
    drafted = any(name.startswith("draft:") for name in record["ran"])
    return Found(equal, len(prompts), float(record["accept_length"]), drafted)


def refuses_strangers(of: Server) -> bool:
    """Whether a request without the key is refused."""
    return httpx.post(f"{of.url}/generate", json={"text": "a"}, timeout=30).status_code == 401
