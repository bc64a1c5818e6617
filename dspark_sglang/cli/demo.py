"""``dspark demo``: the real server without and with DSPARK, measured and compared."""

from __future__ import annotations

import importlib.metadata
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_loadtests.prompts import KINDS, Prompt, load_prompts
from dspark_sglang import targets
from dspark_sglang.artifacts import require_writable, write_json
from dspark_sglang.demo import report
from dspark_sglang.demo.measure import (
    NEAR_TIE,
    Comparison,
    answer_all,
    compare,
    running,
    tie_gap,
)
from dspark_sglang.errors import CheckpointError
from dspark_sglang.server import Server, free_ports, pause_when_up, serve_command

DRAFTER = Path("model_cards/smollm2-135m-instruct-dspark")
_COLUMNS = (
    TextColumn("[bold]{task.description}"),
    BarColumn(bar_width=24),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("[dim]{task.fields[text]}"),
)


def choose_prompts(per_kind: int) -> list[Prompt]:
    """``per_kind`` prompts of each kind, kinds alternating."""
    by_kind = [[p for p in load_prompts() if p.kind == kind][:per_kind] for kind in KINDS]
    return [prompt for group in zip(*by_kind, strict=True) for prompt in group]


def start_pair(
    stack: ExitStack, console: Console, target: Path, drafter: Path, dtype: str, logs: Path
) -> tuple[Server, Server]:
    """Start both servers side by side and pause them."""
    pair = {}
    ports = free_ports(2)
    for port, (name, draft) in zip(ports, (("plain", None), ("dspark", drafter)), strict=True):
        command = serve_command(target, port, dtype=dtype, drafter=draft)
        server = Server(command, port=port, log=logs / f"{name}-{dtype}.log")
        pair[name] = stack.enter_context(server)
    began = time.monotonic()
    with console.status("") as status:
        doing = f"starting two SGLang servers in {dtype}"
        pause_when_up(pair, tell=lambda took: status.update(f"{doing} ({took:.0f} s, usually 40)"))
    console.print(f"[green]✓[/] two servers in {dtype} up after {time.monotonic() - began:.0f} s")
    return pair["plain"], pair["dspark"]


def run_comparison(
    console: Console,
    servers: tuple[Server, Server],
    prompts: list[Prompt],
    *,
    max_tokens: int,
    title: str,
    temperature: float = 0.0,
) -> Comparison:
    """Compare the servers under a progress bar, showing the text that streams in."""
    with Progress(*_COLUMNS, console=console, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=len(prompts), text="")
        text = ""

        def each(prompt: Prompt) -> None:
            nonlocal text
            text = f"{prompt.kind}: "
            progress.update(task, completed=prompts.index(prompt), text=text)

        def show(piece: str) -> None:
            nonlocal text
            text = f"{text}{piece}".replace("\n", " ")[-48:]
            progress.update(task, text=text)

        result = compare(
            *servers,
            prompts,
            max_tokens=max_tokens,
            each=each,
            temperature=temperature,
            show=show,
        )
        progress.update(task, completed=len(prompts), text="")
    return result


def _texts(
    console: Console, servers: tuple[Server, Server], prompts: list[Prompt], *, max_tokens: int
) -> Comparison:
    """The same prompts on both servers, several at once, for their text."""
    with Progress(*_COLUMNS[:4], console=console, refresh_per_second=4) as progress:
        task = progress.add_task("equality (float32)", total=2 * len(prompts))
        answers = [
            answer_all(
                server, prompts, max_tokens=max_tokens, each=lambda _: progress.advance(task)
            )
            for server in servers
        ]
    return Comparison(plain=answers[0], dspark=answers[1])


def _ties(plain: Server, prompts: list[Prompt], both: Comparison, limit: int) -> list[Any]:
    """Every text that differs, with the gap of the two best tokens where it does."""
    found = []
    for prompt, ours, theirs in zip(prompts, both.dspark, both.plain, strict=True):
        if ours.text == theirs.text:
            continue
        with running(plain):
            gap = tie_gap(plain, prompt, ours.text, max_tokens=limit)
        found.append({"prompt": prompt.id, "gap": gap, "near_tie": gap < NEAR_TIE})
    return found


def _fetched(directory: Path | None) -> Path:
    """The converted target, made unless it is there."""
    if directory is not None:
        require_writable(directory, folder=True)
    with Console(stderr=True).status("checking SmolLM2-135M-Instruct") as status:
        return targets.ensure_target(directory, progress=status.update)


def demo(
    out: Annotated[Path, typer.Option(help="Where results and logs go.")] = Path("runs/demo"),
    model: Annotated[
        Literal["smollm2", "v4-tiny"],
        typer.Option(
            help="v4-tiny: a random DeepSeek-V4 of 6 MB in the published form, made here."
        ),
    ] = "smollm2",
    drafter: Annotated[Path, typer.Option(help="The drafter to serve.")] = DRAFTER,
    target: Annotated[
        Path | None, typer.Option(help="Default: the bundle itself, else SmolLM2, fetched once.")
    ] = None,
    per_kind: Annotated[int, typer.Option(min=1, max=9, help="Prompts of each kind.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=16, help="Tokens of each answer.")] = 48,
    fetch_only: Annotated[
        bool, typer.Option("--fetch-only", help="Fetch SmolLM2 into --target (default: the user's "
                                                "cache), print its folder, serve nothing.")
    ] = False,
) -> None:  # fmt: skip
    """Serve a real model without and with DSPARK and show what changes: speed, not text."""
    if fetch_only:
        print(_fetched(target))
        return
    console = Console()
    if model == "v4-tiny":
        from dspark_sglang.layouts.v4 import tiny

        drafter = out / model
        tiny.write(drafter, published=True)
    if not (drafter / "config.json").is_file():
        raise CheckpointError(
            f"{drafter} holds no drafter.",
            expected="a drafter directory (run this from the repository's root)",
            fix="Pass --drafter DIR.",
        )
    if target is None:
        with console.status("checking the target model") as status:
            target = targets.of_drafter(drafter, None, progress=lambda line: status.update(line))
        console.print(f"[green]✓[/] target: {target}")
    prompts = choose_prompts(per_kind)
    logs = out / "logs"
    with ExitStack() as stack:
        servers = start_pair(stack, console, target, drafter, "bfloat16", logs)
        speed = run_comparison(
            console, servers, prompts, max_tokens=max_tokens, title="speed (bfloat16)"
        )
        with running(servers[1]):
            status_now = servers[1].record() or {"active": False}
    with ExitStack() as stack:
        servers = start_pair(stack, console, target, drafter, "float32", logs)
        equal = _texts(console, servers, prompts, max_tokens=max_tokens)
        ties = _ties(servers[0], prompts, equal, max_tokens)
    status_now["sglang"] = importlib.metadata.version("sglang")
    summary = report.summarise(speed, equal, ties=ties, status=status_now)
    report.print_summary(console, summary)
    write_json(out / "summary.json", summary)
    report.draw(summary, out / "demo.png")
    console.print(f"Written: {out / 'summary.json'}, {out / 'demo.png'}; logs in {logs}")
    wrong = report.failures(summary)
    for line in wrong:
        console.print(f"[red]✗[/] {line}")
    if wrong:
        raise typer.Exit(1)
