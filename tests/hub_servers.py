"""A small server that speaks what the hub's client needs to make, fill, list and read a repository.

    python -m tests.hub_servers PORT FOLDER

Files lie in `FOLDER/files`; every commit is a line of `FOLDER/commits.jsonl`. All uploads are of
the `regular` kind, whose bytes stand in the commit. With `FOLDER/refuse` there, commits whose
message begins with its text are refused, once.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ports import wait_for_port
from tests.support import PROJECT_ROOT

_REVISION = "a" * 40
_REPOSITORY = "lab/(?:cache|student)"


class Handler(http.server.BaseHTTPRequestHandler):
    """One repository: the dataset `lab/cache`, or the model `lab/student`."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not (self.folder / "created.json").exists():
            self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif re.match(rf"/api/(datasets|models)/{_REPOSITORY}/tree/", path):
            self._send(200, [self._facts(p) for p in self._paths()])
        elif match := re.fullmatch(rf"(?:/datasets)?/{_REPOSITORY}/resolve/[^/]+/(.+)", path):
            self._file(match[1])
        elif re.match(rf"/api/(datasets|models)/{_REPOSITORY}(/revision/|$)", path):
            siblings = [{"rfilename": p} for p in self._paths()]
            self._send(200, {"id": "lab/it", "sha": _REVISION, "siblings": siblings})
        else:
            self._send(404, {"error": path}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            (self.folder / "created.json").write_bytes(body)
            self._send(200, {"url": "http://127.0.0.1/datasets/lab/cache"})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            self._send(200, {"files": files})
        elif "/paths-info/" in path:
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
            self._send(200, [self._facts(p) for p in self._paths() if p in wanted])
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines() if line])
        else:
            self._send(404, {"error": path})

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        message = lines[0]["value"]["summary"]
        refuse = self.folder / "refuse"
        if refuse.exists() and message.startswith(refuse.read_text()):
            refuse.unlink()
            self._send(403, {"error": "refused"})
            return
        names = []
        for line in lines[1:]:
            target = self.folder / "files" / line["value"]["path"]
            if line["key"] == "file":
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
            else:
                target.unlink()
            names.append(f"{line['key']} {line['value']['path']}")
        with (self.folder / "commits.jsonl").open("a") as log:
            log.write(json.dumps({"message": message, "files": names}) + "\n")
        url = "http://127.0.0.1/datasets/lab/cache/commit/" + _REVISION
        self._send(200, {"success": True, "commitOid": _REVISION, "commitUrl": url})

    def _paths(self) -> list[str]:
        root = self.folder / "files"
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())

    def _facts(self, path: str) -> dict[str, Any]:
        data = (self.folder / "files" / path).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"type": "file", "path": path, "size": len(data), "oid": oid}

    def _file(self, path: str) -> None:
        target = self.folder / "files" / path
        if not target.is_file():
            self._send(404, {"error": path}, {"X-Error-Code": "EntryNotFound"})
            return
        data = target.read_bytes()
        status, start, stop = 200, 0, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, start = 206, int(match[1])
            stop = min(int(match[2]) + 1, len(data)) if match[2] else len(data)
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": _REVISION, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send_bytes(status, data[start:stop], headers)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send_bytes(status, json.dumps(value).encode(), {**kind, **(headers or {})})

    def _send_bytes(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run a server in a process of its own; yields the environment that points clients at it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "files").mkdir(parents=True)
    arguments = [sys.executable, "-m", "tests.hub_servers", str(port), str(folder)]
    with subprocess.Popen(arguments, cwd=PROJECT_ROOT) as process:
        try:
            wait_for_port(port, "the hub")
            yield {
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{port}",
                "HF_HUB_OFFLINE": "0",
                "HF_TOKEN": "hf_secret",
                "HF_HOME": str(folder / "home"),
                "NO_COLOR": "1",
            }
        finally:
            process.kill()


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[2])
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
