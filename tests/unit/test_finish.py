"""Runs of accepted tokens end where plain decoding, one token at a time, would have ended."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from dspark_sglang.serving.requests import finish

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
