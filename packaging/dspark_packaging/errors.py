"""The error of this package."""

from __future__ import annotations

from dspark_sglang.errors import DSparkError


class PackageError(DSparkError):
    """A folder cannot be packaged, or a packaged folder is not what it should be."""
