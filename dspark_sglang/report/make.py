"""The steps of the report, and the page made of what they left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from dspark_sglang.artifacts import Provenance, write_bytes, write_json
from dspark_sglang.economics.quoted import Quoted
from dspark_sglang.economics.study import Study
from dspark_sglang.load import frontier
from dspark_sglang.load.frontier import Frontier
from dspark_sglang.report import collect, sections
from dspark_sglang.report.page import Figure, Page, Section, render
from dspark_sglang.report.steps import Outcome, Step

PAGE, RESULTS = "report.html", "report.json"
#: The frontier that ``dspark bench-load`` leaves.
SWEEP = "frontier-T1-bfloat16.json"
#: The simulator against a real server, committed: it wants a machine of its own and is not part of a report.
VALIDATION = Path("docs/results/simulation.json")
T = TypeVar("T", bound=msgspec.Struct)


class Economy(msgspec.Struct, frozen=True, kw_only=True):
    """A question of ``dspark economics`` about the frontier of an earlier step."""

    name: str
    title: str
    frontier: str
    arguments: tuple[str, ...]

    @property
    def step(self) -> str:
        """Name of its step."""
        return f"economics-{self.name}"


#: Figures of ``dspark simulate published``.
_PUBLISHED = {
    "simulation-frontier.png": "Simulated: throughput of a GPU against the speed of a user, MTP-1 and DSpark-5.",
    "simulation-load.png": "Simulated: tokens verified a request, and throughput, against the load.",
}


def _memory(model: str, hardware: str) -> tuple[str, ...]:
    """Count what fits, with the context that DeepSeek disclosed (the simulator's too)."""
    return ("--model", f"deepseek-v4-{model}-dspark", "--hardware", hardware, "--context", "4989")


#: The speeds are those that were published, and for the CPU a speed that both ways of serving reach.
ECONOMIES = (
    Economy(
        name="flash",
        title="Economics of V4-Flash",
        frontier="published/frontier-flash.json",
        arguments=("--sla", "80", "--preset", "v4-flash", *_memory("flash", "h800-80x8")),
    ),
    Economy(
        name="pro",
        title="Economics of V4-Pro",
        frontier="published/frontier-pro.json",
        arguments=("--sla", "35", "--preset", "v4-pro"),
    ),
    Economy(
        name="pro-memory",
        title="Economics of V4-Pro with the requests that fit two nodes",
        frontier="published/frontier-pro.json",
        arguments=("--sla", "35", "--preset", "v4-pro", *_memory("pro", "2xh800-80x8")),
    ),
    Economy(
        name="cpu",
        title="Economics of this machine",
        frontier=f"sweep/{SWEEP}",
        arguments=("--sla", "10", "--preset", "cpu"),
    ),
)


def plan() -> list[Step]:
    """All steps in their order; what is cheap and needs nothing else comes first."""
    steps = [
        Step(
            name="quoted",
            title="The quoted economics",
            arguments=("economics", "--quoted", "--out", "{out}"),
            produces=("quoted.json",),
            expected_s=5,
            limit_s=120,
        ),
        Step(
            name="generator",
            title="Load generator against a known truth",
            arguments=("bench", "--self-check", "--duration", "30", "--out", "{out}"),
            produces=("selfcheck.json",),
            expected_s=90,
            limit_s=400,
        ),
        Step(
            name="sweep",
            title="Real server, with and without speculation",
            arguments=(
                "bench-load",
                "--modes",
                "none,dspark",
                "--concurrency",
                "1,4,8,16,32",
                "--temperatures",
                "1",
                "--dtypes",
                "bfloat16",
                "--blocks",
                "3",
                "--resume",
                "--out",
                "{out}",
            ),
            produces=("summary.json", SWEEP),
            expected_s=560,
            limit_s=1200,
            resumes=True,
        ),
        Step(
            name="published",
            title="Published result, derived again",
            arguments=("simulate", "published", "--no-sensitivity", "--out", "{out}"),
            produces=("simulation.json", "frontier-flash.json", "frontier-pro.json"),
            expected_s=240,
            limit_s=900,
        ),
    ]
    return steps + [
        Step(
            name=economy.step,
            title=economy.title,
            arguments=(
                "economics",
                "{report}/" + economy.frontier,
                *economy.arguments,
                "--out",
                "{out}",
            ),
            produces=("economics.json", "economics.png"),
            reads=(economy.frontier,),
            expected_s=8,
            limit_s=120,
        )
        for economy in ECONOMIES
    ]


class _Left(NamedTuple):
    """What the steps of this report left. One that failed or was interrupted shows what it left, and is marked."""

    folder: Path
    outcomes: Sequence[Outcome]

    def path(self, step: str, name: str) -> Path | None:
        begun = any(
            outcome.name == step and outcome.status != "not run" for outcome in self.outcomes
        )
        path = self.folder / step / name
        return path if begun and path.is_file() else None

    def frontier(self, step: str, name: str) -> Frontier | None:
        path = self.path(step, name)
        return None if path is None else frontier.read(path)

    def decoded(self, step: str, name: str, kind: type[T]) -> T | None:
        path = self.path(step, name)
        if path is None:
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError) as error:
            raise collect.wrong(path, str(error)) from error

    def figures(self, step: str, captions: Mapping[str, str]) -> list[Figure]:
        found = {name: self.path(step, name) for name in captions}
        return [
            Figure(path=path, caption=captions[n]) for n, path in found.items() if path is not None
        ]


