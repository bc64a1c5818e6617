"""``throughput.json``: what a server delivered with the drafter and without, on one machine.

A figure without a baseline, a spread, a command and a machine cannot be written down here. Made
from the result of ``dspark bench-load``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from dspark_packaging.record import read_record
from dspark_packaging.schemas import Digest, Text
from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance, write_json
from dspark_sglang.checkpoint import read_json
from dspark_sglang.errors import ArtifactError

Rate = Annotated[float, msgspec.Meta(gt=0)]
Spread = Annotated[float, msgspec.Meta(ge=0)]
_FIX = "Measure again with `dspark bench-load`, or leave the file out: the card then says so."


class Speed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One condition, with and without the drafter in turn."""

    temperature: Annotated[float, msgspec.Meta(ge=0)]
    #: Requests in flight.
    concurrency: Annotated[int, msgspec.Meta(ge=1)]
    dtype: Text
    #: Output tokens a second of all requests together, and the standard deviation over blocks.
    baseline_tok_s: Rate
    baseline_spread: Spread
    tok_s: Rate
    spread: Spread
    #: Of paired blocks: lowest, middle, highest.
    ratio: tuple[Rate, Rate, Rate]


class ThroughputArtifact(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag="throughput",
    tag_field="kind",
):
    """The content of ``throughput.json``."""

    schema_version: int
    gamma: int
    drafter_sha256: Digest
    hardware: Text
    #: Turns each way of serving had, and how long each was timed.
    blocks: Annotated[int, msgspec.Meta(ge=1)]
    window_s: Rate
    provenance: Provenance
    rows: Annotated[list[Speed], msgspec.Meta(min_length=1)]


def read_throughput(path: Path, *, gamma: int, drafter_sha256: str) -> ThroughputArtifact:
    """Read ``throughput.json`` and check that it was measured with these weights.

    Raises:
        ArtifactError: malformed, without a command or a machine, or of another drafter.
    """
    found = read_record(
        path,
        ThroughputArtifact,
        what="measured speeds",
        fix=_FIX,
        schema_version=SCHEMA_VERSION,
        gamma=gamma,
        drafter_sha256=drafter_sha256,
    )
    if not found.provenance.command.strip():
        raise ArtifactError(
            f"{path} names no command.", expected="the command that measured it", fix=_FIX
        )
    return found


def _row(name: str, cell: Mapping[str, Any]) -> Speed | None:
    """One cell of a load summary (``T1-c8`` or ``T1-c8-float32``); None without both ways."""
    plain, ours, ratio = (cell.get(key) for key in ("none", "dspark", "ratio_none"))
    if not plain or not ours or not ratio:
        return None
    temperature, concurrency, *dtype = name.split("-")
    return Speed(
        temperature=float(temperature.removeprefix("T")),
        concurrency=int(concurrency.removeprefix("c")),
        dtype=dtype[0] if dtype else "bfloat16",
        baseline_tok_s=plain["tok_s"],
        baseline_spread=plain["tok_s_spread"],
        tok_s=ours["tok_s"],
        spread=ours["tok_s_spread"],
        ratio=tuple(ratio),
    )


def write_throughput(summary: Path, out: Path, *, gamma: int, drafter_sha256: str) -> None:
    """Write ``throughput.json`` from what ``dspark bench-load`` measured.

    Raises:
        ArtifactError: another drafter's result, or no cell with both ways of serving.
    """
    value = read_json(summary, what="the summary.json of `dspark bench-load`")
    if value.get("drafter_sha256") != drafter_sha256:
        raise ArtifactError(
            f"{summary} was measured with drafter {str(value.get('drafter_sha256'))[:12]}.",
            expected=f"{drafter_sha256[:12]}, the weights packaged here",
            fix=_FIX,
        )
    try:
        rows = [_row(name, cell) for name, cell in value["cells"].items()]
        artifact = ThroughputArtifact(
            schema_version=SCHEMA_VERSION,
            gamma=gamma,
            drafter_sha256=drafter_sha256,
            hardware=value["machine"],
            blocks=value["blocks"],
            window_s=value["window_s"],
            provenance=Provenance(
                created=value.get("created", "not recorded"),
                command=value["command"],
                versions=value["versions"],
            ),
            rows=[row for row in rows if row is not None],
        )
        # The constructor does not validate; reading does.
        msgspec.json.decode(msgspec.json.encode(artifact), type=ThroughputArtifact)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{summary} is no result of `dspark bench-load`: {error}.",
            expected="cells with modes none and dspark",
            fix=_FIX,
        ) from error
    write_json(out, artifact)
