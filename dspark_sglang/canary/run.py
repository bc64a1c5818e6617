"""Asking a server everything twice, and what to do with what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance, read_artifact, write_json
from dspark_sglang.canary import statistics
from dspark_sglang.canary.checks import TOLERANCES, Answer, Fault, Tolerance, compare, parse
from dspark_sglang.canary.prompts import Question, questions
from dspark_sglang.errors import ArtifactError, ConfigError, ServerError

_TIMEOUT_S = 300.0
#: Share of near-ties beyond which they are no chance any more, and how many of them there are at least.
NEAR_TIES, NEAR_TIES_AT_LEAST = 0.25, 12


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    url: str
    requests: int = 200
    concurrency: int = 8
    tokens: int = 48
    seed: int = 0
    key: str | None = None
    #: Stop at the first fault.
    stop: bool = True


class Baseline(msgspec.Struct, frozen=True, kw_only=True, tag="canary", tag_field="kind"):
    """Accepted lengths of a server known to be right."""

    schema_version: int
    model: str
    revision: str
    gamma: int
    levels: dict[str, statistics.Level]
    height: float
    provenance: Provenance


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one run found."""

    url: str
    model: str
    revision: str
    dtype: str
    requests: int
    seconds: float
    faults: list[Fault]
    #: Texts that part at a near-tie, which rounding explains.
    near_ties: int
    #: Accepted length by kind of prompt.
    accepted: dict[str, statistics.Level]
    #: The request at which acceptance was found to have drifted; None: not, or no baseline.
    drifted_at: int | None
    compared_with: str

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.faults and self.drifted_at is None


class Canary:
    """A server under watch."""

    def __init__(self, options: Options) -> None:
        self.options = options
        headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
        limits = httpx.Limits(max_connections=2 * options.concurrency)
        self._client = httpx.Client(
            base_url=options.url, timeout=_TIMEOUT_S, headers=headers, limits=limits
        )
        self.info = self._info()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        try:
            answer = self._client.post(path, json=body)
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(
                f"{self.options.url}{path} failed: {error!r}.",
                expected="a running server",
                fix="Check its log, the address, and API_KEY where it has a key.",
            ) from error

    def _info(self) -> dict[str, Any]:
        try:
            answer = self._client.get("/server_info")
            answer.raise_for_status()
            info: dict[str, Any] = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ServerError(
                f"{self.options.url}/server_info gave no usable answer: {error!r}.",
                expected="a running SGLang server",
                fix="Check the address, and API_KEY where it has a key.",
            ) from error
        if str(info.get("speculative_algorithm")).upper() != "DSPARK":
            raise ConfigError(
                f"{self.options.url} runs without DSPARK.",
                expected="a server with speculation to watch",
                fix="Start it with `dspark serve ... --speculative-algorithm DSPARK`.",
            )
        return info

    @property
    def record(self) -> dict[str, Any]:
        """What our plugin says of itself; empty where SGLang's builtin runs."""
        return (self.info.get("internal_states") or [{}])[0].get("dspark_info_record") or {}

    @property
    def dtype(self) -> str:
        """Of the weights, as the server was told; auto is bfloat16 for every model served here."""
        named = str(self.info.get("dtype", "auto")).removeprefix("torch.")
        return named if named in TOLERANCES else "bfloat16"

    def ask(self, question: Question, *, speculate: bool) -> Answer:
        """Generate once. Log-probabilities change how rows are laid out, so every other question has none."""
        with_logprobs = not speculate or question.number % 2 == 0
        parameters: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": question.tokens}
        if not speculate:
            parameters["custom_params"] = {"dspark": {"max_draft_tokens": 0}}
        body: dict[str, Any] = {"text": question.text, "sampling_params": parameters}
        if with_logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": 2}
        return parse(self._post("/generate", body))

    def pair(self, question: Question) -> tuple[Answer, Answer]:
        """With and without speculation; other questions are under way meanwhile.

        Raises:
            ServerError: the reference was speculated on, so that nothing would be compared.
        """
        ours = self.ask(question, speculate=True)
        plain = self.ask(question, speculate=False)
        if plain.accepted > 1.5 and len(plain.ids) > 4:
            raise ServerError(
                f"The answer without speculation took {plain.rounds} rounds for {len(plain.ids)} tokens.",
                expected="one round a token under custom_params.dspark.max_draft_tokens 0",
                fix="This server (SGLang's builtin, or overlap scheduling) cannot switch speculation off for a "
                "request: compare with a second server instead, see deploy/README.md.",
            )
        return ours, plain

    def pairs(self) -> Iterator[tuple[Question, Answer, Answer]]:
        """Every question in order, ``concurrency`` of them at once."""
        asked = questions(self.options.requests, seed=self.options.seed, tokens=self.options.tokens)
        size = self.options.concurrency
        with ThreadPoolExecutor(size) as pool:
            for start in range(0, len(asked), size):
                chunk = asked[start : start + size]
                for question, (ours, plain) in zip(chunk, pool.map(self.pair, chunk), strict=True):
                    yield question, ours, plain

    def turn_off(self) -> str | None:
        """Turn speculation off at run time; why not, where the server refuses."""
        return self._set("dspark_speculation", 0)

    def report(self, passed: bool) -> str | None:
        """Tell the server, which shows it in ``/metrics``; why not, where it refuses."""
        return self._set("dspark_canary", int(passed))

    def _set(self, key: str, value: int) -> str | None:
        answer = self._post("/set_internal_state", {"server_args": {key: value}})
        answers = answer if isinstance(answer, list) else [answer]
        return None if all(found is True for found in answers) else str(answer)


