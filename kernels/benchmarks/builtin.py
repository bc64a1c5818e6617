"""SGLang's own Markov loop and sampled acceptance, as its CUDA path runs them, on given tensors.

For comparison only: nothing here is served. Callers count what a call moves
(:mod:`benchmarks.moved`) or time it. What is run is SGLang's code, imported from the
installed package, with two substitutions that :func:`interpretable` makes while kernels are
interpreted: the choice between a CPU and a CUDA path is made for CUDA, and ``log1p`` of CUDA's
device library, which the interpreter does not know, is ``log(1 + x)``. Neither changes what is read
or written.

Which code is SGLang's default: the Markov loop keeps every step's logits (a sampled draft); the
acceptance turns the logits of the draft and of the target into probabilities in memory and then
tests them (``AcceptSampling``). With ``SGLANG_OPT_DSV41_BLOCKWISE_REJECTION`` it reads logits by
blocks of the vocabulary instead (``BlockwiseRejection``). Probabilities come from flashinfer where
that is installed; its kernel is CUDA C++, cannot be interpreted and is not counted: the Triton
kernel that SGLang falls back to is: 10 bytes an element of bfloat16 logits, where flashinfer's path
makes a float32 copy (6) that its kernel then reads and answers in float32 (8 or more).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import triton.language as tl
from sglang.kernels.ops.speculative.dspark import (
    blockwise_rejection,
    dspark_accept,
    markov_sample,
)
from sglang.srt.models.dspark import VanillaMarkov
from sglang.srt.speculative.dspark_components import dspark_draft, dspark_verify

_KEY = 7


class Drafted(NamedTuple):
    """What SGLang's Markov loop drafted."""

    #: ``[B, gamma]`` int64.
    tokens: torch.Tensor
    #: ``[B, gamma, V]`` step logits, before temperature.
    logits: torch.Tensor


class Outcome(NamedTuple):
    """What SGLang's acceptance decided, all ``[B]``."""

    kept: torch.Tensor
    token: torch.Tensor
    trimmed: torch.Tensor


class MarkovLoop:
    """SGLang's drafting of a block with a vanilla head, at temperature 1."""

    def __init__(self, w1: torch.Tensor, w2: torch.Tensor, requests: int) -> None:
        """The head's tables ``[V, r]`` on one device, and the most requests of a call."""
        size, rank = w1.shape
        with torch.device("meta"):
            head = VanillaMarkov(vocab_size=size, markov_rank=rank)
        head.markov_w1.weight = torch.nn.Parameter(w1, requires_grad=False)
        head.markov_w2.weight = torch.nn.Parameter(w2, requires_grad=False)
        self._head = head
        self._temperatures = torch.ones(requests, device=w1.device)
        offset = torch.zeros(1, dtype=torch.int64, device=w1.device)
        self._noise = dspark_draft.DraftNoise(key=_KEY, offset=offset)

    def run(self, base: torch.Tensor, anchors: torch.Tensor, logits_out: torch.Tensor) -> Drafted:
        """Draft from base logits ``[B, gamma, V]``; step logits go to ``logits_out``."""
        tokens, logits = dspark_draft.draft_markov_block(
            markov_head=self._head,
            base_logits=base,
            anchor_tokens=anchors,
            draft_hidden=None,
            step_temperatures=self._temperatures[: len(anchors)],
            noise=self._noise,
            tp_sync=_Alone(),
            logits_out=logits_out,
        )
        return Drafted(tokens, logits)


class Acceptance:
    """SGLang's sampled acceptance of drafted blocks at temperature 1, no filters."""

    def __init__(self, candidates: torch.Tensor, target: torch.Tensor, draft: torch.Tensor) -> None:
        """Operands of every call.

        Args:
            candidates: ``[B, gamma + 1]`` int64, the anchor first.
            target: ``[B * (gamma + 1), V]`` logits.
            draft: ``[B, gamma, V]`` step logits that the tokens were drawn from.
        """
        requests, width = candidates.shape
        device = candidates.device
        ones = torch.ones(requests, device=device)
        self._candidates, self._target = candidates, target
        self._width = width
        self._sampling = SimpleNamespace(
            is_all_greedy=False,
            is_any_greedy=False,
            need_top_k_sampling=False,
            need_top_p_sampling=False,
            temperatures=ones[:, None],
        )
        self._draft = dspark_draft.DraftBlockResult(
            draft_tokens=candidates[:, 1:],
            corrected_logits=draft,
            greedy_mask=torch.zeros(requests, dtype=torch.bool, device=device),
            temperatures=ones,
            greedy_draft=False,
        )
        self._noise = blockwise_rejection.make_rejection_noise(_KEY, device)
        # SGLang allocates these once and keeps them.
        dspark_accept._get_or_create_chain_verify_buffers(
            bs=requests, draft_token_num=width, device=device
        )

    def run(self, *, blockwise: bool) -> Outcome:
        """The default, or with ``blockwise`` the opt-in path."""
        found = dspark_verify.accept_draft_tokens(
            candidates=self._candidates,
            target_logits=self._target,
            draft_block=self._draft,
            sampling_info=self._sampling,
            draft_input=cast(Any, None),
            gamma=self._width - 1,
            verify_num_draft_tokens=self._width,
            rejection_noise=self._noise if blockwise else None,
        )
        return Outcome(*found)


class _Alone:
    """Tensor parallelism over one rank: nothing is sent."""

    def sync(self, site: object, values: torch.Tensor) -> torch.Tensor:
        return values


def _on_cuda(*args: object, **kwargs: object) -> bool:
    return True


def _log1p(value: Any) -> Any:
    return tl.log(1.0 + value)


@contextmanager
def interpretable() -> Iterator[None]:
    """Send CPU tensors through SGLang's CUDA path, for Triton's interpreter."""
    replaced = [
        (module, name, value)
        for module in (blockwise_rejection, dspark_accept, markov_sample)
        for name, value in (
            ("inputs_on_cuda", _on_cuda),
            ("libdevice", SimpleNamespace(log1p=_log1p)),
        )
        if hasattr(module, name)
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def path(device: torch.device) -> Any:
    """The context in which calls on a device run: as they are on CUDA, interpretable on the CPU."""
    return nullcontext() if device.type == "cuda" else interpretable()
