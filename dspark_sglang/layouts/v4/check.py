"""Being written."""

from pathlib import Path


def check_bundle(directory: Path) -> None:
    """Nothing yet."""
