"""``dspark calibrate --cost``: measure what a server's steps cost, and draw it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dspark_sglang import targets
from dspark_sglang.errors import ConfigError, ServerError

#: Loads shown and drawn.
_SHOWN = (1, 2, 4, 8, 16, 32)
_CONTEXT = 128


def measure(out: Path, drafter: Path, target: Path | None, *, dtype: str, requests: int) -> None:
    """Measure what steps cost, as a server does at its first start, and draw the result.

    Args:
        out: folder of cost.json and cost.png.
        target: None: the bundle itself, else SmolLM2, fetched once.
        requests: most at once.

    Raises:
        ConfigError: another ``dtype`` than bfloat16 and float32.
        ServerError: the server measured nothing.
    """
    from dspark_loadtests.closed_loop import make_server, mode
    from dspark_sglang.server import Server, free_port

    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(
            f"--dtype is {dtype}.", expected="bfloat16 or float32", fix="Use one of these."
        )
    console, out = Console(), out.absolute()
    chosen = mode("dspark")
    # A cache of its own: the start-up measurement runs, whatever was measured before.
    cache = out / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    server: Server = make_server(
        chosen._replace(environment={"DSPARK_CACHE_DIR": str(cache)}),
        target=targets.of_drafter(drafter, target),
        drafter=drafter,
        dtype=dtype,
        port=free_port(),
        requests=requests,
        log=out / "server.log",
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with server, Progress(*columns, console=console) as bar:
        task = bar.add_task("starting, then measuring (about 40 s)", total=None)
        server.wait_ready()
        bar.update(task, total=1, completed=1, description="measured")
        record = server.dspark() or {}
    found = Path(str(record.get("cost_source", "")))
    if not found.is_file():
        raise ServerError(
            f"The server measured nothing (cost: {record.get('cost_source')}).",
            expected="time for a few steps within 18 s, DSPARK_SCHEDULE=adaptive, DSPARK_COST=auto",
            fix=f"See its log in {server.log}.",
        )
    shutil.copyfile(found, out / "cost.json")
    shutil.rmtree(cache, ignore_errors=True)
    report(console, out, record, requests)


def report(console: Console, out: Path, record: dict[str, Any], requests: int) -> None:
    """Print and draw the cost in ``out/cost.json``."""
    from dspark_sglang.artifacts import CostArtifact, read_artifact
    from dspark_sglang.core.schedule.cost_model import CostModel

    artifact = read_artifact(
        out / "cost.json",
        CostArtifact,
        "a cost file of this plugin",
        "Run `dspark calibrate --cost` again.",
    )
    model = CostModel(gamma=artifact.model["gamma"])
    model.restore(artifact.model)
    loads = [count for count in _SHOWN if count <= requests]
    view = Table(title=f"Milliseconds a step ({_CONTEXT} cached tokens a request)")
    view.add_column("requests", justify="right")
    view.add_column("plain", justify="right")
    for depth in range(model.gamma + 1):
        view.add_column(f"verify {depth}", justify="right")
    rows = []
    for count in loads:
        context = count * _CONTEXT
        plain = model.plain_seconds(count, context)
        rounds = [
            model.round_seconds(count, count * depth, context) for depth in range(model.gamma + 1)
        ]
        rows.append((count, plain, rounds))
        view.add_row(str(count), *(f"{1e3 * seconds:.1f}" for seconds in (plain, *rounds)))
    console.print(view)
    _draw(out / "cost.png", rows)
    took = "" if record.get("profile_s") is None else f" in {record['profile_s']:.1f} s"
    console.print(
        f"{model.observations} steps measured{took}. Written: {out / 'cost.json'}, "
        f"{out / 'cost.png'}"
    )


def _draw(path: Path, rows: list[tuple[int, float, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for index, (count, plain, rounds) in enumerate(rows):
        colour = plt.get_cmap("viridis")(index / max(1, len(rows) - 1))
        depths = range(len(rounds))
        left.plot(depths, [1e3 * s for s in rounds], "o-", color=colour, label=f"{count}")
        left.plot([-0.5], [1e3 * plain], "s", color=colour)
        right.plot(depths, [s / plain for s in rounds], "o-", color=colour)
    left.set_xlabel("drafted tokens verified a request (squares: plain step)")
    left.set_ylabel("ms a step")
    left.legend(title="requests", frameon=False, fontsize=8)
    right.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    right.set_xlabel("drafted tokens verified a request")
    right.set_ylabel("round over plain step")
    figure.savefig(path, dpi=140)
    plt.close(figure)
