"""The LM head over the draft vocabulary: the rows of the target's head that drafting reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from sglang.srt.models.dspark import DSparkDraftMixin

from dspark_sglang.artifacts import DRAFT_VOCAB_FILE, read_draft_vocab
from dspark_sglang.serving.cpu.packing import can_pack, pack, packed_linear
from dspark_sglang.serving.ranks import Vocabulary

logger = logging.getLogger(__name__)


class DraftHead:
    """A copy of some rows of the target's LM head, made again when that is updated.

    Args:
        head: ``[V, d]`` weight of the target's LM head.
        tokens: ``[M]`` ascending int64 tokens.
        vocabulary: where ``head`` is a shard of it; every rank then keeps the rows of all.
    """

    def __init__(
        self, head: torch.Tensor, tokens: torch.Tensor, vocabulary: Vocabulary | None = None
    ) -> None:
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
        if self._packed:
            return packed_linear(hidden.to(self._dtype), self._weight, None)
        return torch.nn.functional.linear(hidden.to(self._dtype), self._weight)

    @classmethod
    def beside(cls, drafter: Path, model: Any, vocabulary: Vocabulary | None) -> DraftHead | None:
        """The draft head of a drafter that has a draft vocabulary; None without one.

        None as well, and said in the log, where it cannot be used: a quantised head, or a drafter
        that makes its base logits otherwise.

        Raises:
            ArtifactError: the file is damaged or belongs to another vocabulary.
        """
        path = drafter / DRAFT_VOCAB_FILE
        if not path.is_file():
            return None
        if type(model).compute_base_logits is not DSparkDraftMixin.compute_base_logits:
            logger.warning("%s is not used by %s.", path, type(model).__name__)
            return None
        head = model.lm_head
        artifact = read_draft_vocab(path, vocab_size=int(head.org_vocab_size))
        weight: Any = getattr(head, "weight", None)
        why = ""
        if vocabulary is None and head.tp_size > 1:
            why = "the LM head is sharded with attention data parallelism"
        elif weight is None or not weight.is_floating_point() or weight.element_size() < 2:
            why = "the LM head is quantised"
        elif getattr(head, "bias", None) is not None or model.logits_mup_width_multiplier:
            why = "the LM head has a bias or a multiplier"
        if why:
            logger.warning("%s is not used: %s. Drafting over all tokens.", path, why)
            return None
        return cls(weight, torch.tensor(artifact.tokens), vocabulary)
