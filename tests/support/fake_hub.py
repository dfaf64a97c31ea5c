"""As much of the Hugging Face hub's HTTP interface as pushing and pulling a vector takes, on this machine.

Written down from what the client asks. Safetensors go by LFS, as on the hub when its client has no Xet; the rest is in
the commit. Anyone may read what is public; writing, and reading what is private, takes the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """Commits by their hash, oldest first, each with all its files; ``sizes`` are told instead of the real ones."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        before = list(self.commits.values())[-1] if self.commits else {}
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid] = before | files
        return oid


@dataclass
class Hub:
    """``asked`` has the method and path of every request."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _route(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, self.path_only))
        for methods, pattern, answer in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, self.path_only)):
                answer(self, *match.groups())
                return
        self._json({"error": f"the fake does not know {self.command} {self.path_only}"}, 501)

    # Answers

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._lets_in():
            return
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(
            name, Repository(asked.get("visibility") == "private" or asked.get("private", False))
        )
        self._json({"url": f"{self.hub.endpoint}/{name}"}, status)

    def _yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, name: str) -> None:
        if self._lets_in():
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(self.body)["files"]
            ]
            self._json({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})

    def _batch(self, name: str) -> None:
        if self._lets_in():
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/blob/{wanted['oid']}"}}}
                for wanted in json.loads(self.body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})

    def _blob(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._json({})

    def _commit(self, name: str) -> None:
        if not self._lets_in():
            return
        files = {}
        for line in self.body.splitlines():
            operation, value = (item := json.loads(line))["key"], item["value"]
            if operation == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = self.hub.repositories[name].commit(files)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid})

    def _info(self, name: str, revision: str | None) -> None:
        if found := self._found(name, revision):
            repository, oid = found
            siblings = [
                {"rfilename": path, "size": repository.sizes.get(path, len(content))}
                for path, content in repository.commits[oid].items()
            ]
            self._json({"id": name, "sha": oid, "private": repository.private, "siblings": siblings})

    def _file(self, name: str, revision: str, path: str) -> None:
        if found := self._found(name, revision):
            repository, oid = found
            content = repository.commits[oid].get(path)
            if content is None:
                self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(content, 200, headers | {"Content-Type": "application/octet-stream"})

    # What answers share

    def _found(self, name: str, revision: str | None) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._trusted()):
            code = "RepoNotFound" if self._trusted() else None
            self._json({"error": "Repository not found"}, 404 if code else 401, {"X-Error-Code": code} if code else {})
            return None
        oid = list(repository.commits)[-1] if revision in (None, "main") else revision
        if oid not in repository.commits:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, oid

    def _trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _lets_in(self) -> bool:
        if not self._trusted():
            self._json({"error": "Invalid username or password."}, 401)
        return self._trusted()

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ({"POST"}, "/api/repos/create", Handler._create),
    ({"POST"}, "/api/validate-yaml", Handler._yaml),
    ({"POST"}, f"/api/models/{NAME}/preupload/main", Handler._preupload),
    ({"POST"}, rf"/{NAME}\.git/info/lfs/objects/batch", Handler._batch),
    ({"PUT"}, r"/blob/(\w+)", Handler._blob),
    ({"POST"}, f"/api/models/{NAME}/commit/main", Handler._commit),
    ({"GET"}, rf"/api/models/{NAME}(?:/revision/(.+))?", Handler._info),
    ({"GET", "HEAD"}, f"/{NAME}/resolve/([^/]+)/(.+)", Handler._file),
)
