"""``dspark data``: conversations whose answers the target wrote."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_sglang.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from dspark_sglang.training.conversations import ConversationWriter
    from dspark_sglang.training.generate import Options, Tally
    from dspark_sglang.training.prompts import Draft

#: Large batches pay here; a speculating server is as fast at a few requests only.
_SERVER_FLAGS = ("--max-running-requests", "128", "--max-total-tokens", "131072")


def data(
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
    # Hidden: a key on the command line is seen by everyone on the machine.
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", hidden=True)] = "",
) -> None:
    """Let the target answer prompts, and keep prompts and answers for training.

    Stop it at any time; the same command goes on. The key of a remote endpoint is read from
    OPENAI_API_KEY.
    """
    from dspark_sglang.training.conversations import ConversationWriter
    from dspark_sglang.training.generate import Options

    # Text for people and for logs: no markup in file names, no lines broken at 80 characters.
    console = Console(markup=False, soft_wrap=True)
    parsed = _temperatures(temperatures)
    base = _checked_url(url)
    tokenizer = _tokenizer(console, target)
    drafts = _drafts(console, prompts, recipe)
    with ExitStack() as stack:
        writer = stack.enter_context(ConversationWriter(out))
        if writer.ids:
            console.print(
                f"{out}: {len(writer.ids)} conversations, {writer.tokens} tokens already, "
                f"{writer.broken} broken lines skipped"
            )
        base = base or _serve(stack, console, target, drafter, out)
        options = Options(
            url=base,
            model=model,
            api_key=api_key,
            concurrency=concurrency,
            max_tokens=max_tokens,
            temperatures=parsed,
            seed=seed,
        )
        tally = asyncio.run(_run(console, tokenizer, options, drafts, writer, tokens))
    console.print(
        f"{out}: {writer.tokens} tokens in {len(writer.ids)} conversations "
        f"({tally.written} new, {tally.duplicates} duplicates and {tally.unusable} unusable "
        f"skipped, {tally.failed} requests retried)"
    )
    if tally.own_defaults:
        console.print(
            "The endpoint refuses top_k, min_p and repetition_penalty. If it has defaults for them, "
            "the text does not follow the target's plain law."
        )


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        parsed = tuple(float(part) for part in text.split(","))
    except ValueError:
        parsed = ()
    if not parsed or not all(0 <= value < math.inf for value in parsed):
        raise ConfigError(
            f"--temperatures is {text!r}.",
            expected="numbers of at least 0, comma-separated",
            fix="For example --temperatures 0,1.",
        )
    return parsed


def _checked_url(text: str) -> str:
    """``text`` without a slash at its end; empty stays empty."""
    import httpx

    try:
        parts = httpx.URL(text)
    except httpx.InvalidURL:
        parts = httpx.URL("")
    if text and not (parts.scheme in ("http", "https") and parts.host):
        raise ConfigError(
            f"--url is {text!r}.",
            expected="an http or https address",
            fix="For example --url http://127.0.0.1:30000/v1.",
        )
    return text.rstrip("/")


def _tokenizer(console: Console, target: Path) -> Any:
    """The target's tokenizer; says so where its chat template limits what can be asked."""
    from transformers import AutoTokenizer

    from dspark_sglang.training.chat import accepts_system

    fix = "Give the directory of an instruction-tuned model with its tokenizer."
    try:
        tokenizer = AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The tokenizer of {target} cannot be loaded: {error}.",
            expected="a Hugging Face model directory",
            fix=fix,
        ) from error
    if not tokenizer.chat_template:
        raise CheckpointError(f"{target} has no chat template.", expected="a chat model", fix=fix)
    if not accepts_system(tokenizer):
        console.print("the chat template takes no system messages: they are left out")
    return tokenizer


def _drafts(
    console: Console, prompts: list[Path] | None, recipe: str
) -> Callable[[random.Random], Draft | None]:
    """Where the next conversation to start comes from."""
    from dspark_sglang.training.prompts import load_prompt_files, load_recipe

    if not prompts:
        chosen = load_recipe(recipe)
        return chosen.draw
    scan = load_prompt_files(prompts)
    console.print(f"{len(scan.drafts)} prompts, {scan.broken} broken entries skipped")
    for example in scan.examples:
        console.print(f"  {example}", style="yellow")
    queue = iter(scan.drafts)
    return lambda rng: next(queue, None)


def _serve(
    stack: ExitStack, console: Console, target: Path, drafter: Path | None, out: Path
) -> str:
    """Serve the target here for as long as ``stack`` lives."""
    from dspark_sglang.server import Server, free_port, serve_command

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
    tokenizer: Any,
    options: Options,
    drafts: Callable[[random.Random], Draft | None],
    writer: ConversationWriter,
    tokens: int,
) -> Tally:
    import httpx

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
            generator = Generator(client, options, tokenizer, progress=report)
            return await generator.run(drafts, writer, tokens)
