"""The kernels in the real server, on the CPU in Triton's interpreter: the ops under test are the
ones the server calls, and its text is plain decoding's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from dspark_sglang.server import Server, free_port, serve_command
from tests.serving.tiny import require_undecidable_requests_end_alone
from tests.tiny_models import PROMPT, ensure_models

pytestmark = pytest.mark.server
#: Nothing is measured at the start: the interpreter's times say nothing.
KERNELS = {"DSPARK_KERNELS": "triton", "TRITON_INTERPRET": "1", "DSPARK_COST": "online"}
ONE_THREAD = {"DSPARK_CPU_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Tiny(NamedTuple):
    plain: Server
    kernels: Server
    #: Of the target.
    folder: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("kernels")
    target, drafter = ensure_models(folder, 0)
    started: list[Server] = []
    try:
        for name, draft, more in (("plain", None, {}), ("kernels", drafter, KERNELS)):
            port = free_port()
            extra = ["--skip-tokenizer-init", "--enable-metrics"]
            command = serve_command(target, port, dtype="float32", drafter=draft, extra=extra)
            log = Path(folder / f"{name}.log")
            server = Server(command, port=port, log=log, environment=ONE_THREAD | more)
            started.append(server.start())
        for server in started:
            server.wait_ready()
        started[1].update(dspark_speculation=1)
        yield Tiny(*started, target)
    finally:
        for server in started:
            server.stop()


def generate(server: Server, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    body = {
        "input_ids": prompts,
        "sampling_params": {"max_new_tokens": 12, "ignore_eos": True, **params},
    }
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=300.0)
    assert answer.status_code == 200, answer.text
    return [entry["output_ids"] for entry in answer.json()]


def ran(server: Server) -> dict[str, int]:
    record = server.dspark()
    assert record is not None
    counts: dict[str, int] = record["ran"]
    return counts


PROMPTS = [[*PROMPT[:cut], 30 + cut] for cut in range(4, 10)]


def test_greedy_tokens_are_plain_decodings(tiny: Tiny) -> None:
    wanted = generate(tiny.plain, PROMPTS, temperature=0.0)
    assert generate(tiny.kernels, PROMPTS, temperature=0.0) == wanted
    assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)


def test_a_request_that_nothing_can_be_drawn_for_ends_alone(tiny: Tiny) -> None:
    size = int(json.loads((tiny.folder / "config.json").read_text())["vocab_size"])
    prompts = [tuple(prompt) for prompt in PROMPTS]
    require_undecidable_requests_end_alone(tiny.kernels, tiny.plain, prompts, size, 10)


def test_penalties_and_bias_are_plain_decodings(tiny: Tiny) -> None:
    options = {"temperature": 0.0, "frequency_penalty": 1.5, "logit_bias": {"9": 3.0}}
    wanted = generate(tiny.plain, PROMPTS[:2], **options)
    assert generate(tiny.kernels, PROMPTS[:2], **options) == wanted


def test_sampled_and_filtered_requests_are_served(tiny: Tiny) -> None:
    before = ran(tiny.kernels).get("accept:triton-rejection", 0)
    found = generate(tiny.kernels, PROMPTS, temperature=1.0, top_k=1_000)
    assert all(len(tokens) == 12 for tokens in found)
    one = generate(tiny.kernels, PROMPTS[:1], temperature=1.0, top_k=1)
    assert one == generate(tiny.plain, PROMPTS[:1], temperature=0.0)
    # A nucleus of almost nothing keeps the most probable token alone.
    narrow = generate(tiny.kernels, PROMPTS[:1], temperature=1.0, top_p=1e-6)
    assert narrow == generate(tiny.plain, PROMPTS[:1], temperature=0.0)
    assert ran(tiny.kernels)["accept:triton-rejection"] > before


def test_every_part_that_ran_is_a_kernel(tiny: Tiny) -> None:
    counts = ran(tiny.kernels)
    parts = {name.split(":")[0] for name in counts if ":triton" in name}
    assert parts == {"draft", "confidence", "admit", "accept", "commit"}
    others = {name for name in counts if ":triton" not in name}
    # Copies are found on the host.
    copies = {"draft:copied-requests", "draft:copies-alone"}
    assert others <= {"schedule:early-stop", "adjust:exact", "step:decode"} | copies
    record = tiny.kernels.dspark()
    assert record is not None
    assert record["kernels"] == "triton" and record["accept_length"] > 1.2


def test_the_kernels_were_launched_once_a_round(tiny: Tiny) -> None:
    before = tiny.kernels.dspark()
    generate(tiny.kernels, PROMPTS, temperature=0.0)
    after = tiny.kernels.dspark()
    assert before is not None and after is not None
    rounds = after["steps"] - before["steps"]
    assert rounds > 2
    spent = {name: n - before["launches"][name] for name, n in after["launches"].items()}
    drafting = {f"markov_step.{name}": rounds for name in ("select", "merge", "chain")}
    others = dict.fromkeys(
        ("confidence", "admit", "window", "accept.scan", "accept", "finish", "kept"), rounds
    )
    # What prefills left is written before the next round.
    prefills = spent.pop("kv_inject") - rounds
    assert 1 <= prefills <= len(PROMPTS)
    assert {name: count for name, count in spent.items() if count} == drafting | others


def test_the_metric_names_the_kernels(tiny: Tiny) -> None:
    lines = httpx.get(f"{tiny.kernels.url}/metrics", timeout=60.0).text.splitlines()
    found = [line for line in lines if line.startswith("dspark_info{")]
    assert len(found) == 1
    assert 'kernels="triton"' in found[0] and found[0].endswith(" 1.0")
