"""Send the net to a plain server and to one with DSPARK, and compare.

``python -m tests.net.run --requests 2000 --seed 1``: starts both, prints a line a minute and a summary as JSON.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from dspark_sglang import targets
from dspark_sglang.server import Server, free_port, serve_command
from tests.exactness.statistics import Test, two_sample
from tests.net.generate import batches, greedy

ROOT = Path(__file__).resolve().parents[2]
DRAFTER = ROOT / "model_cards" / "smollm2-135m-instruct-dspark"
#: Log-probabilities of the two best tokens this close may fall either way: one row and several round differently.
NEAR_TIE = 1e-3
#: One thread a server: two servers share two cores.
QUIET = {"OMP_WAIT_POLICY": "passive", "DSPARK_CPU_THREADS": "1"}


class Answer(NamedTuple):
    """What a client sees of one request."""

    status: int
    text: str
    ids: tuple[int, ...]
    finish: str
    usage: tuple[int, int]
    error: str

    @property
    def compared(self) -> tuple[Any, ...]:
        """All but the wording of an error."""
        return self[:-1]


def ask(http: httpx.Client, body: dict[str, Any]) -> Answer:
    """Send one request.

    Raises:
        httpx.HTTPError: the server does not answer.
    """
    answer = http.post("/generate", json=body)
    if answer.status_code != 200:
        return Answer(answer.status_code, "", (), "", (0, 0), answer.text[:300])
    found = answer.json()
    meta = found["meta_info"]
    return Answer(
        200,
        found["text"],
        tuple(found["output_ids"]),
        json.dumps(meta["finish_reason"], sort_keys=True),
        (meta.get("prompt_tokens", 0), meta.get("completion_tokens", 0)),
        "",
    )


def gap(http: httpx.Client, body: dict[str, Any], at: int) -> float:
    """How far apart plain decoding's two best tokens are at output position ``at``, in log-probability."""
    asked = body | {"return_logprob": True, "top_logprobs_num": 2}
    answer = http.post("/generate", json=asked)
    if answer.status_code != 200:
        return float("inf")
    tops = answer.json()["meta_info"]["output_top_logprobs"]
    if at >= len(tops) or len(tops[at]) < 2 or None in (tops[at][0][0], tops[at][1][0]):
        return float("inf")
    return abs(float(tops[at][0][0]) - float(tops[at][1][0]))


def parted(first: Answer, second: Answer) -> int:
    """The first output position at which two answers differ."""
    pairs = enumerate(zip(first.ids, second.ids, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first.ids), len(second.ids)))


class Result(NamedTuple):
    """What the net caught."""

    requests: int
    compared: int
    ties: int
    ended: int
    statuses: dict[str, int]
    #: Body, plain's answer and ours, of every greedy request that differs.
    different: list[tuple[dict[str, Any], Answer, Answer]]

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        return self._asdict() | {"different": len(self.different)}


def catch(
    plain: Server,
    ours: Server,
    groups: Sequence[list[dict[str, Any]]],
    *,
    seconds: float = 7200.0,
    enough: float = math.inf,
) -> Result:
    """Send groups of requests to both servers until they are through, enough, or the time is over.

    Args:
        seconds: after which no further group is begun.
        enough: greedy requests compared, after which no further group is begun.
    """
    began, told = time.monotonic(), time.monotonic()
    requests = compared = ties = ended = 0
    statuses: Counter[str] = Counter()
    different: list[tuple[dict[str, Any], Answer, Answer]] = []
    limits = httpx.Limits(max_connections=64)
    with (
        httpx.Client(base_url=plain.url, timeout=300.0, limits=limits) as one,
        httpx.Client(base_url=ours.url, timeout=300.0, limits=limits) as two,
        concurrent.futures.ThreadPoolExecutor(32) as pool,
    ):
        for group in groups:
            if compared >= enough or time.monotonic() - began > seconds:
                break
            try:
                sent = [
                    (pool.submit(ask, one, body), pool.submit(ask, two, body)) for body in group
                ]
                answers = [(a.result(), b.result()) for a, b in sent]
            except httpx.HTTPError as error:
                ended += sum(1 for server in (plain, ours) if not server.alive())
                if not ended:
                    raise RuntimeError(f"A request was not answered: {error!r}.") from error
                break
            for body, (theirs, own) in zip(group, answers, strict=True):
                requests += 1
                statuses[f"{theirs.status}/{own.status}"] += 1
                if not greedy(body):
                    continue
                compared += 1
                if theirs.compared == own.compared:
                    continue
                if (
                    theirs.status == own.status == 200
                    and gap(one, body, parted(theirs, own)) < NEAR_TIE
                ):
                    ties += 1
                    continue
                different.append((body, theirs, own))
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(
                    f"{requests} requests, {len(different)} different", file=sys.stderr, flush=True
                )
    return Result(requests, compared, ties, ended, dict(statuses), different)


