"""A complete engine over plain tensors: draft, score, schedule, verify, accept, commit.

It states what serving must compute, not how fast. The target is asked about whole sequences in every
round, whatever it keeps of them; the drafter drafts for one request at a time. Everything that decides a
token is the code that serving calls: ``draft``, ``lookup``, ``survival``, ``schedule``, ``penalties``,
``sampling`` and ``accept``. ``dspark eval`` and ``dspark calibrate`` run it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dspark_sglang.core.accept import Accepted, Round, accept_greedy, accept_sampled
from dspark_sglang.core.draft import DraftBlock, draft_block
from dspark_sglang.core.heads import ConfidenceHead, MarkovHead
from dspark_sglang.core.penalties import Penalties
from dspark_sglang.core.round import Float64
from dspark_sglang.core.sampling import UNDECIDED, best, sample, target_weights
from dspark_sglang.core.schedule import admission_order, early_stop_budget, lengths
from dspark_sglang.core.schedule.admission import survival
from dspark_sglang.core.schedule.cost_model import FlatCost, StepCost
from dspark_sglang.core.schedule.prompt_lookup import Follower, LookupRates
from dspark_sglang.errors import ConfigError, NumericsError

#: Numbers in [0, 1), float64, of a given shape.
Uniforms = Callable[[tuple[int, ...]], torch.Tensor]
#: Decides the sampled requests of a round; the uniforms are ``[R, gamma + 1]``.
Accept = Callable[[Round, torch.Tensor], Accepted]


class Target(Protocol):
    """The model whose distribution the engine samples from."""

    #: ``[V, d]`` input embedding.
    embedding: torch.Tensor
    #: ``[V, d]`` LM head.
    head: torch.Tensor

    def forward(
        self, sequences: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each of some sequences ``[n]`` int64: ``[rows, V]`` float32 logits of its last rows, at least one,
        and ``[n, L * d]`` states. The logits are the caller's to change."""
        ...


