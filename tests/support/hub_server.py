"""A stand-in for the two hubs' servers: as much of their HTTP as their own packages ask for to get a model.

with hub_server({"config.json": b"{}", ...}) as hub:
    ... HF_ENDPOINT=hub.url, MODELSCOPE_ENDPOINT=hub.url ...
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COMMIT = "0123456789" * 4


@dataclass
class HubServer:
    """Where it is, the files that every id has, and the paths that were asked for."""

    files: dict[str, bytes]
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, method: str, target: str) -> tuple[dict[str, str], bytes] | None:
        """Headers and body for a path, None for 404."""
        self.asked.append(f"{method} {target}")
        url = urllib.parse.urlsplit(target)
        query = urllib.parse.parse_qs(url.query)
        name = query["FilePath"][0] if "FilePath" in query else url.path.rsplit("/", 1)[1]
        if url.path.endswith("/repo/files"):
            listed = [
                {"Path": n, "Name": n, "Size": len(d), "Type": "blob", "Sha256": sha(d), "Revision": COMMIT}
                for n, d in self.files.items()
            ]
            return _json({"Code": 200, "Success": True, "Data": {"Files": listed}})
        if "/tree/" in url.path:
            blob = {"type": "file", "oid": COMMIT}
            return _json([{**blob, "path": n, "size": len(d)} for n, d in self.files.items()])
        if "/resolve/" not in url.path and url.path.startswith("/api/models/"):
            return _json({"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]})
        if name not in self.files:
            return None
        data = self.files[name]
        return {"ETag": f'"{sha(data)}"', "X-Repo-Commit": COMMIT}, data


def sha(data: bytes) -> str:
    """The digest under which a hub knows a file."""
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextlib.contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[HubServer]:
    """Serve `files` as every model of both hubs, on a free port."""
    hub = HubServer(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply("GET")

        def do_HEAD(self) -> None:
            self._reply("HEAD")

        def _reply(self, method: str) -> None:
            answer = hub.answer(method, self.path)
            if answer is None:
                self.send_error(404)
                return
            headers, body = answer
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if method == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
