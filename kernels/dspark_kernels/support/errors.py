"""The one error an op raises on purpose."""

from __future__ import annotations


class OperandError(ValueError):
    """An operand, or the backend asked for, is not what the op can take.

    Attributes:
        found: what was there, a sentence.
        expected: what should have been there, without a full stop.
        fix: what to do about it, a sentence.
    """

    def __init__(self, found: str, *, expected: str, fix: str) -> None:
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(f"{found} Expected: {expected}. {fix}")