_JSON = {"type": "object", "properties": {"a": {"enum": ["x", "y", "zebra"]}}, "required": ["a"]}


def json_law(plain: Server, ours: Server, samples: int) -> Test:
    """Two-sample test of three tokens of JSON at temperature 1, 16 equal requests at a time."""
    body = {
        "text": ["Write a JSON object about an animal:"] * 16,
        "sampling_params": {
            "temperature": 1.0,
            "max_new_tokens": 3,
            "ignore_eos": True,
            "json_schema": json.dumps(_JSON),
        },
    }
    counts: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    for server, counter in zip((plain, ours), counts, strict=True):
        with httpx.Client(base_url=server.url, timeout=300.0) as http:
            while counter.total() < samples:
                answers = http.post("/generate", json=body).raise_for_status().json()
                counter.update(tuple(answer["output_ids"]) for answer in answers)
    return two_sample(*counts)


def servers(logs: Path, *, overlap: bool, extra: Sequence[str] = ()) -> tuple[Server, Server]:
    """A plain server and one with DSPARK, launched."""
    found = []
    for name, draft in (("plain", None), ("dspark", DRAFTER)):
        port = free_port()
        flags = ["--constrained-json-disable-any-whitespace", *extra]
        command = serve_command(
            targets.ensure_target(), port, dtype="float32", drafter=draft, extra=flags
        )
        environment = QUIET | ({"DSPARK_CPU_OVERLAP": "1"} if overlap else {})
        found.append(
            Server(command, port=port, log=logs / f"{name}.log", environment=environment).start()
        )
    return found[0], found[1]


def main() -> int:
    """Run the net; exit 1 where a greedy answer differs, a server ended, or the law of JSON does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument(
        "--samples", type=int, default=2400, help="of JSON at temperature 1; 0: none"
    )
    parser.add_argument("--overlap", action="store_true", help="SGLang's overlapped loop")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(f"seed {given.seed}", file=sys.stderr)
    logs = Path(tempfile.mkdtemp(prefix="net-"))
    plain, ours = servers(logs, overlap=given.overlap)
    try:
        for server in (plain, ours):
            server.wait_ready(600.0)
        groups = batches(given.seed, given.requests)
        result = catch(plain, ours, groups, seconds=given.seconds)
        for body, theirs, own in result.different:
            print(json.dumps({"body": body, "plain": theirs, "dspark": own}))
        summary = {"seed": given.seed, "overlap": given.overlap, **result.summary()}
        if given.samples and not result.ended:
            law = json_law(plain, ours, given.samples)
            summary["json"] = {
                "samples": given.samples,
                "chi_square": law.statistic,
                "p": law.p_value,
            }
        record = ours.dspark() or {}
        summary["accept_length"], summary["faults"] = (
            record.get("accept_length"),
            record.get("faults"),
        )
    finally:
        plain.stop()
        ours.stop()
    print(json.dumps(summary, indent=2))
    if given.out:
        given.out.write_text(json.dumps(summary, indent=2) + "\n")
    fits = summary.get("json", {}).get("p", 1.0) > 0.001
    return int(bool(result.different or result.ended) or not fits)


if __name__ == "__main__":
    sys.exit(main())
