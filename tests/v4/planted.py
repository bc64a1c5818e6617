"""Mistakes planted in the reference: a comparison with it must notice every one.

Each is a small change of one :class:`~dspark_sglang.layouts.v4.reference.Reference`, undone at the end of a
``with``. One that moves nothing would show that the comparison does not look at that part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from dspark_sglang.layouts.v4.reference import Reference

Mistake = Callable[[Reference], AbstractContextManager[None]]


class Gaps(NamedTuple):
    """How far log-probabilities of a text's own tokens are from the reference's."""

    largest: float
    mean: float
    #: Rows whose most likely token is the same; None where none were given.
    argmax_equal: int | None
    #: Rows compared.
    count: int


def gaps(
    reference: Reference,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    best: Sequence[int] | None = None,
    *,
    first: int = 0,
) -> Gaps:
    """Compare with a server's log-probabilities of a prompt.

    Args:
        reference: exact, or with a mistake in it.
        tokens: ``[n]`` ids of the prompt.
        logprobs: ``[n - 1]``, of ``tokens[1:]`` (SGLang's first entry, None, left out).
        best: ``[n - 1]`` most likely tokens of the same rows, where the server told them.
        first: row from which they are compared.
    """
    if len(logprobs) != len(tokens) - 1 or (best is not None and len(best) != len(logprobs)):
        raise ValueError(f"{len(logprobs)} log-probabilities of {len(tokens)} tokens")
    rows = reference(tokens).logprobs()[first:-1].double()
    own = rows.gather(1, torch.tensor(tokens[first + 1 :])[:, None])[:, 0]
    apart = (own - torch.tensor(logprobs[first:], dtype=torch.float64)).abs()
    same = None if best is None else int((rows.argmax(dim=1) == torch.tensor(best[first:])).sum())
    return Gaps(float(apart.max()), float(apart.mean()), same, len(apart))


def _set(**changes: Any) -> Mistake:
    """Fields of :class:`TargetShape` changed."""

    @contextmanager
    def planted(reference: Reference) -> Iterator[None]:
        with patch.object(reference, "shape", replace(reference.shape, **changes)):
            yield

    return planted


def _layer(**changes: Any) -> Mistake:
    """Fields that all layers share changed."""

    @contextmanager
    def planted(reference: Reference) -> Iterator[None]:
        shape = reference.shape
        wrong = replace(shape, layer=replace(shape.layer, **changes))
        with patch.object(reference, "shape", wrong):
            yield

    return planted


def _filled(ending: str, value: float) -> Mistake:
    """Tensors whose names end so hold one value."""

    @contextmanager
    def planted(reference: Reference) -> Iterator[None]:
        wrong = {
            name: torch.full_like(tensor, value) if name.endswith(ending) else tensor
            for name, tensor in reference.tensors.items()
        }
        with patch.object(reference, "tensors", wrong):
            yield

    return planted


def _method(name: str, make: Callable[[Any], Callable[..., torch.Tensor]]) -> Mistake:
    """A method replaced by what ``make`` makes of it."""

    @contextmanager
    def planted(reference: Reference) -> Iterator[None]:
        with patch.object(reference, name, make(getattr(reference, name))):
            yield

    return planted


def _late(exact: Any) -> Callable[..., torch.Tensor]:
    """Every block's place holds the block before."""

    def compressed(x: Any, prefix: str, ratio: int, speeds: Any) -> torch.Tensor:
        made: torch.Tensor = exact(x, prefix, ratio, speeds)
        return made.roll(1, 0)

    return compressed


@contextmanager
def _own_theta(reference: Reference) -> Iterator[None]:
    """Compressed layers turn as the others, still stretched."""
    with _set(compress_theta=reference.shape.layer.rope_theta)(reference):
        yield


@contextmanager
def _not_hashed(reference: Reference) -> Iterator[None]:
    """Hashed layers are routed by score."""
    shape = reference.shape
    sizes, like = shape.layer, reference.tensors["embed.weight"]
    none = {f"layers.{i}.ffn.gate.bias": like.new_zeros(sizes.experts) for i in range(shape.hashed)}
    with (
        patch.object(reference, "tensors", reference.tensors | none),
        patch.object(reference, "shape", replace(shape, hashed=0)),
    ):
        yield


@contextmanager
def _not_rounded(reference: Reference) -> Iterator[None]:
    with patch.object(reference, "rounding", replace(reference.rounding, kv=False)):
        yield


#: Name to mistake. ``BEYOND_TOP_K`` shows only in prompts in which an indexer leaves blocks out.
MISTAKES: Mapping[str, Mistake] = MappingProxyType(
    {
        "window 127": _layer(window=127),
        "no sink": _filled("attn_sink", -1e9),
        "compressed blocks one late": _method("compressed", _late),
        "no YaRN": _set(yarn=None),
        "one Sinkhorn iteration": _layer(sinkhorn_iters=1),
        "no routing bias": _filled("gate.bias", 0.0),
        "route scale 1": _layer(route_scale=1.0),
        "hashed layers routed by score": _not_hashed,
        "no position bias in compressors": _filled(".ape", 0.0),
        "KV not rounded": _not_rounded,
        "compressed layers turn by rope_theta": _own_theta,
        "clamp of SwiGLU dropped": _layer(swiglu_limit=None),
        "output not turned back": _method("turn_back", lambda _: lambda out, *_: out),
        "indexer without ReLU": _method("rectified", lambda _: lambda products: products),
    }
)
BEYOND_TOP_K = frozenset({"indexer without ReLU"})
