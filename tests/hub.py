"""A Hugging Face Hub on this machine: as much of its HTTP API as uploads and downloads use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"


@dataclass
class Repository:
    """Contents by path, and who may see them."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What was uploaded; `url` is for HF_ENDPOINT, `objects` are large files by SHA-256."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def environment(self, home: object) -> dict[str, str]:
        """For a process that takes this for the Hub; the upload of large files is plain LFS."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }


@contextmanager
def running_hub() -> Iterator[Hub]:
    """An empty Hub on a free port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", path):
            act = self._preupload if match[2] == "preupload" else self._commit
            return act(match[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        return self._json({"error": f"no {path} here"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(\w+)/[^/]+)?(?:/(.+))?", path)
        repository = match and self.hub.repositories.get(match[1])
        if not match or not repository:
            return self._json({}, 404, {"X-Error-Code": "RepoNotFound"})
        if match[2] == "resolve":
            return self._file(repository.files.get(match[3]))
        if match[2] == "tree":
            return self._json([_entry(*item) for item in repository.files.items()])
        siblings = [{"rfilename": name} for name in repository.files]
        info = {"id": match[1], "sha": COMMIT, "private": repository.private, "siblings": siblings}
        return self._json(info)

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return self._json(answer, 409)
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        return self._json(answer)

    def _preupload(self, name: str, body: bytes) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": modes})

    def _batch(self, asked: dict) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        url = f"{self.hub.url}/{name}/commit/{COMMIT}"
        self._json({"commitUrl": url, "commitOid": COMMIT})

    def _file(self, content: bytes | None) -> None:
        if content is None:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: object, status: int = 200, headers: dict | None = None) -> None:
        self._send(status, json.dumps(value).encode(), headers or {})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
