"""The ways of serving that are compared, each a server of its own on the same target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dspark_sglang.demo.server import Server, serve_command

ModeName = Literal["none", "fixed", "builtin_static", "dspark"]
MODES: tuple[ModeName, ...] = ("none", "fixed", "builtin_static", "dspark")

#: What runs is published at every step, not every 15: a block ends when nothing does.
_TELLS_ITS_LOAD = ("--load-snapshot-publish-interval", "1")


class Mode(NamedTuple):
    """One way of serving."""

    name: ModeName
    speculates: bool
    environment: Mapping[str, str]


_KNOWN: dict[ModeName, Mode] = {
    "none": Mode("none", False, {}),
    # Every drafted token is verified.
    "fixed": Mode("fixed", True, {"DSPARK_SCHEDULE": "all"}),
    # SGLang's own DSPARK, on the same CPU platform.
    "builtin_static": Mode(
        "builtin_static", True, {"DSPARK_PLUGIN": "off", "SGLANG_RAGGED_VERIFY_MODE": "static"}
    ),
    # This plugin as it comes.
    "dspark": Mode("dspark", True, {}),
}


def mode(name: ModeName) -> Mode:
    """The mode of that name."""
    return _KNOWN[name]


def make_server(
    chosen: Mode,
    *,
    target: Path,
    drafter: Path,
    dtype: str,
    port: int,
    requests: int,
    log: Path,
    extra: Sequence[str] = (),
) -> Server:
    """A server of that mode, not started yet.

    Args:
        requests: most requests that will run at once.
        extra: more flags of SGLang.
    """
    flags = ("--max-running-requests", str(requests), *_TELLS_ITS_LOAD, *extra)
    command = serve_command(
        target, port, dtype=dtype, drafter=drafter if chosen.speculates else None, extra=flags
    )
    return Server(command, port=port, log=log, environment=chosen.environment)
