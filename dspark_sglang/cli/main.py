"""The ``dspark`` command: from the first moment on, an error or an interrupt is one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

#: What a full, read-only or protected disk answers, and a path that cannot be.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM,
         errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)  # fmt: skip


def __getattr__(name: str) -> Any:
    """``app``, which takes seconds to import."""
    if name != "app":
        raise AttributeError(name)
    from dspark_sglang.cli.app import app

    return app


def _terminate(number: int, frame: object) -> None:
    """End like an interrupt, so that what was started is cleaned up."""
    raise SystemExit(128 + number)


def _interrupted(number: int, frame: object) -> None:
    """End at once: nothing was started, and libraries that are being imported may lose an exception."""
    os.write(2, b"dspark: interrupted\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command line; an error a user can act on is one line and exit code 2."""
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # not where a shell has made this process ignore it
        signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _terminate)
    from dspark_sglang.cli.app import app

    signal.signal(signal.SIGINT, interrupt)
    run(app)


def run(command: Callable[[], object]) -> None:
    """Run a command; what it returns is the exit code. A command of a checkout starts here too."""
    from dspark_sglang.errors import DSparkError

    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = command()
    except DSparkError as error:
        _say(str(error))
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in _DISK:
            raise
        _say(
            f"{error.filename or 'A file'} cannot be written: {error.strerror}. Free some space, or name another place."
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("dspark: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if code:
        raise SystemExit(code)


def _say(error: str) -> None:
    print("dspark: error:", " ".join(error.split()), file=sys.stderr)


if __name__ == "__main__":
    main()
