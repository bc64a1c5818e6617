"""A frontier measured: one server under rising load.

``dspark bench`` calls :func:`frontier_of`; several servers are compared by
:mod:`dspark_sglang.load.versus`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dspark_loadtests import plan
from dspark_loadtests.bench import connect
from dspark_loadtests.schema import BenchResult, Summary
from dspark_loadtests.session import LoadSession
from dspark_sglang.errors import ServerError
from dspark_sglang.load.frontier import Frontier, Point, Series
from dspark_sglang.load.prompts import read_prompts
from dspark_sglang.provenance import machine


def point(summary: Summary, gpus: int) -> Point | None:
    """A stage as a point of the frontier; None where it has no speed of a user."""
    tpot = summary.latency.tpot_ms
    settings = summary.settings
    load = settings.users if settings.users is not None else settings.rate
    if tpot is None or tpot.mean <= 0 or load is None:
        return None
    ttft = summary.latency.ttft_ms
    return Point(
        load=load,
        tok_s_per_gpu=summary.throughput.output_tok_s / gpus,
        tok_s_per_user=1e3 / tpot.mean,
        ttft_ms=None if ttft is None else ttft.mean,
        accept_length=summary.acceptance.accepted_length,
        budget=summary.acceptance.budget,
    )


def frontier_of(results: Sequence[BenchResult], *, hardware: str | None = None) -> Frontier:
    """The frontier of one or more results, a series each; incomplete stages are left out."""
    first = results[0].stages[0]
    return Frontier(
        source="measured",
        model=first.server.model_path or first.settings.model,
        hardware=hardware or results[0].machine,
        assumptions={
            "temperature": first.settings.temperature,
            "max_tokens": first.settings.max_tokens,
            "prompts": first.settings.prompts,
            "arrival": first.settings.arrival,
        },
        series=[
            Series(
                name=result.name,
                gpus=result.gpus,
                points=[
                    found
                    for stage in result.stages
                    if stage.complete and (found := point(stage, result.gpus)) is not None
                ],
            )
            for result in results
        ],
    )


def measure_frontier(
    url: str,
    concurrency: Sequence[int],
    *,
    name: str,
    gpus: int = 1,
    duration_s: float = 30.0,
    warmup_s: float = 5.0,
    temperature: float = 1.0,
    max_tokens: int = 128,
    prompts: Path | None = None,
    seed: int = 0,
    hardware: str | None = None,
    told: Callable[[str, LoadSession], None] = lambda *_: None,
) -> Frontier:
    """Closed-loop load at each concurrency against a running server, as a frontier of one series.

    Args:
        url: of the server, such as ``http://127.0.0.1:30000``.
        gpus: rates are divided by this; 1 for a CPU server.
        duration_s: of each window, after ``warmup_s``.
        hardware: what the server runs on; None: this machine.
        told: called about fifty times a second with the stage's name.

    Raises:
        ServerError: the server does not answer, or stopped; nothing was answered.
        ConfigError: an argument is of no use.
    """
    source = read_prompts(prompts)
    request = plan.Request(
        concurrency=tuple(concurrency),
        duration_s=duration_s,
        warmup_s=warmup_s,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
    )
    points: list[Point] = []
    summary: Summary | None = None
    for stage, _ in plan.run(connect(url), source.prompts, request, source=source.name, told=told):
        summary = stage.summary
        if not summary.complete:
            raise ServerError(
                summary.incidents[-1], expected="a server that answers", fix="See its log."
            )
        found = point(summary, gpus)
        if found is not None:
            points.append(found)
    if summary is None or not points:
        raise ServerError(
            f"{url} gave no answer of two tokens or more.",
            expected="completed requests",
            fix="Try one by hand, and give more --duration.",
        )
    return Frontier(
        source="measured",
        model=summary.server.model_path or summary.settings.model,
        hardware=hardware or machine(),
        assumptions={"temperature": temperature, "max_tokens": max_tokens, "prompts": source.name},
        series=[Series(name=name, gpus=gpus, points=points)],
    )
