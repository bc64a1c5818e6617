"""The training loop."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dspark_sglang.artifacts import (
    DRAFT_VOCAB_FILE,
    SCHEMA_VERSION,
    DraftVocabArtifact,
    read_draft_vocab,
)
from dspark_sglang.errors import DataError, NumericsError
from dspark_sglang.layouts.dense.config import parse_drafter_config
from dspark_sglang.layouts.dense.write import drafter_config, write_drafter
from dspark_sglang.training import bigram, run_folder
from dspark_sglang.training.batches import Packed, pack, sample_anchors, step_batches
from dspark_sglang.training.chat import Encoder, TokenSequence
from dspark_sglang.training.config import TrainConfig
from dspark_sglang.training.conversations import is_validation, load_conversations
from dspark_sglang.training.distributed import World
from dspark_sglang.training.loss import (
    Mix,
    Terms,
    Vocabulary,
    drafting,
    frequent,
    vocabulary_loss,
)
from dspark_sglang.training.model import Drafter
from dspark_sglang.training.optimizer import Optimizer
from dspark_sglang.training.replay import Validator, Walk, block_hidden, gather_final
from dspark_sglang.training.start import prepare
from dspark_sglang.training.target import States, StateSource, Target

_GIB = 1 << 30


class Corpus(NamedTuple):
    """Sequences to learn from and sequences to judge by."""

    train: list[TokenSequence]
    validation: list[TokenSequence]
    #: Whether each validation sequence was written at temperature 0.
    greedy: list[bool]
    #: ``[V]`` how often the target wrote each token.
    counts: npt.NDArray[np.int64]
    summary: dict[str, int]

    def digest(self) -> str:
        """SHA-256 of the sequences to learn from, in order."""
        total = hashlib.sha256()
        for sequence in self.train:
            total.update(sequence.tokens.tobytes())
            total.update(sequence.written.tobytes())
        return total.hexdigest()


def load_corpus(config: TrainConfig, target: Target) -> Corpus:
    """Read, split and tokenise the conversations.

    Raises:
        DataError: too few are left for a batch or for validation.
    """
    scan = load_conversations([Path(name) for name in config.data.files])
    encoder = Encoder(target.tokenizer)
    train, held = [], []
    for number, conversation in enumerate(scan.conversations):
        made = encoder.encode(conversation, number, config.data.max_length)
        if is_validation(conversation.id, config.data.validation_per_mille):
            # Replaying needs text of the very law that is judged: temperature 0 or 1.
            if conversation.temperature in (0.0, 1.0):
                held += [(sequence, conversation.temperature == 0.0) for sequence in made]
        else:
            train += made
    if len(train) < config.batch.sequences or not held:
        raise DataError(
            f"{len(train)} training and {len(held)} validation sequences.",
            expected=f"at least {config.batch.sequences} and 1",
            fix="Generate more with `dspark data`, or raise data.validation_per_mille.",
        )
    half = config.data.validation_conversations // 2
    greedy = [entry for entry in held if entry[1]][:half]
    chosen = greedy + [entry for entry in held if not entry[1]][:half]
    size = int(target.config.vocab_size)
    counts = np.zeros(size, dtype=np.int64)
    for sequence in train:
        if sequence.tokens.max() >= size:
            raise DataError(
                f"The tokenizer gives token {sequence.tokens.max()}.",
                expected=f"tokens below the target's vocabulary of {size}",
                fix="Use the tokenizer of this target.",
            )
        counts += np.bincount(sequence.tokens[sequence.written], minlength=size)
    return Corpus(
        train=train,
        validation=[entry[0] for entry in chosen],
        greedy=[entry[1] for entry in chosen],
        counts=counts,
        summary={
            "conversations": len(scan.conversations),
            "broken_lines": scan.broken,
            "duplicates": scan.duplicates,
            "sequences": len(train),
            "positions": sum(len(sequence.tokens) for sequence in train),
            "written_tokens": int(counts.sum()),
        },
    )


def draft_vocabulary(config: TrainConfig, corpus: Corpus) -> DraftVocabArtifact | None:
    """The tokens to draft: counted, or those of the drafter started from; None for all."""
    limit, size = config.drafter.draft_vocabulary, len(corpus.counts)
    if limit is None:
        path = Path(config.start) / DRAFT_VOCAB_FILE
        known = bool(config.start) and path.is_file()
        return read_draft_vocab(path, vocab_size=size) if known else None
    if not 0 < limit < size:
        return None
    chosen = np.sort(np.argsort(-corpus.counts, kind="stable")[:limit])
    total = int(corpus.counts.sum())
    return DraftVocabArtifact(
        schema_version=SCHEMA_VERSION,
        vocab_size=size,
        tokens=chosen.tolist(),
        counted=total,
        coverage=round(float(corpus.counts[chosen].sum()) / max(total, 1), 6),
    )


class StepReport(NamedTuple):
    """What a step did, summed over processes."""

    step: int
    loss: float
    rate: float
    norm: float
    #: ``[gamma]`` mean acceptance ``1 - TV`` and top-1 agreement with the target.
    acceptance: list[float]
    match: list[float]
    confidence: float
    seconds: float
    blocks: int
    epoch: float


class Trainer:
    """One run: built from a configuration, resumed from its folder where that holds a state."""

    def __init__(
        self,
        config: TrainConfig,
        target: Target,
        world: World,
        *,
        log: Callable[[str], None],
        corpus: Corpus | None = None,
        source: StateSource | None = None,
        resume: bool = True,
    ) -> None:
        self.config, self.target, self.world = config, target, world
        self.folder = Path(config.out)
        self.corpus = corpus or load_corpus(config, target)
        self._digest = self.corpus.digest()
        self.device = torch.device(config.device)
        spec = config.drafter
        self.drafter_config = drafter_config(spec, target.config, target.tokenizer, config.start)
        parsed = parse_drafter_config(self.drafter_config)
        self.model = Drafter(parsed, markov=spec.markov_head != "none")
        self.drafted = draft_vocabulary(config, self.corpus)
        state = run_folder.load_state(self.folder, config) if resume else None
        if state is None:
            self._begin(log)
        self.model.to(self.device)
        self.optimizer = Optimizer(self.model, config.optim)
        self.step = 0
        self.best = -math.inf
        self.stale = 0
        if state is not None:
            self._resume(state, log)
        sequences = self.corpus.train + self.corpus.validation
        self.source = source or self._state_source(parsed.target_layer_ids, sequences)
        kind = torch.bfloat16 if config.bf16 else torch.float32
        head = target.head.to(kind)
        counts = torch.from_numpy(self.corpus.counts)
        tokens = None if self.drafted is None else torch.tensor(self.drafted.tokens)
        self._final = drafting(head, tokens, target.softcap)
        self._frequent = frequent(head, counts, config.loss.frequent_tokens, target.softcap)
        self.validator = Validator(
            target,
            self.source,
            len(self.corpus.train),
            self.corpus.validation,
            self.corpus.greedy,
            self._final,
            bf16=config.bf16,
        )
        decay = config.loss.decay or spec.gamma
        self._weights = torch.exp(-torch.arange(spec.gamma) / decay).to(self.device)

    def _state_source(
        self, layer_ids: tuple[int, ...], sequences: list[TokenSequence]
    ) -> StateSource:
        cache = self.config.cache
        folder = None
        if cache.kind == "disk":
            folder = Path(cache.folder) if cache.folder else self.folder / "states"
        limit = 0 if cache.kind == "none" else int(cache.gib * _GIB) // self.world.size
        return StateSource(self.target, layer_ids, sequences, limit=limit, folder=folder)

    @torch.no_grad()
    def _begin(self, log: Callable[[str], None]) -> None:
        """The weights training begins with; every process gets the first one's."""
        config, head = self.config, self.model.markov_head
        begun = prepare(
            self.model,
            self.target,
            start=config.start,
            use_target=config.from_target,
            seed=config.seed,
        )
        log(begun.text)
        wanted = not begun.markov if config.markov_from_text is None else config.markov_from_text
        if head is not None and wanted and self.world.first:
            log("fitting the Markov embeddings to neighbouring tokens")
            found = bigram.fit(
                bigram.pairs_of(self.corpus.train),
                self.model.config.vocab_size,
                self.model.config.markov_rank,
                tokens=self._fitted_tokens(),
                seed=config.seed,
            )
            bigram.start_head(head, found)
            log(
                f"-log p of the next token, by frequency {found.unigram:.2f},"
                f" given the one before {found.bigram:.2f}"
            )
        self.world.share(self.model.state_dict().values())

    def _fitted_tokens(self) -> torch.Tensor | None:
        """Tokens whose ``W2`` is worth fitting: those drafted, or those the loss begins with."""
        if self.drafted is not None:
            return torch.tensor(self.drafted.tokens)
        limit = self.config.loss.frequent_tokens
        if not 0 < limit < len(self.corpus.counts):
            return None
        return torch.from_numpy(self.corpus.counts).topk(limit).indices.sort().values

    def _resume(self, state: dict[str, Any], log: Callable[[str], None]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.stale = state["step"], state["best"], state["stale"]
        log(f"resumed after step {self.step}")
        # Going on is what the user wants; it is not the run that was begun, and is told so.
        for name, before, now in (
            ("conversations", state.get("corpus"), self._digest),
            ("number of processes", state.get("processes"), self.world.size),
        ):
            if before is not None and before != now:
                log(f"the {name} changed since: from here on the batches are others")

    def save(self) -> None:
        """Keep the state of the run (first process only)."""
        if self.world.first:
            run_folder.save_state(
                self.folder,
                {
                    "config": msgspec.json.encode(self.config),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "best": self.best,
                    "stale": self.stale,
                    "corpus": self._digest,
                    "processes": self.world.size,
                },
            )

    def export(self, folder: Path) -> None:
        """Write the drafter in the published layout (first process only)."""
        if self.world.first:
            tensors = dict(self.model.state_dict())
            write_drafter(folder, self.drafter_config, tensors, self.drafted)

    def judge(self, walks: dict[str, Walk]) -> bool:
        """Keep the drafter if it is the best so far; True when patience has run out."""
        lengths = [walk.accept_length for walk in walks.values() if walk.rounds]
        score = sum(lengths) / len(lengths)
        if score > self.best:
            self.best, self.stale = score, 0
            self.export(self.folder / "best")
        else:
            self.stale += 1
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether validation has not improved for as long as patience lasts."""
        return 0 < self.config.patience <= self.stale

    def vocabulary(self, step: int) -> Vocabulary:
        """The tokens the laws of a step are over."""
        early = step < self.config.loss.full_from * self.config.optim.steps
        return self._frequent if early else self._final

    def mix(self, step: int) -> Mix:
        """Weights of the loss terms at a step."""
        spec = self.config.loss
        end = spec.blend * self.config.optim.steps
        share = min(1.0, step / end) if end > 0 else 1.0
        return Mix(ce=share * spec.ce, kl=1.0 - share, tv=share * spec.tv)

    def steps(self) -> Iterator[StepReport]:
        """Train until ``optim.steps``; the caller saves and validates in between.

        Raises:
            NumericsError: the loss is not finite; the last saved state is good.
        """
        batch = self.config.batch
        size = batch.sequences * batch.accumulate * self.world.size
        lengths = np.array([len(sequence.tokens) for sequence in self.corpus.train])
        if len(lengths) < size:
            raise DataError(
                f"{len(lengths)} training sequences.",
                expected=f"at least {size}, the sequences of one step",
                fix="Generate more data, or lower batch.sequences or batch.accumulate.",
            )
        for index in step_batches(lengths, size, self.config.seed, self.step):
            if self.step >= self.config.optim.steps or self.finished:
                return
            yield self._train_step(index, size / len(lengths))

    def _micro_batches(self, index: npt.NDArray[np.int64]) -> list[Packed]:
        """This process's share of a global batch, in micro-batches."""
        batch = self.config.batch
        share = batch.sequences * batch.accumulate
        mine = index[self.world.rank * share : (self.world.rank + 1) * share]
        packs = []
        for part in np.split(mine, batch.accumulate):
            sequences = [self.corpus.train[i] for i in part]
            anchors = [
                sample_anchors(sequence, batch.anchors, (self.config.seed, self.step, int(i)))
                for sequence, i in zip(sequences, part, strict=True)
            ]
            packs.append(pack(sequences, anchors, part.tolist(), self.config.drafter.gamma))
        return packs

    def _train_step(self, index: npt.NDArray[np.int64], epochs: float) -> StepReport:
        started = time.monotonic()
        packs = self._micro_batches(index)
        gamma = self.config.drafter.gamma
        counts = torch.stack([packed.valid.sum((0, 1)) for packed in packs]).sum(0)
        counts = self.world.sum(counts.double())
        total = float((counts * self._weights.cpu()).sum())
        sums = torch.zeros(3 + 2 * gamma, dtype=torch.float64)
        for packed in packs:
            sums += self._backward(packed, total)
        self.world.sum_gradients(self.model.parameters())
        sums = self.world.sum(sums)
        loss = float(sums[0]) / total
        if not math.isfinite(loss):
            raise NumericsError(
                f"The loss of step {self.step + 1} is {loss}.",
                expected="a finite loss",
                fix=f"Lower optim.lr and run again; {self.folder} keeps the last good state.",
            )
        norm = self.optimizer.step(self.step)
        self.step += 1
        per = counts.clamp(min=1)
        return StepReport(
            step=self.step,
            loss=loss,
            rate=self.optimizer.rate(self.step - 1),
            norm=norm,
            acceptance=(sums[3 : 3 + gamma] / per).tolist(),
            match=(sums[3 + gamma :] / per).tolist(),
            confidence=float(sums[1] / counts.sum().clamp(min=1)),
            seconds=time.monotonic() - started,
            blocks=int(sums[2]),
            epoch=self.step * epochs,
        )

    def _backward(self, packed: Packed, total: float) -> torch.Tensor:
        """Accumulate the gradients of one micro-batch; returns sums for the report."""
        states = self.source.get(packed.source)
        kind = torch.bfloat16 if self.config.bf16 else torch.float32
        states = States(states.layers.to(self.device, kind), states.final.to(self.device, kind))
        packed = packed.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            hidden = block_hidden(self.model, self.target, packed, states)
            valid = packed.valid
            latent = self.model.latents(hidden, packed.previous)
            wanted = gather_final(states.final, packed.place)[valid]
        weights = self._weights.expand(valid.shape)[valid] / total
        terms = self._vocabulary_terms(hidden[valid], latent, wanted, packed, weights)
        confidence = self.model.confidence_logits(hidden, packed.previous)[valid]
        bce = binary_cross_entropy_with_logits(confidence, terms.acceptance, reduction="none")
        loss = terms.loss + self.config.loss.confidence * (bce * weights).sum()
        torch.autograd.backward(loss)
        return self._sums(packed, terms, loss.detach() * total, bce.detach())

    def _vocabulary_terms(
        self,
        rows: torch.Tensor,
        latent: torch.Tensor | None,
        wanted: torch.Tensor,
        packed: Packed,
        weights: torch.Tensor,
    ) -> Terms:
        head = self.model.markov_head
        return vocabulary_loss(
            rows,
            None if latent is None else latent[packed.valid],
            None if head is None else head.markov_w2.weight,
            wanted,
            packed.labels[packed.valid],
            weights,
            vocabulary=self.vocabulary(self.step),
            mix=self.mix(self.step),
        )

    def _sums(
        self, packed: Packed, terms: Terms, loss: torch.Tensor, bce: torch.Tensor
    ) -> torch.Tensor:
        spread = torch.zeros((2, *packed.valid.shape), device=packed.valid.device)
        spread[0][packed.valid] = terms.acceptance
        spread[1][packed.valid] = terms.match.float()
        head = torch.stack([loss, bce.sum(), packed.valid[..., 0].sum()]).double()
        return torch.cat([head, spread.sum((1, 2)).view(-1).double()]).cpu()
