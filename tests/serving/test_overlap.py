"""Overlap scheduling on the real server: steps are launched before the last are known, and the text is the same."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from benchmarks.placement import PROMPTS
from dspark_sglang.server import Server
from tests.serving.tiny import (
    Models,
    ran,
    require_the_distribution,
    require_undecidable_requests_end_alone,
    start,
    tokens,
)

pytestmark = pytest.mark.server
OVERLAP = {"DSPARK_CPU_OVERLAP": "1"}
KERNELS = {"DSPARK_KERNELS": "triton", "TRITON_INTERPRET": "1"}


class Servers(NamedTuple):
    plain: Server
    #: Its step cost is measured at start.
    overlap: Server
    ranks: Server


#: Slow: decides ahead as well, in SGLang's plain loop.
LAGGED = pytest.param("lagged", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("overlap")
    measured = {"DSPARK_COST": "auto", "DSPARK_CACHE_DIR": str(folder)}
    started = [
        start(folder, "plain", (models[0], None), 1),
        start(folder, "overlap", models, 1, **OVERLAP, **measured),
        start(folder, "ranks", models, 2, **OVERLAP),
    ]
    try:
        for server in started:
            server.wait_ready()
        yield Servers(*started)
    finally:
        for server in started:
            server.stop()


@pytest.fixture(scope="module")
def lagged(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Iterator[Server]:
    server = start(tmp_path_factory.mktemp("lagged"), "log", models, 1, DSPARK_SCHEDULE="lagged")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["overlap", "ranks", LAGGED])
def server(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Server]:
    name: str = request.param
    found: Server = request.getfixturevalue(name) if name == "lagged" else getattr(servers, name)
    found.update(dspark_speculation=1, dspark_clear_info_records=1)
    yield found
    found.update(dspark_speculation=-1, dspark_budget=-1)


def record(server: Server) -> dict[str, Any]:
    found = server.dspark()
    assert found is not None
    return found


def test_it_schedules_ahead(servers: Servers, server: Server) -> None:
    assert server.info()["disable_overlap_schedule"] is (server not in servers)
    tokens(server, PROMPTS[0])
    found = record(server)
    assert found["schedule"] == "lagged" and found["lookup"] is False
    assert found["ran"]["schedule:ahead"] > 0
    assert found["observations"] > 0 and found["step_error"] is not None
    assert found["accept_length"] > 1.3


def test_the_step_cost_was_measured_before_the_first_request(servers: Servers) -> None:
    found = record(servers.overlap)
    assert found["cost_source"].endswith(".json") and found["profile_s"] > 0.0
    assert found["observations"] > 48
    assert "step cost measured under" in servers.overlap.log.read_text(errors="replace")


#: Sampling options whose greedy text needs the tokens of the steps before.
ADJUSTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bias": {"logit_bias": {"40": 3.0, "150": -100.0}},
    "frequency": {"frequency_penalty": 0.5},
    "all": {
        "presence_penalty": 0.6, "repetition_penalty": 1.3, "frequency_penalty": 0.2,
        "min_new_tokens": 20, "logit_bias": {"40": 3.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("sampling", ADJUSTED.values(), ids=ADJUSTED)
def test_greedy_text_is_plain_decodings(
    servers: Servers, server: Server, sampling: dict[str, Any]
) -> None:
    wanted = [tokens(servers.plain, prompt, **sampling) for prompt in PROMPTS]
    assert [tokens(server, prompt, **sampling) for prompt in PROMPTS] == wanted
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(lambda prompt: tokens(server, prompt, **sampling), PROMPTS))
    assert found == wanted


@pytest.mark.parametrize("budget", [-1, 0, 0.4, 1])
def test_text_stays_whatever_is_verified(servers: Servers, server: Server, budget: float) -> None:
    server.update(dspark_budget=budget)
    assert tokens(server, PROMPTS[1]) == tokens(servers.plain, PROMPTS[1])
    found = record(server)
    if budget >= 0:
        assert found["verified_tokens"] <= budget * found["drafted_tokens"]
    assert (found["verified_tokens"] == 0) is (budget == 0)
    if budget == 1:
        assert found["verified_tokens"] == found["drafted_tokens"]


def test_a_change_in_the_middle_of_an_answer_leaves_its_text(
    servers: Servers, server: Server
) -> None:
    wanted = tokens(servers.plain, PROMPTS[2], max_new_tokens=200)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(tokens, server, PROMPTS[2], max_new_tokens=200)
        for value in (0, 1, 0, 1, -1):
            server.update(dspark_speculation=value)
        assert running.result() == wanted


def test_a_request_that_opts_out_is_not_speculated_on(servers: Servers, server: Server) -> None:
    opted = {"custom_params": {"dspark": {"max_draft_tokens": 0}}}
    assert tokens(server, PROMPTS[0], **opted) == tokens(servers.plain, PROMPTS[0])
    found = record(server)
    assert found["rounds"] == 0 == found["drafted_tokens"] and found["plain_rounds"] > 30


def test_every_step_is_counted_once(server: Server) -> None:
    count = len(tokens(server, PROMPTS[3]))
    found = record(server)
    # The first token is the prefill's; a step launched before the end was known adds to the others.
    made = found["committed_tokens"] + found["plain_rounds"]
    width = record(server)["gamma"] + 1
    assert count - 1 <= made <= count - 1 + 2 * width
    assert record(server)["steps"] == found["steps"], "nothing runs"


@pytest.mark.parametrize("options", ["temperature,all_filters,min_p,frequency_penalty"])
def test_sampled_outputs_follow_plain_decodings_law(
    server: Server, models: Models, options: str
) -> None:
    require_the_distribution(server, models[0], options)


def test_a_request_that_nothing_can_be_drawn_for_ends_alone(
    servers: Servers, server: Server, models: Models
) -> None:
    size = int(json.loads((models[0] / "config.json").read_text())["vocab_size"])
    require_undecidable_requests_end_alone(server, servers.plain, PROMPTS, size)


def test_kernels_admit_on_the_device(servers: Servers, models: Models, tmp_path: Any) -> None:
    """As on a GPU, but in Triton's interpreter: which tokens a budget admits is not decided on the host."""
    server = start(tmp_path, "kernels", models, 1, **OVERLAP, **KERNELS)
    try:
        server.wait_ready(300.0)
        server.update(dspark_speculation=1)
        for prompt in PROMPTS[:2]:
            wanted = tokens(servers.plain, prompt, max_new_tokens=8)
            assert tokens(server, prompt, max_new_tokens=8) == wanted
        counts = ran(server)
        assert counts["admit:triton"] == counts["schedule:ahead"] > 0
        assert counts["accept:triton-greedy"] > 0
    finally:
        server.stop()
