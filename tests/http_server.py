"""A real HTTP server on this machine that serves a folder and fails as it is told to.

It knows HEAD, Range, ETag and Content-Length. Each fault waits for requests of one file, lets `skip` of them
pass, meets the next `times`, and is gone. Everything ends with the `with` block; no request lasts over
LONGEST seconds.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from urllib.parse import unquote, urlsplit

LONGEST = 30.0  # seconds

KINDS = {
    "cut": "the connection closes after a part of the body",
    "drop": "the connection closes before the first header",
    "status": "an error status in place of the file",
    "stall": "silence after a part of the body",
    "hang": "silence before the first header",
    "short": "a part of the body, with a Content-Length that is honest about the part",
    "astray": "the beginning of the file, and says so, in place of the part that was asked for",
    "changed": "the file is another one from here on",
    "down": "nobody listens for some seconds",
}


@dataclass
class Fault:
    """What happens to the requests of one file; `part` of a body is sent where a fault sends some."""

    kind: str
    times: int = 1
    skip: int = 0
    methods: tuple[str, ...] = ("GET",)
    part: float = 0.5
    code: int = 503
    content: bytes = b""
    seconds: float = 1.0


@dataclass(frozen=True)
class Request:
    """One line of the log; `status` is 0 where no header was sent."""

    method: str
    name: str
    range: str | None
    status: int


class Server:
    """What `serve` hands out. `ranges`, `versions` and `sizes` may be set to False."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = self.versions = self.sizes = True
        self.headers: dict[str, str] = {}  # added to those of every file
        self.requests: list[Request] = []
        self.stopped = threading.Event()
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.RLock()
        self._connections: set[socket] = set()
        self._back: threading.Timer | None = None
        self._listener: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def fail(self, name: str, kind: str, **details) -> None:
        """Plan a fault of KINDS for a file; `details` are the fields of Fault."""
        assert kind in KINDS, f"{kind} is none of {', '.join(KINDS)}"
        if kind in ("status", "drop", "hang", "down"):
            details.setdefault("methods", ("GET", "HEAD"))
        with self._lock:
            self._faults.setdefault(name, []).append(Fault(kind, **details))

    def fault(self, method: str, name: str) -> Fault | None:
        """The fault that meets this request, if any; one is used up."""
        with self._lock:
            for fault in self._faults.get(name, []):
                if method not in fault.methods or fault.times <= 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def pending(self) -> bool:
        """Whether a planned fault has not met all its requests yet."""
        with self._lock:
            return any(fault.times for faults in self._faults.values() for fault in faults)

    def log(self, *request) -> None:
        with self._lock:
            self.requests.append(Request(*request))

    def up(self) -> None:
        """Listen, on the same port as before."""
        with self._lock:
            if self._listener is None and not self.stopped.is_set():
                handler = type("Handler", (_Handler,), {"files": self})
                self._listener = _Listener(("127.0.0.1", self.port), handler)
                self.port = self._listener.server_address[1]
                threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def down(self, seconds: float | None = None) -> None:
        """Close the port and every connection; listen again after some seconds, if given."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown()
            listener.server_close()
        with self._lock:
            for connection in list(self._connections):
                with suppress(OSError):
                    connection.shutdown(SHUT_RDWR)
            self._connections.clear()
            if seconds is not None:
                self._back = threading.Timer(min(seconds, LONGEST), self.up)
                self._back.daemon = True
                self._back.start()

    def stop(self) -> None:
        self.stopped.set()
        if self._back is not None:
            self._back.cancel()
        self.down()


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve the files of a folder until the block ends."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.stop()


class _Listener(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64
    block_on_close = False

    def handle_error(self, request, client_address) -> None:
        pass  # a client that goes away, or a fault that closed the connection


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = LONGEST
    disable_nagle_algorithm = True  # headers and body are two writes
    files: Server

    def setup(self) -> None:
        super().setup()
        self.files._connections.add(self.connection)

    def finish(self) -> None:
        self.files._connections.discard(self.connection)
        super().finish()

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        fault = self.files.fault(self.command, name)
        kind = fault.kind if fault else ""
        path = self.files.folder / name
        if fault and kind == "changed":
            path.write_bytes(fault.content)
        if fault and kind in ("drop", "hang", "down"):
            self.files.log(self.command, name, self.headers["Range"], 0)
            if kind == "hang":
                self.files.stopped.wait(LONGEST)
            if kind == "down":
                threading.Thread(target=self.files.down, args=(fault.seconds,), daemon=True).start()
            return self.hang_up()
        if fault and kind == "status":
            return self.send(fault.code, {"Retry-After": "1"}, b"no\n", None)
        if not path.is_file():
            return self.send(404, {}, b"not found\n", None)

        body = path.read_bytes()
        headers = dict(self.files.headers)
        if self.files.versions:
            headers["ETag"] = f'"{sha256(body).hexdigest()[:16]}"'
        status, size = 200, len(body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and self.files.ranges:
            start, stop = int(asked[1]), min(int(asked[2] or size) + 1, size)
            if kind == "astray":
                start, stop = 0, stop - start
            if start >= size:
                return self.send(416, {"Content-Range": f"bytes */{size}"}, b"", None)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            status, body = 206, body[start:stop]
        self.send(status, headers, body, fault)

    def send(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None) -> None:
        self.files.log(self.command, unquote(self.path).lstrip("/"), self.headers["Range"], status)
        kind = fault.kind if fault else ""
        sent = body[: int(len(body) * fault.part)] if fault and kind in ("cut", "stall", "short") else body
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if self.files.sizes:
            self.send_header("Content-Length", str(len(sent if kind == "short" else body)))
        else:
            self.close_connection = True  # the end of the connection is the end of the body
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent)
            self.wfile.flush()
        if kind == "stall":
            self.files.stopped.wait(LONGEST)
        if kind in ("cut", "stall"):
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(SHUT_RDWR)
