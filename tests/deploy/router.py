"""The overlays' router, run for real with the arguments of its manifest: a rogue worker wants to be registered.

Servers are discovered from a stand-in for the Kubernetes API. The server answers with its key only, the rogue answers
everybody, and both note what arrives. Everything listens on loopback.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml
from manifest_model import Context, Doc, expand
from manifest_network import routes

from dspark_sglang.server import free_ports

KEY, NAMESPACE, MODEL = "key-of-the-check", "llm", "checked-model"
_ASKED, _READY_S, _REGISTER_S = 12, 30.0, 4.0
#: What needs no key in SGLang.
_OPEN = ("/health", "/ready", "/metrics")


class Seen(NamedTuple):
    """A request that arrived."""

    method: str
    path: str
    authorization: str | None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def reply(self, status: int, value: object) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextlib.contextmanager
def _serving(handler: type[_Handler]) -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def _worker(seen: list[Seen], key: str | None) -> type[_Handler]:
    """A server of the model; without a key it answers everybody."""
    answers: dict[str, object] = {
        "/server_info": {"served_model_name": MODEL, "model_path": f"/models/{MODEL}"},
        "/model_info": {"served_model_name": MODEL, "model_path": f"/models/{MODEL}"},
        "/v1/chat/completions": {
            "id": "1", "object": "chat.completion", "created": 1, "model": MODEL,
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": "yes"}}],
        },
    }  # fmt: skip

    class Worker(_Handler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = self.headers.get("Authorization")
            seen.append(Seen(self.command, self.path, said))
            if key and self.path not in _OPEN and said != f"Bearer {key}":
                return self.reply(401, {"error": "Unauthorized"})
            return self.reply(200, answers.get(self.path, {}))

        do_POST = do_GET

    return Worker


def _kubernetes(pods: list[Doc], ended: threading.Event) -> type[_Handler]:
    """Lists the pods of one namespace; its watch never has news."""

    class Kubernetes(_Handler):
        def do_GET(self) -> None:
            if f"/namespaces/{NAMESPACE}/pods" not in self.path:
                return self.reply(404, {"kind": "Status", "code": 404})
            if "watch=true" in self.path:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                ended.wait()
                return None
            found = {"kind": "PodList", "apiVersion": "v1", "items": pods}
            return self.reply(200, found | {"metadata": {"resourceVersion": "1"}})

    return Kubernetes


def _pod(labels: dict[str, str]) -> Doc:
    ready = {"type": "Ready", "status": "True"}
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "server-0", "namespace": NAMESPACE, "uid": "1", "labels": labels},
        "spec": {"containers": []},
        "status": {"phase": "Running", "podIP": "127.0.0.1", "conditions": [ready]},
    }  # fmt: skip


def _kubeconfig(port: int) -> str:
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}
    return yaml.safe_dump(
        {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": [context],
         "users": [{"name": "u", "user": {}}], "current-context": "x"}
    )  # fmt: skip


def router_of(docs: list[Doc]) -> tuple[Doc, dict[str, str]] | None:
    """The router's container and the labels of its pod; None where the rendering has no router."""
    for work in Context(docs, {}, frozenset()).workloads():
        for container in filter(routes, work.pod["containers"]):
            return container, dict(work.labels)
    return None


def _arguments(container: Doc, instance: str, swapped: dict[str, str]) -> list[str]:
    """The manifest's own words as the kubelet expands them; addresses and ports are this machine's."""
    values = {"API_KEY": KEY, "NAMESPACE": NAMESPACE, "INSTANCE": instance}
    words, before = [], ""
    for word in container["args"]:
        words.append(swapped.get(before, expand(word, values)))
        before = word
    return words


def run(python: Path, docs: list[Doc]) -> dict[str, Any]:
    """Start the rendering's router, try to register a rogue without and with a wrong key, then ask as a client.

    Args:
        python: of an environment with sglang-router.
        docs: one rendered overlay that has a router.

    Returns:
        What each request was answered, and what reached whom.
    """
    found = router_of(docs)
    if found is None:
        raise ValueError("the rendering has no router")
    container, labels = found
    instance = labels["app.kubernetes.io/instance"]
    servers: list[Seen] = []
    rogues: list[Seen] = []
    ended = threading.Event()
    pod = _pod({"app.kubernetes.io/component": "server", "app.kubernetes.io/instance": instance})
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(_serving(_worker(servers, KEY)))
        rogue = stack.enter_context(_serving(_worker(rogues, None)))
        kubernetes = stack.enter_context(_serving(_kubernetes([pod], ended)))
        stack.callback(ended.set)
        (folder / "kubeconfig").write_text(_kubeconfig(kubernetes))
        port, metrics = free_ports(2)
        words = _arguments(
            container, instance,
            {"--host": "127.0.0.1", "--port": str(port), "--service-discovery-port": str(server),
             "--prometheus-host": "127.0.0.1", "--prometheus-port": str(metrics)},
        )  # fmt: skip
        log = folder / "router.log"
        environment = {**os.environ, "KUBECONFIG": str(folder / "kubeconfig")}
        with log.open("wb") as stream, subprocess.Popen(
            [str(python), *container["command"][1:], *words],
            stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=folder,
        ) as process:  # fmt: skip
            try:
                answers = _ask(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{rogue}", log)
            finally:
                process.terminate()
        printed = KEY in log.read_text(errors="replace")
    return answers | {
        "asked_servers": sum(seen.path == "/v1/chat/completions" for seen in servers),
        "reached_rogue": len(rogues),
        "key_in_log": printed,
    }


def _ask(url: str, rogue: str, log: Path) -> dict[str, Any]:
    # A connection a request: the router closes idle ones, and what is posted is not posted again.
    fresh = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=url, timeout=10, trust_env=False, limits=fresh) as http:
        deadline = time.monotonic() + _READY_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if http.get("/readiness").status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise RuntimeError(f"the router found no server: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        wrong, right = ({"Authorization": f"Bearer {key}"} for key in ("wrong", KEY))
        body = {"url": rogue}
        registered = {
            "register_without_key": http.post("/workers", json=body).status_code,
            "register_with_wrong_key": http.post("/workers", json=body, headers=wrong).status_code,
        }
        # Registering works in the background: a rogue that got in gets its share of requests now.
        time.sleep(_REGISTER_S)
        model = http.get("/v1/models", headers=right).json()["data"][0]["id"]
        answers = [
            http.post(
                "/v1/chat/completions",
                json={"model": model, "messages": [{"role": "user", "content": f"{n} " * 40}]},
                headers=right,
            ).status_code
            for n in range(_ASKED)
        ]
    return registered | {"model": model, "answered": answers.count(200), "asked": _ASKED}


def faults(found: dict[str, Any]) -> list[str]:
    """What should not have been, of :func:`run`."""
    held = {
        "POST /workers without a key is refused": found["register_without_key"] == 401,
        "POST /workers with a wrong key is refused": found["register_with_wrong_key"] == 401,
        "nothing reaches the rogue": found["reached_rogue"] == 0,
        "the server is discovered with its key": found["model"] == MODEL,
        "the server answers every client": found["asked_servers"] == found["answered"] == _ASKED,
        "the key is not in the log": not found["key_in_log"],
    }
    return [f"router: not so: {what}" for what, holds in held.items() if not holds]
