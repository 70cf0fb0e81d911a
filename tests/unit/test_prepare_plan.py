"""The config of prepare, and which rows it decides on before any is encoded."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage1_teacher import chat as chat_module
from stage1_teacher import conversations, encode
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.prepare_plan import (
    DROP_REASONS,
    no_rows_left,
    plan_rows,
    task_range,
    unique_rows,
)
from stage1_teacher.sources import SourceScan
from tests.builders import chat, chat_rows, write_chat_jsonl
from tide_cache.config import load_config, parse_config
from tide_cache.errors import ConfigError, DataError

SIDE = {"tokenizer": "somewhere"}


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_config(**values: Any) -> PrepareConfig:
    return parse_config({"student": SIDE, **values}, PrepareConfig, where="test.yaml")


class TestConfig:
    def test_defaults(self) -> None:
        config = make_config(sources="a.jsonl + b.jsonl[cap:3]")
        assert config.sources is not None
        assert [(s.path, s.cap) for s in config.sources] == [("a.jsonl", None), ("b.jsonl", 3)]
        assert config.teacher_side == config.student
        assert (config.block_size, config.num_views, config.demo_ratio) == (32, 4, 0.5)
        grid_G = config.timesteps.grid()
        assert grid_G.shape == (32,)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, "expected one of 'sources', 'published' and 'premasked'"),
            (
                {"sources": "a.jsonl", "premasked": "b"},
                "expected one of 'sources', 'published' and 'premasked'",
            ),
            ({"sources": "a.jsonl", "block_sise": 32}, "did you mean 'block_size'?"),
            (
                {"sources": "a.jsonl", "student": {**SIDE, "max_lenght": 9}},
                "unknown key 'student.max_lenght' (did you mean 'max_length'?)",
            ),
            (
                {"sources": "a.jsonl", "timesteps": {"nun": 8}},
                "unknown key 'timesteps.nun' (did you mean 'num'?)",
            ),
            ({"sources": "a.jsonl[cap:0]"}, "sources.0.cap"),
            (
                {"sources": "a.jsonl", "student": {**SIDE, "max_length": 500}},
                "student.max_length: expected a multiple of block_size = 32, got 500",
            ),
            (
                {"sources": "a.jsonl", "teacher": {**SIDE, "max_length": 500}},
                "teacher.max_length: expected a multiple of block_size = 32, got 500",
            ),
            (
                {"sources": "a.jsonl", "num_views": 5},
                "timesteps: num_timesteps: expected a multiple of num_views = 5, got 32",
            ),
            ({"sources": "a.jsonl", "timesteps": {"min": 0.5, "max": 0.5}}, "t_min < t_max"),
            ({"sources": "a.jsonl", "demo_ratio": 1.5}, "demo_ratio"),
            ({"sources": "a.jsonl", "alignment": "chunk"}, "alignment"),
        ],
    )
    def test_mistakes(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            make_config(**values)
        assert caught.value.message.startswith("test.yaml: ")
        assert message in caught.value.message

    def test_teacher_of_chunks_needs_no_whole_blocks(self) -> None:
        teacher = {**SIDE, "max_length": 500}
        assert make_config(sources="a.jsonl", alignment="chunks", teacher=teacher)

    def test_overrides_from_the_command_line(self, tmp_path: Path) -> None:
        path = tmp_path / "prepare.yaml"
        path.write_text("sources: a.jsonl\nstudent: {tokenizer: t}\n")
        config = load_config(path, PrepareConfig, ["student.max_length=64", "seed=5"])
        assert (config.student.max_length, config.seed) == (64, 5)


def scan_of(*ids: str | None) -> SourceScan:
    """A scan whose None rows are dropped for the first reason."""
    return SourceScan(
        sample_id_R=np.array([(i or "").encode() for i in ids], dtype="S32"),
        reason_R=np.array([0 if i is None else -1 for i in ids], dtype=np.int8),
    )


class TestUniqueRows:
    def test_first_of_every_conversation(self) -> None:
        kept = unique_rows([scan_of("a", None, "b", "a"), scan_of("c", "b", "c"), scan_of("a")])
        assert [rows.tolist() for rows in kept] == [[0, 2], [0], []]

    def test_every_conversation_exactly_once(self) -> None:
        random = np.random.default_rng(0)
        scans = [
            scan_of(*(None if i % 7 == 0 else str(i) for i in random.integers(0, 40, 30)))
            for _ in range(4)
        ]
        kept = unique_rows(scans)
        found = [
            scan.sample_id_R[row] for scan, rows in zip(scans, kept, strict=True) for row in rows
        ]
        everything = {i for scan in scans for i in scan.sample_id_R[scan.usable_R]}
        assert Counter(found) == Counter(everything)
        assert all(scan.usable_R[rows].all() for scan, rows in zip(scans, kept, strict=True))


class TestPlanRows:
    def test_counts_add_up(self, tmp_path: Path) -> None:
        rows = chat_rows(30)
        first = [*rows[:20], rows[3], {"messages": chat("only a question")}]
        second = [*rows[15:], rows[29]]
        paths = [
            write_chat_jsonl(tmp_path / name, content)
            for name, content in (("a.jsonl", first), ("b.jsonl", second))
        ]
        config = make_config(
            sources=f"{paths[0]}[cap:12] + {paths[1]}[license:MIT]", max_samples=18
        )
        plan = plan_rows(config)
        assert dict(plan.dropped) == {
            "no_assistant_turn": 1,
            "duplicate": 1 + 6,
            "mixture_cap": 8,
            "over_max_samples": 12 + 10 - 18,
        }
        assert len(plan) == 18
        assert len(plan) + sum(plan.dropped.values()) == len(first) + len(second)
        assert [(f.name, f.licence, f.num_rows) for f in plan.facts] == [
            ("a.jsonl", None, 22),
            ("b.jsonl", "MIT", 16),
        ]
        assert sum(f.num_rows_taken for f in plan.facts) == 18
        taken = set(zip(plan.source_index_R.tolist(), plan.row_index_R.tolist(), strict=True))
        assert len(taken) == 18
        assert all(row < 20 if source == 0 else 5 <= row < 15 for source, row in taken)

    def test_a_cap_means_different_conversations(self, tmp_path: Path) -> None:
        path = write_chat_jsonl(tmp_path / "a.jsonl", [row for row in chat_rows(10) for _ in "xyz"])
        plan = plan_rows(make_config(sources=f"{path}[cap:8]"))
        assert len(plan) == 8
        assert dict(plan.dropped) == {"duplicate": 20, "mixture_cap": 2}

    def test_source_without_usable_rows(self, tmp_path: Path) -> None:
        good = write_chat_jsonl(tmp_path / "good.jsonl", chat_rows(3))
        bad = write_chat_jsonl(tmp_path / "bad.jsonl", [{"messages": chat("Hello?")}] * 2)
        with pytest.raises(DataError) as caught:
            plan_rows(make_config(sources=f"{good} + {bad}"))
        assert caught.value.message == (
            "bad.jsonl: no rows left: dropped no_assistant_turn 2 (no message of the assistant)"
        )
        assert "messages_column" in str(caught.value.hint)

    def test_source_that_repeats_another(self, tmp_path: Path) -> None:
        good = write_chat_jsonl(tmp_path / "good.jsonl", chat_rows(3))
        again = write_chat_jsonl(tmp_path / "again.jsonl", chat_rows(3))
        with pytest.raises(
            DataError, match=r"again\.jsonl: no rows left: dropped duplicate 3"
        ) as e:
            plan_rows(make_config(sources=f"{good} + {again}"))
        assert e.value.hint == "take the source out: its rows stand in earlier ones"

    def test_empty_source(self, tmp_path: Path) -> None:
        path = write_chat_jsonl(tmp_path / "none.jsonl", [])
        with pytest.raises(DataError, match=r"none\.jsonl: empty source \(no rows\)"):
            plan_rows(make_config(sources=str(path)))


class TestReasons:
    def test_every_reason_has_words(self) -> None:
        for reasons in (conversations.DROP_REASONS, chat_module.REFUSALS, encode.DROP_REASONS):
            assert set(reasons) <= set(DROP_REASONS)

    def test_advice_follows_the_commonest(self) -> None:
        error = no_rows_left("out", {"prompt_too_long": 5, "duplicate": 1})
        assert error.message == (
            "out: no rows left: dropped duplicate 1 (the same conversation stands earlier in the "
            "data), prompt_too_long 5 (the prompt leaves no room for a reply within "
            "student.max_length)"
        )
        assert error.hint == "raise student.max_length"


@pytest.mark.parametrize(("num_rows", "size"), [(1, 4), (4, 4), (9, 4), (10, 1)])
def test_tasks_cover_every_row_once(num_rows: int, size: int) -> None:
    num_tasks = -(-num_rows // size)
    ranges = [task_range(task, size, num_rows) for task in range(num_tasks)]
    assert [row for task in ranges for row in task] == list(range(num_rows))
    assert all(len(task) > 0 for task in ranges)
