"""Runs of accepted tokens end where plain decoding, one token at a time, would have ended."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.sampling.sampling_params import SamplingParams

from dspark_sglang.serving.requests import advance_grammar, finish

LETTERS = ["", "a", "b", "ab", "c", "ca", "bc", "d"]


class Tokenizer:
    eos_token_id = 0
    additional_stop_token_ids = None

    def decode(self, tokens: list[int]) -> str:
        return "".join(LETTERS[token] for token in tokens)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [1] * len(text)


def request(stops: list[str], stop_token_ids: list[int], length: int) -> Any:
    params = SamplingParams(
        stop=stops, stop_token_ids=stop_token_ids, max_new_tokens=length, temperature=1.0
    )
    params.normalize(Tokenizer())
    made = Req("r", "", [1, 2], params, eos_token_ids={0}, vocab_size=len(LETTERS))
    made.tokenizer = Tokenizer()
    made.grammar = SimpleNamespace(is_terminated=lambda: False)
    return made


def take(made: Any, tokens: list[int], runs: list[int]) -> tuple[list[int], str]:
    """Give a request its tokens in runs, as the scheduler does; the output and why it ended."""
    begin = 0
    for run in runs:
        part = tokens[begin : begin + run]
        begin += run
        if not part or made.finished():
            break
        made.output_ids.extend(part)
        finish(Req.update_finish_state, made, len(part))
    output = made.output_ids if made.finished_len is None else made.output_ids[: made.finished_len]
    reason = type(made.finished_reason).__name__ if made.finished() else ""
    return list(output), reason


@pytest.mark.parametrize("seed", range(300))
def test_runs_end_like_single_tokens(seed: int) -> None:
    rng = random.Random(seed)
    stops = rng.sample(["a", "bc", "cab", "db", "dd", "aba"], rng.randint(0, 3))
    ids = rng.sample(range(1, 8), rng.randint(0, 1))
    tokens = [rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 4, 7]) for _ in range(12)]
    runs = [rng.randint(1, 6) for _ in range(12)]
    length = rng.randint(4, 12)
    single = take(request(stops, ids, length), tokens, [1] * 12)
    together = take(request(stops, ids, length), tokens, runs)
    assert together == single


def test_the_first_stop_string_wins_whatever_the_order_of_the_list() -> None:
    tokens = [7, 7, 4, 1, 2]  # d d c a b: "dd" ends at the second
    output, reason = take(request(["a", "dd"], [], 9), tokens, [5])
    assert (output, reason) == ([7, 7], "FINISH_MATCHED_STR")
    # SGLang alone takes the later one, which its list names first.
    made = request(["a", "dd"], [], 9)
    made.output_ids.extend(tokens)
    Req.update_finish_state(made, 5)
    assert made.finished_len == 4


def ended(grammar: bool, *, ignore: bool = False) -> Any:
    made = request([], [], 9)
    made.sampling_params.ignore_eos = ignore
    made.grammar = SimpleNamespace(is_terminated=lambda: grammar)
    return made


def test_a_grammar_is_looked_at_before_it_takes_the_token_that_ends_it() -> None:
    """As plain decoding does; with end of text ignored one more token follows, then it ends."""
    made = ended(True, ignore=True)
    made.output_ids.extend([1, 0])
    finish(Req.update_finish_state, made, 1)
    assert not made.finished()
    made.output_ids.extend([3])
    finish(Req.update_finish_state, made, 1)
    assert made.finished() and made.finished_reason.matched == 3


def refused(made: Any, run: list[int], takes: int) -> None:
    """Give a request a run whose tokens its grammar takes up to ``takes``."""

    def accept(processor: Any, req: Any, tokens: Any) -> list[int]:
        req.to_finish = FINISH_ABORT(f"Grammar accept_token failed: {run[takes]}", 500, "x")
        return run[:takes]

    kept = advance_grammar(accept, None, made, run if len(run) > 1 else run[0])
    assert kept == run[: takes + 1] and made.to_finish is None
    made.output_ids.extend(kept)
    finish(Req.update_finish_state, made, len(kept))


@pytest.mark.parametrize("takes", [0, 2])
def test_a_request_ends_as_it_would_though_its_grammar_refused_the_token(takes: int) -> None:
    made = ended(False)
    refused(made, [3] * takes + [0], takes)  # a stop token
    assert made.finished_reason.to_json() == {"type": "stop", "matched": 0}
    made = ended(False)
    made.sampling_params.max_new_tokens = len(made.output_ids) + takes + 1
    refused(made, [3] * (takes + 1), takes)
    assert made.finished_reason.to_json()["type"] == "length"


def test_a_refused_token_that_ends_nothing_is_an_error_at_the_next_one() -> None:
    made = ended(False)
    refused(made, [3, 3], 1)
    assert not made.finished()
    # Its grammar is not asked again, and a stop token comes too late.
    assert advance_grammar(lambda *_: pytest.fail("asked again"), None, made, [0, 3]) == [0]
    made.output_ids.append(0)
    finish(Req.update_finish_state, made, 1)
    assert made.finished_reason.to_json()["type"] == "abort"


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_a_token_that_could_not_be_drawn_ends_a_request_with_an_error(kept: int, own: bool) -> None:
    made = ended(False)
    made.grammar = None
    made.sampling_params.logit_bias = {"1": 1.0} if own else None
    made.output_ids.extend([3] * kept + [-1])
    finish(Req.update_finish_state, made, kept + 1)
    said = made.finished_reason.to_json()
    assert said["type"] == "abort" and said["status_code"] == (400 if own else 500)
    assert list(made.output_ids) == [3] * kept + [0]


def test_a_request_that_ended_before_that_token_has_no_error() -> None:
    made = ended(False)
    made.grammar = None
    made.output_ids.extend([3, 0, 4, -1])  # 0 ends text
    finish(Req.update_finish_state, made, 4)
    assert (
        made.finished_reason.to_json() == {"type": "stop", "matched": 0} and made.finished_len == 2
    )
