"""Waiting for a server of a test to answer."""

import socket
import time

_START_S = 60


def wait_for_port(port: int, what: str) -> None:
    """Return once something listens on a port of this machine. Raises TimeoutError."""
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(f"{what} did not start")
