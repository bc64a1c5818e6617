"""One question, answered with and without speculation: what must agree."""

from __future__ import annotations

from typing import Any

import msgspec

from dspark_sglang.canary.prompts import Question
from dspark_sglang.errors import ServerError


class Tolerance(msgspec.Struct, frozen=True):
    """How far two exact computations may be apart, by dtype."""

    #: Log-probability by which the best token may lead where texts part all the same.
    tie: float
    #: Difference of one token's log-probabilities.
    logprob: float


#: One row and several round differently; in bfloat16 by up to a quarter at logits of 32.
TOLERANCES = {"float32": Tolerance(1e-3, 1e-2), "bfloat16": Tolerance(0.5, 0.5),
              "float16": Tolerance(0.1, 0.1)}  # fmt: skip


class Answer(msgspec.Struct, frozen=True):
    """What a server generated."""

    ids: list[int]
    text: str
    logprobs: list[float]
    #: The two best log-probabilities at each token; empty where not asked for.
    best: list[tuple[float, float]]
    rounds: int
    #: Tokens a round: 1 without speculation.
    accepted: float


class Fault(msgspec.Struct, frozen=True):
    """Something that no exact speculation does."""

    check: str
    question: int
    kind: str
    prompt: str
    #: The first token at fault.
    token: int
    #: Tokens after the last one that both agree on, modulo the block: where in a block it lies cannot be told
    #: from outside, so this is the tokens verified a round, on average, when it happened.
    depth: float
    detail: str


def parse(answer: dict[str, Any]) -> Answer:
    """SGLang's ``/generate`` answer.

    Raises:
        ServerError: it is none.
    """
    try:
        meta = answer["meta_info"]
        ids = [int(token) for token in answer["output_ids"]]
        said = meta.get("output_token_logprobs") or []
        top = meta.get("output_top_logprobs") or []
        rounds = int(meta.get("spec_verify_ct") or len(ids))
        return Answer(
            ids=ids,
            text=str(answer["text"]),
            logprobs=[float(entry[0]) for entry in said],
            best=[(float(entry[0][0]), float(entry[1][0])) for entry in top],
            rounds=rounds,
            accepted=len(ids) / max(rounds, 1),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ServerError(
            f"/generate answered without {error}.",
            expected="text, output_ids and meta_info of SGLang",
            fix="Point --url at an SGLang server, not at a gateway.",
        ) from error


def compare(question: Question, ours: Answer, plain: Answer, allowed: Tolerance) -> Fault | None:
    """The first thing wrong with an answer, or None.

    Args:
        ours, plain: with speculation, and without (with log-probabilities).
    """

    def fault(check: str, token: int, detail: str) -> Fault:
        return Fault(check, question.number, question.kind, question.text, token,
                     round(ours.accepted, 2), detail)  # fmt: skip

    shared = next(
        (i for i, (a, b) in enumerate(zip(ours.ids, plain.ids, strict=False)) if a != b),
        min(len(ours.ids), len(plain.ids)),
    )
    for token in range(min(shared, len(ours.logprobs), len(plain.logprobs))):
        apart = abs(ours.logprobs[token] - plain.logprobs[token])
        if apart > allowed.logprob:
            return fault("logprob", token, f"log-probabilities {apart:.3f} apart")
    if ours.ids == plain.ids:
        return None
    if shared >= len(plain.best):
        return fault("text", shared, f"{len(ours.ids)} tokens, {len(plain.ids)} without")
    best, second = plain.best[shared]
    if best - second >= allowed.tie:
        lead = f"token {ours.ids[shared : shared + 1]}, not {plain.ids[shared]} ahead by {best - second:.3f}"
        return fault("text", shared, lead)
    wanted = question.verbatim
    if wanted and wanted in plain.text and wanted not in ours.text:
        return fault("echo", shared, "a verbatim text came back changed")
    return None
