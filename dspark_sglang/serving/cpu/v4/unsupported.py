"""What of V4 has no torch form here: a clear error in place of a kernel's."""

from __future__ import annotations

from dspark_sglang.errors import CompatibilityError


def refusal(what: str) -> CompatibilityError:
    """The error for ``what``, a noun phrase."""
    return CompatibilityError(
        f"DeepSeek-V4 reached {what}, which has no torch form on the CPU platform.",
        expected="the paths that serving/cpu/v4 replaces (see its install.py)",
        fix="Remove the option or environment variable that selects it, or serve on a GPU.",
    )


def require(holds: bool, what: str) -> None:
    """Raise :func:`refusal` of ``what`` unless ``holds``."""
    if not holds:
        raise refusal(what)
