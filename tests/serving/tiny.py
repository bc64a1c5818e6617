"""Servers of the tiny models whose distribution is known exactly, and what is asked of them."""

from __future__ import annotations

import concurrent.futures
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from dspark_sglang.server import Server, free_port, serve_command
from tests.exactness import sampled
from tests.exactness.distribution import Distribution, Model
from tests.exactness.options import choose
from tests.tiny_models import PROMPT

ONE_THREAD = {"DSPARK_CPU_THREADS": "1", "OMP_NUM_THREADS": "1", "DSPARK_COST": "online"}
TOKENS = 40
#: A target and its drafter.
Models = tuple[Path, Path]


def start(
    folder: Path, name: str, models: tuple[Path, Path | None], ranks: int, **settings: str
) -> Server:
    target, drafter = models
    port = free_port()
    extra = ["--tp", str(ranks), "--max-total-tokens", "8192"]
    command = serve_command(target, port, dtype="float32", drafter=drafter, extra=extra)
    log = folder / f"{name}.log"
    return Server(command, port=port, log=log, environment=ONE_THREAD | settings).start()


def generate(
    server: Server, prompt: tuple[int, ...], *, check: bool = True, **sampling: Any
) -> dict[str, Any]:
    """SGLang's answer to a greedy request of :data:`TOKENS`, unless told otherwise."""
    logprob = sampling.pop("return_logprob", False)
    body = {
        "input_ids": list(prompt),
        "return_logprob": logprob,
        "sampling_params": {
            "temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True, **sampling
        },
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300.0)
    if check:
        answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def tokens(server: Server, prompt: tuple[int, ...], **sampling: Any) -> list[int]:
    found: list[int] = generate(server, prompt, **sampling)["output_ids"]
    assert len(found) == sampling.get("max_new_tokens", TOKENS)
    return found


def ran(server: Server) -> dict[str, int]:
    record = server.dspark()
    assert record is not None
    found: dict[str, int] = record["ran"]
    return found


def require_the_distribution(server: Server, target: Path, options: str) -> None:
    """Sampled outputs, all options mixed in every batch, against plain decoding's distribution."""
    wanted = choose(options)
    calls = [wanted[place % len(wanted)].request for place in range(63)]
    counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in wanted]
    with httpx.Client(timeout=300.0) as client:
        for _ in range(32):
            for place, output in enumerate(sampled.generate(client, server, calls)):
                counts[place % len(wanted)][output] += 1
    model = Model(target, PROMPT)
    for option, seen in zip(wanted, counts, strict=True):
        verdict = sampled.judge("", Distribution(model, option.request), dict(seen))
        assert verdict.freedom > 10
        assert verdict.p_value > 1e-4, (option.name, verdict)


def require_undecidable_requests_end_alone(
    server: Server,
    plain: Server,
    prompts: Sequence[tuple[int, ...]],
    size: int,
    count: int = TOKENS,
) -> None:
    """A request whose tokens are all excluded ends with an error of its own; greedy ones are plain decoding's.

    Args:
        size: tokens of the vocabulary.
        count: tokens of each answer.
    """
    nothing = {"logit_bias": dict.fromkeys(map(str, range(size)), -1e39)}
    certain = {"logit_bias": {"40": 1e39}}
    length = {"max_new_tokens": count}
    wanted = tokens(plain, prompts[0], **length)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            bystander = pool.submit(tokens, server, prompts[0], **length)
            broken = pool.submit(
                generate, server, prompts[1], check=False, temperature=1.0, **nothing, **length
            )
            drawn = pool.submit(tokens, server, prompts[1], temperature=1.0, **certain, **length)
            greedy = pool.submit(tokens, server, prompts[2], **nothing, **length)
            assert "cannot be drawn" in str(broken.result())
            assert bystander.result() == wanted
            assert set(drawn.result()) == {40}
            assert set(greedy.result()) == {0}
    assert server.alive()
    record = server.dspark()
    assert (
        record is not None and record["faults"]["request"] >= 2 and not record["drafting_stopped"]
    )
