"""The event log of a build: one JSON object per line, appended, for people and programs.

Each line has `time` (UTC, ISO 8601), `host`, `pid` and `event`; the rest is what the event says.
Several processes may append to one file: a line is one write to a file opened for appending.
"""

import json
import os
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tide_cache.errors import StorageError


class EventLog:
    """Appends events to a file, if there is one, and tells them to a listener, if there is one."""

    def __init__(
        self,
        path: Path | None = None,
        listener: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        self.path = path
        self._listener = listener
        self._lock = threading.Lock()
        self._host = socket.gethostname()

    def write(self, event: str, **facts: Any) -> None:
        """Append one event. Raises StorageError."""
        if self._listener is not None:
            self._listener(event, facts)
        if self.path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        values = {"time": now, "host": self._host, "pid": os.getpid(), "event": event, **facts}
        line = (json.dumps(values, ensure_ascii=False) + "\n").encode()
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(descriptor, line)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write the event log: {error}") from error


NO_EVENTS = EventLog()
