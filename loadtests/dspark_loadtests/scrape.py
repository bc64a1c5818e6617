"""The server's own ``/metrics`` over a run: counters as differences, gauges as they were at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from dspark_loadtests.client import ServerApi
from dspark_sglang.errors import ServerError

#: Others are of the Python process.
_PREFIXES = ("sglang", "dspark")


class Scraped(NamedTuple):
    """Sums over label sets but for gauges, of which SGLang has one a rank that must not be added."""

    counters: Mapping[str, float]
    gauges: Mapping[str, float]


def scrape(api: ServerApi) -> Scraped:
    """Ask the server now; nothing where it has no metrics (``--enable-metrics``)."""
    try:
        return read_metrics(api.get("/metrics").decode("utf-8", "replace"))
    except ServerError:
        return Scraped({}, {})


def read_metrics(text: str) -> Scraped:
    """Interpret the Prometheus text format; what is not that gives nothing."""
    counters: dict[str, float] = {}
    gauges: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            if not family.name.startswith(_PREFIXES):
                continue
            for sample in family.samples:
                if family.type == "gauge":
                    gauges[sample.name] = max(gauges.get(sample.name, sample.value), sample.value)
                elif sample.name.endswith(("_total", "_sum", "_count")):
                    counters[sample.name] = counters.get(sample.name, 0.0) + sample.value
    except ValueError:
        return Scraped({}, {})
    return Scraped(counters, gauges)


def over_run(before: Scraped, after: Scraped) -> dict[str, float]:
    """What the run changed, and the gauges at its end. A counter that fell was reset, and is left out."""
    grown = {name: value - before.counters.get(name, 0.0) for name, value in after.counters.items()}
    return {name: value for name, value in grown.items() if value >= 0} | dict(after.gauges)
