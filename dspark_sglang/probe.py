"""Start-up probe: exit code 0 once a server is ready *and* runs this plugin.

``python -m dspark_sglang.probe --port 30000``. SGLang is also ready with its builtin algorithm, since it
swallows a plugin that fails, so ``/ready`` alone does not say enough. Where ``DSPARK_PLUGIN=off`` asks for the
builtin, DSPARK itself has to run. Imports little, for a kubelet starts it every few seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from typing import Any

from dspark_sglang.config import read_api_key, read_settings
from dspark_sglang.errors import DSparkError

#: Below the probe's own timeout in deploy/base.
_TIMEOUT_S = 4.0


def judge(info: dict[str, Any], *, builtin: bool) -> str | None:
    """What is wrong with a server that answers ``/server_info`` like this; None: nothing."""
    algorithm = str(info.get("speculative_algorithm")).upper()
    if algorithm != "DSPARK":
        return f"speculative_algorithm is {algorithm}, not DSPARK"
    if builtin:
        return None
    record = (info.get("internal_states") or [{}])[0].get("dspark_info_record")
    if not isinstance(record, dict) or not record.get("active"):
        return "SGLang's builtin DSPARK runs, not this plugin: run `dspark doctor` in the container"
    return None


def _get(url: str, key: str | None) -> bytes:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return bytes(answer.read())


def main() -> int:
    """Probe the server on this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=30000, help="The server's port")
    url = f"http://127.0.0.1:{parser.parse_args().port}"
    try:
        builtin = read_settings().plugin == "off"
        _get(f"{url}/ready", None)
        wrong = judge(json.loads(_get(f"{url}/server_info", read_api_key())), builtin=builtin)
    except (DSparkError, OSError, ValueError, urllib.error.URLError) as error:
        wrong = str(error)
    if wrong:
        print(f"dspark: not ready: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
