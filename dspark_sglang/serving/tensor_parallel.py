"""Ranks: what they exchange, which part of the vocabulary each holds, and what each has of the drafter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
from sglang.srt.models.dspark import project_through_lm_head
from sglang.srt.runtime_context import get_parallel

from dspark_sglang import config
from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, read_draft_vocab
from dspark_sglang.core.placement import Placement
from dspark_sglang.core.tensor_parallel import Exchange, HeldHeads, Shard, Sum, held_heads
from dspark_sglang.core.tensor_parallel.shard import Result
from dspark_sglang.errors import CompatibilityError, ConfigError
from dspark_sglang.serving.cpu.packing import can_pack, pack, packed_linear
from dspark_sglang.serving.draft_model import DraftModel
from dspark_sglang.serving.placement import settled
from dspark_sglang.serving.sglang_types import Group, KvInjector, LogitsProcessor, VocabEmbedding
from dspark_sglang.serving.telemetry import Telemetry


class Ranks:
    """Collectives over the target's ranks, each counted.

    The group is the target's even inside the draft's narrower context.

    Args:
        group: SGLang's coordinator of the ranks that share the LM head.
    """

    def __init__(self, group: Group, telemetry: Telemetry) -> None:
        self._group = group
        self._telemetry = telemetry
        self.count = int(group.world_size)
        self.rank = int(group.rank_in_group)

    def broadcast(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """Rank 0's ``values`` on every rank.

        ``SGLANG_SPEC_TP_SYNC`` does not leave any out: ranks decide by their own clocks.
        """
        if self.count == 1:
            return values
        self._telemetry.exchanged(what, values.numel() * values.element_size())
        received: torch.Tensor = self._group.broadcast(values, src=0)
        return received

    def broadcast_host(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """Rank 0's ``values``, which are on the host, on every rank: no rank waits for its device."""
        if self.count > 1:
            self._telemetry.exchanged(what, values.numel() * values.element_size())
            source, group = self._group.ranks[0], self._group.cpu_group
            torch.distributed.broadcast(values, src=source, group=group)
        return values

    def reduce(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """The sum of every rank's ``values``."""
        self._telemetry.exchanged(what, values.numel() * values.element_size())
        total: torch.Tensor = self._group.all_reduce(values)
        return total

    def gather(self, values: torch.Tensor, what: str, *, dim: int | None = None) -> torch.Tensor:
        """Every rank's ``values``: stacked in rank order, or joined along ``dim``."""
        if dim is None:
            values, dim = values[None], 0
        self._telemetry.exchanged(what, values.numel() * values.element_size() * self.count)
        every: torch.Tensor = self._group.all_gather(values.contiguous(), dim=dim)
        return every

    def run(self, exchange: Exchange[Result], what: str) -> Result:
        """Run one rank of an exchange over the real ranks."""
        try:
            record = next(exchange)
            while True:
                if isinstance(record, Sum):
                    found = self.reduce(record.values, record.what)
                else:
                    found = self.gather(record, what)
                record = exchange.send(found)
        except StopIteration as end:
            result: Result = end.value
            return result


class Vocabulary:
    """This rank's part of the target's vocabulary.

    Args:
        draft: the drafter, which shares the target's LM head, sharded over ``ranks``.
    """

    def __init__(self, draft: DraftModel, ranks: Ranks) -> None:
        self.ranks = ranks
        self._draft = draft
        self._head = head = draft.module.lm_head
        indices = head.shard_indices
        start, end = int(indices.org_vocab_start_index), int(indices.org_vocab_end_index)
        self.shard = Shard(ranks.rank, start, end - start, int(head.org_vocab_size))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Base logits ``[N, width]`` of this rank's tokens, of draft states ``[N, d]``."""
        return self.own(project_through_lm_head(self._draft.head_input(hidden), self._head))

    def own(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's columns of whole rows, or of a shard with padded columns."""
        shard = self.shard
        if logits.shape[-1] == shard.vocabulary:
            return logits[..., shard.start : shard.start + shard.width]
        return logits[..., : shard.width]

    def gathered(self, logits: torch.Tensor, what: str) -> torch.Tensor:
        """Whole rows ``[N, V]`` of shards with padded columns, or of whole rows."""
        if logits.shape[-1] >= self.shard.vocabulary:
            return logits
        return self.ranks.gather(logits, what, dim=-1)[..., : self.shard.vocabulary]

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whole rows of the LM head, ``[M, d]``, of ``tokens`` ``[M]`` int64, from every rank."""
        return self.ranks.reduce(self.shard.rows(self._head.weight.detach(), tokens), "start")

    @classmethod
    def of(cls, draft: DraftModel, ranks: Ranks) -> Vocabulary | None:
        """The part of the LM head a drafter shares; None where every rank holds the whole of it.

        None as well with attention data parallelism, where SGLang gathers whole rows.

        Raises:
            CompatibilityError: it is sharded in a way that exchanges of records do not know.
        """
        head = draft.module.lm_head
        if int(getattr(head, "tp_size", 1)) == 1 or get_parallel().attn_dp_enabled:
            return None
        added = int(head.num_embeddings) - int(head.org_vocab_size)
        if added or int(head.tp_size) != ranks.count:
            raise CompatibilityError(
                f"The LM head is sharded over {head.tp_size} of {ranks.count} ranks, with {added} "
                "added tokens.",
                expected="one shard a rank and no added tokens",
                fix="Serve without added tokens, or run SGLang's builtin with DSPARK_PLUGIN=off.",
            )
        if not draft.reads_target_head:
            raise CompatibilityError(
                f"{type(draft.module).__name__} makes its base logits in a way of its own.",
                expected="a drafter that reads the target's LM head where there are several ranks",
                fix="Serve with --tp 1, or run SGLang's builtin with DSPARK_PLUGIN=off.",
            )
        return cls(draft, ranks)


def keep_shards(processor: LogitsProcessor) -> None:
    """Let the target's logits processor leave verification's logits sharded.

    Prefill and plain decoding still gather. What the processor does to single logits (scale, soft cap)
    it does to a shard's.
    """
    original = processor._get_logits

    def get_logits(
        hidden_states: torch.Tensor,
        lm_head: object,
        logits_metadata: Any,
        embedding_bias: torch.Tensor | None = None,
        use_logits_buffer: bool = True,
    ) -> torch.Tensor:
        given = (hidden_states, lm_head, logits_metadata, embedding_bias)
        if not logits_metadata.forward_mode.is_target_verify():
            whole: torch.Tensor = original(*given, use_logits_buffer)
            return whole
        processor.do_tensor_parallel_all_gather = False
        try:
            # The buffer is as wide as the vocabulary.
            shard: torch.Tensor = original(*given, False)
        finally:
            processor.do_tensor_parallel_all_gather = True
        return shard

    processor._get_logits = get_logits


class DraftEmbedding(torch.nn.Module):
    """The target's sharded embedding as the draft forward reads it: one all-reduce of the anchors' rows.

    All other rows are the mask token's, which is looked up once; after an update of the target's
    weights at run time it is that of the old ones, which costs acceptance and nothing else.

    Args:
        embed: the target's embedding.
        mask: the mask token.
        width: rows of the draft forward a request.
    """

    def __init__(self, embed: VocabEmbedding, mask: int, width: int, ranks: Ranks) -> None:
        super().__init__()
        # In a tuple, or its weight would be listed among the draft's parameters.
        self._shared = (embed,)
        self._ranks = ranks
        self._width = width
        token = torch.tensor([mask], device=embed.weight.device)
        with torch.inference_mode():
            self._mask = self._rows(token, "start")

    def _rows(self, tokens: torch.Tensor, what: str) -> torch.Tensor:
        return self._ranks.reduce(self._shared[0]._embed_local_shard(tokens), what)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[..., d]`` of ``[R, width]`` or ``[R * width]`` int64 tokens.

        The first of a request is its anchor, the others are mask tokens.
        """
        anchors = self._rows(tokens.view(-1, self._width)[:, 0], "embed")
        rest = self._mask.expand(len(anchors), self._width - 1, -1)
        return torch.cat([anchors[:, None], rest], dim=1).view(*tokens.shape, -1)


logger = logging.getLogger(__name__)


class DraftHead:
    """A copy of some rows of the target's LM head, made again when that is updated.

    Args:
        draft: the drafter.
        head: ``[V, d]`` weight of the target's LM head.
        tokens: ``[M]`` ascending int64 tokens.
        vocabulary: where ``head`` is a shard of it; every rank then keeps the rows of all.
    """

    def __init__(
        self,
        draft: DraftModel,
        head: torch.Tensor,
        tokens: torch.Tensor,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self._draft = draft
        self.tokens = tokens.to(head.device)
        self._vocabulary = vocabulary
        self.renew(head)

    def renew(self, head: torch.Tensor) -> None:
        """Copy the rows again; every rank has to."""
        if self._vocabulary is None:
            weight = head.detach()[self.tokens]
        else:
            weight = self._vocabulary.rows(self.tokens)
        self._dtype = weight.dtype
        self._packed = head.device.type == "cpu" and can_pack(weight)
        self._weight = pack(weight) if self._packed else weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Base logits ``[N, M]`` of draft hidden states ``[N, d]``."""
        given = self._draft.head_input(hidden).to(self._dtype)
        if self._packed:
            return packed_linear(given, self._weight, None)
        return torch.nn.functional.linear(given, self._weight)

    @classmethod
    def beside(
        cls, drafter: Path, draft: DraftModel, vocabulary: Vocabulary | None
    ) -> DraftHead | None:
        """The draft head of a drafter that has a draft vocabulary; None without one.

        None as well, and said in the log, where it cannot be used: a quantised head, or a drafter
        that makes its base logits otherwise.

        Raises:
            ArtifactError: the file is damaged or belongs to another vocabulary.
        """
        path = drafter / DRAFT_VOCAB_FILE
        if not path.is_file():
            return None
        if not draft.reads_target_head:
            logger.warning("%s is not used by %s.", path, type(draft.module).__name__)
            return None
        head = draft.module.lm_head
        artifact = read_draft_vocab(path, vocab_size=int(head.org_vocab_size))
        weight: Any = getattr(head, "weight", None)
        why = ""
        if vocabulary is None and head.tp_size > 1:
            why = "the LM head is sharded with attention data parallelism"
        elif weight is None or not weight.is_floating_point() or weight.element_size() < 2:
            why = "the LM head is quantised"
        elif getattr(head, "bias", None) is not None:
            why = "the LM head has a bias"
        if why:
            logger.warning("%s is not used: %s. Drafting over all tokens.", path, why)
            return None
        return cls(draft, weight, torch.tensor(artifact.tokens), vocabulary)


class DraftSharding(msgspec.Struct, frozen=True):
    """What a rank needs to know of where the drafter lives."""

    draft: DraftModel
    ranks: Ranks
    placement: Placement
    #: None where every rank has the whole LM head.
    vocabulary: Vocabulary | None
    head: DraftHead | None
    #: What the draft forward embeds with; None: as SGLang does.
    embedding: DraftEmbedding | None
    #: Where W1 and the confidence head live, and what this rank has of them; None: all of both.
    heads: Placement = "replicate"
    held: HeldHeads | None = None
    #: Whether this rank keeps the rows of W2 of its own tokens only.
    cuts_w2: bool = True

    @property
    def tokens(self) -> torch.Tensor | None:
        """The draft vocabulary ``[M]``; None for all tokens."""
        return None if self.head is None else self.head.tokens

    @property
    def alone(self) -> bool:
        """Whether one rank drafts for all."""
        return self.placement == "single" and self.ranks.count > 1

    @property
    def drafts(self) -> bool:
        """Whether this rank runs the draft forward."""
        return not self.alone or self.ranks.rank == 0

    def sent(self, states: torch.Tensor) -> torch.Tensor:
        """Draft states ``[N, d]`` of this rank, which the others receive where it drafts for all."""
        return self.ranks.broadcast(states.contiguous(), "states") if self.alone else states

    def received(self, ids: torch.Tensor, gamma: int) -> torch.Tensor:
        """``[R * gamma, d]`` draft states of rank 0, on a rank that does not draft.

        Args:
            ids: ``[R, q]`` int64 rows of the draft forward, whose embedding needs every rank.
        """
        if self.embedding is not None:
            self.embedding(ids)
        shape = (len(ids) * gamma, self.draft.width)
        return self.ranks.broadcast(
            torch.empty(shape, dtype=self.draft.dtype, device=ids.device), "states"
        )

    def renew(self) -> None:
        """Copy again what was copied of the target's weights; every rank has to."""
        if self.head is not None:
            self.head.renew(self.draft.module.lm_head.weight)

    def forget(self, injector: KvInjector) -> None:
        """Free what this rank does not read: rows of W1 and W2, and layers where it does not draft.

        A rank that does not draft writes no draft KV at prefill either.

        The KV pool stays: SGLang gives every rank as many slots as the fullest one. The projection of
        target states stays too: some targets run it themselves.
        """
        self._cut_heads(self.draft.module.markov_head)
        if self.drafts:
            return
        for name, parameter in self.draft.module.named_parameters():
            if name.startswith(self.draft.LAYERS):
                parameter.data = parameter.data.new_empty(0)
        injector.inject_prefill = lambda *args, **kwargs: None

    def _cut_heads(self, markov: Any) -> None:
        if self.vocabulary is None or self.head is not None:  # the draft vocabulary reads any row
            return
        cuts = []
        if self.cuts_w2:
            cuts.append((markov.markov_w2.weight, self.vocabulary.shard))
        if self.held is not None:
            cuts.append((markov.markov_w1.weight, self.held.rows))
        for weight, shard in cuts:
            weight.data = shard.cut(weight.data).clone()


def shard_draft(
    draft: DraftModel,
    ranks: Ranks,
    *,
    folder: Path | None,
    mask: int,
    width: int,
    heads: config.Placement = "replicate",
    lists: bool = False,
) -> DraftSharding:
    """What this rank has; the draft model then embeds with what is found here.

    Args:
        draft: the drafter.
        folder: of the drafter, where its draft vocabulary may be; None: it is not used.
        mask: the mask token.
        width: rows of the draft forward a request.
        heads: where W1 and the confidence head are wanted.
        lists: drafting reads rows of W2 of every rank's tokens, where a rank has the rest of the heads.

    Raises:
        CompatibilityError: an LM head sharded in an unknown way.
        ConfigError: ``heads`` that a draft vocabulary cannot be drafted with.
        ArtifactError: a draft vocabulary that is damaged or of another one.
    """
    vocabulary = Vocabulary.of(draft, ranks)
    embed = draft.module.embed_tokens
    embedding = None
    if vocabulary is not None and int(getattr(embed, "tp_size", 1)) > 1 and draft.embeds_by_module:
        embedding = DraftEmbedding(embed, mask, width, ranks)
        draft.embed_with(embedding)
    head = None if folder is None else DraftHead.beside(folder, draft, vocabulary)
    if vocabulary is None or heads == "auto":
        heads = "replicate"
    elif heads != "replicate" and head is not None:
        raise ConfigError(
            f"DSPARK_HEADS is {heads}, and the drafter has a draft vocabulary.",
            expected="replicate or auto: every rank drafts from all tokens of a draft vocabulary",
            fix="Unset DSPARK_HEADS, or set DSPARK_DRAFT_VOCAB=whole.",
        )
    held = None
    if vocabulary is not None:
        held = held_heads(heads, vocabulary.shard, ranks.count, draft.width)
    return DraftSharding(
        draft=draft,
        ranks=ranks,
        placement=settled() if ranks.count > 1 else "replicate",
        vocabulary=vocabulary,
        head=head,
        embedding=embedding,
        heads=heads,
        held=held,
        cuts_w2=not lists or held is not None,
    )
