"""Whether to draft at all: never slower than no speculation, with a small bill for finding out.

Drafting pays where ``τ / T_round > R / T_plain``. Both sides depend on the load, and greedy requests
accept far more than sampled ones, so the decision is kept for each power of two of running requests,
apart where most of them sample. Who drafts learns the gain at every step and, now and
then, what decode steps cost; who does not tries a few rounds at intervals that keep their cost
within a bound.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Choice = Literal["auto", "on", "off"]

#: Gains within this of 0 change nothing: around it either choice is right.
HYSTERESIS = 0.02
#: Rounds of a probe at most, and the share of time that probing may cost.
PROBE_ROUNDS, OVERHEAD = 3, 0.005
#: Fewest and most decode steps between probes: a changed workload must be noticed.
_NEAREST, _FARTHEST, _EXTREME = 24, 160, 960
#: Steps before the first look at the other way and, each time twice as many, between later ones at most (rounds: no
#: more than the second); rounds between steps that verify all.
_FIRST_LOOK, _PLAIN_EVERY, _WHOLE_EVERY = 12, 256, 96
#: Logarithm of the gain from which looks are no more frequent than that: near break-even they cost
#: little and decide much.
_CLEAR = 0.2
#: Weight of the newest gain, and of one that a probe finds.
_RATE, _PROBE_RATE = 0.04, 0.3
#: Largest gain that is believed, and blocks seen before a choice is changed: one block says little.
_MOST, _BLOCKS = 32.0, 16


class Decision(NamedTuple):
    """What a step does."""

    draft: bool
    #: Verify everything drafted, whatever it pays: acceptance is learned from it.
    verify_all: bool = False
    #: A decode step that is there to be timed.
    look: bool = False


class Learned(NamedTuple):
    """What drafting has brought."""

    #: Throughput with it over without.
    gain: float
    #: A round's seconds over a decode step's.
    length: float


class _State:
    """Of one range of running requests, greedy or sampled ones."""

    def __init__(self) -> None:
        self.drafting = True
        #: Mean throughput drafting over throughput not. The mean of logarithms would be lower: at one
        #: request a round's tokens vary so much that drafting would seem to bring 5% less than it does.
        self.gain = 1.0
        self.rounds = 0
        #: Steps since drafting was last looked at the other way, and of that look still to come.
        self.since = 0
        self.probing = 0
        #: How long a round lasts in decode steps.
        self.length = 1.5
        #: Decode steps that a round of a probe loses.
        self.lost = 0.2
        #: Steps until the next look at the other way, at most.
        self.wait = _FIRST_LOOK


class DraftPolicy:
    """Decides step by step; constant memory."""

    def __init__(self) -> None:
        #: ``on`` and ``off`` overrule what is learned.
        self.choice: Choice = "auto"
        #: By bits of the number of requests, and whether most of them sample.
        self._states: dict[tuple[int, bool], _State] = {}
        self.switches = 0

    def _state(self, requests: int, sampled: bool) -> _State:
        key = requests.bit_length(), sampled
        if key not in self._states:
            near = min(
                self._states, key=lambda k: (k[1] != sampled, abs(k[0] - key[0])), default=None
            )
            state = self._states[key] = _State()
            if near is not None:
                # What was learned beside it, to be confirmed quickly.
                state.drafting, state.gain = self._states[near].drafting, self._states[near].gain
        return self._states[key]

    def drafting(self, requests: int, sampled: bool = False) -> bool:
        """Whether steps of that many requests usually draft."""
        return self.choice == "on" or (
            self.choice == "auto" and self._state(requests, sampled).drafting
        )

    def gain(self, requests: int, sampled: bool = False) -> float:
        """Expected throughput with drafting over without, as learned."""
        return self._state(requests, sampled).gain

    def learned(self, requests: int, sampled: bool = False) -> Learned | None:
        """What rounds of that many requests brought; None before there were any."""
        state = self._state(requests, sampled)
        return Learned(state.gain, state.length) if state.rounds else None

    def decide(self, requests: int, sampled: bool = False) -> Decision:
        """What the next step of that many requests does."""
        if self.choice != "auto":
            return Decision(self.choice == "on")
        state = self._state(requests, sampled)
        state.since += 1
        if state.probing:
            state.probing -= 1
            return Decision(not state.drafting, look=state.drafting)
        if state.drafting:
            if state.since >= min(state.wait, self._patience(state)):
                state.since, state.probing = 0, PROBE_ROUNDS - 1
                state.wait = min(2 * state.wait, _PLAIN_EVERY)
                return Decision(False, look=True)
            return Decision(True, verify_all=state.since % _WHOLE_EVERY == _WHOLE_EVERY // 2)
        if state.since >= min(state.wait, self._pause(state, requests)):
            state.since, state.probing = 0, _probe(requests) - 1
            state.wait = min(2 * state.wait, _EXTREME)
            # In full: what the last workload taught about depth and confidence may be over.
            return Decision(True, verify_all=True)
        return Decision(False)

    @staticmethod
    def _patience(state: _State) -> float:
        """Rounds until the next look at decode steps, at most."""
        return max(_NEAREST, _PLAIN_EVERY * min(1.0, abs(math.log(state.gain)) / _CLEAR))

    @staticmethod
    def _pause(state: _State, requests: int) -> float:
        """Decode steps until the next probe."""
        bill = _probe(requests) * max(HYSTERESIS, state.lost)
        # Far apart at most where that keeps to a bill of a few times what is meant.
        return max(
            _NEAREST, min(bill / OVERHEAD, max(_FARTHEST, bill / (3.0 * OVERHEAD)), _EXTREME)
        )

    def learn(
        self,
        requests: int,
        gain: float,
        length: float = 1.5,
        lost: float | None = None,
        sampled: bool = False,
    ) -> None:
        """Take in the gain of a round: throughput with drafting over without, as predicted.

        Args:
            gain: positive and finite; anything else is ignored.
            length: seconds of the round over those of a decode step.
            lost: decode steps that it lasted beyond those that would have brought as many tokens,
                with all that it verified to learn; None: as many as follow from the others.
            sampled: most of the requests sample.
        """
        lost = length * (1.0 - gain) if lost is None else lost
        if not (0.0 < gain < math.inf and 0.0 < length < math.inf and math.isfinite(lost)):
            return
        state = self._state(requests, sampled)
        state.rounds += 1
        rate = max(_RATE if state.drafting else _PROBE_RATE, 1.0 / state.rounds)
        state.gain += rate * (min(gain, _MOST) - state.gain)
        state.length += rate * (length - state.length)
        state.lost += rate * (lost - state.lost)
        if state.rounds < max(PROBE_ROUNDS, _BLOCKS // requests):
            return
        wanted = state.gain > 1.0 + (-HYSTERESIS if state.drafting else HYSTERESIS)
        if wanted != state.drafting:
            state.drafting = wanted
            state.since = state.probing = 0
            # What few rounds have decided is looked at again soon.
            state.wait = _FIRST_LOOK if wanted else max(_FIRST_LOOK, 2 * state.rounds)
            self.switches += 1


def _probe(requests: int) -> int:
    """Rounds of a probe: many requests show in one what few do in several."""
    return max(1, min(PROBE_ROUNDS, math.ceil(_BLOCKS / requests)))
