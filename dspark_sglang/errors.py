"""Errors a user can act on.

Every message has three parts: what was found, what was expected, and what to do. Pure
code raises these; the command line turns them into one line and exit code 2.
"""

from __future__ import annotations


class DSparkError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, found: str, *, expected: str, fix: str) -> None:
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(f"{found} Expected {expected}. {fix}")


class ConfigError(DSparkError):
    """A setting, flag or environment variable is wrong."""


class CheckpointError(DSparkError):
    """A drafter or target checkpoint is missing, damaged or does not fit."""


class ArtifactError(DSparkError):
    """A calibration or cost artifact is damaged or belongs to something else."""


class CompatibilityError(DSparkError):
    """The installed SGLang is not the one this plugin was checked against."""


class DataError(DSparkError):
    """Training or evaluation data is missing, unusable or cannot be written."""


class NumericsError(DSparkError):
    """A tensor holds values from which no correct token can be drawn."""


class ServerError(DSparkError):
    """The server did not start, stopped, or answered something unusable."""
