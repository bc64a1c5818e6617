"""DeepSeek-V4 on ordinary CPU cores: torch in place of the functions of SGLang that launch kernels.

SGLang's own V4 model, pools, metadata and scheduler run; what they call in the end (a *leaf*) is replaced by
torch that keeps the kernel's contract: same operands, same bytes in the caches, same result up to rounding. One
module a family: ``pages`` (cache formats), ``rotary``, ``attention``, ``indexer``, ``compressor``,
``layers`` (hyper-connections and experts). ``install`` says what replaces what.

Loaded only where the target is a DeepSeek-V4.
"""

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
