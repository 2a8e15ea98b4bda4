"""A server on this machine that stands in for the hub: the part of its HTTP API by which models come and go."""

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

Repositories = dict[str, dict[str, bytes]]
OWNER = "someone"


class _Hub(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *_: Any) -> None:
        """Keep the tests' output clean."""

    def _answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body, repositories = self._body(), self.server.repositories
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    repositories[found[1]][entry["value"]["path"]] = content
            self._answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/{found[1]}/commit/0"}
            )
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        else:
            self._answer(status=404)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        repositories = self.server.repositories
        if path == "/api/whoami-v2":
            self._answer({"type": "user", "name": OWNER, "orgs": []})
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+)?", path)
        if found and found[1] in repositories:
            files = [{"rfilename": name} for name in repositories[found[1]]]
            self._answer({"id": found[1], "sha": "0" * 40, "siblings": files})
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path)
        if found and found[1] in repositories:
            held = repositories[found[1]].items()
            self._answer([{"type": "file", "path": name, "size": len(each), "oid": _tag(each)} for name, each in held])
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)
        if found and found[2] in repositories.get(found[1], {}):
            content = repositories[found[1]][found[2]]
            self._answer(content, ETag=f'"{_tag(content)}"', X_Repo_Commit="0" * 40)
            return
        known = found is not None and found[1] in repositories
        self._answer(status=404, X_Error_Code="EntryNotFound" if known else "RepoNotFound", X_Repo_Commit="0" * 40)

    do_HEAD = do_GET


def _tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub() -> Iterator[tuple[str, Repositories]]:
    """Serve; yield the address, and the files of the repositories by name."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.url, server.repositories = f"http://127.0.0.1:{server.server_port}", {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url, server.repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
