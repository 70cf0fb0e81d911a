"""How far a set is, from its folder alone."""

from pathlib import Path

import pytest

from tests.set_builders import premasked_header, random_row, write_premasked
from tide_cache.errors import FormatError, StorageError
from tide_cache.rows import rows_to_table
from tide_cache.status import lines, status
from tide_cache.store import Store
from tide_cache.writer import SetWriter, Total


def test_nothing_begun_is_an_error_with_the_next_command(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="neither a finished set nor one under way; 'tide-cache"):
        status(Store(tmp_path))


def test_a_set_under_way(tmp_path: Path) -> None:
    writer = SetWriter(Store(tmp_path), premasked_header())
    writer.begin(Total(num_tasks=3, num_rows=30))
    facts = status(writer.store)
    assert (facts["state"], facts["num_tasks_done"], facts["rows_per_s"]) == ("building", 0, None)
    for task in (0, 2):
        rows_V = [[random_row(task * 5 + n, v) for n in range(5)] for v in range(2)]
        writer.publish_task(
            task,
            [rows_to_table(rows, "positions") for rows in rows_V],
            counts={"num_samples": 5, "num_rows": 10},
            dropped={"nonfinite_logits": task},
            notes=[f"note of {task}"],
        )
    writer.set_aside(1, "row 7 is bad")
    writer.set_aside(2, "was bad, is done now")
    facts = status(writer.store)
    assert (facts["num_tasks"], facts["num_tasks_done"]) == (3, 2)
    assert (facts["num_rows"], facts["num_rows_done"]) == (30, 20)
    assert facts["size_bytes"] == sum(
        path.stat().st_size for path in tmp_path.glob("data/*/*.parquet")
    )
    assert facts["dropped"] == {"nonfinite_logits": 2}
    assert facts["set_aside"] == [{"task": 1, "error": "row 7 is bad"}]
    assert facts["rows_per_s"] > 0
    text = dict(lines(facts))
    assert text["tasks"] == "2 of 3"
    assert text["rows"].startswith("20 of 30")
    assert text["failed"] == "task 1: row 7 is bad"
    assert text["note"] == "note of 2"
    writer.forget_set_aside()
    assert status(writer.store)["set_aside"] == []


def test_a_finished_set(tmp_path: Path) -> None:
    manifest = write_premasked(tmp_path)
    facts = status(Store(tmp_path))
    assert (facts["state"], facts["kind"]) == ("finished", "premasked")
    assert facts["num_tasks_done"] == facts["num_tasks"] == 2
    assert facts["num_rows_done"] == manifest.counts["num_rows"]
    assert dict(lines(facts))["state"] == "finished"


@pytest.mark.parametrize("name", ["header.json", "total.json", "tasks/00000.json"])
@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '{"kind": {"secret": 7}}', "\xff"])
def test_a_stranger_s_build_state_is_refused_or_told_as_nothing(
    tmp_path: Path, name: str, content: str
) -> None:
    writer = SetWriter(Store(tmp_path / "set"), premasked_header())
    writer.begin(Total(num_tasks=2, num_rows=2 * 5))
    damaged = tmp_path / "set" / "_build" / name
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text(content, encoding="latin-1")
    try:
        facts = status(Store(tmp_path / "set"))
    except FormatError as error:
        assert "secret" not in error.message
        assert "_build/" in error.message
    else:
        assert name == "header.json"
        assert facts["kind"] is None


def test_a_record_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    SetWriter(Store(tmp_path / "set"), premasked_header()).begin(Total(num_tasks=1, num_rows=5))
    tasks = tmp_path / "set" / "_build" / "tasks"
    tasks.mkdir(exist_ok=True)
    (tmp_path / "outside.json").write_text("{}")
    (tasks / "00000.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(StorageError, match="link"):
        status(Store(tmp_path / "set"))
