"""Rendered overlays before a real API server, where ``KUBE_APISERVER_BIN`` names one.

No registry in reach ships the program, so this was never run here: deploy-check says "skipped" without it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tools
import yaml

from dspark_sglang.server import free_ports

_TOKEN = "drill"
_START_S = 60.0


class Api(NamedTuple):
    """A running API server."""

    url: str
    kubectl: str

    def run(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """kubectl against it."""
        command = [
            self.kubectl,
            "--server",
            self.url,
            "--token",
            _TOKEN,
            "--insecure-skip-tls-verify",
        ]
        return subprocess.run(
            [*command, *words], input=given, capture_output=True, text=True, check=False, timeout=60
        )


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[None]:
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, cwd=log.parent
        ) as running,
    ):
        try:
            yield
        finally:
            running.terminate()


@contextlib.contextmanager
def served(kubectl: str) -> Iterator[Api]:
    """etcd and an API server with one user, who may do everything."""
    program = os.environ["KUBE_APISERVER_BIN"]
    client, peer, secure = free_ports(3)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        store, own = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        # PyPI's archive does not say that it can be run.
        etcd = tools.etcd()
        etcd.chmod(0o755)
        stack.enter_context(_process(
            [str(etcd), "--data-dir", str(folder / "etcd"), "--listen-client-urls", store,
             "--advertise-client-urls", store, "--listen-peer-urls", own,
             "--initial-advertise-peer-urls", own, "--initial-cluster", f"default={own}"],
            folder / "etcd.log",
        ))  # fmt: skip
        key = folder / "key.pem"
        subprocess.run(
            ["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True
        )
        (folder / "tokens.csv").write_text(f"{_TOKEN},admin,admin,system:masters\n")
        stack.enter_context(_process(
            [program, "--etcd-servers", store, "--secure-port", str(secure), "--bind-address", "127.0.0.1",
             "--cert-dir", str(folder / "certificates"), "--service-cluster-ip-range", "10.0.0.0/24",
             "--service-account-issuer", "https://kubernetes.default.svc",
             "--service-account-key-file", str(key), "--service-account-signing-key-file", str(key),
             "--authorization-mode", "RBAC", "--disable-admission-plugins", "ServiceAccount",
             "--token-auth-file", str(folder / "tokens.csv")],
            folder / "apiserver.log",
        ))  # fmt: skip
        api = Api(f"https://127.0.0.1:{secure}", kubectl)
        deadline = time.monotonic() + _START_S
        while api.run("get", "--raw", "/readyz").returncode:
            if time.monotonic() > deadline:
                said = (folder / "apiserver.log").read_text(errors="replace")[-400:]
                raise SystemExit(
                    f"deploy-check: {program} is not ready after {_START_S:.0f} s: {said}"
                )
            time.sleep(0.5)
        yield api


def check(api: Api, name: str, docs: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Errors and warnings of an overlay, applied in a namespace of its own; etcd and all go with the server.

    Args:
        docs: of core kinds only: CRDs are not installed.
    """
    made = api.run("create", "namespace", name)
    if made.returncode:
        return [made.stderr.strip()], []
    if not any(_stated_privileged(doc) for doc in docs):
        api.run("label", "namespace", name, "pod-security.kubernetes.io/warn=restricted")
    done = api.run("apply", "--server-side", "-n", name, "-f", "-", given=yaml.safe_dump_all(docs))
    lines = done.stderr.strip().splitlines()
    warnings = [line for line in lines if line.startswith("Warning:")]
    errors = [line for line in lines if line not in warnings] if done.returncode else []
    return errors, warnings


def _stated_privileged(doc: dict[str, Any]) -> bool:
    """Whether pods say that they cannot run at the restricted level."""
    pod = (doc.get("spec") or {}).get("template") or {}
    stated = (pod.get("metadata") or {}).get("annotations") or {}
    return str(stated.get("dspark-sglang/pod-security", "")).startswith("privileged")
