"""The server engine: the same questions to a real DSPARK server, its own counters read between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np

from dspark_sglang import remote
from dspark_sglang.config import read_api_key
from dspark_sglang.errors import ServerError
from dspark_sglang.evaluation.answer import Question
from dspark_sglang.training.replay import Walk


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

    Nothing else may use the server meanwhile; its key is read from ``API_KEY``.

    Raises:
        ServerError: a request failed.
    """
    domains: dict[str, list[Question]] = {}
    for question in questions:
        domains.setdefault(question.domain, []).append(question)
    walks, done = {}, 0
    with remote.client(url, read_api_key()) as http, ThreadPoolExecutor(at_once) as pool:
        for domain, asked in domains.items():
            before = remote.record(http)

            def ask(question: Question) -> int:
                return _answer(http, question, temperature, max_tokens)

            tokens = sum(count - 1 for count in pool.map(ask, asked))
            walks[domain] = _difference(before, remote.record(http), tokens)
            done += len(asked)
            progress(done)
    return walks


def _answer(http: httpx.Client, question: Question, temperature: float, max_tokens: int) -> int:
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
        answer = http.post("/v1/chat/completions", json=body, timeout=900.0)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ServerError(
            f"A request to {http.base_url} failed: {error!r}.",
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
