"""The standalone engine: the target answers, the drafter drafts at every position, rounds are replayed.

No server is involved. At every position of an answer the drafter drafts with the answer's own
tokens before it; :mod:`dspark_sglang.training.replay` then takes the rounds serving would have taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, read_draft_vocab
from dspark_sglang.checkpoint import check_fits, is_bundle, read_config
from dspark_sglang.core.lookup import CopyRates, Follower
from dspark_sglang.core.sts import sigmoid
from dspark_sglang.errors import CheckpointError
from dspark_sglang.evaluation.questions import Question
from dspark_sglang.evaluation.shortlist import score_shortlist
from dspark_sglang.training.chat import TokenSequence
from dspark_sglang.training.layouts import read_drafter
from dspark_sglang.training.loss import Vocabulary, drafting
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.replay import Scores, Walk, score_sequence, walk
from dspark_sglang.training.states import Target

Float64 = npt.NDArray[np.float64]
Progress = Callable[[int], None]


class Pair(NamedTuple):
    """A target and its drafter."""

    target: Target
    drafter: Drafter
    vocabulary: Vocabulary
    bf16: bool


class Answer(NamedTuple):
    """One answer of the target, scored at every anchor; ``A`` anchors."""

    question: int
    domain: str
    #: ``[A, gamma]``, see :class:`dspark_sglang.training.replay.Scores`.
    match: Float64
    ratio: Float64
    confidence: Float64
    #: ``[A]`` tokens of the answer that follow each anchor.
    remaining: npt.NDArray[np.int64]


def refuse_bundle(drafter: Path, *, instead: str) -> None:
    """Raise where a drafter lies inside its target: only dense drafters are loaded without a server.

    Args:
        drafter: its directory.
        instead: the command that does it.

    Raises:
        CheckpointError: a bundle, or a configuration that is missing or damaged.
    """
    if is_bundle(read_config(drafter, role="drafter")):
        raise CheckpointError(
            f"{drafter} is a bundle, a target with its drafter inside.",
            expected="a dense drafter: a bundle is run by a server only",
            fix=instead,
        )


def load_pair(target: Path, drafter: Path, *, bf16: bool = True) -> Pair:
    """Load both models.

    Raises:
        CheckpointError: either is damaged, or they do not fit together.
        ArtifactError: the draft vocabulary beside the weights is damaged or another target's.
    """
    config, tensors = read_drafter(drafter)
    check_fits(config, read_config(target, role="target"), name=str(target))
    loaded = Target(str(target), bf16=bf16)
    model = Drafter(config)
    model.load(tensors)
    kind = torch.bfloat16 if bf16 else torch.float32
    head, tokens = loaded.head.to(kind), None
    path = drafter / DRAFT_VOCAB_FILE
    if path.is_file():
        tokens = torch.tensor(read_draft_vocab(path, vocab_size=len(head)).tokens)
    return Pair(loaded, model.eval(), drafting(head, tokens, loaded.softcap), bf16)


@torch.inference_mode()
def write_answers(
    target: Target,
    questions: Sequence[Question],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    at_once: int = 12,
    progress: Progress = lambda done: None,
) -> list[TokenSequence]:
    """Let the target answer every question, as the server would: no filters, its own template.

    Args:
        temperature: 0 is greedy.
        at_once: answers written together.
        progress: told how many are done.
    """
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    tokenizer, model = target.tokenizer, target.model
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    made = []
    choice: dict[str, Any] = {"do_sample": False}
    if temperature:
        choice = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": temperature}
    ends = model.generation_config.eos_token_id
    # A fresh configuration: a model's own may filter or penalise, and that is another law.
    law = GenerationConfig(
        **choice,
        max_new_tokens=max_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    for begin in range(0, len(questions), at_once):
        part = questions[begin : begin + at_once]
        texts = [
            tokenizer.apply_chat_template(q.messages, tokenize=False, add_generation_prompt=True)
            for q in part
        ]
        given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**given.to(model.device), generation_config=law)
        width = given["input_ids"].shape[1]
        for row, (tokens, mask) in enumerate(zip(out, given["attention_mask"], strict=True)):
            prompt = tokens[:width][mask.bool()].tolist()
            answer = tokens[width:].tolist()
            stop = next((i for i, token in enumerate(answer) if token in stops), len(answer) - 1)
            answer = answer[: stop + 1]
            made.append(
                TokenSequence(
                    np.array(prompt + answer, dtype=np.int32),
                    np.array([False] * len(prompt) + [True] * len(answer)),
                    begin + row,
                )
            )
        progress(len(made))
    return made


@torch.no_grad()
def score_answers(
    pair: Pair,
    answers: Sequence[TokenSequence],
    questions: Sequence[Question],
    *,
    shortlist: int = 0,
    following: int = 0,
    progress: Progress = lambda done: None,
) -> list[Answer]:
    """Score a block at every anchor of every answer; answers without an anchor are left out.

    Args:
        shortlist: candidates a position as in serving; 0: every token can be drafted.
        following: tokens of largest bias beside them, as our kernels draft.
        progress: told how many answers are done.
    """
    scored = []
    for number, sequence in enumerate(answers):
        if len(sequence.anchors()):
            scores = _score(pair, sequence, shortlist, following)
            match, ratio, confidence = (field.double().numpy() for field in scores)
            scored.append(
                Answer(
                    question=sequence.source,
                    domain=questions[sequence.source].domain,
                    match=match,
                    ratio=ratio,
                    confidence=confidence,
                    remaining=sequence.remaining(),
                )
            )
        progress(number + 1)
    return scored


def _score(pair: Pair, sequence: TokenSequence, shortlist: int, following: int) -> Scores:
    tokens = torch.from_numpy(sequence.tokens[None].astype(np.int64)).to(pair.target.head.device)
    states = pair.target.states(tokens, pair.drafter.config.target_layer_ids)
    if 0 < shortlist < len(pair.vocabulary.head):
        return score_shortlist(pair, sequence, states, shortlist, following)
    return score_sequence(
        pair.drafter, pair.target, sequence, states, pair.vocabulary, bf16=pair.bf16
    )


def with_copies(
    answers: Sequence[Answer], texts: Sequence[TokenSequence], temperatures: Sequence[float] | None
) -> list[Answer]:
    """Greedy answers as serving drafts them: copied where that is expected to be accepted longer.

    :class:`dspark_sglang.serving.prompt_lookup.Lookup` over the answers one after the other; confidences are those of the
    text's own tokens.

    Args:
        texts: that the answers were scored on, in order.
        temperatures: ``[gamma]`` of STS; None: not calibrated.
    """
    rates, made = CopyRates(), []
    by_source = {text.source: text for text in texts}
    for answer in answers:
        text = by_source[answer.question]
        tokens, anchors = text.tokens.tolist(), text.anchors()
        gamma = answer.match.shape[1]
        scale = np.ones(gamma) if temperatures is None else np.asarray(temperatures)
        drafted = sigmoid(answer.confidence / scale).cumprod(axis=1).sum(axis=1)
        match = answer.match.copy()
        prompt = int(anchors[0])
        follower = Follower(tokens[:prompt], rates)
        for row, anchor in enumerate(anchors):
            follower.read(tokens[prompt : anchor + 1])
            copied = follower.continuation(gamma)
            if not copied:
                continue
            chances = rates.chances(follower.matched, gamma)
            if chances.cumprod().sum() > drafted[row]:
                follows = tokens[anchor + 1 : anchor + 1 + gamma]
                match[row] = 0.0
                match[row, : len(follows)] = np.equal(copied[: len(follows)], follows)
        made.append(answer._replace(match=match))
    return made


def replay(answers: Sequence[Answer], *, greedy: bool, seed: int = 0) -> list[Walk]:
    """The rounds of each answer, at temperature 0 or at the temperature it was sampled at (1)."""
    rng = np.random.default_rng(seed)
    walks = []
    for answer in answers:
        chance = answer.match if greedy else answer.ratio
        walks.append(walk(chance, rng.random(chance.shape), answer.remaining))
    return walks
