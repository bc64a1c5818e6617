"""What :func:`dspark_kernels.accept.accept` takes and returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """The target's logits and the drafted tokens they judge; all on one device.

    Request ``r`` owns rows ``first[r] .. first[r] + lens[r]``; row ``first[r] + j`` is the target's
    law after the first ``j`` drafted tokens. Rows that no request owns are never read.
    """

    #: ``[N, V]`` bfloat16 or float32, rows contiguous, any row stride.
    logits: torch.Tensor
    #: ``[R]`` int32 or int64.
    first: torch.Tensor
    #: ``[R]`` int32 or int64 in 0..gamma; -1: a padded request, whose outcome is count 0 and token 0.
    lens: torch.Tensor
    #: ``[R, gamma]`` int64, gamma at least 1.
    drafted: torch.Tensor


class DenseDraft(NamedTuple):
    """Drafted laws over the whole vocabulary: ``q = exp(logits / T - lse)``."""

    #: ``[R, gamma, V]`` bfloat16 or float32.
    logits: torch.Tensor
    #: ``[R, gamma]`` float32 natural log-sum-exp of ``logits / T``, ``T`` the request's temperature;
    #: not finite where a logit is NaN or ``+inf`` or all are ``-inf``.
    lse: torch.Tensor


class ListedDraft(NamedTuple):
    """Drafted laws over ``M`` tokens a position; every other token has probability 0."""

    #: ``[R, gamma, M]`` float32, each row of sum 1.
    probs: torch.Tensor
    #: ``[R, gamma, M]`` int64, unique in a row, padded with -1.
    tokens: torch.Tensor


class Filters(NamedTuple):
    """Filters of every request. All refer to the unfiltered law, as in SGLang's ``pytorch`` backend."""

    #: ``[R]`` int32, at least 1; ``V`` or more filters nothing.
    top_k: torch.Tensor
    #: ``[R]`` float32 in (0, 1]; 1 filters nothing.
    top_p: torch.Tensor
    #: ``[R]`` float32 in [0, 1]; 0 filters nothing.
    min_p: torch.Tensor


class Keys(NamedTuple):
    """Keys of coupled draws."""

    #: ``[R]`` int64.
    seeds: torch.Tensor
    #: ``[R]`` int64 position of the request's anchor; row ``j`` draws with ``positions + j``.
    positions: torch.Tensor
    #: ``[R]`` int32, nonzero where the request is coupled.
    coupled: torch.Tensor


class Adjustments(NamedTuple):
    """What plain decoding does to logits before it samples; ``n`` listed tokens a request.

    The drafted tokens before a row count as output, whether they are listed or not.
    """

    #: ``[R, n]`` int64, unique in a row, padded with -1: tokens of the output, with a bias, or that stop.
    tokens: torch.Tensor
    #: ``[R, n]`` int32 occurrences of each in the output so far.
    counts: torch.Tensor
    #: ``[R, n]`` float32 added to its logit.
    bias: torch.Tensor
    #: ``[R, n]`` int32, nonzero where it is a stop token.
    stops: torch.Tensor
    #: ``[R]`` float32.
    frequency: torch.Tensor
    #: ``[R]`` float32.
    presence: torch.Tensor
    #: ``[R]`` float32; 1 changes nothing.
    repetition: torch.Tensor
    #: ``[R]`` int32.
    min_new_tokens: torch.Tensor
    #: ``[R]`` int32 tokens of the output so far.
    lengths: torch.Tensor


class Accepted(NamedTuple):
    """The outcome of one round."""

    #: ``[R]`` int32 drafted tokens kept; int64 where such a tensor was given to write to.
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count
    #: ``[R]`` int64 the token after them (correction or bonus), or -1: a sampled or coupled request
    #: came to a row without a law (see :func:`dspark_kernels.accept.accept`).
    token: torch.Tensor
    #: ``[R]`` int32: 0 good; 2 rows outside ``logits``, more drafted tokens than gamma, or a drafted
    #: token outside the vocabulary. With 2 count and token are 0 and must not be used.
    flag: torch.Tensor
