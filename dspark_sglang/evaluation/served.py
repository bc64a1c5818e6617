"""The server engine: the same questions to a real DSPARK server, its own counters read between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np

from dspark_sglang.errors import ServerError
from dspark_sglang.evaluation.answer import Question
from dspark_sglang.training.replay import Walk


def counters(url: str) -> dict[str, Any]:
    """What the plugin counts in a server.

    Raises:
        ServerError: no answer, or our DSPARK is not running there.
    """
    fix = "Start it with --speculative-algorithm DSPARK and this plugin installed."
    try:
        info = httpx.get(f"{url}/server_info", timeout=60.0).json()
        record = info["internal_states"][0].get("dspark_info_record")
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerError(
            f"{url}/server_info did not answer usefully: {error!r}.",
            expected="an SGLang server",
            fix=fix,
        ) from error
    if not isinstance(record, dict) or not record.get("active"):
        raise ServerError(
            f"{url} does not run this plugin's DSPARK.", expected="its counters", fix=fix
        )
    return record


def serve(
    url: str,
    questions: Sequence[Question],
    *,
    temperature: float,
    max_tokens: int,
    at_once: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Walk]:
    """Rounds of each domain as the server counted them.

    Nothing else may use the server meanwhile.

    Raises:
        ServerError: a request failed.
    """
    domains: dict[str, list[Question]] = {}
    for question in questions:
        domains.setdefault(question.domain, []).append(question)
    walks, done = {}, 0
    with httpx.Client(timeout=900.0) as client, ThreadPoolExecutor(at_once) as pool:
        for domain, asked in domains.items():
            before = counters(url)

            def ask(question: Question) -> int:
                return _answer(client, url, question, temperature, max_tokens)

            tokens = sum(count - 1 for count in pool.map(ask, asked))
            walks[domain] = _difference(before, counters(url), tokens)
            done += len(asked)
            progress(done)
    return walks


def _answer(
    client: httpx.Client, url: str, question: Question, temperature: float, max_tokens: int
) -> int:
    body = {
        "model": "default",
        "messages": question.messages,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": max_tokens,
    }
    try:
        answer = client.post(f"{url}/v1/chat/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ServerError(
            f"A request to {url} failed: {error!r}.",
            expected="an answer",
            fix="See the server's log.",
        ) from error


def _difference(before: dict[str, Any], after: dict[str, Any], tokens: int) -> Walk:
    def grown(name: str) -> Any:
        return np.array(after[name]) - np.array(before[name])

    return Walk(
        rounds=int(after["rounds"] - before["rounds"]),
        tokens=tokens,
        reached=grown("position_reached"),
        accepted=grown("position_kept"),
    )
