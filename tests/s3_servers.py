"""An S3 server on loopback and the environment that points every client at it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.ports import wait_for_port
from tests.support import PROJECT_ROOT


@contextmanager
def s3_server(bucket: str, log: Path) -> Iterator[dict[str, str]]:
    """Run a server with one empty bucket in a process of its own; yields the environment.

    The environment is set in this process too. Skips where s3fs or moto is missing.
    """
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'tide-cache[s3]'")
    pytest.importorskip("moto", reason="needs moto[server]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in environment}
    arguments = [sys.executable, "-m", "tests.atomic_moto", str(port)]
    with (
        log.open("wb") as output,
        subprocess.Popen(arguments, cwd=PROJECT_ROOT, stderr=output, stdout=output) as process,
    ):
        try:
            os.environ |= environment
            wait_for_port(port, "the S3 server")
            import s3fs

            s3fs.S3FileSystem.clear_instance_cache()  # of a server that ran before
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
            yield environment
        finally:
            process.kill()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
