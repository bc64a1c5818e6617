"""Fitting STS to what a running server verified, without stopping it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dspark_packaging.card import reliability_plot
from dspark_packaging.records import Reliability
from dspark_sglang import remote
from dspark_sglang.artifacts import (
    SCHEMA_VERSION,
    STSArtifact,
    require_writable,
    write_bytes,
    write_json,
)
from dspark_sglang.config import read_api_key
from dspark_sglang.errors import ServerError
from dspark_sglang.provenance import provenance

#: Blocks that a bin has to hold to be drawn.
_ENOUGH = 5


def refit(url: str, out: Path | None) -> None:
    """Let the server fit and use new temperatures; keep them in ``out`` if given.

    Raises:
        ServerError: it cannot be reached, or has verified too little since its last fit.
        ConfigError: ``out`` cannot be written; nothing was changed then.
    """
    if out is not None:
        require_writable(out)
    console = Console()
    with remote.client(url, read_api_key()) as http:
        before = remote.record(http)
        answer = http.post("/set_internal_state", json={"server_args": {"dspark_sts": 2}})
        after = remote.record(http)
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
    write_bytes(plot, reliability_plot(_curves(before["reliability"])))
    console.print(f"Written: {out}, {plot} (reliability before the fit)")


def _curves(table: Mapping[str, Any]) -> dict[str, list[Reliability]]:
    """Survival of each position, as a server counted it, of greedy and of sampled requests.

    Args:
        table: :meth:`dspark_sglang.core.schedule.correction.Reliability.table`.
    """
    seen, predicted, kept = (np.array(table[name]) for name in ("seen", "predicted", "kept"))
    curves: dict[str, list[Reliability]] = {}
    for kind, name in enumerate(("greedy", "sampled")):
        curves[name] = []
        for place in range(seen.shape[1]):
            used = seen[kind, place] >= _ENOUGH
            count = seen[kind, place][used]
            curves[name].append(
                Reliability(
                    predicted=(predicted[kind, place][used] / count).tolist(),
                    observed=(kept[kind, place][used] / count).tolist(),
                    blocks=count.round().astype(int).tolist(),
                )
            )
    return curves
