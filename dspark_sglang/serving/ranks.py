"""The ranks of a server: what they exchange, and which part of the vocabulary each holds."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.models.dspark import project_through_lm_head
from sglang.srt.runtime_context import get_parallel

from dspark_sglang.core.sharded import Exchange, Shard, Sum
from dspark_sglang.core.sharded.shard import Result
from dspark_sglang.errors import CompatibilityError
from dspark_sglang.serving.draft_model import DraftModel
from dspark_sglang.serving.telemetry import Telemetry


class Ranks:
    """Collectives over the target's ranks, each counted.

    The group is the target's even inside the draft's narrower context.

    Args:
        group: SGLang's coordinator of the ranks that share the LM head.
    """

    def __init__(self, group: Any, telemetry: Telemetry) -> None:
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


def keep_shards(processor: Any) -> None:
    """Let the target's logits processor leave verification's logits sharded.

    Prefill and plain decoding still gather. What the processor does to single logits (scale, soft cap)
    it does to a shard's.
    """
    original = processor._get_logits

    def get_logits(
        hidden_states: torch.Tensor,
        lm_head: Any,
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

    def __init__(self, embed: Any, mask: int, width: int, ranks: Ranks) -> None:
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
