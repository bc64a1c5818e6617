"""Prompt lookup: drafts from a request's own text, what verifying them alone is worth, and when they replace the draft."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dspark_sglang.core.round import Float64, Int64, Load, StepPlan
from dspark_sglang.core.schedule.cost_model import CostModel, StepCost
from dspark_sglang.core.schedule.policy import DraftPolicy

#: Tokens that have to agree, and up to where more of them count as more.
LEAST, LONGEST = 2, 16
#: Tokens looked through: up to twice as many are kept.
WINDOW = 8192
#: Weight of a token one token of its kind older: about the last 500 count.
_MEMORY = 0.998
#: Tokens that the rate before any was seen is worth.
_PRIOR = 6.0
_WIDTH = 32


class LookupRates:
    """How often the token was right that followed ``m`` agreeing tokens before; constant memory."""

    def __init__(self) -> None:
        # Half for two tokens, three quarters for four, and so on, until something is known.
        rates = [0.0] + [1.0 - 1.0 / m for m in range(1, LONGEST + 1)]
        self._seen = [_PRIOR] * (LONGEST + 1)
        self._right = [_PRIOR * rate for rate in rates]

    def observe(self, matched: int, right: bool) -> None:
        """Learn whether the token after ``matched`` agreeing tokens was the one that followed before."""
        m = min(matched, LONGEST)
        self._seen[m] = _MEMORY * self._seen[m] + 1.0
        self._right[m] = _MEMORY * self._right[m] + right

    def rate(self, matched: int) -> float:
        """Chance that the token after ``matched`` agreeing tokens is the one that followed before."""
        m = min(matched, LONGEST)
        return self._right[m] / self._seen[m]

    def chances(self, matched: int, count: int) -> Float64:
        """``[count]`` chance of each copied token, given that those before it were right."""
        return np.array([self.rate(matched + k) for k in range(count)])


class LookupBudget(NamedTuple):
    """How many copied tokens to verify in a step that drafts nothing."""

    tokens: int
    #: Expected tokens a second at that.
    rate: float


def lookup_budget(
    gains: Float64, requests: int, plain_s: float, round_: StepCost, factor: float = 1.0
) -> LookupBudget:
    """The budget of most tokens a second: a decode step, and what verifying more adds to a round.

    Requests are greedy: nothing has to be decided token by token.

    Args:
        gains: ``[n]`` survival of the copied tokens, descending.
        plain_s: seconds of a decode step.
        round_: seconds of a round, of which only the differences count.
        factor: seconds of a step that verifies them over that sum; one of none is a decode step.
    """
    tokens = np.arange(requests, requests + len(gains) + 1)
    seconds = round_.seconds(tokens)
    expected = requests + np.concatenate([[0.0], np.cumsum(gains)])
    lasts = factor * (plain_s + seconds - seconds[0])
    lasts[0] = plain_s
    rates = expected / lasts
    best = int(rates.argmax())
    return LookupBudget(best, float(rates[best]))


class Follower:
    """The text of one request and the place in it that its end repeats.

    Args:
        prompt: token ids.
        rates: learn from every token of :meth:`read`.
    """

    def __init__(self, prompt: Sequence[int], rates: LookupRates) -> None:
        self._rates = rates
        #: Tokens of the answer that were read.
        self._read = 0
        self._begin(list(prompt[-WINDOW:]))

    def _begin(self, tokens: list[int]) -> None:
        self._tokens = tokens
        # Where each pair was last followed by something; the last pair is not yet.
        pairs = ((a << _WIDTH) | b for a, b in itertools.pairwise(tokens[:-1]))
        self._after = dict(zip(pairs, range(2, len(tokens)), strict=True))
        self._find()

    def _find(self) -> None:
        """Look up the last pair, and remember where it ends."""
        tokens = self._tokens
        #: Where the text goes on that agrees with the end, and how many tokens do; 0: nowhere.
        self._at = self.matched = 0
        if len(tokens) < LEAST:
            return
        pair = (tokens[-2] << _WIDTH) | tokens[-1]
        at = self._after.get(pair, 0)
        if at:
            m = LEAST
            while m < min(LONGEST, at) and tokens[at - 1 - m] == tokens[-1 - m]:
                m += 1
            self._at, self.matched = at, m
        self._after[pair] = len(tokens)

    def read(self, answer: Sequence[int]) -> None:
        """Take in what the request has written since.

        Args:
            answer: all its tokens so far.
        """
        for token in answer[self._read :]:
            self._append(token)
        self._read = len(answer)

    def _append(self, token: int) -> None:
        tokens, at = self._tokens, self._at
        followed = False
        if at:
            followed = tokens[at] == token
            self._rates.observe(self.matched, followed)
        tokens.append(token)
        if followed:
            self._at, self.matched = at + 1, min(self.matched + 1, LONGEST)
            self._after[(tokens[-2] << _WIDTH) | token] = len(tokens)
        elif len(tokens) > 2 * WINDOW:
            self._begin(tokens[-WINDOW:])
        else:
            self._find()

    def continuation(self, count: int) -> list[int]:
        """The ``count`` tokens that followed before; none where the end repeats nothing.

        A repetition that reaches the end goes on with itself.
        """
        if not self._at:
            return []
        tokens, size = self._tokens, len(self._tokens)
        found: list[int] = []
        for place in range(self._at, self._at + count):
            found.append(tokens[place] if place < size else found[place - size])
        return found


#: Weight of the newest step of prompt lookup alone, and the most it may last over those before.
_RATE, _STALLED = 0.05, 1.3


class PromptLookup:
    """Weighs steps of prompt lookup alone against decode steps and rounds."""

    def __init__(self, cost: CostModel, policy: DraftPolicy) -> None:
        self._cost = cost
        self._policy = policy
        #: Seconds of a step of prompt lookup alone over those of a decode step and of what verifying more
        #: adds to a round: a verification costs more than decoding.
        self._dearer = 1.1

    def alone(self, load: Load, gains: Float64) -> LookupBudget:
        """How many copied tokens of a step that drafts nothing to verify.

        Args:
            gains: their survivals, falling.
        """
        requests, at = load.requests, (load.context, load.sampling)
        if not self._cost.comparable:
            return LookupBudget(0, 0.0)
        decode = self._cost.plain_seconds(requests, *at)
        return lookup_budget(gains, requests, decode, self._cost.curve(requests, *at), self._dearer)

    def skip_draft(self, plan: StepPlan, rows: Int64, chances: Float64) -> bool | None:
        """Whether prompt lookup alone is expected to bring more tokens a second than a draft beside them.

        Args:
            rows: ``[n]`` requests of the step that can copy.
            chances: ``[n, depth]`` of each copied token, given those before it.

        Returns:
            None where too little is known to tell; never where drafting is the operator's choice.
        """
        if self._policy.choice == "on":
            return False
        load, requests = plan.load, plan.load.requests
        known = self._policy.learned(requests, load.samples)
        if not self._cost.comparable or known is None:
            return None
        if plan.verify_all:
            return False
        within = np.arange(chances.shape[1]) < load.limits[rows][:, None]
        survives = np.where(within, chances.cumprod(axis=1), 0.0)
        alone = self.alone(load, -np.sort(-survives[within])).rate
        # A request whose text repeats keeps the better of both; the others what drafts usually bring.
        drafted = max(0.0, known.gain * known.length - 1.0)
        best = np.maximum(survives.sum(axis=1), drafted).sum() + (requests - len(rows)) * drafted
        decode = self._cost.plain_seconds(requests, load.context, load.sampling)
        return alone >= (requests + float(best)) / (known.length * decode)

    def learn(self, load: Load, budget: int, seconds: float) -> None:
        """Take in what a step of prompt lookup alone has cost, of which ``budget`` tokens were verified."""
        requests, at = load.requests, (load.context, load.sampling)
        none, some = self._cost.curve(requests, *at).seconds(
            np.array([requests, requests + budget])
        )
        dearer = seconds / (self._cost.plain_seconds(requests, *at) + some - none)
        if 0.0 < dearer < np.inf:  # one step teaches little, a stalled one no more
            self._dearer += _RATE * (min(dearer, _STALLED * self._dearer) - self._dearer)
