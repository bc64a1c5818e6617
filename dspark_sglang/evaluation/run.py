"""An evaluation from its options to its result and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from dspark_packaging.card import calibration_plot
from dspark_packaging.layout import EVAL_FILE
from dspark_sglang import targets
from dspark_sglang.artifacts import SCHEMA_VERSION, STS_FILE, read_sts, write_bytes, write_json
from dspark_sglang.checkpoint import read_config
from dspark_sglang.errors import ConfigError
from dspark_sglang.evaluation import answer, served
from dspark_sglang.evaluation.answer import Answer, Question
from dspark_sglang.evaluation.options import Options
from dspark_sglang.evaluation.report import (
    ALONE,
    Blocks,
    Domain,
    Evaluation,
    Lengths,
    calibration,
    card_artifact,
    lengths,
)
from dspark_sglang.layouts.base import layout_of, weights_digest
from dspark_sglang.memory import keep_freed_memory
from dspark_sglang.provenance import machine, provenance
from dspark_sglang.server import Server, free_port, serve_command

_TEMPERATURES = (0.0, 1.0)


def fast_dtype() -> str:
    """``bfloat16`` where this processor multiplies it in hardware, else ``float32``.

    Without such instructions a matrix product in bfloat16 takes three to five times as long.
    """
    known = torch.cpu.get_capabilities()
    return "bfloat16" if known.get("avx512_bf16") or known.get("amx_bf16") else "float32"


class Judged(NamedTuple):
    """The drafter that is judged."""

    gamma: int
    digest: str
    #: ``[gamma]`` STS beside the weights; None: there is none.
    temperatures: list[float] | None


def _judged(drafter: Path) -> Judged:
    raw = read_config(drafter, role="drafter")
    gamma = layout_of(raw).read(raw).gamma
    digest, sts = weights_digest(drafter), drafter / STS_FILE
    if not sts.exists():
        return Judged(gamma, digest, None)
    return Judged(gamma, digest, read_sts(sts, gamma=gamma, drafter_sha256=digest).temperatures)


def evaluate(options: Options, console: Console, *, accepts: Sequence[str] | None) -> Evaluation:
    """Measure accepted length, and calibration where the reference engine runs.

    Args:
        console: shows how far it is.
        accepts: the only domains that prompts may be of; None: any.

    Raises:
        DSparkError: options that contradict each other, or anything that cannot be read, loaded or served.
    """
    if options.engine == "server" and options.shortlist is not None:
        raise ConfigError(
            "--shortlist with --engine server.",
            expected="the standalone engine: a server has the shortlist it serves with",
            fix="Leave --engine out.",
        )
    if options.engine != "server":
        answer.refuse_bundle(
            options.artifact, instead="Pass --engine server, which asks a real server."
        )
    questions = answer.load_questions(options.prompts)
    questions = questions[: options.limit] if options.limit else questions
    unknown = {question.domain for question in questions} - set(accepts or ())
    if accepts is not None and unknown:
        raise ConfigError(
            f"The prompts are of domains {', '.join(sorted(unknown))}.",
            expected=", ".join(accepts),
            fix="Give each prompt one of these as its domain, or leave --record out.",
        )
    target = targets.of_drafter(options.artifact, options.target, progress=console.print)
    judged = _judged(options.artifact)
    dtype = fast_dtype() if options.dtype == "auto" else options.dtype
    rows: list[Lengths] = []
    blocks: Blocks | None = None
    candidates: dict[str, int] = {}
    if options.engine != "server":
        made = _standalone(options, target, questions, judged, dtype, console)
        rows, blocks, candidates = made
    if options.engine != "standalone":
        rows = rows + _served(options, target, questions, dtype, console)
    found = None
    if blocks is not None:
        found = calibration(blocks.confidence, blocks.acceptance, judged.temperatures)
    greedy, sampled = rows[:2]  # at the temperatures in order
    name = options.prompts.name if options.prompts else "packaged prompts"
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        gamma=judged.gamma,
        drafter_sha256=judged.digest,
        target=target.name,
        prompts=f"{len(questions)} from {name}",
        max_tokens=options.max_tokens,
        dtype=dtype,
        accept_length_greedy=greedy.accept_length,
        accept_length_t1=sampled.accept_length,
        accept_length_greedy_drafted=next(
            (row.accept_length for row in rows if row.engine == ALONE), None
        ),
        per_position=sampled.per_position,
        per_position_greedy=greedy.per_position,
        ece_before=found.ece_before if found else None,
        ece_after=found.ece_after if found else None,
        lengths=rows,
        calibration=found,
        provenance=provenance(options.command(target, dtype)),
        candidates=candidates,
    )


def _standalone(
    options: Options,
    target: Path,
    questions: list[Question],
    judged: Judged,
    dtype: str,
    console: Console,
) -> tuple[list[Lengths], Blocks, dict[str, int]]:
    """Rows at both temperatures, the sampled blocks to judge confidences by, and candidates by temperature."""
    keep_freed_memory()
    with console.status("loading target and drafter"):
        pair = answer.load_pair(target, options.artifact, bf16=dtype == "bfloat16")
    sizes = {
        at: pair.candidates(sampled=at > 0) if options.shortlist is None else options.shortlist
        for at in _TEMPERATURES
    }
    ways = [("standalone", 0.0, options.lookup), ("standalone", 1.0, False)]
    ways += [(ALONE, 0.0, False)] if options.lookup else []
    rows, sampled = [], list[Answer]()
    with Progress(console=console) as bar:
        for engine, temperature, lookup in ways:
            name = f"answering, T={temperature:g}{'' if lookup else ', drafted'}"
            answers = answer.answer(
                pair,
                questions,
                temperature=temperature,
                max_tokens=options.max_tokens,
                seed=options.seed,
                shortlist=sizes[temperature],
                lookup=lookup,
                temperatures=judged.temperatures,
                progress=_told(bar, name, len(questions)),
            )
            walks = [Domain(one.domain, one.walk) for one in answers]
            rows.append(lengths(engine, temperature, walks, by_prompt=True))
            sampled = answers if temperature else sampled
    return rows, Blocks.of(sampled), {f"{at:g}": size for at, size in sizes.items()}


def _served(
    options: Options, target: Path, questions: list[Question], dtype: str, console: Console
) -> list[Lengths]:
    """Rows as a server counted them; one is started here without ``--url``."""
    rows, url = [], options.url
    with ExitStack() as stack:
        if not url:
            port = free_port()
            command = serve_command(target, port, dtype=dtype, drafter=options.artifact)
            # Everything drafted is verified: that is what accepted length is defined by.
            environment = {"DSPARK_SCHEDULE": "all"}
            environment |= {} if options.lookup else {"DSPARK_LOOKUP": "off"}
            log = Path("runs/eval/server.log")
            server = Server(command, port=port, log=log, environment=environment)
            with console.status("starting the server"):
                stack.enter_context(server).wait_ready()
            url = server.url
        bar = stack.enter_context(Progress(console=console))
        for temperature in _TEMPERATURES:
            walks = served.serve(
                url.rstrip("/").removesuffix("/v1"),
                questions,
                temperature=temperature,
                max_tokens=options.max_tokens,
                progress=_told(bar, f"serving, T={temperature:g}", len(questions)),
            )
            entries = [Domain(name, walk) for name, walk in walks.items()]
            rows.append(lengths("server", temperature, entries, by_prompt=False))
    return rows


def _told(bar: Progress, name: str, total: int) -> Callable[[int], None]:
    task = bar.add_task(name, total=total)
    return lambda done: bar.update(task, completed=done)


def save(folder: Path, found: Evaluation) -> None:
    """Write ``evaluation.json`` and, where confidences were judged, ``reliability.png``."""
    write_json(folder / "evaluation.json", found)
    picture = calibration_plot(found.calibration)
    if picture is not None:
        write_bytes(folder / "reliability.png", picture)


def record(drafter: Path, found: Evaluation) -> Path:
    """Write ``eval.json`` beside the weights, from which the card's acceptance table is made."""
    write_json(drafter / EVAL_FILE, card_artifact(found, machine()))
    return drafter / EVAL_FILE