def write(
    folder: Path,
    outcomes: Sequence[Outcome],
    *,
    validation: Path,
    machine: str,
    provenance: Provenance,
) -> Path:
    """Make ``report.json`` and the page from what is there.

    Args:
        folder: of the report.
        outcomes: of all steps.
        validation: of the simulator against a real server.

    Returns:
        The page.

    Raises:
        DSparkError: a file that a step left is damaged.
    """
    left = _Left(folder, outcomes)
    found = collect.results(
        derived=left.path("published", "simulation.json"),
        validation=validation if validation.is_file() else None,
        generator=left.path("generator", "selfcheck.json"),
        outcomes=outcomes,
        machine=machine,
        provenance=provenance,
    )
    write_json(folder / RESULTS, found)
    page = folder / PAGE
    write_bytes(page, render(_page(left, found)).encode())
    return page


def _page(left: _Left, found: collect.Results) -> Page:
    partial = sections.failures(found.steps, [outcome.name for outcome in found.steps])
    if found.sim_error_pct is None:
        partial.append(
            "The simulator's error against a real server is missing: run `dspark simulate check`."
        )
    return Page(
        title="DSpark for SGLang: measured, simulated, and what it is worth",
        subtitle=f"{found.machine}. Made {found.provenance.created}.",
        partial=partial,
        sections=_sections(left, found),
        footer=f"dspark-sglang {found.provenance.versions.get('dspark-sglang', '')}, {found.provenance.created}. "
        "This file loads nothing and runs nothing.",
    )


def _sections(left: _Left, found: collect.Results) -> list[Section]:
    measured, run = left.frontier("sweep", SWEEP), collect.read(left.path("sweep", "summary.json"))
    derived = [left.frontier("published", f"frontier-{model}.json") for model in ("flash", "pro")]
    studies, drawn = {}, {}
    for economy in ECONOMIES:
        study = left.decoded(economy.step, "economics.json", Study)
        if study is not None:
            studies[economy.name] = study
            caption = f"{economy.title}: what speed costs, and how far the answer moves."
            drawn[economy.name] = left.figures(economy.step, {"economics.png": caption})
    figures = []
    if measured is not None:
        figures.append(sections.frontier_figure(measured, left.folder / "figures" / "measured.png"))

    def failed(*names: str) -> list[str]:
        return sections.failures(found.steps, names)

    return [
        sections.summary(found, run, studies),
        sections.measured(measured, run, figures, failed("sweep")),
        sections.simulated(
            found,
            [each for each in derived if each is not None],
            left.figures("published", _PUBLISHED),
            failed("published"),
        ),
        *sections.economics(
            left.decoded("quoted", "quoted.json", Quoted),
            studies,
            drawn,
            failed("quoted", *(economy.step for economy in ECONOMIES)),
        ),
        sections.generator(found, failed("generator")),
        sections.method(found),
    ]
