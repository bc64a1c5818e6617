"""Where SGLang verifies whole blocks only, on the real server: the target's own text, drafting or not."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from benchmarks.placement import PROMPTS
from dspark_sglang.server import Server
from tests.serving.tiny import Models, ran, require_the_distribution, start, tokens

pytestmark = pytest.mark.server
STATIC = {"SGLANG_RAGGED_VERIFY_MODE": "static"}


class Servers(NamedTuple):
    """Without speculation; deciding whether to draft, with the step before known or not; and over ranks,
    which draft and verify always."""

    plain: Server
    adaptive: Server
    ahead: Server
    all: Server


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("whole")
    started = [
        start(folder, "plain", (models[0], None), 1),
        start(folder, "adaptive", models, 1, **STATIC),
        start(folder, "ahead", models, 1, **STATIC, DSPARK_CPU_OVERLAP="1"),
        start(folder, "all", models, 2, **STATIC),
    ]
    try:
        for server in started:
            server.wait_ready()
        yield Servers(*started)
    finally:
        for server in started:
            server.stop()


@pytest.mark.parametrize("drafting", [1, 0, -1], ids=["on", "off", "auto"])
def test_the_targets_own_text(servers: Servers, drafting: int) -> None:
    adjusted = {"frequency_penalty": 0.6, "logit_bias": {"40": 3.0, "150": -100.0}}
    jobs: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        (prompt, sampling) for prompt in PROMPTS for sampling in ({}, adjusted)
    ]
    wanted = [tokens(servers.plain, prompt, **sampling) for prompt, sampling in jobs]
    for server in (servers.adaptive, servers.ahead):
        server.update(dspark_speculation=drafting)
    for server in servers[1:]:
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
            found = list(pool.map(lambda job, s=server: tokens(s, job[0], **job[1]), jobs))
        assert found == wanted


def test_a_step_drafts_and_verifies_everything_or_decodes(servers: Servers) -> None:
    def spent(server: Server, drafting: int) -> dict[str, int]:
        server.update(dspark_speculation=drafting)
        before = ran(server)
        tokens(server, PROMPTS[0])
        return {name: n - before.get(name, 0) for name, n in ran(server).items()}

    for server, form in (
        (servers.adaptive, "schedule:early-stop"),
        (servers.ahead, "schedule:ahead"),
    ):
        drafted, plain = spent(server, 1), spent(server, 0)
        assert drafted[form] > 0 and drafted.get("step:decode", 0) == 0
        assert plain["step:decode"] > 0 and plain.get(form, 0) == 0
    record = servers.all.dspark()
    assert record is not None and record["schedule"] == "all"


def test_a_part_of_the_blocks_may_count(servers: Servers) -> None:
    for server in (servers.adaptive, servers.ahead):
        server.update(dspark_speculation=1, dspark_budget=0.4)
        try:
            for prompt in PROMPTS:
                assert tokens(server, prompt) == tokens(servers.plain, prompt)
        finally:
            server.update(dspark_budget=-1)


def test_samples_follow_plain_decodings_law(servers: Servers, models: Models) -> None:
    for server in (servers.adaptive, servers.ahead):
        server.update(dspark_speculation=1)
        require_the_distribution(server, models[0], "temperature,all_filters,frequency_penalty")
