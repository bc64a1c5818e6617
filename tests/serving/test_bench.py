"""The load test on the real server: what it reports agrees with what the server says of itself."""

from __future__ import annotations

import pytest

from dspark_loadtests import bench, compare
from dspark_loadtests.acceptance import Snapshot, accepted_length
from dspark_loadtests.bench import Stage
from dspark_loadtests.client import RequestSettings, connect
from dspark_loadtests.generator import Load
from dspark_loadtests.prompts import Source, load_prompts
from dspark_loadtests.schema import Slo
from dspark_sglang.server import Server
from tests.serving.conftest import Pair

pytestmark = pytest.mark.server
TOKENS = 16


def run(server: Server, *, users: int, requests: int, temperature: float = 1.0) -> Stage:
    settings = RequestSettings(model="", temperature=temperature, max_tokens=TOKENS)
    load = Load(settings=settings, users=users, requests=requests, drain_s=120.0)
    source = Source(list(load_prompts()[:8]), "packaged")
    slo = Slo(ttft_ms=1000.0, tpot_ms=50.0)
    return bench.run(connect(server.url), source, load, slo=slo, name="s")


def test_counts_and_times(servers: Pair) -> None:
    stage = run(servers.dspark, users=2, requests=4, temperature=0.0)
    summary = stage.summary
    assert (summary.counts.sent, summary.counts.completed) == (4, 4), summary.errors
    assert 4 <= summary.tokens.completion <= 4 * TOKENS
    assert summary.latency.ttft_ms and summary.latency.itl_ms and summary.latency.tpot_ms
    assert summary.server.arguments["speculative_algorithm"] == "DSPARK"
    # The plugin's counters and the streams' own ends tell the same rounds, but for what is cut off at the end.
    told = accepted_length(Snapshot(), Snapshot(), stage.ran.measured())
    assert told.source == "requests" and told.accepted_length is not None
    assert 1.0 <= told.accepted_length <= 6.0
    assert summary.acceptance.source in ("window", "none"), "none: every step was plain"
    assert summary.acceptance.budget is not None and 0.0 <= summary.acceptance.budget <= 5.0


def test_a_server_without_speculation_has_no_accepted_length(servers: Pair) -> None:
    summary = run(servers.plain, users=1, requests=1).summary
    assert summary.acceptance.accepted_length is None
    assert "without speculation" in summary.acceptance.note


def test_switching_a_server_for_its_turn(servers: Pair) -> None:
    endpoint = connect(servers.dspark.url)
    try:
        compare.switch(endpoint, compare.SWITCHES["none"])
        off = run(servers.dspark, users=1, requests=1).summary.acceptance
        assert (off.drafting_share, off.budget) == (0.0, 0.0)
        compare.settle(endpoint)
        compare.switch(endpoint, compare.SWITCHES["fixed"])
        fixed = run(servers.dspark, users=1, requests=1).summary.acceptance
        assert fixed.drafting_share == 1.0 and fixed.budget is not None and fixed.budget > 3
    finally:
        compare.switch(endpoint, compare.SWITCHES["dspark"])
