"""Sizes of a drafter's tensors by part, from the safetensors headers (the weights are not loaded)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from dspark_packaging.shards import Shards
from dspark_sglang.safetensors import Tensor

_GROUPS = (
    ("layers.", "draft layers"),
    ("markov_head.", "Markov head"),
    ("confidence_head.", "confidence head"),
    ("embed_tokens.", "copy of the target's embedding"),
    ("lm_head.", "copy of the target's LM head"),
)
_REST = "context projection and norms"
_STAGE = "mtp."


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors of one part of the drafter."""

    name: str
    parameters: int
    nbytes: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What the weights hold."""

    groups: list[Group]
    dtypes: list[str]

    @property
    def parameters(self) -> int:
        """Stored elements (two 4-bit weights packed in a byte count as one)."""
        return sum(group.parameters for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors (headers excluded)."""
        return sum(group.nbytes for group in self.groups)

    @property
    def element_bytes(self) -> float:
        """Bytes an element, on average."""
        return self.nbytes / self.parameters


def _group(name: str) -> str:
    if name.startswith(_STAGE):
        # mtp.N.<part>: heads and the projection of the context lie in the last and first stage.
        rest = name.split(".", 2)[2]
        special = ("markov_head.", "confidence_head.", "main_", "norm.", "hc_head_")
        name = rest if rest.startswith(special) else "layers." + rest
    short = name.removeprefix("model.")
    return next((group for prefix, group in _GROUPS if short.startswith(prefix)), _REST)


def sizes_of(tensors: Mapping[str, Tensor]) -> Sizes:
    """Elements and bytes by part."""
    totals: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        count, size = totals.get(_group(name), (0, 0))
        totals[_group(name)] = (count + tensor.parameters, size + tensor.nbytes)
    groups = [
        Group(name=name, parameters=totals[name][0], nbytes=totals[name][1])
        for name in [*(group for _, group in _GROUPS), _REST]
        if name in totals
    ]
    return Sizes(groups=groups, dtypes=sorted({tensor.dtype for tensor in tensors.values()}))


def shared_bytes(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Bytes of copies of the target's own modules, which a server need not hold twice."""
    return sum(
        tensor.nbytes
        for name, tensor in tensors
        if name.removeprefix("model.").startswith(("embed_tokens.", "lm_head."))
    )


def read_sizes(shards: Shards) -> Sizes:
    """Elements and bytes of a drafter by part."""
    return sizes_of({name: stored.tensor for name, stored in shards.tensors.items()})
