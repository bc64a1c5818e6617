"""Several ranks on one machine: the text of one rank, and no server left when a rank dies."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.placement import DEATH_SECONDS, EVEN, PROMPTS, UNEVEN, kill_rank
from dspark_sglang.server import Server
from tests.serving.tiny import Models, generate, ran, require_the_distribution, start, tokens
from tests.tiny_models import ensure_models

pytestmark = pytest.mark.server


class Pair(NamedTuple):
    alone: Server
    ranks: Server


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Iterator[Pair]:
    """Nine query heads over two ranks, which only a whole drafter can serve."""
    folder = tmp_path_factory.mktemp("placement")
    started = [start(folder, "alone", models, 1), start(folder, "ranks", models, 2)]
    try:
        for server in started:
            server.wait_ready()
        yield Pair(*started)
    finally:
        for server in started:
            server.stop()


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"frequency_penalty": 0.6, "presence_penalty": 0.2},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 20, "ignore_eos": False, "max_new_tokens": 20},
        {"logit_bias": {"40": 3.0, "150": -100.0}},
    ],
    ids=["greedy", "penalties", "repetition", "min-tokens", "bias"],
)
def test_the_text_of_one_rank(pair: Pair, sampling: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        assert tokens(pair.ranks, prompt, **sampling) == tokens(pair.alone, prompt, **sampling)


def test_a_batch_of_greedy_and_sampling_requests(pair: Pair) -> None:
    """Greedy requests keep their text beside sampling ones; those run to their end."""
    expected = [tokens(pair.alone, prompt) for prompt in PROMPTS[:2]]
    filtered = {"temperature": 1.0, "top_p": 0.9, "top_k": 30, "min_p": 0.01}
    wanted = [(PROMPTS[0], {}), (PROMPTS[2], {"temperature": 1.0}), (PROMPTS[1], {}), (PROMPTS[3], filtered)]  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(tokens, pair.ranks, prompt, **s) for prompt, s in wanted]
        found = [future.result() for future in running]
    assert [found[0], found[2]] == expected
    assert ran(pair.ranks)["accept:sharded-rejection"] > 0


def test_sampled_outputs_follow_plain_decodings_law(pair: Pair, models: Models) -> None:
    require_the_distribution(pair.ranks, models[0], "temperature,all_filters,frequency_penalty")


def test_logprobs_are_those_of_one_rank(pair: Pair) -> None:
    def logprobs(server: Server) -> list[float]:
        found = generate(server, PROMPTS[0], return_logprob=True)
        return [entry[0] for entry in found["meta_info"]["output_token_logprobs"]]

    assert logprobs(pair.ranks) == pytest.approx(logprobs(pair.alone), abs=1e-4)


def test_rows_of_logits_stay_sharded_unless_something_reads_them(pair: Pair) -> None:
    # Whether drafting pays depends on how busy the machine is; what a round exchanges does not.
    pair.ranks.update(dspark_speculation=1, dspark_budget=1)
    try:
        pair.ranks.update(dspark_clear_info_records=1)
        tokens(pair.ranks, PROMPTS[0])
        first = pair.ranks.dspark()
        assert first is not None
        steps = first["steps"]
        greedy = first["ran"]["accept:sharded-greedy"]
        assert first["ran"]["logits:sharded"] == greedy == steps > 0
        assert "logits:gathered" not in first["ran"]
        assert first["placement"] in ("replicate", "single")
        assert first["accept_length"] > 1.3
        count, size = first["collectives"], first["collective_bytes"]
        assert count["accept"] == count["outcome"] == steps
        assert count["draft"] == 3 * count["block"], "one exchange a drafted position"
        assert sum(size.values()) / steps < 4096
        tokens(pair.ranks, PROMPTS[0], frequency_penalty=0.6)
        assert ran(pair.ranks)["logits:gathered"] > 0
    finally:
        pair.ranks.update(dspark_speculation=-1, dspark_budget=-1)


@pytest.mark.slow
def test_ranks_with_the_kernels_have_the_text_of_one_rank(
    pair: Pair, models: Models, tmp_path: Path
) -> None:
    """Acceptance by ``vocab_parallel_accept`` in Triton's interpreter, through the real server."""
    kernels = {"DSPARK_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    server = start(tmp_path, "kernels", models, 2, **kernels)
    try:
        server.wait_ready(300.0)
        for prompt in PROMPTS[:2]:
            assert tokens(server, prompt) == tokens(pair.alone, prompt)
        narrow = {"temperature": 1.0, "top_p": 1e-6, "max_new_tokens": 12}
        wanted = tokens(pair.alone, PROMPTS[0], max_new_tokens=12)
        assert tokens(server, PROMPTS[0], **narrow) == wanted
        tokens(server, PROMPTS[0], temperature=1.0, max_new_tokens=12)
        counts = ran(server)
        assert counts["accept:sharded-triton-greedy"] > 0
        assert counts["accept:sharded-triton-rejection"] > 0
        record = server.dspark()
        assert record is not None
        assert record["launches"]["vocab_parallel_accept.finish"] > 0
    finally:
        server.stop()


def test_a_rank_that_dies_ends_the_server(pair: Pair) -> None:
    """Last here: nothing is left of the server, and its log names the rank."""
    seconds, said = kill_rank(pair.ranks, PROMPTS[0])
    assert seconds < DEATH_SECONDS
    assert "scheduler_1 (pid" in said
    assert "was ended by signal 9" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "sizes", "placement", "heads"),
    [
        (2, UNEVEN, "single", "single"),
        (2, EVEN, "shard", "shard"),
        (4, UNEVEN, "replicate", "shard"),
        (4, EVEN, "shard", "replicate"),
    ],
    ids=["single-2", "shard-2", "replicate-4", "shard-4"],
)
def test_other_placements_have_the_same_text(
    tmp_path: Path, ranks: int, sizes: Any, placement: str, heads: str
) -> None:
    models = ensure_models(tmp_path / "models", 3, sizes)
    block = {"DSPARK_VERIFICATION": "block"} if placement == "single" else {}
    servers = [
        start(tmp_path, "alone", models, 1),
        start(
            tmp_path,
            "ranks",
            models,
            ranks,
            DSPARK_PLACEMENT=placement,
            DSPARK_HEADS=heads,
            **block,
        ),
    ]
    try:
        for server in servers:
            server.wait_ready()
        servers[1].update(dspark_speculation=1)  # every round shows what the placement exchanges
        for sampling in ({}, {"frequency_penalty": 0.6}):
            for prompt in PROMPTS:
                found = [tokens(server, prompt, **sampling) for server in servers]
                assert found[0] == found[1]
        record = servers[1].dspark()
        assert record is not None
        assert (record["placement"], record["heads"]) == (placement, heads)
        exchanged = {"markov", "confidence"} & set(record["collectives"])
        assert len(exchanged) == (0 if heads == "replicate" else 2)
        assert record["accept_length"] > 1.3
        require_the_distribution(servers[1], models[0], "temperature,top_k,top_p")
    finally:
        for server in servers:
            server.stop()
