"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

from tests.build_grounds import BuildGround, write_build_ground
from tests.support import find_golden, find_shared

# No test may reach a hub; forked tokenizers must not warn or dead-lock.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    folder = find_shared()
    if folder is None:
        pytest.skip("no shared data: set TIDE_SHARED to a folder with data/ and tokenizers/")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    folder = find_golden()
    if folder is None:
        pytest.skip("no golden vectors: set TIDE_GOLDEN to a folder with index.json")
    return folder


@pytest.fixture(scope="session")
def build_ground(tmp_path_factory: pytest.TempPathFactory) -> BuildGround:
    return write_build_ground(tmp_path_factory.mktemp("build_ground"))
