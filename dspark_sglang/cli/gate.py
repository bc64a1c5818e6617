"""``dspark gate``: are these the bytes that were published? For an initContainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dspark_sglang.errors import ConfigError


def _pair(text: str, flag: str) -> tuple[Path, Path]:
    directory, found, manifest = text.partition("=")
    if not found or not directory or not manifest:
        raise ConfigError(
            f"{flag} is {text!r}.",
            expected="DIRECTORY=CHECKSUMS",
            fix=f"For example: {flag} /models/target=/etc/dspark/checksums/target.json",
        )
    return Path(directory), Path(manifest)


def gate(
    target: Annotated[str, typer.Option(help="DIRECTORY=CHECKSUMS of the target.")],
    drafter: Annotated[
        str | None, typer.Option(help="DIRECTORY=CHECKSUMS of the drafter; the same as the target's "
                                      "where one checkpoint holds both.")
    ] = None,
) -> None:  # fmt: skip
    """Check size and SHA-256 of every file that a server loads; exit code 2 when one differs.

    CHECKSUMS is what `dspark package`, `dspark demo --fetch-only` or
    `python -m sglang.srt.utils.model_file_verifier generate` wrote. Weight files that it does not list are
    refused too.
    """
    from dspark_packaging.manifest import verify_files

    pairs = [_pair(target, "--target")]
    if drafter is not None and drafter != target:
        pairs.append(_pair(drafter, "--drafter"))
    for directory, manifest in pairs:
        count = verify_files(directory, manifest)
        typer.echo(f"{directory}: {count} files as {manifest} lists them")
