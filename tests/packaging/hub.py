"""A stand-in for the Hugging Face Hub: the requests of ``hf upload`` and ``hf download``.

Git LFS over HTTP (no Xet): create the repository, validate the card, ask which files are
large, upload those by digest, then commit all files as newline-delimited JSON. What the real
Hub would refuse is refused here too: bytes that do not match their digest, a commit of a
large file that never arrived, a request without a token. It can drop connections in the middle
of an upload, as networks do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

_LFS_SUFFIXES = (".safetensors",)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """The state of the hub: files by repository, large objects by digest, requests seen."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.private: dict[str, bool] = {}
        #: Every ``Authorization`` header seen, to search outputs for what was in it.
        self.tokens: set[str] = set()
        #: Uploads to cut off after half of their bytes, by file size; None: none.
        self.drop_larger_than: int | None = None
        self.dropped = 0

    def sha(self) -> str:
        """The head commit, of all repositories alike."""
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    def describe(self, path: str, content: bytes) -> dict[str, Any]:
        """One entry of a tree listing."""
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": _git_oid(content),
        }
        if path.endswith(_LFS_SUFFIXES):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        """Apply a commit.

        Raises:
            ValueError: what the Hub answers with 400.
        """
        files = dict(self.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise ValueError(f"{value['path']} was never uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise ValueError(f"unknown operation {line['key']}")
        self.repos[repo] = files
        self.commits.append(summary)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; failures show in the client's output."""

    def _reply(
        self, status: int, body: object = b"", headers: dict[str, str] | None = None
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        self.hub.tokens.add(str(self.headers.get("Authorization")))
        if self.headers.get("Authorization") is None:
            return self._reply(401, {"error": "a token is needed"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            return self._preupload(match[1], json.loads(body))
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(json.loads(body))
        if path == "/lfs/verify":
            wanted = json.loads(body)
            found = self.hub.objects.get(wanted["oid"])
            ok = found is not None and len(found) == wanted["size"]
            return self._reply(200 if ok else 404, {})
        if re.fullmatch(r"/api/models/(.+)/branch/[^/]+", path):
            return self._reply(200, {})
        if match := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", path):
            try:
                self.hub.commit(match[1], [json.loads(line) for line in body.splitlines()])
            except ValueError as error:
                return self._reply(400, {"error": str(error)})
            oid = self.hub.sha()
            url = f"{self.hub.url}/{match[1]}/commit/{oid}"
            return self._reply(200, {"commitOid": oid, "commitUrl": url, "success": True})
        return self._reply(404, {"error": f"no POST {path}"})

    def do_PUT(self) -> None:
        path = self._path()
        limit, size = self.hub.drop_larger_than, int(self.headers.get("Content-Length") or 0)
        if limit is not None and size > limit:
            self.rfile.read(size // 2)
            self.hub.dropped += 1
            self.close_connection = True
            # Bytes that were not read make the close a reset, as a lost connection is.
            self.connection.close()
            return None
        body = self._body()
        digest = path.removeprefix("/lfs/objects/")
        if hashlib.sha256(body).hexdigest() != digest:
            return self._reply(400, {"error": "digest mismatch"})
        self.hub.objects[digest] = body
        return self._reply(200)

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            files = self.hub.repos.get(match[1])
            if files is None:
                return self._reply(404, {}, {"X-Error-Code": "RepoNotFound"})
            info: dict[str, Any] = {"id": match[1], "sha": self.hub.sha(), "tags": []}
            info["private"] = self.hub.private.get(match[1], False)
            info["siblings"] = [{"rfilename": name} for name in sorted(files)]
            return self._reply(200, info)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.hub.repos[match[1]]
            return self._reply(200, [self.hub.describe(n, c) for n, c in sorted(files.items())])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._resolve(match[1], match[2])
        return self._reply(404, {"error": f"no GET {path}"})

    do_HEAD = do_GET

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'someone'}/{request['name']}"
        known = name in self.hub.repos
        self.hub.repos.setdefault(name, {})
        if not known:
            visibility = request.get("visibility")
            self.hub.private[name] = bool(request.get("private")) or visibility == "private"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        self._reply(409 if known else 200, answer)

    def _validate(self, card: str) -> None:
        match = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
        try:
            meta = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self._reply(400, {"errors": [{"message": str(error)}]})
        warnings = [] if meta else [{"message": "empty or missing yaml metadata"}]
        return self._reply(200, {"errors": [], "warnings": warnings})

    def _preupload(self, repo: str, request: dict[str, Any]) -> None:
        answers = []
        for file in request["files"]:
            large = file["path"].endswith(_LFS_SUFFIXES)
            held = self.hub.repos[repo].get(file["path"])
            oid = None
            if held is not None:
                oid = hashlib.sha256(held).hexdigest() if large else _git_oid(held)
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self._reply(200, {"files": answers})

    def _lfs_batch(self, request: dict[str, Any]) -> None:
        objects = []
        for wanted in request["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/objects/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(answer)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, repo: str, name: str) -> None:
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            return self._reply(404, {}, {"X-Error-Code": "EntryNotFound"})
        entry = self.hub.describe(name, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": self.hub.sha(),
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
        }
        return self._reply(200, content, headers)


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub listening on a free local port until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
