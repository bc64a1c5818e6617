"""Fitting STS to what a running server verified, without stopping it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_sglang.artifacts import SCHEMA_VERSION, STSArtifact, require_writable, write_json
from dspark_sglang.config import authorization, read_api_key
from dspark_sglang.errors import ServerError
from dspark_sglang.provenance import provenance

_KINDS = ("greedy", "sampled")


def _record(http: httpx.Client) -> dict[str, Any]:
    try:
        answer = http.get("/server_info")
        answer.raise_for_status()
        record: dict[str, Any] = answer.json()["internal_states"][0]["dspark_info_record"]
        if not record["active"]:
            raise KeyError("active")
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ServerError(
            f"{str(http.base_url).rstrip('/')}/server_info tells nothing of DSPARK: {error!r}.",
            expected="a server that runs this plugin",
            fix="Check the address, and API_KEY where the server has a key; `dspark doctor --url` says what it runs.",
        ) from error
    return record


def _client(url: str) -> httpx.Client:
    try:
        headers = authorization(read_api_key())
        return httpx.Client(base_url=url, headers=headers, timeout=60.0)
    except httpx.InvalidURL as error:
        raise ServerError(
            f"{url} is no address: {error}.", expected="http://HOST:PORT", fix="Correct it."
        ) from error


def refit(url: str, out: Path | None) -> None:
    """Let the server fit and use new temperatures; keep them in ``out`` if given.

    Raises:
        ServerError: it cannot be reached, or has verified too little since its last fit.
        ConfigError: ``out`` cannot be written; nothing was changed then.
    """
    if out is not None:
        require_writable(out)
    console = Console()
    with _client(url) as http:
        before = _record(http)
        answer = http.post("/set_internal_state", json={"server_args": {"dspark_sts": 2}})
        after = _record(http)
    if answer.status_code != 200 or not all(answer.json()):
        raise ServerError(
            "The server made no new fit.",
            expected="at least 256 verified blocks since the last one, and adaptive scheduling",
            fix="Wait for more requests; the reason is in the server's log.",
        )
    view = Table(title="STS temperatures")
    for heading in ("position", "before", "after"):
        view.add_column(heading, justify="right")
    for place, pair in enumerate(zip(before["temperatures"], after["temperatures"], strict=True)):
        view.add_row(str(place + 1), *(f"{value:.3f}" for value in pair))
    console.print(view)
    console.print(f"The server runs with it now ({after['sts']}).")
    if out is None:
        return
    write_json(
        out,
        STSArtifact(
            schema_version=SCHEMA_VERSION,
            gamma=after["gamma"],
            temperatures=after["temperatures"],
            drafter_sha256=after["drafter_sha256"] or "",
            target="as served",
            ece_before=before["ece"],
            provenance=provenance(["dspark", "calibrate", "--url", url], data=after["sts"]),
        ),
    )
    plot = out.with_suffix(".png")
    draw(before["reliability"], plot)
    console.print(f"Written: {out}, {plot} (reliability before the fit)")


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Observed against predicted acceptance of each position, as a server counted them.

    Args:
        table: :meth:`dspark_sglang.core.schedule.correction.Reliability.table`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seen, predicted, kept = (np.array(table[name]) for name in ("seen", "predicted", "kept"))
    gamma = seen.shape[1]
    figure, axes = plt.subplots(
        1, gamma, figsize=(2.5 * gamma, 2.9), sharey=True, layout="constrained", squeeze=False
    )
    for place, axis in enumerate(axes[0]):
        axis.plot([0, 1], [0, 1], ":", color="black", linewidth=0.8)
        for kind, colour in zip(range(2), ("#c44e52", "#1f6fb4"), strict=True):
            enough = seen[kind, place] >= 5.0
            if enough.any():
                axis.scatter(
                    predicted[kind, place][enough] / seen[kind, place][enough],
                    kept[kind, place][enough] / seen[kind, place][enough],
                    s=4.0 + 60.0 * seen[kind, place][enough] / seen[kind, place].max(),
                    color=colour,
                    alpha=0.7,
                    label=_KINDS[kind],
                )
        axis.set_title(f"position {place + 1}", fontsize=9)
        axis.set_xlabel("confidence")
    axes[0][0].set_ylabel("accepted")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
