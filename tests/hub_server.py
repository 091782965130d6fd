"""A small Hugging Face hub on this machine: the calls that its library makes for a model, and ways to fail."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@cache
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub:
    """repos: the files of each repository. What a test sets makes the server fail; `asked` are the requests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.status: dict[str, tuple[int, dict[str, str]]] = {}  # a path's beginning -> the answer and its headers
        self.breaks_at: int | None = None  # a GET without Range ends after so many bytes
        self.redirects = False  # HEAD and GET of a file lead to /cdn/...
        self.corrupts = False
        self.size_off = 0  # added to the sizes that HEAD and the listing give

    def listing(self, repo: str) -> dict[str, object]:
        files = [
            {
                "rfilename": name,
                "size": len(data) + self.size_off,
                "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134},
            }
            for name, data in sorted(self.repos[repo].items())
        ]
        return {"id": repo, "sha": COMMIT, "siblings": files}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}" + (f" {self.headers['Range']}" if "Range" in self.headers else ""))
        for start, (code, headers) in hub.status.items():
            if path.startswith(start):
                return self._send(code, b"{}", headers)
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").removesuffix("/revision/main")
            if repo not in hub.repos:
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return self._send(200, json.dumps(hub.listing(repo)).encode(), {})
        on_cdn = path.startswith("/cdn/")
        repo, _, rest = path.removeprefix("/cdn").strip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        data = hub.repos.get(repo, {}).get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        about = {
            "ETag": f'"{sha256(data)}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data) + hub.size_off),
            "Accept-Ranges": "bytes",
        }
        about["X-Linked-ETag"] = about["ETag"]
        if hub.redirects and not on_cdn:
            return self._send(302, b"", {**about, "Location": f"{hub.url}/cdn{path}"})
        return self._send_file(data, about, body=body)

    def _send_file(self, data: bytes, about: dict[str, str], *, body: bool) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
        sent = data[start:]
        if self.hub.corrupts:
            sent = sent[:-1] + bytes([sent[-1] ^ 1])
        self.send_response(206 if start else 200)
        if start:
            about = {**about, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        for key, value in {**about, "Content-Length": str(len(sent))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            cut = self.hub.breaks_at if not start else None
            self.wfile.write(sent if cut is None else sent[:cut])
            if cut is not None:
                self.close_connection = True

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Yields a hub that answers at `url` until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield handler.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
