"""``dspark eval``: accepted length and calibration of a drafter, the one command everywhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from dspark_sglang.artifacts import SCHEMA_VERSION, STS_FILE, read_sts, write_json
from dspark_sglang.checkpoint import read_config, weights_digest
from dspark_sglang.errors import ConfigError
from dspark_sglang.layouts.dense.config import parse_drafter_config

if TYPE_CHECKING:
    from dspark_sglang.evaluation.answer import Answer, Question
    from dspark_sglang.evaluation.report import Blocks, Evaluation, Lengths

Engine = Literal["standalone", "server", "both"]
_TEMPERATURES = (0.0, 1.0)


def evaluate(
    artifact: Annotated[Path, typer.Option(help="The drafter's directory, or a bundle.")],
    target: Annotated[
        Path | None,
        typer.Option(help="The target's directory. Default: the bundle, else the demo's."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts: packaged format, messages, ShareGPT, text. Default: packaged."),
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="The reference engine, a server's counters, or both.")
    ] = "standalone",
    url: Annotated[
        str, typer.Option(help="A running DSPARK server for --engine server. Default: serve here.")
    ] = "",
    limit: Annotated[int, typer.Option(min=0, help="First N prompts only. 0: all.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longest answer in tokens.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
    shortlist: Annotated[
        int | None,
        typer.Option(min=0, help="Candidates a position. 0: all tokens. Default: as serving."),
    ] = None,
    lookup: Annotated[
        bool,
        typer.Option(help="Copy from a greedy request's own text, as serving does."),
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and reliability.png.")
    ] = None,
    record: Annotated[
        bool, typer.Option(help="Write eval.json beside the weights, for the model card.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON and nothing else.")
    ] = False,
) -> None:
    """Measure accepted length per domain at temperatures 0 and 1, and calibration.

    The standalone engine is the reference one, with everything drafted verified; the server engine
    counts what a real server did.
    """
    from dspark_sglang import targets
    from dspark_sglang.evaluation.answer import load_questions, refuse_bundle

    if engine == "server" and shortlist is not None:
        raise ConfigError(
            "--shortlist with --engine server.",
            expected="the standalone engine: a server has the shortlist it serves with",
            fix="Leave --engine out.",
        )
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(
            f"--dtype is {dtype!r}.", expected="bfloat16 or float32", fix="Choose one of these."
        )
    if engine != "server":
        refuse_bundle(artifact, instead="Pass --engine server, which asks a real server.")
    console = Console(stderr=as_json)
    questions = load_questions(prompts)
    questions = questions[:limit] if limit else questions
    if record:
        _check_domains(questions)
    where = targets.of_drafter(artifact, target, progress=console.print)
    flags = ["--engine", engine]
    flags += ["--prompts", prompts.name] if prompts else []
    flags += ["--limit", str(limit)] if limit else []
    flags += [] if shortlist is None else ["--shortlist", str(shortlist)]
    flags += [] if lookup else ["--no-lookup"]
    settings = Settings(max_tokens, dtype, seed, shortlist, flags, lookup)
    session = Session(console, where, artifact, questions, settings)
    rows: list[Lengths] = []
    blocks: Blocks | None = None
    if engine != "server":
        made, blocks = session.standalone()
        rows += made
    if engine != "standalone":
        rows += session.server(url)
    result = session.result(rows, blocks, name=prompts.name if prompts else "packaged prompts")
    if out is not None:
        session.save(out, result, blocks)
    if record:
        session.record(result)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
        return
    _show(console, result)


def _check_domains(questions: list[Question]) -> None:
    """Raise ConfigError where prompts have domains a card does not know."""
    from dspark_packaging.card import KINDS

    unknown = {question.domain for question in questions} - set(KINDS)
    if unknown:
        raise ConfigError(
            f"The prompts are of domains {', '.join(sorted(unknown))}.",
            expected=", ".join(KINDS),
            fix="Give each prompt one of these as its domain, or leave --record out.",
        )


def _row(engine: str, temperature: float, answers: list[Answer]) -> Lengths:
    from dspark_sglang.evaluation.report import Domain, lengths

    entries = [Domain(answer.domain, answer.walk) for answer in answers]
    return lengths(engine, temperature, entries, by_prompt=True)


def _advance(bar: Progress, task: TaskID, done: int) -> None:
    bar.update(task, completed=done)


def _show(console: Console, result: Evaluation) -> None:
    from dspark_sglang.evaluation.report import positions, table

    console.print(table(result))
    for row in result.lengths:
        console.print(positions(row))
    if result.calibration is not None:
        after = result.ece_after
        console.print(
            f"Expected calibration error of survival, {result.calibration.blocks} blocks: "
            f"{result.calibration.ece_before:.1%} before STS"
            + (f", {after:.1%} after" if after is not None else "; no sts.json beside the weights")
        )
        ranked = " ".join(f"{value:.2f}" for value in result.calibration.per_position_auc or ())
        console.print(f"Area under the ROC curve of survival, by position: {ranked}")


class Settings(NamedTuple):
    """How a session judges."""

    max_tokens: int
    dtype: str
    seed: int
    #: Candidates a position of the standalone engine; 0: all tokens; None: as serving.
    shortlist: int | None
    #: Flags of the command that are not the default.
    flags: list[str]
    #: Whether greedy requests copy from their own text.
    lookup: bool


class Session:
    """One evaluation: what is judged, on what, and how."""

    def __init__(
        self,
        console: Console,
        target: Path,
        drafter: Path,
        questions: list[Question],
        settings: Settings,
    ) -> None:
        from dspark_sglang.layouts.dense.read import read_drafter

        self._console, self._target, self._drafter = console, target, drafter
        self._questions, self._settings = questions, settings
        self._max_tokens, self._dtype, self._seed = settings[:3]
        self._candidates: dict[str, int] = {}
        config = parse_drafter_config(read_config(drafter, role="drafter"))
        self._gamma = config.gamma if config.bundled else read_drafter(drafter)[0].gamma
        self._digest = weights_digest(drafter)
        sts = drafter / STS_FILE
        self._sts: list[float] | None = None
        if sts.exists():
            artifact = read_sts(sts, gamma=self._gamma, drafter_sha256=self._digest)
            self._sts = artifact.temperatures

    def standalone(self) -> tuple[list[Lengths], Blocks]:
        """Rows at both temperatures, and the sampled blocks to judge confidences by."""
        from dspark_sglang.evaluation import answer
        from dspark_sglang.evaluation.report import ALONE, Blocks
        from dspark_sglang.memory import keep_freed_memory

        keep_freed_memory()
        with self._console.status("loading target and drafter"):
            pair = answer.load_pair(self._target, self._drafter, bf16=self._dtype == "bfloat16")
        with Progress(console=self._console) as bar:

            def answered(temperature: float, lookup: bool) -> list[Answer]:
                given = self._settings.shortlist
                size = pair.candidates(sampled=temperature > 0) if given is None else given
                self._candidates[f"{temperature:g}"] = size
                name = f"answering, T={temperature:g}{'' if lookup else ', drafted'}"
                task = bar.add_task(name, total=len(self._questions))
                return answer.answer(
                    pair,
                    self._questions,
                    temperature=temperature,
                    max_tokens=self._max_tokens,
                    seed=self._seed,
                    shortlist=size,
                    lookup=lookup,
                    temperatures=self._sts,
                    progress=partial(_advance, bar, task),
                )

            lookup = self._settings.lookup
            greedy, sampled = answered(0.0, lookup), answered(1.0, False)
            alone = answered(0.0, False) if lookup else []
        rows = [_row("standalone", 0.0, greedy), _row("standalone", 1.0, sampled)]
        rows += [_row(ALONE, 0.0, alone)] if alone else []
        return rows, Blocks.of(sampled)

    def server(self, url: str) -> list[Lengths]:
        """Rows as a server counted them; one is started here without ``url``."""
        from contextlib import ExitStack

        from dspark_sglang.evaluation import served
        from dspark_sglang.evaluation.report import Domain, lengths
        from dspark_sglang.server import Server, free_port, serve_command

        rows: list[Lengths] = []
        with ExitStack() as stack:
            if not url:
                port = free_port()
                command = serve_command(
                    self._target, port, dtype=self._dtype, drafter=self._drafter
                )
                log = Path("runs/eval/server.log")
                # Everything drafted is verified: that is what accepted length is defined by.
                environment = {"DSPARK_SCHEDULE": "all"}
                environment |= {} if self._settings.lookup else {"DSPARK_LOOKUP": "off"}
                server = Server(command, port=port, log=log, environment=environment)
                with self._console.status("starting the server"):
                    stack.enter_context(server).wait_ready()
                url = server.url
            bar = stack.enter_context(Progress(console=self._console))
            for temperature in _TEMPERATURES:
                task = bar.add_task(f"serving, T={temperature:g}", total=len(self._questions))
                walks = served.serve(
                    url.rstrip("/").removesuffix("/v1"),
                    self._questions,
                    temperature=temperature,
                    max_tokens=self._max_tokens,
                    progress=partial(_advance, bar, task),
                )
                entries = [Domain(name, walk) for name, walk in walks.items()]
                rows.append(lengths("server", temperature, entries, by_prompt=False))
        return rows

    def result(self, rows: list[Lengths], blocks: Blocks | None, *, name: str) -> Evaluation:
        """Everything in one struct; the headline numbers are the first engine's."""
        from dspark_sglang.evaluation.report import ALONE, Evaluation, calibration
        from dspark_sglang.provenance import provenance

        judged = None
        if blocks is not None:
            judged = calibration(blocks.confidence, blocks.acceptance, self._sts)
        greedy, sampled = rows[:2]  # at the temperatures in order
        command = ["dspark", "eval", "--artifact", self._drafter.name, "--target"]
        command += [self._target.name, "--max-tokens", str(self._max_tokens)]
        command += ["--dtype", self._dtype, "--seed", str(self._seed), *self._settings.flags]
        return Evaluation(
            schema_version=SCHEMA_VERSION,
            gamma=self._gamma,
            drafter_sha256=self._digest,
            target=self._target.name,
            prompts=f"{len(self._questions)} from {name}",
            max_tokens=self._max_tokens,
            dtype=self._dtype,
            accept_length_greedy=greedy.accept_length,
            accept_length_t1=sampled.accept_length,
            accept_length_greedy_drafted=next(
                (row.accept_length for row in rows if row.engine == ALONE), None
            ),
            per_position=sampled.per_position,
            per_position_greedy=greedy.per_position,
            ece_before=judged.ece_before if judged else None,
            ece_after=judged.ece_after if judged else None,
            lengths=rows,
            calibration=judged,
            provenance=provenance(command),
            candidates=self._candidates,
        )

    def record(self, result: Evaluation) -> None:
        """Write eval.json, from which the card's acceptance table is made."""
        from dspark_packaging.layout import EVAL_FILE
        from dspark_packaging.records import EvalArtifact
        from dspark_sglang.evaluation.report import card_artifact
        from dspark_sglang.provenance import machine

        artifact = msgspec.convert(card_artifact(result, machine()), EvalArtifact)
        write_json(self._drafter / EVAL_FILE, artifact)
        self._console.print(f"Written: {self._drafter / EVAL_FILE}")

    def save(self, folder: Path, result: Evaluation, blocks: Blocks | None) -> None:
        """Write evaluation.json and, where confidences were judged, reliability.png."""
        from dspark_sglang.evaluation.report import reliability_plot

        write_json(folder / "evaluation.json", result)
        if blocks is not None:
            path = folder / "reliability.png"
            reliability_plot(path, blocks.confidence, blocks.acceptance, self._sts)
        self._console.print(f"Written: {folder}")
