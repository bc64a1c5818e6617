"""A result on disk: ``result.json``, ``stages.csv``, ``requests.csv``, ``report.png`` and ``report.html``."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from dspark_loadtests.bench import Stage
from dspark_loadtests.report import percentile
from dspark_loadtests.schema import BenchResult, Distribution, Summary
from dspark_sglang.artifacts import write_bytes, write_json

_LATENCIES = ("ttft_from_schedule_ms", "ttft_ms", "tpot_ms", "itl_ms", "inter_chunk_ms", "e2e_ms")
_REQUEST_COLUMNS = (
    "stage", "measured", "prompt_id", "prompt_kind", "outcome", "scheduled_s", "sent_s", "ttft_ms",
    "ttft_from_schedule_ms", "tpot_ms", "e2e_ms", "prompt_tokens", "cached_tokens", "completion_tokens",
    "chunks", "rounds", "finish_reason", "error",
)  # fmt: skip


def write(result: BenchResult, stages: Sequence[Stage], out: Path) -> list[Path]:
    """Write everything; a result of an unfinished run is written the same and says so.

    Args:
        stages: with their records; may be fewer than ``result.stages``, which holds parts too.
    """
    paths = [out / name for name in ("result.json", "stages.csv", "requests.csv", "report.png", "report.html")]  # fmt: skip
    write_json(paths[0], result)
    write_bytes(paths[1], _csv(stage_row(summary) for summary in result.stages))
    write_bytes(paths[2], _csv(_requests(stages), _REQUEST_COLUMNS))
    picture = draw(result, stages)
    write_bytes(paths[3], picture)
    write_bytes(paths[4], page(result, picture).encode())
    return paths


def _csv(rows: Any, columns: Sequence[str] | None = None) -> bytes:
    rows = list(rows)
    text = io.StringIO(newline="")
    names = columns or (list(rows[0]) if rows else [])
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def stage_row(summary: Summary) -> dict[str, Any]:
    """One line of ``stages.csv``."""
    counts, rate = summary.counts, summary.throughput
    row: dict[str, Any] = {
        "stage": summary.name,
        "complete": summary.complete,
        "users": summary.settings.users,
        "rate": summary.settings.rate,
        "sent": counts.sent,
        "completed": counts.completed,
        "failed": counts.failed,
        "unfinished": counts.unfinished,
        "window_s": round(rate.duration_s, 3),
        "output_tok_s": round(rate.output_tok_s, 3),
        "requests_per_s": round(rate.requests_per_s, 4),
        "user_tok_s_mean": None if rate.user_tok_s is None else round(rate.user_tok_s.mean, 3),
        "goodput_ratio": summary.goodput.ratio,
        "goodput_per_s": round(summary.goodput.per_s, 4),
        "accepted_length": summary.acceptance.accepted_length,
        "accepted_length_source": summary.acceptance.source,
        "budget": summary.acceptance.budget,
    }
    for name in _LATENCIES:
        found: Distribution | None = getattr(summary.latency, name)
        for statistic in ("mean", "p50", "p90", "p99"):
            value = None if found is None else round(getattr(found, statistic), 3)
            row[f"{name.removesuffix('_ms')}_{statistic}_ms"] = value
    return row


def _requests(stages: Sequence[Stage]) -> Any:
    for stage in stages:
        ran = stage.ran
        for r in sorted(ran.records, key=lambda record: record.sent_at):
            seconds = {
                "ttft_ms": r.ttft_s,
                "ttft_from_schedule_ms": r.ttft_from_schedule_s,
                "tpot_ms": r.tpot_s,
                "e2e_ms": r.e2e_s,
            }
            yield {
                "stage": stage.summary.name,
                "measured": ran.begin <= r.sent_at < ran.closed,
                "prompt_id": r.prompt_id,
                "prompt_kind": r.prompt_kind,
                "outcome": str(r.outcome),
                "scheduled_s": None if r.scheduled_at is None else round(r.scheduled_at - ran.began, 4),
                "sent_s": round(r.sent_at - ran.began, 4),
                "prompt_tokens": r.prompt_tokens,
                "cached_tokens": r.cached_tokens,
                "completion_tokens": r.completion_tokens,
                "chunks": r.content_chunks,
                "rounds": r.rounds,
                "finish_reason": r.finish_reason,
                "error": r.error,
            } | {name: None if at is None else round(at * 1e3, 3) for name, at in seconds.items()}  # fmt: skip


def draw(result: BenchResult, stages: Sequence[Stage]) -> bytes:
    """A PNG: output and requests in flight over time, and the shares of requests within each latency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    state = "" if result.complete else " (incomplete)"
    figure.suptitle(f"{result.name}, {result.pattern}{state}", fontsize=11)
    over_time, flight, first, each = axes.flat
    flying = flight.twinx()
    for number, stage in enumerate(stages):
        colour = f"C{number % 10}"
        bins = stage.summary.timeline
        # the last bin may be a sliver
        whole = [b for b in bins if b.at_s + 1.0 <= stage.summary.throughput.duration_s] or bins
        over_time.plot([b.at_s for b in whole], [b.tokens for b in whole], color=colour, label=stage.summary.name)  # fmt: skip
        flight.plot([b.at_s for b in whole], [b.in_flight for b in whole], color=colour)
        flying.plot([b.at_s for b in whole], [b.sent for b in whole], ":", color=colour)
        done = [r for r in stage.measured if r.first_content_at is not None]
        _shares(first, [(r.ttft_from_schedule_s or 0.0) * 1e3 for r in done], colour)
        _shares(each, [r.tpot_s * 1e3 for r in done if r.tpot_s is not None], colour)
    slo = result.stages[0].goodput.slo if result.stages else None
    for axis, limit, label in (
        (first, slo and slo.ttft_ms, "TTFT from schedule (ms)"),
        (each, slo and slo.tpot_ms, "TPOT (ms)"),
    ):
        axis.set(xlabel=label, ylabel="share of requests", ylim=(0, 1.02))
        axis.set_xlim(left=0)
        if limit and limit < 3 * axis.get_xlim()[1]:
            axis.axvline(limit, color="black", linewidth=0.8, linestyle="--", label="SLA")
            axis.legend(frameon=False, loc="lower right")
    over_time.set(xlabel="seconds into the window", ylabel="output tokens a second", ylim=(0, None))
    flight.set(xlabel="seconds into the window", ylabel="requests in flight", ylim=(0, None))
    flying.set(ylabel="requests sent a second (dotted)", ylim=(0, None))
    if stages:
        over_time.legend(frameon=False, title="stage", loc="lower right")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    plt.close(figure)
    return data.getvalue()


def _shares(axis: Any, values: Sequence[float], colour: str) -> None:
    ordered = sorted(values)
    if ordered:
        shares = [i / 200 for i in range(201)]
        axis.plot([percentile(ordered, share) for share in shares], shares, color=colour)


def page(result: BenchResult, picture: bytes) -> str:
    """The report as one HTML file that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dspark_loadtests", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html").render(
        result=result,
        latencies=_LATENCIES,
        picture=base64.b64encode(picture).decode(),
    )
