"""The load-test library: what it measures equals what the server did."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dspark_loadtests.acceptance import (
    Acceptance,
    ServerIdentity,
    Snapshot,
    accepted_length,
    read_snapshot,
    take_snapshot,
)
from dspark_loadtests.client import (
    ChatClient,
    RequestSettings,
    ServerApi,
    chat_payload,
    read_api_key,
)
from dspark_loadtests.generator import LoadSession
from dspark_loadtests.prompts import KINDS, cycle, load_prompts
from dspark_loadtests.report import distribution, print_summaries, summarize, verdict
from dspark_loadtests.schema import RunSettings, Slo, Summary
from dspark_loadtests.stream import Outcome, RequestRecord, StreamRecorder
from dspark_sglang.artifacts import read_artifact, write_json
from dspark_sglang.errors import ArtifactError, ConfigError, ServerError
from tests.fake_server import Chunk, FakeServer, Script, Served

# How much later than the server's write a client on the same machine may stamp a chunk.
LAG_S = 0.12


@dataclass
class FakeClock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


def content(text: str, tokens: int | None = None, finish: str | None = None) -> bytes:
    fields: dict[str, Any] = {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    if tokens is not None:
        fields["usage"] = {"prompt_tokens": 7, "completion_tokens": tokens}
    return event(**fields)


ROLE = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
STOP = event(choices=[{"delta": {}, "finish_reason": "stop"}])
DONE = b"data: [DONE]\n\n"


def usage(tokens: int, cached: int | None = None) -> bytes:
    details = None if cached is None else {"cached_tokens": cached}
    counts = {"prompt_tokens": 7, "completion_tokens": tokens, "prompt_tokens_details": details}
    return event(choices=[], usage=counts)


def feed(*timed: tuple[float, bytes]) -> StreamRecorder:
    """A recorder that was sent at 100 s and got each piece at its offset in seconds."""
    clock = FakeClock()
    recorder = StreamRecorder(prompt_id="p", prompt_kind="chat", clock=clock)
    for offset, data in timed:
        clock.now = 100.0 + offset
        recorder.feed(data)
    return recorder


WHOLE = (
    (0.125, ROLE),
    (0.25, content("a", 1)),
    (0.5, content("b c d", 4)),
    (1.0, content("e f", 6)),
    (1.0, STOP),
    (1.0, usage(7, cached=3)),
    (1.125, DONE),
)


class TestStream:
    def test_times_and_tokens_are_exact(self) -> None:
        record = feed(*WHOLE).finish()
        assert record.outcome is Outcome.COMPLETED and record.error is None
        assert record.ttft_s == 0.25, "the role chunk at 0.125 is not a token"
        assert record.gaps_s == (0.25, 0.5)
        assert record.chunk_tokens == (1, 3, 2)
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 7, 3)
        assert record.tpot_s == 0.75 / 6, "divided by tokens after the first, not by chunks"
        assert record.e2e_s == 1.125
        assert record.finish_reason == "stop"

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
    @pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
    def test_any_cut_of_the_bytes_gives_the_same_record(self, size: int, newline: bytes) -> None:
        pieces: list[tuple[float, bytes]] = []
        for offset, data in WHOLE:
            data = data.replace(b"\n", newline)
            pieces += [(offset, data[i : i + size]) for i in range(0, len(data), size)]
        assert feed(*pieces).finish() == feed(*WHOLE).finish()

    def test_a_chunk_in_two_pieces_counts_when_it_is_whole(self) -> None:
        data = content("a", 1)
        recorder = feed((0.25, data[:20]), (0.75, data[20:]), (0.75, STOP), (0.75, usage(1) + DONE))
        record = recorder.finish()
        assert record.ttft_s == 0.75 and record.content_chunks == 1

    def test_usage_only_at_the_end(self) -> None:
        record = feed((1, content("a")), (2, content("b c")), (3, STOP + usage(5) + DONE)).finish()
        assert record.completion_tokens == 5 and record.tpot_s == 1 / 4
        assert record.chunk_tokens == () and record.cached_tokens is None

    def test_reasoning_and_tool_calls_are_content(self) -> None:
        thought = event(choices=[{"delta": {"reasoning_content": "hm", "content": None}}])
        call = event(choices=[{"delta": {"tool_calls": [{"index": 0}]}}])
        record = feed((1, thought), (2, call), (3, STOP + usage(2) + DONE)).finish()
        assert record.ttft_s == 1 and record.gaps_s == (1,)

    def test_one_chunk_has_no_time_per_token(self) -> None:
        record = feed((1, content("a b c", 3)), (1, STOP + usage(3) + DONE)).finish()
        assert record.outcome is Outcome.COMPLETED and record.tpot_s is None

    def test_an_answer_without_text_has_no_ttft(self) -> None:
        record = feed((1, ROLE + STOP + usage(1) + DONE)).finish()
        assert record.outcome is Outcome.COMPLETED and record.ttft_s is None

    def test_comments_and_extension_events_are_passed_over(self) -> None:
        noise = b": ping\n\nevent: sglext_ids\n" + content("ids", 9)
        record = feed((1, noise), (2, content("a", 1)), (3, STOP + usage(1) + DONE)).finish()
        assert record.ttft_s == 2 and record.completion_tokens == 1

    @pytest.mark.parametrize(
        ("tail", "reason"),
        [
            (event(error={"code": 503, "message": "no memory left"}) + DONE, "no memory left"),
            (event(object="error", message="bad luck") + DONE, "bad luck"),
            (b'event: error\ndata: {"error": "worker died"}\n\n' + DONE, "worker died"),
            (b"data: {not json\n\n" + STOP + usage(1) + DONE, "unreadable chunk"),
            (b"", "truncated stream: it ended before [DONE]"),
            (STOP + usage(1), "truncated stream: it ended before [DONE]"),
            (STOP + usage(1) + DONE.rstrip(), "truncated stream: it ended before [DONE]"),
            (usage(1) + DONE, "without a finish_reason"),
            (content("", None, "abort") + usage(1) + DONE, "aborted"),
            (STOP + DONE, "no token counts"),
        ],
    )
    def test_faults_are_failures(self, tail: bytes, reason: str) -> None:
        record = feed((1, content("a")), (2, tail)).finish()
        assert record.outcome is Outcome.FAILED
        assert record.error is not None and reason in record.error

    def test_a_broken_transport_fails_only_before_the_end(self) -> None:
        assert feed().fail("refused").error == "refused"
        assert feed(*WHOLE[:-1]).fail("reset").error == "truncated stream: reset"
        assert feed(*WHOLE).fail("reset").outcome is Outcome.COMPLETED

    def test_the_first_error_is_kept(self) -> None:
        recorder = feed((1, event(error="cause")))
        assert recorder.fail("consequence").error == "error in the stream: cause"

    def test_an_abandoned_request_keeps_what_it_got(self) -> None:
        record = feed(*WHOLE[:3]).abandon()
        assert record.outcome is Outcome.UNFINISHED
        assert (record.completion_tokens, record.e2e_s) == (4, 0.5)


def chat(script: Script) -> tuple[RequestRecord, Served]:
    """One chat over real sockets: what the client recorded and what the server did."""
    prompt = load_prompts()[0]
    payload = chat_payload(prompt, RequestSettings(model="m", temperature=1.0, max_tokens=8))
    with FakeServer(lambda _: script) as server:
        return asyncio.run(stream_chat(server.url, payload)), server.served[0]


async def stream_chat(url: str, payload: dict[str, Any]) -> RequestRecord:
    client = ChatClient(url)
    try:
        recorder = StreamRecorder(prompt_id="p", prompt_kind="chat")
        return await client.stream(json.dumps(payload).encode(), recorder)
    finally:
        await client.close()


class TestAgainstServer:
    def test_several_tokens_a_chunk_and_a_split_chunk(self) -> None:
        chunks = (Chunk(0.1, 1), Chunk(0.05, 4), Chunk(0.05, 3, split_s=0.3), Chunk(0.05, 2))
        record, served = chat(Script(chunks=chunks, prompt_tokens=31, cached_tokens=16))
        assert record.outcome is Outcome.COMPLETED, record.error
        assert record.chunk_tokens == (1, 4, 3, 2)
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (
            31,
            10,
            16,
        )
        # Client and server read the same clock, so no slack is needed below.
        arrivals = list(itertools.accumulate(record.gaps_s, initial=record.first_content_at or 0))
        for arrived, written in zip(arrivals, served.chunk_times, strict=True):
            assert -1e-6 <= arrived - written < LAG_S
        assert record.ttft_s is not None and 0.1 <= record.ttft_s < 0.1 + LAG_S
        assert record.tpot_s is not None
        assert record.tpot_s == pytest.approx(0.45 / 9, abs=LAG_S / 9)
        assert record.gaps_s[1] > 0.25, "the split chunk counts when its second half is in"

    def test_usage_in_the_last_chunk_only(self) -> None:
        record, _ = chat(Script(chunks=(Chunk(0, 1), Chunk(0.05, 5)), usage="last"))
        assert (record.outcome, record.completion_tokens) == (Outcome.COMPLETED, 6)
        assert record.chunk_tokens == () and record.content_chunks == 2

    @pytest.mark.parametrize(
        ("ending", "reason", "tokens"),
        [
            ("error", "503 X no memory left", 3),
            ("truncate", "truncated stream: ClientPayloadError", 3),
            ("http_500", "HTTP 500", None),
        ],
    )
    def test_failures(self, ending: Any, reason: str, tokens: int | None) -> None:
        record, _ = chat(Script(chunks=(Chunk(0, 1), Chunk(0, 2)), ending=ending))
        assert record.outcome is Outcome.FAILED
        assert record.error is not None and reason in record.error
        assert record.completion_tokens == tokens

    def test_the_request_asks_for_counts(self) -> None:
        _, served = chat(Script(chunks=(Chunk(0, 1),)))
        assert served.body["stream"] is True
        assert served.body["stream_options"] == {
            "include_usage": True,
            "continuous_usage_stats": True,
        }
        assert [message["role"] for message in served.body["messages"]] == ["system", "user"]

    def test_model_and_its_absence(self) -> None:
        with FakeServer(lambda _: Script(chunks=())) as server:
            assert ServerApi(server.url).model() == "fake-model"
            with pytest.raises(ServerError, match="404"):
                ServerApi(server.url).get("/nothing")
            address = server.url
        with pytest.raises(ServerError, match="Start the server or correct its address"):
            ServerApi(address, timeout_s=2).model()


class TestPrompts:
    def test_enough_of_each_kind_with_one_shared_prefix(self) -> None:
        prompts = load_prompts()
        assert len(prompts) >= 32
        assert min(Counter(prompt.kind for prompt in prompts).values()) >= 8
        assert {prompt.kind for prompt in prompts} == set(KINDS)
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        assert len({prompt.user for prompt in prompts}) == len(prompts)
        systems = {(prompt.kind, prompt.system) for prompt in prompts}
        assert len(systems) == len({system for _, system in systems}) == len(KINDS)
        # Several pages of a 16-token cache page.
        assert all(len(system.split()) >= 80 for _, system in systems)

    def test_cycle_is_seeded_and_balanced(self) -> None:
        prompts = load_prompts()
        first, again, other = (
            list(itertools.islice(cycle(prompts, random.Random(seed)), 2 * len(prompts)))
            for seed in (1, 1, 2)
        )
        assert first == again != other
        assert set(Counter(prompt.id for prompt in first).values()) == {2}
        assert len({prompt.id for prompt in first[: len(prompts)]}) == len(prompts)

    @pytest.mark.parametrize(
        "text", ["{", '{"schema_version": 2, "license": "", "systems": {}, "prompts": []}']
    )
    def test_another_format_is_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "prompts.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match="schema_version 1"):
            load_prompts(path)


def info(*states: dict[str, Any], algorithm: str | None = "DSPARK") -> Snapshot:
    body = {"version": "0", "speculative_algorithm": algorithm, "internal_states": list(states)}
    return read_snapshot(json.dumps(body).encode())


def counters(rounds: int, committed: int, active: bool = True) -> dict[str, Any]:
    record = {"active": active, "rounds": rounds, "committed_tokens": committed, "more": [1]}
    return {"dspark_info_record": record, "avg_spec_accept_length": 9.0}


class TestAcceptance:
    def test_window_is_the_difference(self) -> None:
        result = accepted_length(info(counters(100, 150)), info(counters(140, 270)))
        assert (result.accepted_length, result.source) == (3.0, "window")
        assert (result.rounds, result.committed_tokens) == (40, 120)

    def test_data_parallel_ranks_are_summed(self) -> None:
        before = info(counters(10, 10), counters(0, 0))
        result = accepted_length(before, info(counters(20, 40), counters(30, 60)))
        assert (result.rounds, result.committed_tokens, result.accepted_length) == (40, 90, 2.25)

    @pytest.mark.parametrize("record", [None, {"records": []}, "text"])
    def test_without_our_counters_it_is_the_lifetime_average(self, record: Any) -> None:
        state = {"dspark_info_record": record, "avg_spec_accept_length": 2.5}
        result = accepted_length(info(state), info(state))
        assert (result.accepted_length, result.source) == (2.5, "lifetime_average")
        assert "not of this run" in result.note

    @pytest.mark.parametrize(
        ("before", "after", "note"),
        [
            (info({}, algorithm=None), info({}, algorithm=None), "without speculation"),
            (info({}), info({}), "DSPARK"),
            (info(counters(9, 9)), info(counters(9, 9)), "no verify round"),
            (info(counters(9, 9)), info(counters(9, 9, active=False)), "inactive"),
            (info(counters(9, 9)), info(counters(2, 3)), "restarted"),
            (read_snapshot(b"<html>"), info(counters(2, 3)), "not SGLang's"),
        ],
    )
    def test_no_number_has_a_reason(self, before: Snapshot, after: Snapshot, note: str) -> None:
        result = accepted_length(before, after)
        assert (result.accepted_length, result.source) == (None, "none")
        assert note in result.note

    def test_from_a_server_and_from_none(self) -> None:
        script = Script(chunks=(Chunk(0, 1), Chunk(0, 4), Chunk(0, 1)))
        with FakeServer(lambda _: script) as server:
            api = ServerApi(server.url, timeout_s=2)
            before = take_snapshot(api)
            asyncio.run(stream_chat(server.url, {}))
            after = take_snapshot(api)
        assert accepted_length(before, after).accepted_length == 2.5
        assert after.identity.model_path == "fake-model"
        assert "failed" in accepted_length(before, take_snapshot(api)).note


def record(
    outcome: Outcome = Outcome.COMPLETED,
    *,
    sent: float = 0.0,
    content_at: tuple[float, ...] = (),
    end: float,
    tokens: int | None = None,
    cached: int | None = None,
    error: str | None = None,
) -> RequestRecord:
    return RequestRecord(
        prompt_id="p",
        prompt_kind="chat",
        outcome=outcome,
        error=error,
        sent_at=sent,
        first_content_at=content_at[0] if content_at else None,
        last_content_at=content_at[-1] if content_at else None,
        ended_at=end,
        gaps_s=tuple(b - a for a, b in itertools.pairwise(content_at)),
        chunk_tokens=(),
        content_chunks=len(content_at),
        prompt_tokens=10,
        completion_tokens=tokens,
        cached_tokens=cached,
        finish_reason="stop",
    )


RECORDS = (
    record(content_at=(0.5, 1.0, 1.5), end=1.5, tokens=11, cached=4),
    record(content_at=(1.0, 3.0), end=3.0, tokens=5, cached=0),
    record(sent=1.0, content_at=(1.5, 2.5), end=2.5, tokens=21, cached=4),
    record(Outcome.FAILED, sent=2.0, content_at=(2.1,), end=2.2, tokens=3, error="[503] full"),
    record(Outcome.UNFINISHED, sent=2.0, content_at=(2.1,), end=4.0, tokens=6),
)


def summary_of(records: tuple[RequestRecord, ...]) -> Summary:
    slo = Slo(ttft_ms=500.0, tpot_ms=100.0)
    return summarize(
        records,
        settings=RunSettings(
            host="http://h", model="m", temperature=1.0, max_tokens=8, users=2, seed=0, slo=slo
        ),
        started_at="2030-01-01T00:00:00+00:00",
        server=ServerIdentity(version="0"),
        acceptance=Acceptance(accepted_length=3.25, source="window", note="n"),
    )


class TestReport:
    def test_percentiles_interpolate(self) -> None:
        found = distribution([5.0, None, 1.0, 3.0, 2.0])
        assert found is not None
        assert (found.count, found.mean) == (4, 2.75)
        assert [found.min, found.p50, found.p90, found.max] == pytest.approx([1, 2.5, 4.4, 5])
        one = distribution([7.0])
        assert one is not None and one.p99 == 7.0 and distribution([None]) is None

    def test_every_number_of_a_known_run(self) -> None:
        summary = summary_of(RECORDS)
        counts = summary.counts
        assert (counts.sent, counts.completed, counts.failed, counts.unfinished) == (5, 3, 1, 1)
        latency = summary.latency
        assert latency.ttft_ms and latency.tpot_ms and latency.inter_chunk_ms and latency.e2e_ms
        assert (latency.ttft_ms.p50, latency.ttft_ms.max, latency.ttft_ms.count) == (500, 1000, 3)
        # 1 s over 10, 2 s over 4 and 1 s over 20 tokens.
        assert latency.tpot_ms.p50 == pytest.approx(100)
        assert (latency.tpot_ms.min, latency.tpot_ms.max) == pytest.approx((50, 500))
        assert latency.tpot_ms.p90 == pytest.approx(420)
        assert (latency.inter_chunk_ms.count, latency.inter_chunk_ms.max) == (4, 2000)
        assert latency.e2e_ms.mean == pytest.approx(2000)
        tokens = summary.tokens
        assert (tokens.prompt, tokens.completion, tokens.partial, tokens.cached) == (30, 37, 9, 8)
        assert tokens.per_chunk == pytest.approx(37 / 7)
        rate = summary.throughput
        assert rate.duration_s == 4.0, "first send to last end, the unfinished one included"
        assert (rate.output_tok_s, rate.requests_per_s) == (37 / 4, 3 / 4)
        assert rate.user_tok_s is not None
        assert rate.user_tok_s.p50 == pytest.approx(10)
        assert rate.user_tok_s.p90 == pytest.approx(2 + 0.2 * 8), "p90 names the slow side"
        assert [(error.message, error.count) for error in summary.errors] == [("[503] full", 1)]

    def test_goodput_is_over_requests_sent(self) -> None:
        good = summary_of(RECORDS).goodput
        assert (good.good, good.sent, good.ratio, good.per_s) == (2, 5, 0.4, 0.5)

    def test_unknown_cached_tokens_stay_unknown(self) -> None:
        known = record(content_at=(1.0,), end=1.0, tokens=1, cached=4)
        assert summary_of((known, record(end=1.0, tokens=1))).tokens.cached is None

    def test_json_round_trip_and_version(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "summary.json"
        summary = summary_of(RECORDS)
        write_json(path, summary)
        assert read_artifact(path, Summary, "a summary", "") == summary
        data = json.loads(path.read_text())
        assert (data["schema_version"], data["kind"]) == (1, "dspark-loadtest-summary")
        assert data["acceptance"]["source"] == "window"
        path.write_text(json.dumps(data | {"schema_version": 2}))
        with pytest.raises(ArtifactError, match="schema_version 2"):
            read_artifact(path, Summary, "a summary", "")

    @pytest.mark.parametrize(
        ("records", "passed", "text"),
        [
            (RECORDS[:3], True, "OK: 3 of 3 requests completed"),
            (RECORDS, False, "FAILED: 1 of 5 requests failed, most often: [503] full"),
            (RECORDS[4:], False, "FAILED: no request completed (1 sent)"),
            ((), False, "FAILED: no request completed (0 sent)"),
        ],
    )
    def test_verdict(self, records: tuple[RequestRecord, ...], passed: bool, text: str) -> None:
        ok, line = verdict(summary_of(records))
        assert ok is passed and line.startswith(text)

    @pytest.mark.parametrize("records", [RECORDS, ()], ids=["some", "none"])
    def test_the_table_prints(self, records: tuple[RequestRecord, ...]) -> None:
        out = StringIO()
        print_summaries([summary_of(records)], Console(file=out, width=100))
        assert f"{len(records)} sent = " in out.getvalue()
        assert "3.250 tokens a round" in out.getvalue()
        assert ("1 x [503] full" in out.getvalue()) is bool(records)


class TestSession:
    def test_nothing_sent_is_lost(self) -> None:
        clock = FakeClock()
        session = LoadSession(cycle(load_prompts(), random.Random(0)), clock=clock)
        (prompt, first), (_, second) = session.begin(), session.begin()
        clock.now = 103.0
        session.end(first, first.fail("reset"))
        clock.now = 105.0
        (abandoned,) = session.abandon_in_flight()
        assert [one.outcome for one in session.records] == [Outcome.FAILED, Outcome.UNFINISHED]
        assert session.records[0].prompt_id == prompt.id
        assert abandoned.e2e_s == 5.0 and session.abandon_in_flight() == []
        with pytest.raises(AssertionError, match="exactly once"):
            second.finish()


class TestApiKey:
    def test_key_file(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("abc\n")
        assert read_api_key(path) == "abc" and read_api_key(None) is None
        path.write_text("\n")
        with pytest.raises(ConfigError, match="empty"):
            read_api_key(path)
        with pytest.raises(ConfigError, match="Cannot read"):
            read_api_key(tmp_path / "none")
