"""The part of the Hugging Face hub's interface that is used here, on 127.0.0.1; it keeps what is pushed.

Files come and go as regular ones; the real hub takes large ones through storage of its own.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from typing import Any

import yaml

TOKEN = "hf_of_the_tests"


class Hub:
    """Repositories by name, each a dictionary of files; a context manager that serves them at `address`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.down = False  # every request is answered with 503
        self.requests: list[str] = []
        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self})
        )
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, name: str) -> str:
        files = sorted(self.repos[name].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refused(self, name: str) -> bool:
        """Whether a repository may not be read; the answer is given then."""
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.hub.down:
            self._answer(503)
        elif name in self.hub.gated and not known:
            self._answer(403, X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        elif name not in self.hub.repos or (name in self.hub.private and not known):
            self._answer(404 if known else 401, X_Error_Code="RepoNotFound", X_Error_Message="not found")
        else:
            return False
        return True

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            name = found[1]
            if not self._refused(name):
                files = [{"rfilename": file} for file in self.hub.repos[name]]
                self._answer(200, {"id": name, "sha": self.hub.sha(name), "siblings": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            if not self._refused(found[1]):
                rows = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in self.hub.repos[found[1]].items()
                ]
                self._answer(200, rows)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if self._refused(found[1]):
                return
            data = self.hub.repos[found[1]].get(found[2])
            if data is None:
                self._answer(404, X_Error_Code="EntryNotFound")
            else:
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                self._answer(200, data, ETag=tag, X_Repo_Commit=self.hub.sha(found[1]))
        else:
            self._answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urllib.parse.urlparse(self.path).path
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.down:
            self._answer(503)
        elif path == "/api/validate-yaml":
            fields = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._answer(200 if isinstance(fields, dict) else 400, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "others":
                self._answer(403, {"error": "You don't have the rights to create a model under others"})
                return
            made = name not in self.hub.repos
            self.hub.repos.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self._answer(200 if made else 409, {"url": f"{self.hub.address}/{name}"})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    data = base64.b64decode(line["value"]["content"])
                    self.hub.repos[found[1]][line["value"]["path"]] = data
            sha = self.hub.sha(found[1])
            address = f"{self.hub.address}/{found[1]}/commit/{sha}"
            self._answer(200, {"success": True, "commitOid": sha, "commitUrl": address})
        else:
            self._answer(404)
