"""The LM head over the draft vocabulary: the rows of the target's head that drafting reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, read_draft_vocab
from dspark_sglang.serving.cpu.packing import can_pack, pack, packed_linear
from dspark_sglang.serving.draft_model import DraftModel
from dspark_sglang.serving.ranks import Vocabulary

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
