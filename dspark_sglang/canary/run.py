"""Asking a server everything twice, and what to do with what was found."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import numpy as np

from dspark_sglang import remote
from dspark_sglang.artifacts import SCHEMA_VERSION, Provenance, read_artifact, write_json
from dspark_sglang.canary import statistics
from dspark_sglang.canary.checks import TOLERANCES, Answer, Fault, Tolerance, compare, parse
from dspark_sglang.canary.prompts import Question, questions
from dspark_sglang.errors import ArtifactError, ConfigError, ServerError

#: Of seeded questions.
TEMPERATURE = 0.8
#: Share of near-ties beyond which they are no chance any more, and how many of them there are at least.
NEAR_TIES, NEAR_TIES_AT_LEAST = 0.25, 12
#: Repeats of familiar questions that a baseline needs, and those after which one of them at least has
#: to have had the baseline's text.
REPEATS, BLIND_AFTER = 12, 16


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    url: str
    requests: int = 200
    concurrency: int = 8
    tokens: int = 48
    seed: int = 0
    key: str | None = None
    #: A server of the same model without speculation; empty: the watched one is asked not to speculate.
    baseline_url: str = ""
    baseline_key: str | None = None
    #: Stop at the first fault.
    stop: bool = True


class Known(msgspec.Struct, frozen=True):
    """A familiar question on a server known to be right."""

    #: Digest of the answer's tokens.
    text: str
    #: Mean accepted length of the answers with that text, and how many there were.
    mean: float
    count: int


class Baseline(msgspec.Struct, frozen=True, kw_only=True, tag="canary", tag_field="kind"):
    """Accepted lengths of a server known to be right."""

    schema_version: int
    model: str
    revision: str
    gamma: int
    #: Tokens of an answer.
    tokens: int
    levels: dict[str, statistics.Level]
    #: By the familiar question's name.
    known: dict[str, Known]
    #: Standard deviation of an accepted length about its question's mean, tokens.
    deviation: float
    height: float
    provenance: Provenance


class Seen(NamedTuple):
    """One answer with speculation."""

    question: Question
    text: str
    accepted: float


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
    #: Requests after which acceptance was found to have drifted; None: not, or no baseline.
    drifted_at: int | None
    #: Answers that could be held against the baseline's.
    familiar: int
    compared_with: str

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.faults and self.drifted_at is None


class Canary:
    """A server under watch."""

    def __init__(self, options: Options) -> None:
        self.options = options
        connections = 2 * options.concurrency
        self._client = remote.client(options.url, options.key, connections=connections)
        self._plain = self._client
        self.info = remote.info(self._client)
        if str(self.info.get("speculative_algorithm")).upper() != "DSPARK":
            raise ConfigError(
                f"{options.url} runs without DSPARK.",
                expected="a server with speculation to watch",
                fix="Start it with `dspark serve ... --speculative-algorithm DSPARK`.",
            )
        if options.baseline_url:
            self._plain = remote.client(
                options.baseline_url, options.baseline_key, connections=connections
            )
            _same_model(self.info, remote.info(self._plain), options.baseline_url)

    def _post(self, path: str, body: dict[str, Any], http: httpx.Client | None = None) -> Any:
        http = http or self._client
        try:
            answer = http.post(path, json=body)
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServerError(
                f"{http.base_url}{path.lstrip('/')} failed: {error!r}.",
                expected="a running server",
                fix="Check its log, the address, and API_KEY where it has a key.",
            ) from error

    @property
    def record(self) -> dict[str, Any]:
        """What our plugin says of itself; empty where SGLang's builtin runs."""
        return (self.info.get("internal_states") or [{}])[0].get("dspark_info_record") or {}

    @property
    def dtype(self) -> str:
        """Of the weights, as the server was told; auto is bfloat16 for every model served here."""
        named = str(self.info.get("dtype", "auto")).removeprefix("torch.")
        return named if named in TOLERANCES else "bfloat16"

    @property
    def compared_with(self) -> str:
        """Where the text without speculation comes from."""
        return self.options.baseline_url or "custom_params.dspark.max_draft_tokens 0"

    def seeded(self, question: Question) -> bool:
        """Whether a question is asked with a seed and at :data:`TEMPERATURE`.

        One of four open ones, none of them familiar, where the server honours seeds and this plugin couples draws to them.
        """
        honoured = bool(self.info.get("enable_deterministic_inference")) and self.record
        return bool(honoured) and question.kind == "open" and question.number % 16 == 7

    def ask(self, question: Question, *, speculate: bool) -> Answer:
        """Generate once. Log-probabilities change how rows are laid out, so every other question has none."""
        with_logprobs = not speculate or question.number % 2 == 0
        parameters: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": question.tokens}
        if self.seeded(question):
            parameters |= {"temperature": TEMPERATURE, "sampling_seed": question.number}
        if not speculate and not self.options.baseline_url:
            parameters["custom_params"] = {"dspark": {"max_draft_tokens": 0}}
        body: dict[str, Any] = {"text": question.text, "sampling_params": parameters}
        if with_logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": 2}
        return parse(self._post("/generate", body, None if speculate else self._plain))

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
                fix="This server (SGLang's builtin, or DSPARK_SCHEDULE=all) cannot switch speculation off for a "
                "request: name a server of the same model without speculation by --baseline-url.",
            )
        return ours, plain

    def judge(
        self, question: Question, ours: Answer, plain: Answer, allowed: Tolerance
    ) -> Fault | None:
        """What is wrong with an answer, or None.

        A seeded draw's lead over the next is not told, so seeded texts that differ are asked again: rounding does
        not part them twice.
        """
        if not self.seeded(question):
            return compare(question, ours, plain, allowed)
        if ours.ids == plain.ids:
            return None
        again, reference = self.pair(question)
        if again.ids == reference.ids:
            return None
        token = next((i for i, (a, b) in enumerate(zip(again.ids, reference.ids, strict=False)) if a != b),
                     min(len(again.ids), len(reference.ids)))  # fmt: skip
        return Fault("seeded", question.number, question.kind, question.text, token, round(again.accepted, 2),
                     f"two texts of seed {question.number}, twice")  # fmt: skip

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