class Drafter(Protocol):
    """What drafts: :class:`~.drafter.DenseDrafter` or :class:`~.v4.V4Drafter`."""

    markov: MarkovHead
    confidence: ConfidenceHead

    @property
    def gamma(self) -> int: ...

    def context(self, target_hidden: torch.Tensor) -> torch.Tensor:
        """``[S, L * d]`` target states to ``[S, d]`` context rows, each of its own state alone."""
        ...

    def hidden(
        self, context: torch.Tensor, anchors: torch.Tensor, embedding: torch.Tensor
    ) -> torch.Tensor:
        """``[A, gamma, d]`` final hidden states of the blocks at ``anchors``."""
        ...

    def base_logits(self, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """``[..., V]`` logits of hidden states through the target's head."""
        ...


@dataclass(slots=True)
class Request:
    """One request; the engine appends to ``output``.

    Attributes:
        prompt: at least one token.
        max_new_tokens: length of ``output`` at which it ends.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters of sampling; None filters nothing.
        penalties: as in SGLang's sampling parameters.
        stop_tokens: end the output, and are part of it.
        output: generated tokens.
        context: ``[n, d]`` context rows of all tokens but the last; None before the first round.
        follower: where its end occurred before, for prompt lookup.
    """

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    penalties: Penalties = field(default_factory=Penalties)
    stop_tokens: tuple[int, ...] = ()
    output: list[int] = field(default_factory=list)
    context: torch.Tensor | None = None
    follower: Follower | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.prompt + self.output

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be generated."""
        ended = bool(self.output) and self.output[-1] in self.stop_tokens
        return ended or len(self.output) >= self.max_new_tokens


class RoundReport(NamedTuple):
    """What one round did with each unfinished request."""

    #: ``[R, gamma]`` int64 drafted tokens.
    drafted: torch.Tensor
    #: ``[R, gamma]`` float32 uncalibrated confidence logits of what the drafter drafted.
    confidence: torch.Tensor
    #: ``[R, gamma]`` float64 chance that the first ``j`` are all accepted.
    survival: Float64
    #: ``[R]`` int64 drafted tokens sent to verification.
    sent: torch.Tensor
    #: ``[R]`` int64 drafted tokens kept.
    kept: torch.Tensor


class Engine:
    """Generates text with the target's distribution.

    Args:
        target: the model.
        drafter: made for it.
        uniforms: where randomness comes from: a generator, or a function of a shape.
        cost: seconds of a round, for the schedule.
        temperatures: ``[gamma]`` float32 of sequential temperature scaling; None: the drafter's.
        accept: how sampled requests are verified.
        limit: most drafted tokens a round sends to verification, over all requests; None: no limit.
        vocabulary: ``[M]`` int64 the only tokens that are drafted, ascending; None: all.
        shortlist: candidates a position; None: every token that is drafted.
        lookup: let greedy requests copy from their own text where more is expected of that.

    Raises:
        ConfigError: not one temperature a position.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        uniforms: torch.Generator | Uniforms,
        *,
        cost: StepCost | None = None,
        temperatures: torch.Tensor | None = None,
        accept: Accept = accept_sampled,
        limit: int | None = None,
        vocabulary: torch.Tensor | None = None,
        shortlist: int | None = None,
        lookup: bool = False,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.cost = cost or FlatCost()
        self.accept = accept
        self.limit = limit
        self.vocabulary = vocabulary
        self.shortlist = shortlist
        self._head = target.head if vocabulary is None else target.head[vocabulary]
        self._lookup_rates = LookupRates() if lookup else None
        self._uniforms = _drawing(uniforms) if isinstance(uniforms, torch.Generator) else uniforms
        self._confidence = drafter.confidence
        if temperatures is not None:
            if tuple(temperatures.shape) != (drafter.gamma,):
                raise ConfigError(
                    f"The confidence temperatures have shape {list(temperatures.shape)}.",
                    expected=f"[{drafter.gamma}], one a drafted position",
                    fix="Fit them with `dspark calibrate` for this drafter.",
                )
            self._confidence = replace(drafter.confidence, temperatures=temperatures)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[RoundReport]:
        """Run rounds until every request is finished; outputs are in the requests."""
        reports = []
        while any(not request.finished for request in requests):
            reports.append(self.step(requests))
        return reports

    @torch.no_grad()
    def step(self, requests: Sequence[Request]) -> RoundReport:
        """One round for the unfinished requests; those that are new get their first token before.

        Raises:
            ConfigError: a prompt without tokens.
            NumericsError: logits or confidences from which nothing can be decided.
        """
        self.start(requests)
        running = [request for request in requests if not request.finished]
        if not running:
            none = torch.empty(0, dtype=torch.int64)
            shape = (0, self.drafter.gamma)
            return RoundReport(none.view(shape), torch.empty(shape), np.zeros(shape), none, none)
        block, logits = self._draft(running)
        block, confidence = self._copy(running, block, self._confidence.calibrate(logits))
        chance = survival(confidence.numpy())
        sent = self._schedule(chance)
        kept = self._verify(running, block, sent)
        return RoundReport(block.tokens, logits, chance, sent, kept)

    @torch.no_grad()
    def start(self, requests: Sequence[Request]) -> None:
        """The target's own first token, as plain decoding finds it, of those that have none."""
        new = [request for request in requests if request.context is None and not request.finished]
        if not all(request.prompt for request in new):
            raise ConfigError(
                "A request has an empty prompt.",
                expected="at least one token to continue",
                fix="Begin the prompt with the model's beginning-of-sequence token.",
            )
        if not new:
            return
        made = self.target.forward([torch.tensor(r.tokens) for r in new], [1] * len(new))
        for request, (row, states) in zip(new, made, strict=True):
            request.context = self.drafter.context(states)
            request.penalties.apply(row, request.output, [])
            token = best(row)
            if request.temperature > 0:
                token = sample(_weights(row, [request], [1]), self._uniforms((1,)))
            _extend(request, [int(token)])

    def _draft(self, running: Sequence[Request]) -> tuple[DraftBlock, torch.Tensor]:
        """A block for every request, and ``[R, gamma]`` uncalibrated confidence logits of its tokens."""
        drafter = self.drafter
        anchors = torch.tensor([request.tokens[-1] for request in running])
        hidden = torch.cat(
            [
                drafter.hidden(
                    request.context,
                    torch.tensor([len(request.context)]),
                    self.target.embedding[anchor][None],
                )
                for request, anchor in zip(running, anchors, strict=True)
                if request.context is not None
            ]
        )
        sampled = _sampled(running)
        block = draft_block(
            drafter.base_logits(hidden, self._head),
            anchors,
            hidden,
            drafter.markov,
            temperatures=torch.tensor([running[i].temperature for i in sampled]),
            sampled=torch.tensor(sampled) if sampled else None,
            uniforms=self._uniforms((len(sampled), drafter.gamma)) if sampled else None,
            shortlist=self.shortlist,
            vocabulary=self.vocabulary,
        )
        return block, self._confidence.logits(hidden, block.previous, drafter.markov)

    def _copy(
        self, running: Sequence[Request], block: DraftBlock, confidence: torch.Tensor
    ) -> tuple[DraftBlock, torch.Tensor]:
        """The block and its confidences, with copies where a greedy request's text repeats itself.

        A greedy request keeps what the target would have written whatever is proposed, so its text may be
        looked up in place of the draft wherever more of it is expected to be right.
        """
        rates = self._lookup_rates
        if rates is None:
            return block, confidence
        tokens, confidence = block.tokens.clone(), confidence.clone()
        for row, request in enumerate(running):
            if request.temperature > 0:
                continue
            if request.follower is None:
                request.follower = Follower(request.prompt, rates)
            request.follower.read(request.output)
            copied = request.follower.continuation(self.drafter.gamma)
            if not copied:
                continue
            chances = torch.from_numpy(rates.chances(request.follower.matched, len(copied)))
            if chances.cumprod(0).sum() > confidence[row].cumprod(0).sum():
                tokens[row], confidence[row] = torch.tensor(copied), chances.to(confidence)
        return block._replace(tokens=tokens), confidence

    def _schedule(self, chance: Float64) -> torch.Tensor:
        """``[R]`` drafted tokens of each request to verify."""
        order = admission_order(chance)
        budget = early_stop_budget(chance, order, self.cost)
        if self.limit is not None:
            budget = min(budget, self.limit)
        return torch.from_numpy(lengths(order, budget, requests=len(chance)))

    def _verify(
        self, running: Sequence[Request], block: DraftBlock, sent: torch.Tensor
    ) -> torch.Tensor:
        """Run the target over anchors and admitted tokens, decide, and commit what is kept."""
        admitted = [own[:count] for own, count in zip(block.tokens, sent.tolist(), strict=True)]
        made = self.target.forward(
            [
                torch.cat([torch.tensor(r.tokens), own])
                for r, own in zip(running, admitted, strict=True)
            ],
            [len(own) + 1 for own in admitted],
        )
        for request, own, (rows, _) in zip(running, admitted, made, strict=True):
            request.penalties.apply(rows, request.output, own.tolist())
        result = self._accept(running, block, sent, [rows for rows, _ in made])
        for i, request in enumerate(running):
            kept = int(result.count[i])
            # Its last token's state is computed by the next round: the anchor's row.
            known = request.context
            assert known is not None
            states = made[i][1][len(known) : len(request.tokens) + kept]
            request.context = torch.cat([known, self.drafter.context(states)])
            _extend(request, [*block.tokens[i, :kept].tolist(), int(result.token[i])])
        return result.count

    def _accept(
        self,
        running: Sequence[Request],
        block: DraftBlock,
        sent: torch.Tensor,
        made: Sequence[torch.Tensor],
    ) -> Accepted:
        """Greedy requests keep the prefix that is the target's argmax; the others are tested."""
        widths = sent + 1
        rows = torch.cat(list(made))
        result = accept_greedy(best(rows), block.tokens, sent, widths.cumsum(0) - widths)
        sampled = _sampled(running)
        if not sampled:
            return result
        assert block.probs is not None
        index = torch.tensor(sampled)
        requests = [running[i] for i in sampled]
        weights = _weights(torch.cat([made[i] for i in sampled]), requests, widths[index].tolist())
        tested = self.accept(
            Round(
                weights=weights,
                drafted=block.tokens[index],
                probs=block.probs,
                lens=sent[index],
                first=widths[index].cumsum(0) - widths[index],
                support=block.support,
            ),
            self._uniforms((len(sampled), self.drafter.gamma + 1)),
        )
        return Accepted(
            count=result.count.index_copy(0, index, tested.count),
            token=result.token.index_copy(0, index, tested.token),
        )


def _drawing(generator: torch.Generator) -> Uniforms:
    def uniforms(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    return uniforms


def _sampled(requests: Sequence[Request]) -> list[int]:
    return [i for i, request in enumerate(requests) if request.temperature > 0]


def _weights(
    rows: torch.Tensor, requests: Sequence[Request], widths: Sequence[int]
) -> torch.Tensor:
    """What plain decoding samples from: ``[N, V]``; request ``i`` owns ``widths[i]`` rows."""
    repeats = torch.tensor(list(widths))

    def each(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(list(values)).repeat_interleave(repeats)

    size = rows.shape[-1]
    filtered = any(r.top_k or r.top_p or r.min_p for r in requests)
    return target_weights(
        rows,
        each([r.temperature for r in requests]),
        top_k=each([r.top_k or size for r in requests]) if filtered else None,
        top_p=each([r.top_p or 1.0 for r in requests]) if filtered else None,
        min_p=each([r.min_p or 0.0 for r in requests]) if filtered else None,
    )


def _extend(request: Request, tokens: Sequence[int]) -> None:
    """Append the committed tokens up to the end of the request.

    Raises:
        NumericsError: it goes on and the next one could not be drawn.
    """
    for token in tokens:
        if request.finished:
            return
        if token == UNDECIDED:
            raise NumericsError(
                "A token law has no finite positive mass (NaN or infinite logits, or every token excluded).",
                expected="finite logits with at least one allowed token",
                fix="Check the model's weights and dtype, and the request's penalties.",
            )
        request.output.append(token)
