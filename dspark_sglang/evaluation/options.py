"""What ``dspark eval`` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

Engine = Literal["standalone", "server", "both"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged, on what, and how."""

    artifact: Annotated[Path, typer.Option(help="The drafter's directory, or a bundle.")]
    target: Annotated[
        Path | None,
        typer.Option(help="The target's directory. Default: the bundle, else the demo's."),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts: packaged format, messages, ShareGPT, text. Default: packaged."),
    ] = None
    engine: Annotated[
        Engine, typer.Option(help="The reference engine, a server's counters, or both.")
    ] = "standalone"
    url: Annotated[
        str, typer.Option(help="A running DSPARK server for --engine server. Default: serve here.")
    ] = ""
    limit: Annotated[int, typer.Option(min=0, help="First N prompts only. 0: all.")] = 0
    max_tokens: Annotated[
        int,
        typer.Option(
            min=16,
            help="Longest answer in tokens. The packaged prompts at the default take twelve minutes on two cores of an AMD EPYC.",
        ),
    ] = 96
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(
            help="Of both models. auto: bfloat16 where this CPU multiplies it in hardware (AMX, AVX-512 BF16), "
            "else float32, which is several times faster there."
        ),
    ] = "auto"
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0
    shortlist: Annotated[
        int | None,
        typer.Option(min=0, help="Candidates a position. 0: all tokens. Default: as serving."),
    ] = None
    lookup: Annotated[
        bool, typer.Option(help="Copy from a greedy request's own text, as serving does.")
    ] = True

    def command(self, target: Path, dtype: str) -> list[str]:
        """The command line that repeats this with the target and dtype that were chosen; of files the names alone."""
        words = ["dspark", "eval", "--artifact", self.artifact.name, "--target", target.name]
        words += ["--max-tokens", str(self.max_tokens), "--dtype", dtype]
        words += ["--seed", str(self.seed), "--engine", self.engine]
        words += ["--prompts", self.prompts.name] if self.prompts else []
        words += ["--limit", str(self.limit)] if self.limit else []
        words += [] if self.shortlist is None else ["--shortlist", str(self.shortlist)]
        return words + ([] if self.lookup else ["--no-lookup"])