def _same_model(ours: dict[str, Any], plain: dict[str, Any], url: str) -> None:
    """Raise ConfigError where two servers cannot be compared."""
    if plain.get("speculative_algorithm"):
        raise ConfigError(
            f"{url} speculates too ({plain['speculative_algorithm']}).",
            expected="a server without --speculative-algorithm",
            fix="Start one of the same model without it.",
        )
    for name in ("served_model_name", "weight_version", "dtype", "quantization"):
        if ours.get(name) != plain.get(name):
            raise ConfigError(
                f"{url} has {name} {plain.get(name)}.",
                expected=f"{ours.get(name)}, as on the watched server",
                fix="Start both alike: same model, --served-model-name, --weight-version, --dtype.",
            )


def run(
    canary: Canary,
    baseline: Baseline | None,
    told: Callable[[int, int], None],
    seen: list[Seen] | None = None,
) -> Report:
    """Ask everything and compare.

    Args:
        told: of the requests done and the faults so far.
        seen: gets every answer with speculation, in order.

    Raises:
        ArtifactError: the baseline's texts are not this server's.
    """
    seen = [] if seen is None else seen
    began, faults, ties = time.monotonic(), list[Fault](), 0
    watch = None if baseline is None else _Watch(baseline)
    allowed: Tolerance = TOLERANCES[canary.dtype]
    done = 0
    for question, ours, plain in canary.pairs():
        done += 1
        fault = canary.judge(question, ours, plain, allowed)
        ties += fault is None and ours.ids != plain.ids
        faults += [fault] if fault else []
        seen.append(Seen(question, _digest(ours), ours.accepted))
        if watch is not None:
            watch.add(seen[-1], done)
        told(done, len(faults))
        if canary.options.stop and (faults or (watch is not None and watch.drifted_at)):
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
        drifted_at=None if watch is None else watch.drifted_at,
        familiar=0 if watch is None else watch.compared,
        compared_with=canary.compared_with,
    )


