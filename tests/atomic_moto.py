"""`python -m tests.atomic_moto PORT`: moto's S3 server, answering one request at a time.

S3 creates a key if it is absent in one step. moto looks and then writes, and with a thread for each
request several writers of one key can be told that they were the first; under a lock it is as
atomic as what it stands for.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import run_simple

_one_at_a_time = threading.Lock()


def serial(application: Callable[..., Iterable[bytes]]) -> Callable[..., list[bytes]]:
    """Let an application answer whole, and nobody else meanwhile."""

    def answer(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        with _one_at_a_time:
            found = application(environ, start_response)
            try:
                return list(found)
            finally:
                getattr(found, "close", lambda: None)()

    return answer


if __name__ == "__main__":
    os.environ["MOTO_PORT"] = sys.argv[1]  # as moto's own command does
    run_simple(
        "127.0.0.1",
        int(sys.argv[1]),
        serial(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        request_handler=MotoRequestHandler,
    )
