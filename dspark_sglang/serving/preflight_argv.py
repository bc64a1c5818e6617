"""Looking at the command line before SGLang does.

SGLang meets a wrong model path deep inside a library and answers with a page of traceback; a path
that is plainly local is checked here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dspark_sglang.checkpoint import read_config

_PATHS = {
    "--model-path": "target",
    "--model": "target",
    "--speculative-draft-model-path": "drafter",
    "--speculative-draft-model": "drafter",
}


def serves_http(argv: Sequence[str]) -> bool:
    """Whether this is SGLang's HTTP server, not an offline engine in somebody's program."""
    return Path(argv[0]).name == "launch_server.py" or "serve" in argv[1:2]


def check(argv: Sequence[str]) -> None:
    """Check the model directories named on the command line.

    Raises:
        CheckpointError: a local path without a readable ``config.json``.
    """
    for position, word in enumerate(argv):
        flag, separator, value = word.partition("=")
        if flag not in _PATHS:
            continue
        if not separator:
            value = argv[position + 1] if position + 1 < len(argv) else ""
        path = Path(value).expanduser()
        if value and (path.is_absolute() or value.startswith(".") or path.exists()):
            read_config(path, role=_PATHS[flag])
