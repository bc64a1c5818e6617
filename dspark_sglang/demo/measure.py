"""Sending the same prompts to two servers and counting what came back."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import numpy as np

from dspark_loadtests.prompts import Prompt
from dspark_loadtests.stream import STREAM_OPTIONS, Outcome, RequestRecord, StreamRecorder
from dspark_sglang.errors import ServerError
from dspark_sglang.server import Server

#: Two tokens whose logits differ by less are a near-tie: rounding may choose either.
NEAR_TIE = 1e-4


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt answered by one server."""

    prompt: str
    kind: str
    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    #: From sending to the last chunk, and from the first chunk to the last.
    seconds: float
    decode_seconds: float
    #: Decode steps (without speculation) or verification rounds (with).
    steps: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The same prompts on both servers, in order."""

    plain: list[Sample]
    dspark: list[Sample]


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Let a paused server run for the length of a ``with`` block."""
    server.resume()
    try:
        yield server
    finally:
        server.pause()


def stream_text(
    client: httpx.Client,
    server: Server,
    prompt: Prompt,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    show: Callable[[str], None] | None = None,
) -> tuple[RequestRecord, str]:
    """Stream one chat through the OpenAI API.

    Args:
        show: called with each piece of text as it arrives.

    Raises:
        ServerError: the request failed or its stream was cut.
    """
    body = {
        "model": "default",
        "messages": prompt.messages(),
        "temperature": temperature,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": STREAM_OPTIONS,
    }
    recorder = StreamRecorder(prompt_id=prompt.id, prompt_kind=prompt.kind)
    shown = 0
    try:
        with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            for data in response.iter_raw():
                recorder.feed(data)
                if show is not None and len(recorder.text) > shown:
                    show(recorder.text[shown:])
                    shown = len(recorder.text)
            status = response.status_code
    except httpx.HTTPError as error:
        raise server.gone(error) from error
    record = recorder.finish() if status == 200 else recorder.fail(f"HTTP {status}")
    if record.outcome is not Outcome.COMPLETED:
        raise ServerError(
            f"A request failed: {record.error}.",
            expected="a complete stream",
            fix=f"See the server's log in {server.log}.",
        )
    return record, recorder.text


def _sample(prompt: Prompt, record: RequestRecord, text: str, *, steps: int) -> Sample:
    return Sample(
        prompt=prompt.id,
        kind=prompt.kind,
        text=text,
        tokens=record.completion_tokens or 0,
        prompt_tokens=record.prompt_tokens or 0,
        cached_tokens=record.cached_tokens or 0,
        seconds=(record.last_content_at or record.ended_at) - record.sent_at,
        decode_seconds=(record.last_content_at or 0.0) - (record.first_content_at or 0.0),
        steps=steps,
    )


def ask(
    client: httpx.Client,
    server: Server,
    prompt: Prompt,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    show: Callable[[str], None] | None = None,
) -> Sample:
    """Answer one prompt on a running server and measure it."""
    before = (server.dspark() or {}).get("rounds")
    record, text = stream_text(
        client, server, prompt, max_tokens=max_tokens, temperature=temperature, show=show
    )
    # Without speculation every token after the first is a step of its own.
    steps = (record.completion_tokens or 0) - 1
    if before is not None:
        steps = (server.dspark() or {})["rounds"] - before
    return _sample(prompt, record, text, steps=steps)


def compare(
    plain: Server,
    dspark: Server,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    each: Callable[[Prompt], None],
    temperature: float = 0.0,
    show: Callable[[str], None] | None = None,
) -> Comparison:
    """Ask every prompt on both servers, alternating, the idle one paused.

    Args:
        temperature: of the answers; above 0 the two texts differ.
        each: told before every prompt.
        show: shown the text of the DSPARK server as it streams.
    """
    result = Comparison(plain=[], dspark=[])
    with httpx.Client(timeout=600.0) as client:
        for server in (plain, dspark):
            with running(server):  # the first forward of a process allocates and compiles
                stream_text(client, server, prompts[0], max_tokens=8)
        for index, prompt in enumerate(prompts):
            each(prompt)
            order = [(plain, result.plain), (dspark, result.dspark)]
            # Alternate who goes first: whatever drifts on this machine hits both alike.
            for server, samples in order if index % 2 == 0 else reversed(order):
                with running(server):
                    sink = show if server is dspark else None
                    samples.append(
                        ask(
                            client,
                            server,
                            prompt,
                            max_tokens=max_tokens,
                            temperature=temperature,
                            show=sink,
                        )
                    )
    return result


def answer_all(
    server: Server,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    each: Callable[[Prompt], None],
    at_once: int = 4,
) -> list[Sample]:
    """Answer every prompt greedily, several at a time: for the text, not for its speed.

    Args:
        each: told after every prompt.
    """

    def answer(prompt: Prompt) -> Sample:
        with httpx.Client(timeout=600.0) as client:
            record, text = stream_text(client, server, prompt, max_tokens=max_tokens)
        each(prompt)
        return _sample(prompt, record, text, steps=0)

    with running(server), ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(answer, prompts))


def rate(samples: Sequence[Sample]) -> float:
    """Output tokens a second, prefill included."""
    return sum(s.tokens for s in samples) / sum(s.seconds for s in samples)


def step_seconds(samples: Sequence[Sample]) -> float:
    """Median over prompts of the seconds of one decode step or round."""
    return statistics.median(s.decode_seconds / s.steps for s in samples if s.steps)


def accept_length(samples: Sequence[Sample]) -> float:
    """Tokens a round: all after the prefill's first, over the rounds that made them."""
    return sum(s.tokens - 1 for s in samples) / max(1, sum(s.steps for s in samples))


def bootstrap(
    comparison: Comparison,
    statistic: Callable[[Sequence[Sample], Sequence[Sample]], float],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95% interval of a statistic of the paired prompts, by resampling prompts."""
    generator = np.random.default_rng(seed)
    count = len(comparison.plain)
    values = []
    for _ in range(draws):
        chosen = generator.integers(0, count, count)
        values.append(
            statistic([comparison.plain[i] for i in chosen], [comparison.dspark[i] for i in chosen])
        )
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def tie_gap(server: Server, prompt: Prompt, other: str, *, max_tokens: int) -> float:
    """How close the two best tokens were where ``server``'s greedy text leaves ``other``.

    Returns:
        The logit gap (a difference of log-probabilities) at the first differing token.
    """
    body = {
        "model": "default",
        "messages": prompt.messages(),
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer: dict[str, Any] = server.http.post(
        "/v1/chat/completions", json=body, timeout=600.0
    ).json()
    shared = ""
    for token in answer["choices"][0]["logprobs"]["content"]:
        shared += token["token"]
        if not other.startswith(shared):
            best, second = (entry["logprob"] for entry in token["top_logprobs"][:2])
            return float(best - second)
    return 0.0 if shared == other else float("inf")
