"""A stand-in for the Hugging Face hub on this machine: what `datasets` asks for to stream a dataset.

A folder OWNER/NAME below the root is a dataset with a single revision. Programs reach it with HF_ENDPOINT in
their environment, which `huggingface_hub` reads when it is imported. Requests that it does not know are kept.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef" * 2 + "01234567"
REPOSITORY = r"datasets/(?P<name>\w+/[\w-]+)"
INFO = {
    "id": "",
    "sha": REVISION,
    "private": False,
    "gated": False,
    "disabled": False,
    "downloads": 0,
    "likes": 0,
    "tags": [],
    "siblings": [],
    "lastModified": "2024-01-01T00:00:00.000Z",
    "createdAt": "2024-01-01T00:00:00.000Z",
}


class Hub:
    """What `serve_hub` hands out. `failures` maps the end of a path to statuses for its next requests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.failures: dict[str, list[int]] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.listener = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.listener.daemon_threads = True
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.server_address[1]}"

    def failure(self, path: str) -> int | None:
        for end, statuses in self.failures.items():
            if path.endswith(end) and statuses:
                return statuses.pop(0)
        return None


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    """Serve the datasets of a folder until the block ends."""
    hub = Hub(root)
    try:
        yield hub
    finally:
        hub.listener.shutdown()
        hub.listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("")

    def do_GET(self) -> None:
        self.answer("")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())

    def answer(self, body: str) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.requests.append(f"{self.command} {path}")
        status = self.hub.failure(path)
        if status:
            return self.send(status, b"no\n")
        for pattern, method in (
            (rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.file),
            (rf"/api/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", self.info),
            (rf"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", self.tree),
            (rf"/api/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", self.paths),
        ):
            found = re.fullmatch(pattern, path)
            if found:
                folder = self.hub.root / found["name"]
                if not folder.is_dir():
                    return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                if found["revision"] not in (None, "main", REVISION):
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return method(folder, found.groupdict().get("path") or "", parse_qs(address.query), body)
        self.hub.unknown.append(f"{self.command} {path}")
        return self.send(404, b"{}")

    def info(self, folder: Path, *_) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
        self.json(INFO | {"id": "/".join(folder.parts[-2:]), "siblings": names})

    def tree(self, folder: Path, path: str, query: dict[str, list[str]], _: str) -> None:
        below = folder / path
        if not below.is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        deep = query.get("recursive", [""])[0].lower() == "true"
        self.json([entry(folder, at) for at in sorted(below.rglob("*") if deep else below.iterdir())])

    def paths(self, folder: Path, path: str, query: dict, body: str) -> None:
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.json([entry(folder, folder / at) for at in wanted if (folder / at).exists()])

    def file(self, folder: Path, path: str, *_) -> None:
        if not (folder / path).is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": REVISION})
        data = (folder / path).read_bytes()
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": REVISION}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not asked:
            return self.send(200, data, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.send(206, data[start:stop], headers)

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entry(folder: Path, path: Path) -> dict[str, object]:
    """What the hub tells about a file or a folder."""
    name = path.relative_to(folder).as_posix()
    kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
    return {"type": kind, "path": name, "oid": sha1(name.encode()).hexdigest(), "size": size}
