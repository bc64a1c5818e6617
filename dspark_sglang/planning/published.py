"""Configurations of published models, so that a plan needs no download."""

from __future__ import annotations

from importlib import resources
from typing import Any

import msgspec


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"origin": "from"}):
    """Some values of a configuration and how they are known."""

    origin: str
    config: dict[str, Any]


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint's name on the Hub and what a plan reads of its configuration."""

    checkpoint: str
    sources: list[Source]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, put together."""
        return {key: value for source in self.sources for key, value in source.config.items()}


def names() -> list[str]:
    """Names that can stand in place of a model directory."""
    folder = resources.files(__package__).joinpath("models")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir())


def find(name: str) -> Published | None:
    """The published model called ``name``; None where there is none."""
    if name not in names():
        return None
    path = resources.files(__package__).joinpath("models", f"{name}.yaml")
    return msgspec.yaml.decode(path.read_bytes(), type=Published)
