"""A hub on this machine: what huggingface_hub asks of the real one for a model's list and its files.

By https://huggingface.co/docs/hub/api and the headers that ``huggingface_hub.file_download`` reads.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(number: int) -> str:
    """A commit's hash."""
    return hashlib.sha1(str(number).encode()).hexdigest()


@dataclass
class Model:
    """Commits with their files, branches and tags, and who may read it."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    token: str | None = None


@dataclass
class Hub:
    """What the server has, what it was asked for, and how it fails.

    Attributes:
        cut_at: file -> bytes after which a connection for it breaks; each number once.
        broken: every request gets this status.
        body: the answer for every model.
        bad_token: one that has expired.
    """

    url: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut_at: dict[str, list[int]] = field(default_factory=dict)
    broken: int | None = None
    body: bytes | None = None
    bad_token: str | None = None

    def add(self, name: str, files: Mapping[str, bytes], number: int = 1, **refs: str) -> str:
        """A commit of a model, which ``main`` then is; returns its hash."""
        commit = commit_of(number)
        model = self.models.setdefault(name, Model({}, {}))
        model.commits[commit] = dict(files)
        model.refs |= {"main": commit} | dict.fromkeys(refs.values(), commit)
        return commit

    def fetched(self) -> list[str]:
        """Names of files whose content was asked for, in order."""
        return [
            line.rsplit("/", 1)[1] for line in self.asked if line.startswith("GET") and "/resolve/" in line
        ]


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub at ``hub.url``, on a port of its own."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.broken:
            self._refuse(self.hub.broken)
        elif self.hub.bad_token and self.hub.bad_token in self.headers.get("Authorization", ""):
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif self.hub.body is not None and path.startswith("/api/models/"):
            self._send(200, self.hub.body, {"Content-Type": "application/json"})
        elif path.startswith("/api/models/"):
            self._model(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._file(path[1:])
        else:
            self._refuse(404)

    def _model(self, rest: str) -> None:
        name, _, revision = rest.partition("/revision/")
        found = self._found(name, revision or "main")
        if found is not None:
            model, commit = found
            siblings = [
                {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
                for file, data in model.commits[commit].items()
            ]
            body = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        found = self._found(name, next((r for r in self._revisions(name) if rest.startswith(f"{r}/")), rest))
        if found is None:
            return
        model, commit = found
        if model.gated:
            self._refuse(401, "GatedRepo")
            return
        file = next(rest.removeprefix(f"{r}/") for r in self._revisions(name) if rest.startswith(f"{r}/"))
        data = model.commits[commit].get(file)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, data, headers, cut=self._cut(file))
            return
        first = int(asked.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(206, data[first:], headers, cut=self._cut(file))

    def _revisions(self, name: str) -> list[str]:
        model = self.hub.models.get(name)
        return [] if model is None else [*model.refs, *model.commits]

    def _found(self, name: str, revision: str) -> tuple[Model, str] | None:
        model = self.hub.models.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if model is None or (model.token is not None and given != model.token):
            self._refuse(401, "RepoNotFound")
            return None
        commit = model.refs.get(revision, revision)
        if commit not in model.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return model, commit

    def _cut(self, file: str) -> int | None:
        cuts = self.hub.cut_at.get(file)
        return cuts.pop(0) if cuts and self.command == "GET" else None

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, b"", {name: value for name, value in headers.items() if value})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
