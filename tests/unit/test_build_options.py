"""What `tide-cache build` makes of its command line."""

import os
from pathlib import Path

import pytest

from stage1_teacher.build import ShardRange
from stage1_teacher.build_options import default_event_log, parse_shard_range
from tide_cache.errors import ConfigError


def test_shares_are_disjoint_and_cover_everything() -> None:
    tasks = list(range(3, 26))
    shares = [parse_shard_range(f"{index}/5").of(tasks) for index in range(5)]
    assert sorted(task for share in shares for task in share) == tasks
    assert {len(share) for share in shares} == {4, 5}
    assert parse_shard_range("0/1") == ShardRange(index=0, count=1)
    assert parse_shard_range("7/64").of([1, 2]) == []


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "2/2", "3/2", "-1/2", "0/0", "a/b", "1/2/3"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--shard-range: expected"):
        parse_shard_range(text)


def test_events_are_logged_beside_a_local_output(tmp_path: Path) -> None:
    assert default_event_log(f"{tmp_path}/cache/") == tmp_path / "cache.events.jsonl"
    assert default_event_log(f"{tmp_path}/new/cache") == tmp_path / "new/cache.events.jsonl"
    assert default_event_log("memory://cache") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_where_nothing_may_be_written_nothing_is_logged(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert default_event_log(f"{tmp_path}/cache") is None
