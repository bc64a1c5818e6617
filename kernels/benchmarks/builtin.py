"""SGLang's own Markov loop and sampled acceptance, as its CUDA path runs them: for comparison, nothing is served.

What is run is the installed package, with two substitutions while kernels are interpreted (:func:`_path`): the
choice between a CPU and a CUDA path is made for CUDA, and ``log1p`` of CUDA's device library, which the
interpreter does not know, is ``log(1 + x)``. Neither changes what is read or written.

Which code is SGLang's default: the Markov loop keeps every step's logits (a sampled draft); the acceptance
turns the logits of the draft and of the target into probabilities in memory and then tests them
(``AcceptSampling``). With ``SGLANG_OPT_DSV41_BLOCKWISE_REJECTION`` it reads logits by blocks of the vocabulary
instead (``BlockwiseRejection``). Probabilities come from flashinfer where that is installed; its kernel is CUDA
C++, cannot be interpreted and is not counted: the Triton kernel that SGLang falls back to is: 10 bytes an element
of bfloat16 logits, where flashinfer's path makes a float32 copy (6) that its kernel then reads and answers in
float32 (8 or more).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import triton.language as tl
from sglang.kernels.ops.speculative.dspark import (
    blockwise_rejection,
    dspark_accept,
    markov_sample,
)
from sglang.srt.models.dspark import VanillaMarkov
from sglang.srt.speculative.dspark_components import dspark_draft, dspark_verify

from benchmarks import ops
from benchmarks.ops import CPU, Example

_KEY = 7
#: The round of :mod:`benchmarks.kernels`; three of its five drafts are kept, as in the ops' examples.
GAMMA, VOCABULARY, RANK, KEPT = 5, 129280, 256, 3


def draft(
    batch: int,
    device: torch.device = CPU,
    *,
    gamma: int = GAMMA,
    columns: int = VOCABULARY,
    rank: int = RANK,
) -> Example:
    """Drafting of a block with a vanilla head, at temperature 1; all requests share one row of base logits."""
    random = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16().to(device)

    base = _spread(2 * normal(gamma, columns), batch)
    with torch.device("meta"):
        head = VanillaMarkov(vocab_size=columns, markov_rank=rank)
    head.markov_w1.weight = torch.nn.Parameter(normal(columns, rank), requires_grad=False)
    w2 = normal(columns, rank) / rank**0.5
    head.markov_w2.weight = torch.nn.Parameter(w2, requires_grad=False)
    offset = torch.zeros(1, dtype=torch.int64, device=device)
    given: dict[str, Any] = {
        "markov_head": head,
        "base_logits": base,
        "anchor_tokens": torch.full((batch,), columns // 2, device=device),
        "draft_hidden": None,
        "step_temperatures": torch.ones(batch, device=device),
        "noise": dspark_draft.DraftNoise(key=_KEY, offset=offset),
        # Tensor parallelism over one rank: nothing is sent.
        "tp_sync": SimpleNamespace(sync=lambda site, values: values),
        "logits_out": torch.empty_like(base),
    }

    def run() -> Any:
        with _path(device), torch.no_grad():
            return dspark_draft.draft_markov_block(**given)

    def max_error(result: tuple[torch.Tensor, torch.Tensor]) -> float:
        tokens, _ = result
        if not bool(((tokens >= 0) & (tokens < columns)).all()):
            raise ArithmeticError(
                f"Drafted {tokens.tolist()}. Expected: tokens in 0..{columns - 1}."
            )
        return 0.0

    return Example(run, max_error)


def accept(
    batch: int,
    device: torch.device = CPU,
    *,
    blockwise: bool = False,
    gamma: int = GAMMA,
    columns: int = VOCABULARY,
    kept: int = KEPT,
) -> Example:
    """Sampled acceptance at temperature 1, without filters: the default, or with ``blockwise`` the opt-in.

    Target distributions are flat but for the drafted token, which is certain to be kept, or not to be.
    """
    steps, width = torch.arange(gamma), gamma + 1
    drafted = columns // 128 * (42 + steps)
    theirs = torch.zeros(gamma, columns)
    theirs[steps, drafted] = math.log(columns)
    target = torch.zeros(width, columns)
    target[steps, drafted] = math.log(columns) + 4.0
    if kept < gamma:
        target[kept, drafted[kept]] = -1e4
    anchor = torch.zeros(1, dtype=torch.int64)
    candidates = _spread(torch.cat([anchor, drafted]).to(device), batch)
    ones = torch.ones(batch, device=device)
    given: dict[str, Any] = {
        "candidates": candidates,
        "target_logits": _spread(target.bfloat16().to(device), batch).flatten(0, 1),
        "draft_block": dspark_draft.DraftBlockResult(
            draft_tokens=candidates[:, 1:],
            corrected_logits=_spread(theirs.bfloat16().to(device), batch),
            greedy_mask=torch.zeros(batch, dtype=torch.bool, device=device),
            temperatures=ones,
            greedy_draft=False,
        ),
        "sampling_info": SimpleNamespace(
            is_all_greedy=False,
            is_any_greedy=False,
            need_top_k_sampling=False,
            need_top_p_sampling=False,
            temperatures=ones[:, None],
        ),
        "draft_input": cast(Any, None),
        "gamma": gamma,
        "verify_num_draft_tokens": width,
        "rejection_noise": None,
    }
    if blockwise:
        given["rejection_noise"] = blockwise_rejection.make_rejection_noise(_KEY, device)
    # SGLang allocates these once and keeps them.
    dspark_accept._get_or_create_chain_verify_buffers(
        bs=batch, draft_token_num=width, device=device
    )

    def run() -> Any:
        with _path(device), torch.no_grad():
            return dspark_verify.accept_draft_tokens(**given)

    def max_error(result: Any) -> float:
        ops.check_equal((result[0],), (torch.tensor([kept], device=device),), "drafts kept")
        return 0.0

    return Example(run, max_error)


#: Parts of the round by name in the summary.
PARTS: dict[str, Callable[..., Example]] = {
    "builtin_draft": draft,
    "builtin_accept": accept,
    "builtin_accept_optin": partial(accept, blockwise=True),
}


def _spread(row: torch.Tensor, batch: int) -> torch.Tensor:
    """One request's tensor for every request of a batch, in memory of its own."""
    return row.expand(batch, *row.shape).contiguous()


def _on_cuda(*args: object, **kwargs: object) -> bool:
    return True


def _log1p(value: Any) -> Any:
    return tl.log(1.0 + value)


@contextmanager
def _path(device: torch.device) -> Iterator[None]:
    """Send CPU tensors through SGLang's CUDA path, for Triton's interpreter; leave CUDA tensors to it."""
    replaced = {"inputs_on_cuda": _on_cuda, "libdevice": SimpleNamespace(log1p=_log1p)}
    with ExitStack() as stack:
        for module in (blockwise_rejection, dspark_accept, markov_sample):
            for name, value in replaced.items() if device.type == "cpu" else ():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, value))
        yield
