"""The ``dspark`` command's subcommands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from dspark_sglang import __version__
from dspark_sglang.cli import (
    bench_compare,
    calibrate,
    canary,
    data,
    demo,
    doctor,
    evaluate,
    package,
    plan,
    push,
    serve,
    simulate,
    train,
)
from dspark_sglang.cli.bench import app as bench_app
from dspark_sglang.errors import ConfigError

app = typer.Typer(
    name="dspark",
    help="DSpark speculative decoding for SGLang: the kit around the plugin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"dspark-sglang {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """DSpark speculative decoding for SGLang: the kit around the plugin."""


app.command("doctor")(doctor.doctor)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)
app.command("canary")(canary.canary)
app.command("demo")(demo.demo)
bench_app.command("compare")(bench_compare.compare_servers)
app.add_typer(bench_app, name="bench")
app.command("data")(data.data)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("plan")(plan.plan)
app.add_typer(simulate.app, name="simulate")
app.command("package")(package.package)
app.command("verify")(package.verify)
app.command("push")(push.push)

#: Commands that are gone: what took their place, and an example.
GONE = {
    "ablate": (
        "dspark train, once a variant",
        "dspark train --config train.yaml --set drafter.layers=3 --set out=runs/3",
    ),
    "generate-data": ("dspark data", "dspark data --target TARGET --out data.jsonl"),
    "economics": ("dspark simulate price", "dspark simulate price frontier.json --sla 80"),
    "report": ("docs/results.md, which make results writes in a checkout", "make results"),
    "fetch-target": ("dspark demo --fetch-only", "dspark demo --fetch-only --target DIR"),
    "bench-round": ("make bench in a checkout", "make bench"),
    "bench-kernels": ("make bench-kernels in a checkout", "make bench-kernels"),
    "bench-load": ("make bench-load in a checkout", "make bench-load"),
    "bench-placement": ("make bench-placement in a checkout", "make bench-placement"),
    "drill": ("make drill in a checkout", "make drill DRILL='--url URL --requests 500'"),
    "lossless": ("make exactness in a checkout", "make exactness"),
    "gate": (
        "dspark verify --files DIR=CHECKSUMS",
        "dspark verify --files /models/target=target.json",
    ),
    "card": ("dspark package DIR --card write", "dspark package model_cards/NAME --card check"),
    "profile": ("dspark calibrate --cost", "dspark calibrate --cost --drafter DIR"),
    "bench gate": (
        "dspark bench --baseline",
        "dspark bench --result runs/bench/result.json --baseline saved/result.json",
    ),
    "bench frontier": (
        "dspark bench compare",
        "dspark bench compare runs/a/frontier.json runs/b/frontier.json",
    ),
    "package-check": ("make package-check in a checkout", "make package-check"),
    "simulate published": ("make simulate-published in a checkout", "make simulate-published"),
    "simulate fit": ("make simulate-fit in a checkout", "make simulate-fit"),
    "simulate check": ("make simulate-check in a checkout", "make simulate-check"),
}


def _gone(name: str) -> Callable[[], None]:
    def answer() -> None:
        instead, example = GONE[name]
        raise ConfigError(
            f"There is no dspark {name} any more.", expected=instead, fix=f"For example: {example}"
        )

    return answer


_GROUPS = {"": app, "bench": bench_app, "simulate": simulate.app}
for _path in GONE:
    _group, _, _name = _path.rpartition(" ")
    _GROUPS[_group].command(
        _name,
        hidden=True,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_gone(_path))
