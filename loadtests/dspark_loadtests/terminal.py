"""The summary for a person: one table and one verdict line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dspark_loadtests.schema import Distribution, Summary


def print_summary(summary: Summary, console: Console) -> None:
    """Print the latency table and the lines below it."""
    table = Table(title=f"DSpark load test: {summary.settings.model} at {summary.settings.host}")
    for heading in ("latency (ms)", "count", "mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="left" if heading.startswith("latency") else "right")
    latency = summary.latency
    for name, row in (
        ("TTFT", latency.ttft_ms),
        *([("TTFT from schedule", latency.ttft_from_schedule_ms)] if _open(summary) else []),
        ("TPOT", latency.tpot_ms),
        ("ITL", latency.itl_ms),
        ("inter-chunk", latency.inter_chunk_ms),
        ("end to end", latency.e2e_ms),
    ):
        table.add_row(name, *_cells(row))
    console.print(table)
    for line in _lines(summary):
        # Plain text: error messages and model names may hold square brackets.
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_stages(stages: Sequence[Summary], console: Console) -> None:
    """One line a stage."""
    table = Table(
        title=f"{stages[0].settings.model} at {stages[0].settings.host}",
        caption="tok/s of all and of one user; TTFT from schedule and TPOT in ms; accepted length; verified a request",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    headings = ("stage", "sent", "fail", "tok/s", "user", "TTFT", "p99", "TPOT", "p99", "good", "acc", "ver")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for stage in stages:
        latency, good = stage.latency, stage.goodput.ratio
        speed, ttft, tpot = stage.throughput.user_tok_s, latency.ttft_from_schedule_ms, latency.tpot_ms  # fmt: skip
        table.add_row(
            stage.name + ("" if stage.complete else " (cut)"),
            str(stage.counts.sent),
            str(stage.counts.failed),
            _number(stage.throughput.output_tok_s, 1),
            _number(speed.mean if speed else None, 1),
            _number(ttft.p50 if ttft else None, 0),
            _number(ttft.p99 if ttft else None, 0),
            _number(tpot.p50 if tpot else None, 1),
            _number(tpot.p99 if tpot else None, 1),
            "-" if good is None else f"{good:.0%}",
            _number(stage.acceptance.accepted_length, 2),
            _number(stage.acceptance.budget, 2),
        )
    console.print(table)
    for stage in stages:
        if stage.goodput.note:
            console.print(f"{stage.name}: {stage.goodput.note}", highlight=False, soft_wrap=True)


def _open(summary: Summary) -> bool:
    return summary.settings.arrival == "open_loop"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _cells(row: Distribution | None) -> list[str]:
    if row is None:
        return ["0", *["-"] * 5]
    values = (row.mean, row.p50, row.p90, row.p99, row.max)
    return [str(row.count), *(f"{value:.1f}" for value in values)]


def _lines(summary: Summary) -> list[str]:
    counts, tokens, rate = summary.counts, summary.tokens, summary.throughput
    good, acceptance = summary.goodput, summary.acceptance
    cached = "not reported" if tokens.cached is None else str(tokens.cached)
    lines = [
        f"requests     {counts.sent} sent = {counts.completed} completed + {counts.failed} failed "
        f"+ {counts.unfinished} unfinished, in {rate.duration_s:.2f} s",
        f"tokens       {tokens.prompt} prompt ({cached} cached), {tokens.completion} output, "
        f"{tokens.partial} lost in failed or unfinished requests",
        f"throughput   {rate.output_tok_s:.1f} output tok/s, {rate.requests_per_s:.2f} requests/s",
    ]
    if rate.user_tok_s is not None:
        speed = rate.user_tok_s
        lines.append(
            f"per user     {speed.p50:.1f} tok/s p50, {speed.p90:.1f} p90, {speed.p99:.1f} p99"
        )
    ratio = "-" if good.ratio is None else f"{good.ratio:.1%}"
    lines.append(
        f"goodput      {good.good} of {good.sent} sent ({ratio}), {good.per_s:.2f}/s within "
        f"TTFT <= {good.slo.ttft_ms:g} ms and TPOT <= {good.slo.tpot_ms:g} ms"
    )
    if good.note:
        lines.append(f"             {good.note}")
    if acceptance.accepted_length is None:
        lines.append(f"accepted     no accepted length: {acceptance.note}")
    else:
        lines.append(
            f"accepted     {acceptance.accepted_length:.3f} tokens a round, bonus included "
            f"(source {acceptance.source}: {acceptance.note})"
        )
    lines += [f"error        {error.count} x {error.message}" for error in summary.errors]
    return lines


def verdict(summary: Summary) -> tuple[bool, str]:
    """Whether the run passed, and the line that says so."""
    counts = summary.counts
    if counts.failed:
        first = summary.errors[0].message
        return (
            False,
            f"FAILED: {counts.failed} of {counts.sent} requests failed, most often: {first}",
        )
    if not counts.completed:
        return False, (
            f"FAILED: no request completed ({counts.sent} sent), so nothing was measured. "
            "Run longer, or allow more time to drain."
        )
    return True, f"OK: {counts.completed} of {counts.sent} requests completed, none failed"
