"""A model hub on 127.0.0.1 that knows as much of the Hugging Face protocol as an upload and a download need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What the hub has: files of every repository, and what was asked of it."""

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    def revision(self, repo: str) -> str:
        """A commit that is told by what is in it."""
        parts = [name.encode() + content for name, content in sorted(self.files[repo].items())]
        return hashlib.sha1(b"".join(parts)).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for one hub."""

    hub: Hub

    def log_message(self, *args) -> None:
        """Nothing: tests are quiet."""

    def _answer(self, content: bytes | dict, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"POST {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(raw)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.files.setdefault(repo, {})
            self.hub.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self._answer({"url": f"{self.hub.endpoint}/{repo}", "id": repo})
        elif parts == ["api", "validate-yaml"]:
            self._answer({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = json.loads(raw)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif parts[4:5] == ["commit"]:
            repo = "/".join(parts[2:4])
            for line in raw.decode().splitlines():
                change = json.loads(line)
                if change["key"] == "file":
                    self.hub.files[repo][change["value"]["path"]] = base64.b64decode(change["value"]["content"])
                elif change["key"] == "deletedFile":
                    del self.hub.files[repo][change["value"]["path"]]
            oid = self.hub.revision(repo)
            self._answer({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True})
        else:
            self._answer({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo not in self.hub.files:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        files, revision = self.hub.files[repo], self.hub.revision(repo)
        if parts[0] == "api" and "tree" in parts:
            tree = [{"type": "file", "path": name, "size": len(raw), "oid": _oid(raw)} for name, raw in files.items()]
            self._answer(json.dumps(tree).encode())
        elif parts[0] == "api":
            siblings = [{"rfilename": name} for name in files]
            self._answer(
                {"id": repo, "modelId": repo, "sha": revision, "private": False, "tags": [], "siblings": siblings}
            )
        elif parts[2] == "resolve" and "/".join(parts[4:]) in files:
            raw = files["/".join(parts[4:])]
            self._answer(raw, ETag=f'"{_oid(raw)}"', X_Repo_Commit=revision, Accept_Ranges="bytes")
        else:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision)

    do_HEAD = do_GET


def _oid(raw: bytes) -> str:
    return hashlib.sha1(raw).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port for a while."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