class _Watch:
    """Accepted lengths of familiar questions against the baseline's, one answer after the other."""

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline
        self._drift = statistics.Drift(baseline.height)
        self._asked = self.compared = 0
        self.drifted_at: int | None = None

    def add(self, answer: Seen, done: int) -> None:
        known = self._baseline.known.get(answer.question.name)
        if known is None:
            return
        self._asked += 1
        # Another text has another accepted length; the same one has it whatever the server rounds.
        if known.text == answer.text:
            self.compared += 1
            expected = known.mean, self._baseline.deviation
            self._drift.add(statistics.residual(answer.accepted, *expected))
        if not self.compared and self._asked >= BLIND_AFTER:
            raise ArtifactError(
                f"None of {self._asked} answers that the baseline knows has the text it had.",
                expected="the target, dtype and device that the baseline was recorded with",
                fix="Record it again with `dspark canary --record`, of a server known to be right.",
            )
        if self.drifted_at is None and self._drift.found is not None:
            self.drifted_at = done


def _digest(answer: Answer) -> str:
    return hashlib.sha256(repr(answer.ids).encode()).hexdigest()[:16]


def levels_of(seen: list[Seen]) -> dict[str, statistics.Level]:
    """Accepted length by kind of prompt."""
    kinds = dict.fromkeys(answer.question.kind for answer in seen)
    return {
        kind: statistics.level([a.accepted for a in seen if a.question.kind == kind])
        for kind in kinds
    }


def _familiar(seen: list[Seen]) -> dict[str, tuple[str, list[float]]]:
    """The text that each familiar question had most often, and its accepted lengths with it."""
    named: dict[str, list[Seen]] = {}
    for answer in seen:
        if answer.question.name:
            named.setdefault(answer.question.name, []).append(answer)
    found = {}
    for name, answers in named.items():
        text, _ = Counter(answer.text for answer in answers).most_common(1)[0]
        found[name] = text, [a.accepted for a in answers if a.text == text]
    return found


def record(
    canary: Canary, path: Path, told: Callable[[int, int], None], made: Provenance
) -> Report:
    """Write a baseline of a server that passes.

    Raises:
        ServerError: it does not, or its texts repeat too seldom.
    """
    seen: list[Seen] = []
    report = run(canary, None, told, seen)
    if not report.passed:
        raise ServerError(
            f"The server has {len(report.faults)} faults.",
            expected="one that passes, to take a baseline of",
            fix="Look at them first: `dspark canary` without --record.",
        )
    familiar = _familiar(seen)
    repeats = sum(len(lengths) - 1 for _, lengths in familiar.values())
    if repeats < REPEATS:
        raise ServerError(
            f"{repeats} of {report.requests} answers repeat an earlier one.",
            expected=f"{REPEATS} at least, to know how much accepted lengths vary",
            fix="Raise --requests; 100 are enough where texts do not depend on the batch.",
        )
    deviation = statistics.spread(lengths for _, lengths in familiar.values())
    known = {
        name: Known(text, sum(lengths) / len(lengths), len(lengths))
        for name, (text, lengths) in familiar.items()
    }
    residuals = [
        statistics.residual(answer.accepted, known[answer.question.name].mean, deviation)
        for answer in seen
        if answer.question.name and known[answer.question.name].text == answer.text
    ]
    height = statistics.threshold(residuals, np.random.default_rng(canary.options.seed))
    write_json(
        path,
        Baseline(
            schema_version=SCHEMA_VERSION,
            model=report.model,
            revision=report.revision,
            gamma=int(canary.record.get("gamma", 0)),
            tokens=canary.options.tokens,
            levels=report.accepted,
            known=known,
            deviation=deviation,
            height=height,
            provenance=made,
        ),
    )
    return report


def read_baseline(path: Path, canary: Canary) -> Baseline:
    """A baseline, checked to belong to this server.

    Raises:
        ArtifactError: missing, damaged, or of another model, revision, γ or length of answers.
    """
    fix = f"Record one of this server while it is known to be right: dspark canary --record {path}"
    found = read_artifact(path, Baseline, "a canary baseline", fix)
    own = (
        str(canary.info.get("served_model_name", "")),
        str(canary.info.get("weight_version", "")),
        int(canary.record.get("gamma", 0)),
        canary.options.tokens,
    )
    if (found.model, found.revision, found.gamma, found.tokens) != own:
        raise ArtifactError(
            f"{path} is of {found.model} {found.revision}, gamma {found.gamma}, answers of {found.tokens} tokens.",
            expected=f"{own[0]} {own[1]}, gamma {own[2]}, as served, and {own[3]} tokens",
            fix=fix,
        )
    return found
