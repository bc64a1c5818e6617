"""The exact output distribution of plain decoding, from the target's own logits.

Independent of the plugin and of SGLang: logits from transformers, and the semantics of SGLang's
``pytorch`` sampling backend written out here (``srt/layers/sampler.py``,
``srt/sampling/sampling_batch_info.py`` and ``srt/sampling/penaltylib``): penalties, grammar mask,
logit bias, temperature, softmax, then top-k, top-p and min-p against the unfiltered distribution.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tests.exactness.options import REGEX, REGEX_PREFIX, ends, text_of
from tests.tiny_models import EOS, SPECIAL, VOCABULARY

Output = tuple[int, ...]
#: A context whose filter threshold is closer than this (relative) to a token's probability is
#: decided by float32 rounding; it is not looked into.
AMBIGUOUS = 1e-4
_KNOWN = {
    *("temperature", "top_k", "top_p", "min_p", "logit_bias", "regex"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"),
    *("stop", "stop_token_ids", "ignore_eos", "max_new_tokens"),
}


class NextLogits(Protocol):
    """The model: logits after outputs of equal length."""

    def __call__(self, outputs: Sequence[Output]) -> torch.Tensor:
        """``[N, V]`` float64 logits after each of ``N`` outputs behind the prompt."""


class Model:
    """A Hugging Face causal language model behind one prompt, in float64 where it computes in it."""

    def __init__(self, directory: Path, prompt: Sequence[int], *, rows: int = 1024) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        self._model.eval()
        self._prompt = tuple(prompt)
        self._rows = rows

    @torch.inference_mode()
    def __call__(self, outputs: Sequence[Output]) -> torch.Tensor:
        """Logits ``[N, V]`` after outputs of equal length."""
        tokens = torch.tensor([self._prompt + output for output in outputs])
        parts = [
            self._model(input_ids=part, use_cache=False, logits_to_keep=1).logits[:, -1].double()
            for part in torch.split(tokens, self._rows)
        ]
        return torch.cat(parts)


def adjust(logits: torch.Tensor, outputs: Sequence[Output], params: Mapping[str, Any]) -> None:
    """What plain decoding does to logits before the temperature, in place.

    Args:
        logits: ``[N, V]`` float64.
        outputs: ``N`` outputs so far.
    """
    size = logits.shape[1]
    for row, output in zip(logits, outputs, strict=True):
        times = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=size)
        row -= params.get("frequency_penalty", 0.0) * times
        row -= params.get("presence_penalty", 0.0) * (times > 0)
        repetition = params.get("repetition_penalty", 1.0)
        scaled = torch.where(row < 0, row * repetition, row / repetition)
        row.copy_(torch.where(times > 0, scaled, row))
        if len(output) < params.get("min_new_tokens", 0):
            row[sorted({EOS, *params.get("stop_token_ids", ())})] = float("-inf")
        if "regex" in params:
            row[~allowed(text_of(output), size)] = float("-inf")
    for token, bias in params.get("logit_bias", {}).items():
        logits[:, int(token)] += bias


def allowed(text: str, size: int = len(VOCABULARY)) -> torch.Tensor:
    """``[V]`` bool: which of ``size`` tokens the grammar allows after ``text``; no special ones but the end."""
    possible = [
        len(SPECIAL) <= token < len(VOCABULARY)
        and REGEX_PREFIX.fullmatch(text + VOCABULARY[token]) is not None
        for token in range(size)
    ]
    possible[EOS] = re.fullmatch(REGEX, text) is not None
    return torch.tensor(possible)


def filtered(
    distribution: torch.Tensor, params: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top-k, top-p and min-p, all against the unfiltered distribution.

    Args:
        distribution: ``[N, V]`` probabilities.

    Returns:
        ``[N, V]`` normalised probabilities, and ``[N]`` relative distance of each row's nearest
        threshold from a probability (infinite without filters).
    """
    ordered, index = distribution.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(distribution.shape[1])
    top_k, top_p, min_p = (
        params.get(n, d) for n, d in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    )
    keep = torch.ones_like(ordered, dtype=torch.bool)
    margin = distribution.new_full((len(distribution),), float("inf"))
    if top_k:
        keep &= rank < top_k
        margin = torch.minimum(margin, ordered[:, top_k - 1] / ordered[:, top_k] - 1.0)
    if top_p < 1.0:
        keep &= before <= top_p
        margin = torch.minimum(margin, (before - top_p).abs().min(dim=-1).values)
    if min_p > 0.0:
        keep &= ordered >= min_p * ordered[:, :1]
        ratio = ordered / (min_p * ordered[:, :1])
        margin = torch.minimum(margin, (ratio - 1.0).abs().min(dim=-1).values)
    kept = torch.zeros_like(distribution).scatter_(-1, index, ordered * keep)
    return kept / kept.sum(-1, keepdim=True), margin


class Distribution:
    """Next-token distributions of one request, each context computed once.

    Args:
        model: the target.
        params: SGLang's sampling parameters, ``max_new_tokens`` included.
    """

    def __init__(self, model: NextLogits, params: Mapping[str, Any]) -> None:
        unknown = set(params) - _KNOWN
        assert not unknown, f"no distribution for {sorted(unknown)}"
        self.params = dict(params)
        self._model = model
        self._known: dict[Output, tuple[torch.Tensor, bool]] = {}

    def ends(self, output: Output) -> bool:
        """Whether the request stops at ``output``."""
        return ends(self.params, output)

    def learn(self, outputs: Iterable[Output]) -> None:
        """Compute the distributions after many outputs at once."""
        by_length: dict[int, list[Output]] = {}
        for output in dict.fromkeys(outputs):
            if output not in self._known:
                by_length.setdefault(len(output), []).append(output)
        for group in by_length.values():
            logits = self._model(group).clone()
            adjust(logits, group, self.params)
            distribution = torch.softmax(logits / self.params.get("temperature", 1.0), dim=-1)
            kept, margin = filtered(distribution, self.params)
            for output, row, near in zip(group, kept, margin.tolist(), strict=True):
                self._known[output] = row, near < AMBIGUOUS

    def after(self, output: Output) -> torch.Tensor:
        """``[V]`` distribution of the token after ``output``."""
        self.learn([output])
        return self._known[output][0]

    def ambiguous(self, output: Output) -> bool:
        """Whether rounding decides what the filters keep after ``output``."""
        self.learn([output])
        return self._known[output][1]

    def impossible(self, outputs: Iterable[Output]) -> list[Output]:
        """Those of ``outputs`` that plain decoding never gives: a token of probability 0, a stop
        that was run over, or an end where nothing ends it."""
        given = list(outputs)
        self.learn(output[:n] for output in given for n in range(len(output)))
        return [output for output in given if not self._possible(output)]

    def _possible(self, output: Output) -> bool:
        if not self.ends(output):
            return False
        for length, token in enumerate(output):
            context = output[:length]
            if self.ends(context):
                return False
            distribution, near = self._known[context]
            if not near and float(distribution[token]) <= 0.0:
                return False
        return True
