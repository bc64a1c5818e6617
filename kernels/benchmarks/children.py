"""Work done in a Python of its own: with Triton's interpreter, or without it.

Triton decides whether a kernel is interpreted when its module is imported, so one process can do
one or the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from dspark_sglang.errors import DSparkError

_VARIABLE = "TRITON_INTERPRET"
#: Marks a line of a child's output as a result; libraries print lines of their own.
_RESULT = "dspark-result "


class MeasurementError(DSparkError):
    """A kernel could not be compiled, run or counted."""


def results(function: str, *arguments: str, interpret: bool) -> Iterator[Any]:
    """What a generator function yields in a child process, as JSON, while it runs.

    Args:
        function: ``package.module.name``.
        arguments: texts handed to it.
        interpret: whether Triton's interpreter is on.

    Raises:
        MeasurementError: the child failed.
    """
    module, _, name = function.rpartition(".")
    environment = {**os.environ}
    environment.pop(_VARIABLE, None)
    if interpret:
        environment[_VARIABLE] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    code = (
        f"import json; from {module} import {name}\n"
        f"for found in {name}(*{arguments!r}):\n"
        f"    print({_RESULT!r} + json.dumps(found), flush=True)\n"
    )
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(_RESULT):
                    yield json.loads(line.removeprefix(_RESULT))
            failed = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if failed:
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["it said nothing"]
            raise MeasurementError(
                f"{name}({', '.join(arguments)}) ended with code {failed}: {said[-1]}",
                expected="exit code 0",
                fix=f"Run it alone to see the whole error: "
                f"{_VARIABLE + '=1 ' if interpret else ''}python -c "
                f"'from {module} import {name}; print(list({name}{arguments!r}))'",
            )
