"""Fixtures of more than one file of unit tests."""

from typing import Any

import pytest

from stage1_teacher.mixture import SourceConfig
from stage1_teacher.sources import Source, open_source
from tests.source_forms import Open


@pytest.fixture
def open_here(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """`open_source` of a path with options, with a cache of its own."""
    cache_dir = tmp_path_factory.mktemp("datasets-cache")

    def open_path(path: Any, **options: Any) -> Source:
        return open_source(SourceConfig(path=str(path), **options), cache_dir=cache_dir)

    return open_path
