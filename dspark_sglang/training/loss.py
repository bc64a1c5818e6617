"""The training loss over the vocabulary, without ever holding the logits of a batch.

For a row with target law ``p`` and drafted law ``q = softmax(h E^T + z W2^T)``:

    L = ce * -log q(x) + kl * KL(p || q) + tv * ||p - q||_1

Rows are taken a few at a time; their logits, laws and gradients live in cache only, and the
gradients with respect to ``h``, ``z`` and ``W2`` are made on the way (the loss is a sum, so they
are only scaled later). The LM head is applied at sampled positions and nowhere else.

With ``s = sign(q - p)``: dCE = q - 1[x], dKL = q - p, d||p-q||_1 = q (s - <s, q>), all
with respect to the drafted logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

#: Logits of one chunk: on a processor small enough for its caches, on a GPU large enough that
#: reading the head again for every chunk does not count.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}


class Mix(NamedTuple):
    """Weights of the loss terms."""

    ce: float
    kl: float
    tv: float


class Vocabulary(NamedTuple):
    """The tokens the laws are over."""

    #: ``[Vs, d]`` rows of the target's LM head, in the type of the matrix products.
    head: torch.Tensor
    #: ``[Vs]`` int64 token of each row; None: all of them in order.
    tokens: torch.Tensor | None
    #: ``[V]`` int64 row of each token, -1 where it has none; None with ``tokens``.
    rows: torch.Tensor | None
    #: Final logit soft-capping of the target (0: none).
    softcap: float = 0.0
    #: ``[V, d]`` the whole LM head where the target's law is over all tokens and only the drafted
    #: one over these; None: both are.
    outer: torch.Tensor | None = None

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of some tokens; -1 where the vocabulary has none."""
        return tokens if self.rows is None else self.rows[tokens]

    @property
    def width(self) -> int:
        """Tokens that the widest of the laws is over."""
        return (self.head if self.outer is None else self.outer).shape[0]

    def target_log_law(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's law from final hidden states ``[n, d]``.

        Returns:
            Its logarithm ``[n, Vs]`` float32, of mass below 1 where tokens outside this
            vocabulary have some, and ``[n]`` int64 row of the most probable token, -1 outside.
        """
        head = self.head if self.outer is None else self.outer
        logits = (hidden.to(head.dtype) @ head.T).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
        best = logits.max(dim=-1).indices
        if self.outer is not None:
            assert self.tokens is not None
            best = self.labels(best)
            logits = logits.index_select(-1, self.tokens)
        return logits.sub_(log_z), best


def whole(head: torch.Tensor, softcap: float = 0.0) -> Vocabulary:
    """All tokens."""
    return Vocabulary(head, None, None, softcap)


def frequent(
    head: torch.Tensor, counts: torch.Tensor, limit: int, softcap: float = 0.0
) -> Vocabulary:
    """Both laws over the ``limit`` most frequent tokens by ``counts`` ``[V]``; all where that is
    no fewer, or 0."""
    if limit <= 0 or limit >= head.shape[0]:
        return whole(head, softcap)
    return _subset(head, counts.topk(limit).indices.sort().values, softcap)


def drafting(head: torch.Tensor, tokens: torch.Tensor | None, softcap: float = 0.0) -> Vocabulary:
    """The drafted law over ``tokens`` (ascending ``[M]``), the target's over all; None: all."""
    if tokens is None:
        return whole(head, softcap)
    return _subset(head, tokens, softcap)._replace(outer=head)


def _subset(head: torch.Tensor, tokens: torch.Tensor, softcap: float) -> Vocabulary:
    rows = torch.full((head.shape[0],), -1, dtype=torch.int64)
    rows[tokens] = torch.arange(len(tokens))
    chosen = tokens.to(head.device)
    return Vocabulary(head[chosen].contiguous(), chosen, rows.to(head.device), softcap)


class Terms(NamedTuple):
    """The loss and what it is made of; only ``loss`` carries gradients."""

    #: ``[]`` weighted sum over rows.
    loss: torch.Tensor
    #: ``[N]`` overlap ``1 - ½||p - q||_1``: the chance that rejection sampling accepts.
    acceptance: torch.Tensor
    #: ``[N]`` bool: both laws have the same most probable token.
    match: torch.Tensor
    #: ``[N]`` cross-entropy (0 where the label is not in the vocabulary) and KL.
    ce: torch.Tensor
    kl: torch.Tensor


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        latent: torch.Tensor,
        w2: torch.Tensor,
        wanted: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        vocabulary: Vocabulary,
        mix: Mix,
    ) -> tuple[torch.Tensor, ...]:
        head = vocabulary.head
        rows = hidden.shape[0]
        kind = head.dtype
        low, low_latent, low_w2 = hidden.to(kind), latent.to(kind), w2.to(kind)
        grads = (torch.empty_like(low), torch.empty_like(low_latent), torch.zeros_like(w2))
        stats = hidden.new_zeros((5, rows), dtype=torch.float32)
        step = max(1, min(rows, _CHUNK_ELEMENTS[hidden.device.type] // vocabulary.width))
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            target, best = vocabulary.target_log_law(wanted[part])
            drafted = (low[part] @ head.T).float()
            drafted += (low_latent[part] @ low_w2.T).float()
            row_stats, gradient = _rows(target, best, drafted, labels[part], weights[part], mix)
            stats[:, part] = row_stats
            gradient = gradient.to(kind)
            torch.mm(gradient, head, out=grads[0][part])
            torch.mm(gradient, low_w2, out=grads[1][part])
            grads[2].add_((gradient.T @ low_latent[part]).to(w2.dtype))
        ctx.save_for_backward(*grads)
        loss = (stats[0] * weights).sum()
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        scale = grads[0]
        hidden, latent, w2 = ctx.saved_tensors
        made = (hidden.float() * scale, latent.float() * scale, w2 * scale)
        return (*made, None, None, None, None, None)


def _rows(
    target: torch.Tensor,
    best: torch.Tensor,
    drafted: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    mix: Mix,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics ``[5, n]`` of some rows and the gradient ``[n, Vs]`` of the drafted logits.

    ``target`` is a log law, perhaps of less than all mass; the rest lies on tokens that are never
    drafted, where it adds to the distance and nothing to the gradient.
    """
    match = best == drafted.max(dim=-1).indices
    p = target.exp()
    inside = p.sum(-1)
    log_z = torch.logsumexp(drafted, dim=-1, keepdim=True)
    # KL: the sum of p (log p - d), with the drafted normaliser outside.
    kl = (p * (target - drafted)).sum(-1) + inside * log_z.squeeze(-1)
    known = labels >= 0
    at = labels.clamp(min=0)[:, None]
    ce = (log_z - drafted.gather(1, at)).squeeze(-1) * known
    q = drafted.sub_(log_z).exp_()
    gap = q - p
    tv = gap.abs().sum(-1) + (1.0 - inside).clamp(min=0.0)
    sign = gap.sign_()
    lean = (sign * q).sum(-1, keepdim=True)
    # q (mix.tv (s - <s, q>) + ce + kl <p, 1>) - kl p - ce 1[x], all times the row's weight
    scale = weights[:, None]
    ce_scale = mix.ce * known[:, None]
    gradient = sign.sub_(lean).mul_(mix.tv).add_(ce_scale + mix.kl * inside[:, None]).mul_(q)
    if mix.kl:
        gradient.sub_(p, alpha=mix.kl)
    gradient.scatter_add_(1, at, -ce_scale.to(gradient.dtype))
    gradient.mul_(scale)
    loss = mix.ce * ce + mix.kl * kl + mix.tv * tv
    return torch.stack([loss, 1 - 0.5 * tv, match.float(), ce, kl]), gradient


def vocabulary_loss(
    hidden: torch.Tensor,
    latent: torch.Tensor | None,
    w2: torch.Tensor | None,
    wanted: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    *,
    vocabulary: Vocabulary,
    mix: Mix,
) -> Terms:
    """The weighted sum of the loss over rows.

    Args:
        hidden: ``[N, d]`` draft hidden states.
        latent, w2: ``[N, r]`` Markov latents and ``[V, r]`` their projection; None without a head.
        wanted: ``[N, d]`` final hidden states of the target at the same places.
        labels: ``[N]`` int64 tokens that follow.
        weights: ``[N]`` float32 weight of each row.
    """
    if latent is None or w2 is None:
        latent, chosen = hidden.new_zeros((len(hidden), 1)), hidden.new_zeros((1, 1))
        chosen = chosen.expand(vocabulary.head.shape[0], 1)
    else:
        chosen = w2 if vocabulary.tokens is None else w2[vocabulary.tokens]
    loss, stats = _Fused.apply(
        hidden, latent, chosen, wanted, vocabulary.labels(labels), weights, vocabulary, mix
    )
    return Terms(loss, stats[1], stats[2].bool(), stats[3], stats[4])
