"""``dspark generate-data``: conversations whose answers the target wrote."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_sglang.errors import ConfigError

if TYPE_CHECKING:
    from dspark_sglang.training.conversations import ConversationWriter
    from dspark_sglang.training.generate import Draft, Options, Tally

#: Large batches pay here; a speculating server is as fast at a few requests only.
_SERVER_FLAGS = ("--max-running-requests", "128", "--max-total-tokens", "131072")


def generate_data(
    target: Annotated[
        Path, typer.Option(help="The target's directory (its chat template is used).")
    ],
    out: Annotated[Path, typer.Option(help="Conversations, JSON Lines; grown if it exists.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of answers to reach.")] = 1_000_000,
    url: Annotated[
        str,
        typer.Option(help="OpenAI-compatible endpoint with /v1. Default: serve --target here."),
    ] = "",
    drafter: Annotated[
        Path | None, typer.Option(help="Serve with DSPARK and this drafter (without --url).")
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompt files (ShareGPT, OpenAI messages, text). Repeatable."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Domain mix whose prompts the target writes (without --prompts).")
    ] = "perfectblend",
    temperatures: Annotated[
        str, typer.Option(help="Temperatures of the answers, by turns, comma-separated.")
    ] = "0,1",
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest answer in tokens.")] = 256,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    model: Annotated[str, typer.Option(help="Model name sent to the endpoint.")] = "default",
    seed: Annotated[int, typer.Option(help="Seed of prompts and answers.")] = 0,
) -> None:
    """Let the target answer prompts, and keep prompts and answers for training.

    Stop it at any time; the same command goes on. The key of a remote endpoint is read from
    OPENAI_API_KEY.
    """
    from dspark_sglang.training.conversations import ConversationWriter
    from dspark_sglang.training.generate import Options

    console = Console()
    try:
        parsed = tuple(float(part) for part in temperatures.split(","))
    except ValueError:
        parsed = ()
    if not parsed or min(parsed) < 0:
        raise ConfigError(
            f"--temperatures is {temperatures!r}.",
            expected="numbers of at least 0, comma-separated",
            fix="For example --temperatures 0,1.",
        )
    drafts = _drafts(console, prompts, recipe)
    with ExitStack() as stack:
        writer = stack.enter_context(ConversationWriter(out))
        if writer.ids:
            console.print(f"{out}: {len(writer.ids)} conversations, {writer.tokens} tokens already")
        base = url.rstrip("/") or _serve(stack, console, target, drafter, out)
        options = Options(
            url=base,
            model=model,
            api_key=os.environ.get("OPENAI_API_KEY", ""),
            concurrency=concurrency,
            max_tokens=max_tokens,
            temperatures=parsed,
            seed=seed,
        )
        tally = asyncio.run(_run(console, target, options, drafts, writer, tokens))
    console.print(
        f"{out}: {writer.tokens} tokens in {len(writer.ids)} conversations "
        f"({tally.written} new, {tally.duplicates} duplicates and {tally.unusable} unusable "
        f"skipped, {tally.failed} requests retried)"
    )


def _drafts(
    console: Console, prompts: list[Path] | None, recipe: str
) -> Callable[[random.Random], Draft | None]:
    """Where the next conversation to start comes from."""
    from dspark_sglang.training.generate import Options, draw_draft
    from dspark_sglang.training.prompts import load_prompt_files
    from dspark_sglang.training.recipe import load_recipe

    if not prompts:
        chosen = load_recipe(recipe)
        share = Options(url="").system_share
        return lambda rng: draw_draft(chosen, rng, share)
    scan = load_prompt_files(prompts)
    console.print(f"{len(scan.drafts)} prompts, {scan.broken} broken entries skipped")
    for example in scan.examples:
        console.print(f"  {example}", style="yellow", markup=False)
    queue = iter(scan.drafts)
    return lambda rng: next(queue, None)


def _serve(
    stack: ExitStack, console: Console, target: Path, drafter: Path | None, out: Path
) -> str:
    """Serve the target here for as long as ``stack`` lives."""
    from dspark_sglang.demo.server import Server, free_port, serve_command

    port = free_port()
    command = serve_command(
        target, port, dtype="bfloat16", drafter=drafter, extra=("--disable-overlap-schedule",)
    )
    for flag, value in zip(_SERVER_FLAGS[::2], _SERVER_FLAGS[1::2], strict=True):
        command[command.index(flag) + 1] = value
    server = Server(command, port=port, log=out.with_suffix(".server.log"))
    with console.status("starting the target's server"):
        stack.enter_context(server).wait_ready()
    return f"{server.url}/v1"


async def _run(
    console: Console,
    target: Path,
    options: Options,
    drafts: Callable[[random.Random], Draft | None],
    writer: ConversationWriter,
    tokens: int,
) -> Tally:
    import httpx
    from transformers import AutoTokenizer

    from dspark_sglang.training.generate import Generator

    started, before = time.monotonic(), writer.tokens
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
        TextColumn("{task.fields[rate]:.0f} tok/s"),
        TimeRemainingColumn(),
    )
    limits = httpx.Limits(max_connections=options.concurrency)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("answering", total=tokens, completed=before, rate=0.0)

        def report(tally: Tally) -> None:
            rate = (writer.tokens - before) / max(1e-9, time.monotonic() - started)
            bar.update(task, completed=min(writer.tokens, tokens), rate=rate)

        async with httpx.AsyncClient(limits=limits) as client:
            generator = Generator(
                client, options, AutoTokenizer.from_pretrained(target), progress=report
            )
            return await generator.run(drafts, writer, tokens)
