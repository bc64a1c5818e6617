"""Weights that are no numbers (NaN) or infinite, counted in the pass that hashes them.

A drafter with one of them serves: the target's verification keeps the text right and refuses every draft.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dspark_packaging.errors import PackageError
from dspark_sglang.errors import CheckpointError
from dspark_sglang.safetensors import Header, read_header

#: How to read one element, and the bits that are all set in those that are not finite, by dtype. E4M3 has no
#: infinity, E8M0 no sign and no fraction; FP4 and FP6 have finite values only (OCP Microscaling Formats 1.0).
_MASKS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E8M0": ("u1", 0xFF),
}
_NAMED = 3


class Scan:
    """Reads the bytes of one safetensors file in order, whatever the size of its tensors.

    Args:
        header: of the file.
    """

    def __init__(self, header: Header) -> None:
        #: Values that are not finite, by tensor.
        self.found: dict[str, int] = {}
        self._tensors = sorted(
            (header.start + tensor.data_offsets[0], header.start + tensor.data_offsets[1], name)
            for name, tensor in header.tensors.items()
            if tensor.dtype in _MASKS and tensor.nbytes
        )
        self._dtypes = {name: tensor.dtype for name, tensor in header.tensors.items()}
        self._next = 0
        self._at = 0
        #: The beginning of a value whose end is in the next piece.
        self._rest = b""

    def feed(self, piece: memoryview) -> None:
        """Take the next bytes of the file, the header's included."""
        begin, end = self._at, self._at + len(piece)
        for first, last, name in self._tensors[self._next :]:
            if first >= end:
                break
            self._count(name, piece[max(first, begin) - begin : min(last, end) - begin])
            if last > end:
                break
            self._next += 1
        self._at = end

    def _count(self, name: str, part: memoryview) -> None:
        kind, mask = _MASKS[self._dtypes[name]]
        size = np.dtype(kind).itemsize
        if self._rest:
            missing = size - len(self._rest)
            self._rest += bytes(part[:missing])
            part = part[missing:]
            if len(self._rest) < size:
                return
            self._add(name, np.frombuffer(self._rest, kind), mask)
        whole = len(part) - len(part) % size
        self._rest = bytes(part[whole:])
        if whole:
            self._add(name, np.frombuffer(part[:whole], kind), mask)

    def _add(self, name: str, values: np.ndarray, mask: int) -> None:
        bits = np.bitwise_and(values, values.dtype.type(mask))
        # A maximum is found several times faster than values are counted, and is nearly always enough.
        if int(bits.max()) == mask:
            self.found[name] = self.found.get(name, 0) + int(np.count_nonzero(bits == mask))


def scan_of(path: Path) -> Scan | None:
    """A scan of a weight file; None for other files, and for weights that cannot be read.

    Those are no oversight: opening the package reads every header again and refuses them.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        return Scan(read_header(path))
    except CheckpointError:
        return None


def refuse_not_finite(path: Path, found: dict[str, int]) -> None:
    """Refuse a weight file with values that are not finite.

    Args:
        path: the file.
        found: how many each of its tensors has.

    Raises:
        PackageError: there are some.
    """
    if not found:
        return
    named = ", ".join(f"{count} in {name}" for name, count in sorted(found.items())[:_NAMED])
    more = len(found) - _NAMED
    raise PackageError(
        f"{path} holds NaN or infinite values: {named}"
        + (f", and some in {more} tensors more." if more > 0 else "."),
        expected="finite weights",
        fix="Convert or train it again, or download it again; it would serve, but draft nothing.",
    )
