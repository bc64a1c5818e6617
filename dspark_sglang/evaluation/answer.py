"""The reference engine over a target and its drafter: what `dspark eval` and `dspark calibrate` count.

Every prompt is one request of :class:`dspark_sglang.core.engine.Engine`; everything drafted is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_loadtests.prompts import BALANCED, read_prompts
from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, read_draft_vocab
from dspark_sglang.checkpoint import read_config
from dspark_sglang.core.accept import Accepted, Round, accept_sampled
from dspark_sglang.core.draft import cpu_shortlist
from dspark_sglang.core.engine import Drafter, Engine, Request
from dspark_sglang.errors import CheckpointError, ConfigError
from dspark_sglang.layouts.base import check_fits, layout_of, open_drafter, resolve
from dspark_sglang.training.replay import Walk, nothing
from dspark_sglang.training.target import HFTarget, Target

Float64 = npt.NDArray[np.float64]

#: Requests that the engine runs together.
_AT_ONCE = 12


class Question(NamedTuple):
    """One prompt and the domain it is counted in."""

    domain: str
    messages: list[dict[str, str]]


def load_questions(path: Path | None) -> list[Question]:
    """The packaged prompts, or those of a file: the packaged format, ShareGPT, messages, text.

    Of a conversation the first user turn is asked.

    Raises:
        DSparkError: the file cannot be used.
    """
    prompts = read_prompts(path).prompts[: BALANCED if path is None else None]
    return [Question(prompt.kind, prompt.messages()) for prompt in prompts]


def calibration_questions() -> list[Question]:
    """The packaged prompts for calibration: the target wrote them, no benchmark here uses them."""
    data = resources.files("dspark_sglang.evaluation").joinpath("data/calibration.jsonl")
    with resources.as_file(data) as path:
        return load_questions(path)


def refuse_bundle(drafter: Path, *, instead: str) -> None:
    """Raise where a drafter lies inside its target: only dense drafters are loaded without a server.

    Args:
        drafter: its directory.
        instead: the command that does it.

    Raises:
        CheckpointError: a bundle, or a configuration that is missing or damaged.
    """
    if layout_of(read_config(drafter, role="drafter")).bundled:
        raise CheckpointError(
            f"{drafter} is a bundle, a target with its drafter inside.",
            expected="a dense drafter: a bundle is run by a server only",
            fix=instead,
        )


class Pair(NamedTuple):
    """A target and its drafter."""

    target_model: Target
    target: HFTarget
    drafter: Drafter
    #: ``[M]`` int64 the tokens that are drafted, ascending; None: all.
    vocabulary: torch.Tensor | None

    def candidates(self, *, sampled: bool) -> int:
        """Candidates a position as serving has on a CPU; 0: every token can be drafted."""
        tokens = self.target.head if self.vocabulary is None else self.vocabulary
        return cpu_shortlist(len(tokens), sampled=sampled) or 0


def load_pair(target: Path, drafter: Path, *, bf16: bool = True) -> Pair:
    """Load both models.

    Raises:
        CheckpointError: either is damaged, or they do not fit together.
        ArtifactError: the draft vocabulary beside the weights is damaged or another target's.
    """
    layout, _, config = open_drafter(drafter)
    check_fits(config, read_config(target, role="target"), name=str(target))
    loaded = Target(str(target), bf16=bf16)
    tokens = None
    path = drafter / DRAFT_VOCAB_FILE
    if path.is_file():
        tokens = torch.tensor(read_draft_vocab(path, vocab_size=len(loaded.head)).tokens)
    engine_target = HFTarget(loaded, config.target_layer_ids)
    dtype, embedding = engine_target.head.dtype, engine_target.embedding
    reference: Drafter = resolve(layout.reference)(drafter, dtype, embedding)
    return Pair(loaded, engine_target, reference, tokens)


class Answer(NamedTuple):
    """One prompt answered, in ``N`` rounds."""

    domain: str
    output: list[int]
    walk: Walk
    #: ``[N, gamma]`` uncalibrated confidence logits of the drafted tokens.
    confidence: Float64
    #: ``[N, gamma]`` chance ``min(1, p(x) / q(x))`` that each is accepted, the ones before it having been; no
    #: columns for a greedy request.
    acceptance: Float64


@torch.inference_mode()
def answer(
    pair: Pair,
    questions: Sequence[Question],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    shortlist: int = 0,
    lookup: bool = False,
    temperatures: Sequence[float] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer every question with the reference engine: no filters, the target's own chat template.

    Args:
        temperature: 0 is greedy.
        seed: of drafted and accepted tokens.
        shortlist: candidates a position; 0: every token can be drafted.
        lookup: let greedy requests copy from their own text, as serving does.
        temperatures: ``[gamma]`` of STS; None: not calibrated.
        progress: told how many are done.

    Raises:
        ConfigError: every answer ended at once.
    """
    chances: list[torch.Tensor] = []

    def accept(round_: Round, uniforms: torch.Tensor) -> Accepted:
        p, q = round_.chances()
        chances.append((p / q).clamp(max=1.0))
        return accept_sampled(round_, uniforms)

    engine = Engine(
        pair.target,
        pair.drafter,
        torch.Generator().manual_seed(seed),
        temperatures=None if temperatures is None else torch.tensor(temperatures),
        accept=accept,
        vocabulary=pair.vocabulary,
        shortlist=shortlist or None,
        lookup=lookup,
    )
    requests = [
        Request(
            pair.target_model.encode(question.messages),
            max_tokens,
            temperature=temperature,
            stop_tokens=pair.target_model.stop_tokens,
        )
        for question in questions
    ]
    found = []
    for begin in range(0, len(requests), _AT_ONCE):
        part = requests[begin : begin + _AT_ONCE]
        rounds: list[list[tuple[Walk, torch.Tensor, torch.Tensor]]] = [[] for _ in part]
        engine.start(part)
        while running := [number for number, request in enumerate(part) if not request.finished]:
            before = [len(part[number].output) for number in running]
            report = engine.step(part)
            chance = chances.pop() if temperature > 0 else torch.empty((len(running), 0))
            for row, number in enumerate(running):
                grown = len(part[number].output) - before[row]
                walk = _round(int(report.kept[row]), grown, engine.drafter.gamma)
                rounds[number].append((walk, report.confidence[row], chance[row]))
        for question, request, made in zip(questions[begin:], part, rounds, strict=False):
            if made:
                walks, logits, accepted = zip(*made, strict=True)
                found.append(
                    Answer(
                        domain=question.domain,
                        output=request.output,
                        walk=sum(walks, nothing(engine.drafter.gamma)),
                        confidence=torch.stack(logits).double().numpy(),
                        acceptance=torch.stack(accepted).double().numpy(),
                    )
                )
        progress(begin + len(part))
    if not found:
        raise ConfigError(
            "Every answer of the target ended at once.",
            expected="answers of at least two tokens",
            fix="Use other prompts, or check the target's chat template.",
        )
    return found


def _round(kept: int, grown: int, gamma: int) -> Walk:
    """One round that kept so many drafted tokens and grew an answer by so many, up to its end."""
    position = np.arange(gamma)
    reached = position < min(kept + 1, grown)
    return Walk(1, grown, reached.astype(np.int64), (position < min(kept, grown)).astype(np.int64))
