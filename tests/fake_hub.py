"""A local server that speaks the two calls of the hub's API which are used, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

REPOSITORY, COMMIT = "acme/tiny", "c0ffee"
LARGE = 1000
"""Files from this many bytes on are kept as large files (LFS), with a checksum."""


@dataclass
class FakeHub:
    """Serves `files` of one repository at `url`. What it was asked lies in `seen`, as path and headers."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    redirect_to: str = ""
    """Downloads are answered with a redirect to this base URL."""
    cuts: list[int] = field(default_factory=list)
    """Each next download breaks off at this byte of the file."""
    damaged: bool = False
    status: int = 0
    """Answer everything with this status."""
    statuses: list[int] = field(default_factory=list)
    """Answer the next requests with these, then as usual."""
    cause: str = ""
    """`X-Error-Code` of refusals."""
    ranges: bool = True
    """Whether Range is understood."""
    lists_checksums: bool = True
    """Whether the list of files has checksums; the redirect's X-Linked-Etag has them in any case."""
    oid: bool = False
    """Say `lfs.oid` instead of `lfs.sha256`."""
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def downloads(self) -> list[dict[str, str]]:
        """Headers of the requests for files."""
        return [headers for path, headers in self.seen if "/resolve/" in path]

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.seen.append((path, dict(request.headers)))
        if status := self.statuses.pop(0) if self.statuses else self.status:
            return self._refuse(request, status)
        if self.private and request.headers.get("Authorization") != "Bearer secret":
            return self._refuse(request, 401)
        if path == f"/api/models/{REPOSITORY}/revision/main":
            return answer(request, 200, json.dumps({"sha": COMMIT, "siblings": self._siblings()}).encode())
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.files:
            return self._refuse(request, 404)
        if self.redirect_to:
            linked = {"X-Linked-Etag": f'"{_sha256(self.files[name])}"', "Location": f"{self.redirect_to}{path}"}
            return answer(request, 302, b"", linked)
        return self._send(request, self.files[name])

    def _refuse(self, request: BaseHTTPRequestHandler, status: int) -> None:
        answer(request, status, b"no", {"X-Error-Code": self.cause} if self.cause else {})

    def _siblings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            if len(data) > LARGE and self.lists_checksums:
                entry["lfs"] = {"size": len(data), "oid" if self.oid else "sha256": _sha256(data)}
            found.append(entry)
        return found

    def _send(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        etag = f'"{_sha256(data)}"'
        if self.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if not self.ranges or request.headers.get("If-Range", etag) != etag:
            start = 0
        cut = self.cuts.pop(0) if self.cuts else None
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("ETag", etag)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        request.wfile.write(data[start:cut])
        request.close_connection = True


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def answer(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@contextlib.contextmanager
def serving(*hubs: FakeHub) -> Iterator[None]:
    """Each hub on a port of its own, until the end of the block."""
    servers = []
    for hub in hubs:

        class Handler(BaseHTTPRequestHandler):
            fake = hub

            def do_GET(self) -> None:
                self.fake.handle(self)

            def log_message(self, *_arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
