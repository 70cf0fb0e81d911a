"""A web server of files in a process of its own, which can be told to misbehave, and its log.

    python -m tests.http_servers FOLDER PORT LOG [--no-ranges]

It reads `FOLDER/.faults.json` before each answer: `{"path": {"fault": "flip"|"cut"|"stall"|"die",
"times": 1}}`, counts `times` down in memory, and forgets nothing else. Every request for a file's
bytes is a line of the log.
"""

import argparse
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import PROJECT_ROOT

FAULTS = ".faults.json"
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_START_S = 30


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers HEAD and GET for the files of one folder."""

    protocol_version = "HTTP/1.1"
    folder: Path
    log_path: Path
    with_ranges: bool
    served: dict[str, int]
    lock = threading.Lock()

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, *, send_body: bool) -> None:
        relative = self.path.lstrip("/")
        path = self.folder / relative
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        start, stop, status = 0, len(data), 200
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if self.with_ranges and match:
            first, last = match.groups()
            start = int(first) if first else len(data) - int(last)
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            status = 206
        body = data[start:stop]
        fault = self._fault(relative) if send_body else None
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        if self.with_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if send_body:
            with self.lock, self.log_path.open("a") as log:
                log.write(relative + "\n")
            self._send(body, fault)

    def _send(self, body: bytes, fault: str | None) -> None:
        if fault == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif fault is not None:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stall":
                time.sleep(600)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)

    def _fault(self, relative: str) -> str | None:
        path = self.folder / FAULTS
        faults = json.loads(path.read_text()) if path.is_file() else {}
        if relative not in faults:
            return None
        with self.lock:
            self.served[relative] = self.served.get(relative, 0) + 1
            if self.served[relative] > faults[relative]["times"]:
                return None
        return str(faults[relative]["fault"])


class WebServer:
    """A running server of a folder. `start` and `kill` may be called again and again."""

    def __init__(self, folder: Path, log: Path, *, with_ranges: bool = True) -> None:
        self.folder = folder
        self.log = log
        self._options = [] if with_ranges else ["--no-ranges"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [str(self.folder), str(self.port), str(self.log), *self._options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.http_servers", *arguments], cwd=PROJECT_ROOT
        )
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the web server did not start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def requests(self) -> list[str]:
        """The files whose bytes were asked for, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def misbehave(self, path: str, fault: str, times: int = 1_000_000) -> None:
        (self.folder / FAULTS).write_text(json.dumps({path: {"fault": fault, "times": times}}))

    def behave(self) -> None:
        (self.folder / FAULTS).unlink(missing_ok=True)


@contextmanager
def web_server(folder: Path, log: Path, *, with_ranges: bool = True) -> Iterator[WebServer]:
    """Serve a folder until the end of the block."""
    server = WebServer(folder, log, with_ranges=with_ranges)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        server.behave()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("log", type=Path)
    parser.add_argument("--no-ranges", action="store_true")
    options = parser.parse_args()
    Handler.folder, Handler.log_path = options.folder, options.log
    Handler.with_ranges, Handler.served = not options.no_ranges, {}
    http.server.ThreadingHTTPServer.allow_reuse_address = True
    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
