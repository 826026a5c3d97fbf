"""A small Hugging Face hub on this machine, which speaks as much of its HTTP as pushing and pulling take.

Small files come from the hub itself, under git's digest; large ones (LFS) are redirected to another host, which takes
ranges and refuses whoever shows it a token, as the real one's storage does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".gguf", ".bin")
TOKEN = "hf_notforeveryoneseyes"


@dataclass
class Model:
    """A repository: its commits by their revisions, each of them files by name."""

    commits: dict[str, dict[str, bytes]]
    gated: bool = False
    licence: str = "mit"
    lies: dict[str, bytes] = field(default_factory=dict)
    """What is sent in place of a file."""
    digests: dict[str, str] = field(default_factory=dict)
    """What is said of a file's digest in place of it."""

    def commit(self, revision: str) -> str | None:
        """The hash of a revision, a hash being one of itself."""
        hashes = {name: self._hash(files) for name, files in self.commits.items()}
        return revision if revision in hashes.values() else hashes.get(revision)

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.commit(revision)
        return next(files for files in self.commits.values() if self._hash(files) == commit)

    @staticmethod
    def _hash(files: dict[str, bytes]) -> str:
        return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


@dataclass
class Hub:
    """What it has and what happened to it: the repositories made and the files of each push, requests, tokens."""

    url: str = ""
    storage: str = ""
    made: list[dict[str, object]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    pushes: list[dict[str, bytes]] = field(default_factory=list)
    """All files after each push, and the push that each tag names, from 1."""
    tags: dict[str, str] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refusal: int | None = None
    models: dict[str, Model] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Paths asked of the hub."""
    fetched: list[tuple[str, str | None]] = field(default_factory=list)
    """Large files asked of the storage, by name, with the range."""
    stall_after: int | None = None
    """Bytes of a large file after which the storage falls silent, until `go_on` is set."""
    go_on: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, directory: Path, revision: str = "main", **about: object) -> Model:
        """Put the files of a directory, or one file, under a name."""
        paths = [directory] if directory.is_file() else [path for path in directory.rglob("*") if path.is_file()]
        root = directory.parent if directory.is_file() else directory
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
        model = self.models.setdefault(name, Model({}))
        model.commits[revision] = model.commits.get(revision, {}) | files
        for key, value in about.items():
            setattr(model, key, value)
        return model


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class _HubHandler(_Handler):
    def do_POST(self) -> None:
        hub = self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refusal is not None:
            # As a proxy might, it repeats what it was sent.
            return self.answer({"error": f"no room for {self.headers['Authorization']}"}, hub.refusal)
        if self.path == "/api/repos/create":
            hub.made.append(json.loads(body))
            return self.answer({"url": f"{hub.url}/somebody/model"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [file | how for file in json.loads(body)["files"]]})
        if self.path.startswith("/api/models/somebody/model/tag/"):
            hub.tags[json.loads(body)["tag"]] = unquote(self.path.rpartition("/")[2])
            return self.answer({})
        assert self.path == "/api/models/somebody/model/commit/main", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        hub.pushes.append(dict(hub.files))
        number = len(hub.pushes)
        return self.answer({"commitUrl": f"{hub.url}/somebody/model/commit/{number}", "commitOid": str(number)})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if not path.startswith("/api/models/") and "/resolve/" not in path:
            return self.answer({"error": "Sorry, we can't find the page you are looking for."}, 404)
        hub.asked.append(path)
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refusal is not None:
            return self.answer({"error": "out of order"}, hub.refusal)
        parts = path.strip("/").split("/")
        if parts[4:5] == ["tree"]:
            # What a push looks at first.
            pushed = hub.files.items()
            return self.answer([{"type": "file", "path": name, "oid": "1", "size": len(each)} for name, each in pushed])
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
        else:
            name, revision = "/".join(parts[:2]), parts[3]
        model = hub.models.get(name)
        if model is None:
            return self.refuse("RepoNotFound", "Repository not found", 401)
        if model.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}" and parts[0] != "api":
            return self.refuse("GatedRepo", f"Access to model {name} is restricted", 401)
        commit = model.commit(revision)
        if commit is None:
            return self.refuse("RevisionNotFound", "Invalid rev id", 404)
        if parts[0] == "api":
            return self.answer(self.described(name, model, commit))
        return self.file(model, commit, "/".join(parts[4:]))

    def refuse(self, code: str, message: str, status: int) -> None:
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def described(self, name: str, model: Model, commit: str) -> dict[str, object]:
        siblings = []
        for file, content in sorted(model.files(commit).items()):
            described: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": _git_sha1(content)}
            if file.endswith(LARGE):
                digest = model.digests.get(file, hashlib.sha256(content).hexdigest())
                described["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(described)
        return {
            "_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False,
            "downloads": 0, "gated": "manual" if model.gated else False, "likes": 0,
            "tags": [f"license:{model.licence}"],
            "cardData": {"license": model.licence},
        }  # fmt: skip

    def file(self, model: Model, commit: str, file: str) -> None:
        files = model.files(commit)
        if file not in files:
            return self.refuse("EntryNotFound", "Entry not found", 404)
        content = files[file]
        common = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            headers = {
                "Location": f"{self.hub.storage}/{digest}?name={file}&Signature=1",
                "X-Linked-Size": str(len(content)),
            }
            return self.answer(b"", 302, common | headers | {"X-Linked-Etag": f'"{digest}"', "ETag": '"pointer"'})
        return self.answer(model.lies.get(file, content), headers=common | {"ETag": f'"{_git_sha1(content)}"'})


class _StorageHandler(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        parts = urlsplit(self.path)
        file = parts.query.split("&")[0].removeprefix("name=")
        if self.headers.get("Authorization"):
            return self.answer({"error": "only one way to authenticate"}, 400)
        found = [
            model.lies.get(name, content)
            for model in hub.models.values()
            for files in model.commits.values()
            for name, content in files.items()
            if hashlib.sha256(content).hexdigest() == parts.path.strip("/")
        ]
        if not found:
            return self.answer({"error": "no such key"}, 404)
        content, asked = found[0], self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        hub.fetched.append((file, asked))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if hub.stall_after is not None and not hub.go_on.is_set():
            self.wfile.write(content[start : hub.stall_after])
            self.wfile.flush()
            hub.go_on.wait(60)
            start = hub.stall_after
        try:
            self.wfile.write(content[start:])
        except OSError:
            self.close_connection = True
        return None


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def connect(monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path) -> None:
    """Have this process, and those that it starts, take `hub` for the hub and `cache` for its cache, with no token."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    monkeypatch.setattr(
        f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(cache.parent / "no token"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub, and its storage under another host's name, for as long as the block lasts."""
    hub = Hub()
    servers = []
    for handler in (_HubHandler, _StorageHandler):
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub})))
    hub.url = f"http://127.0.0.1:{servers[0].server_port}"
    hub.storage = f"http://localhost:{servers[1].server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