def run(
    canary: Canary,
    baseline: Baseline | None,
    told: Callable[[int, int], None],
    seen: list[tuple[str, float]] | None = None,
) -> Report:
    """Ask everything and compare.

    Args:
        told: of the requests done and the faults so far.
        seen: gets the kind and the accepted length of every request, in order.
    """
    seen = [] if seen is None else seen
    began, faults, ties = time.monotonic(), list[Fault](), 0
    residuals: list[float] = []
    allowed: Tolerance = TOLERANCES[canary.dtype]
    done, drifted = 0, None
    for question, ours, plain in canary.pairs():
        done += 1
        fault = compare(question, ours, plain, allowed)
        ties += fault is None and ours.ids != plain.ids
        faults += [fault] if fault else []
        seen.append((question.kind, ours.accepted))
        if baseline is not None and question.kind in baseline.levels:
            residuals.append(statistics.residual(ours.accepted, baseline.levels[question.kind]))
            drifted = statistics.alarm(residuals, baseline.height)
        told(done, len(faults))
        if canary.options.stop and (faults or drifted is not None):
            break
    if ties > max(NEAR_TIES_AT_LEAST, NEAR_TIES * done):
        faults.append(
            Fault("near-ties", -1, "all", "", -1, 0.0, f"{ties} of {done} texts part at near-ties")
        )
    info = canary.info
    return Report(
        url=canary.options.url,
        model=str(info.get("served_model_name", "")),
        revision=str(info.get("weight_version", "")),
        dtype=canary.dtype,
        requests=done,
        seconds=round(time.monotonic() - began, 1),
        faults=faults,
        near_ties=ties,
        accepted=levels_of(seen),
        drifted_at=drifted,
        compared_with="custom_params.dspark.max_draft_tokens 0",
    )


def levels_of(seen: list[tuple[str, float]]) -> dict[str, statistics.Level]:
    """Accepted length by kind of prompt."""
    kinds = dict.fromkeys(kind for kind, _ in seen)
    return {
        kind: statistics.level([length for own, length in seen if own == kind]) for kind in kinds
    }


def record(
    canary: Canary, path: Path, told: Callable[[int, int], None], made: Provenance
) -> Report:
    """Write a baseline of a server that passes.

    Raises:
        ServerError: it does not.
    """
    seen: list[tuple[str, float]] = []
    report = run(canary, None, told, seen)
    if not report.passed:
        raise ServerError(
            f"The server has {len(report.faults)} faults.",
            expected="one that passes, to take a baseline of",
            fix="Look at them first: `dspark canary` without --record.",
        )
    levels = report.accepted
    residuals = [statistics.residual(length, levels[kind]) for kind, length in seen]
    height = statistics.threshold(residuals, np.random.default_rng(canary.options.seed))
    write_json(
        path,
        Baseline(
            schema_version=SCHEMA_VERSION,
            model=report.model,
            revision=report.revision,
            gamma=int(canary.record.get("gamma", 0)),
            levels=levels,
            height=height,
            provenance=made,
        ),
    )
    return report


def read_baseline(path: Path, canary: Canary) -> Baseline:
    """A baseline, checked to belong to this server.

    Raises:
        ArtifactError: missing, damaged, or of another model, revision or γ.
    """
    fix = f"Record one of this server while it is known to be right: dspark canary --record {path}"
    found = read_artifact(path, Baseline, "a canary baseline", fix)
    own = (
        str(canary.info.get("served_model_name", "")),
        str(canary.info.get("weight_version", "")),
        int(canary.record.get("gamma", 0)),
    )
    if (found.model, found.revision, found.gamma) != own:
        raise ArtifactError(
            f"{path} is of {found.model} {found.revision}, gamma {found.gamma}.",
            expected=f"{own[0]} {own[1]}, gamma {own[2]}, as served",
            fix=fix,
        )
    return found
