"""Our Prometheus metrics, in the scheduler process; SGLang serves them at ``/metrics``."""

from __future__ import annotations

from collections.abc import Mapping

from dspark_sglang import __version__


def announce(labels: Mapping[str, str]) -> None:
    """Say once that the plugin is active, and what it runs: ``dspark_info{...} 1``.

    SGLang's server collects the metrics of all its processes from files. prometheus_client decides
    where they go when it is imported, and SGLang has set the place by then.

    Args:
        labels: what runs, by name.
    """
    from prometheus_client import Gauge

    names = ("version", *labels)
    gauge = Gauge(
        "dspark_info",
        "1 while dspark-sglang serves DSPARK; the labels say what runs.",
        names,
        multiprocess_mode="mostrecent",
    )
    gauge.labels(version=__version__, **labels).set(1)
