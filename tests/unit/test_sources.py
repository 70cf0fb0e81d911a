"""Every form of chat data gives the same source; splits, folders and filters mean the same."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from stage1_teacher.conversations import DROP_REASONS
from stage1_teacher.mixture import parse_mixture
from stage1_teacher.sources import Conversation, Dropped, open_source, sample_id
from tests.source_forms import (
    CARD,
    FORMS,
    ROWS,
    Open,
    as_folder_of_jsonl,
    as_jsonl,
    as_saved_dataset,
    as_saved_dict,
    pairs,
    texts,
    write_jsonl,
)
from tide_cache.errors import ConfigError, DataError, TideError


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same_source(
    write: Callable[[Path], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    open_here: Open,
) -> None:
    source = open_here(write(tmp_path))
    assert len(source) == len(ROWS)
    assert texts(source) == pairs(ROWS)
    reference = open_here(as_jsonl(tmp_path_factory.mktemp("reference")))
    assert source.scan().fingerprint == reference.scan().fingerprint


@pytest.mark.parametrize("write", FORMS)
def test_filters_mean_the_same_in_every_form(
    write: Callable[[Path], Path], tmp_path: Path, open_here: Open
) -> None:
    path = write(tmp_path)
    # CSV spells Python's booleans with a capital, and is read as text or boolean accordingly.
    kept = open_here(path, filters={"lang": "python", "level": "1"})
    assert texts(kept) == pairs([r for r in ROWS if r["lang"] == "python" and r["level"] == 1])
    assert len(open_here(path, filters={"checked": True})) == 6


def test_csv_texts_are_taken_as_they_stand(tmp_path: Path, open_here: Open) -> None:
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "d.csv"
    path.write_text('question,answer,n\nNA,007\nnull,1e3,\n"two\nlines",4.50,3\n')
    expected = [("NA", "007"), ("null", "1e3"), ("two\nlines", "4.50")]
    assert texts(open_here(path)) == expected
    assert texts(open_here(path.parent)) == expected


def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path: Path, open_here: Open) -> None:
    path = write_jsonl(tmp_path / "we[ir]d *dir" / "a?[b]+.jsonl", ROWS)
    assert texts(open_here(path)) == pairs(ROWS)
    (config,) = parse_mixture(f"'{path}'[lang:go]")
    assert len(open_source(config, cache_dir=tmp_path / "cache")) == 4


def test_changed_data_is_read_again(tmp_path: Path, open_here: Open) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", ROWS)
    before = open_here(path).scan().fingerprint
    write_jsonl(path, [*ROWS[:-1], ROWS[-1] | {"response": "other"}])
    os.utime(path, (1, 1))  # another time, whatever the clock's grain
    source = open_here(path)
    assert texts(source)[-1] == (ROWS[-1]["prompt"], "other")
    assert source.scan().fingerprint != before


def test_rows_with_messages_of_mixed_types_are_dropped_one_by_one(
    tmp_path: Path, open_here: Open
) -> None:
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, good[1]]
    rows = [good, parts, None, "text", [{"role": "user", "content": 3}], good[:1], good]
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"messages": row} for row in rows])
    source = open_here(path)
    reasons = [
        "content_parts",
        "no_messages",
        "messages_not_a_list",
        "content_not_text",
        "no_assistant_turn",
    ]
    assert texts(source) == [("q", "a"), *reasons, ("q", "a")]
    scan = source.scan()
    assert scan.num_dropped == dict.fromkeys(sorted(reasons, key=list(DROP_REASONS).index), 1)
    assert scan.usable_R.tolist() == [True] + [False] * 5 + [True]
    assert scan.sample_id_R[0] == scan.sample_id_R[-1] == sample_id(good).encode()
    assert scan.sample_id_R[1] == b""


def test_bytes_that_are_not_utf8_cost_their_row_only(tmp_path: Path, open_here: Open) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(
        b'{"prompt":"a","response":"b"}\n'
        b'{"prompt":"caf\xe9","response":"b"}\n'
        b'{"prompt":"c","response":"d"}\n'
    )
    source = open_here(path)
    expected = [("a", "b"), "content_invalid_unicode", ("c", "d")]
    assert texts(source) == expected
    assert [type(row) for row in source.conversations([0, 1, 2])] == [
        Conversation,
        Dropped,
        Conversation,
    ]


def test_rows_that_look_like_agent_traces_are_chat_rows(tmp_path: Path, open_here: Open) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"id": "1", "source": "s", "model": "m", "system_prompt": "x", "messages": turns}
    assert texts(open_here(write_jsonl(tmp_path / "one.jsonl", [row]))) == [("q", "a")]
    assert texts(open_here(write_jsonl(tmp_path / "f/one.jsonl", [row]).parent)) == [("q", "a")]


def test_texts_that_all_look_like_dates_are_refused(tmp_path: Path, open_here: Open) -> None:
    rows = [{"prompt": "when?", "response": "2024-01-02"}] * 2
    with pytest.raises(DataError, match="column 'response' was read as timestamp") as error:
        open_here(write_jsonl(tmp_path / "dates.jsonl", rows))
    assert "Parquet" in str(error.value.hint)
    turns = [{"role": role, "content": "2024-01-02"} for role in ("user", "assistant")]
    with pytest.raises(DataError, match="column 'messages' was read as timestamp"):
        open_here(write_jsonl(tmp_path / "turns.jsonl", [{"messages": turns}]))
    stamped = [turn | {"content": "x", "at": "2024-01-02"} for turn in turns]
    assert texts(open_here(write_jsonl(tmp_path / "ok.jsonl", [{"messages": stamped}]))) == [
        ("x", "x")
    ]


# ----------------------------------------------------------------------------- splits and folders


def test_splits_are_chosen_by_name(tmp_path: Path, open_here: Open) -> None:
    folder = as_folder_of_jsonl(tmp_path)
    assert len(open_here(folder)) == 12  # train, where there is one
    assert len(open_here(folder, split="test")) == 1
    assert len(open_here(folder, split="train[:25%]")) == 3
    assert len(open_here(folder, split="train+test")) == 13
    with pytest.raises(ConfigError, match=r"no split 'tset' \(did you mean 'test'\?\); splits: "):
        open_here(folder, split="tset")
    saved = as_saved_dict(tmp_path)
    assert len(open_here(saved, split="test")) == 1
    for unknown in ("dev", "train[:25%]"):
        with pytest.raises(ConfigError, match=r"no split '.*'.*; splits: train, test"):
            open_here(saved, split=unknown)


def test_without_train_the_only_split_is_taken_and_two_must_be_chosen_from(
    tmp_path: Path, open_here: Open
) -> None:
    write_jsonl(tmp_path / "d" / "test.jsonl", ROWS)
    assert len(open_here(tmp_path / "d")) == 12
    write_jsonl(tmp_path / "d" / "validation.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"which split\?.*choose with split:NAME"):
        open_here(tmp_path / "d")


def test_options_that_mean_nothing_for_a_form_are_refused(tmp_path: Path, open_here: Open) -> None:
    file, saved = as_jsonl(tmp_path), as_saved_dataset(tmp_path)
    assert len(open_here(file, split="train")) == 12
    with pytest.raises(ConfigError, match="a single file has no configurations"):
        open_here(file, split="test")
    with pytest.raises(ConfigError, match="a single file has no configurations"):
        open_here(file, name="main")
    with pytest.raises(ConfigError, match="has no splits"):
        open_here(saved, split="train")
    with pytest.raises(ConfigError, match="has no configurations"):
        open_here(saved, name="main")
    with pytest.raises(ConfigError, match="revision is for datasets of the hub"):
        open_here(file, revision="main")


def test_a_folder_with_a_card_has_a_license_and_configurations(
    tmp_path: Path, open_here: Open
) -> None:
    write_jsonl(tmp_path / "d/easy.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "d/hard.jsonl", ROWS)
    (tmp_path / "d/README.md").write_text(CARD)
    source = open_here(tmp_path / "d", name="hard")
    assert len(source) == 12
    assert source.license == "apache-2.0"
    assert source.name == "d[name:hard]"
    assert open_here(tmp_path / "d", name="easy", license="MIT").license == "MIT"
    with pytest.raises(TideError, match=r"(?s)d: cannot be read: .*easy.*hard"):
        open_here(tmp_path / "d")


def test_a_license_known_to_the_data_itself_is_kept(tmp_path: Path, open_here: Open) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.info.license = "cc-by-4.0"
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert open_here(tmp_path / "saved").license == "cc-by-4.0"
    assert open_here(as_jsonl(tmp_path)).license is None


def test_files_of_a_folder_that_are_not_read_are_named(
    tmp_path: Path, open_here: Open, caplog: pytest.LogCaptureFixture
) -> None:
    folder = as_folder_of_jsonl(tmp_path)
    with caplog.at_level(logging.WARNING, logger="stage1_teacher"):
        open_here(folder)
        assert not caplog.records
        (folder / "extra.csv").write_text("prompt,response\na,b\n")
        open_here(folder)
    assert caplog.messages == [f"{folder}: 1 data files are not read: extra.csv"]


def test_what_is_read_is_said_in_the_log(
    tmp_path: Path, open_here: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="stage1_teacher"):
        open_here(as_jsonl(tmp_path), filters={"lang": "go"})
    assert caplog.messages == [
        "chat.jsonl[lang:go]: 4 of 12 rows, prompt in 'prompt', response in 'response',"
        " license unknown"
    ]


# ---------------------------------------------------------------------------------------- filters


def test_a_label_is_filtered_by_its_name(tmp_path: Path, open_here: Open) -> None:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "response": datasets.Value("string"),
            "topic": datasets.ClassLabel(names=["art", "math"]),
        }
    )
    rows = [{"prompt": str(i), "response": "r", "topic": i % 2} for i in range(5)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    assert [
        prompt for prompt, _ in texts(open_here(tmp_path / "d", filters={"topic": "math"}))
    ] == [
        "1",
        "3",
    ]
    with pytest.raises(DataError, match=r"topic:sport matches no row.* are art \(3\), math \(2\)"):
        open_here(tmp_path / "d", filters={"topic": "sport"})


@pytest.mark.parametrize(
    ("filters", "kind", "message"),
    [
        (
            {"lang": "pyhton"},
            DataError,
            "filter lang:pyhton matches no row; the commonest values of 'lang' are"
            " go (4), python (4), rust (4)",
        ),
        (
            {"lang": "go", "prompt": "Question 0: où?"},
            DataError,
            "no row matches all filters (lang:go, prompt:Question 0: où?)",
        ),
        (
            {"topic": "go"},
            ConfigError,
            "filter on 'topic': no such column; columns: prompt, response, lang, level, checked",
        ),
        ({"lnag": "go"}, ConfigError, "no such column (did you mean 'lang'?)"),
        ({"spilt": "test"}, ConfigError, "no such column (did you mean 'split'?)"),
        ({"level": "high"}, ConfigError, "'high' cannot be compared with a column of type int64"),
    ],
)
def test_a_filter_that_cannot_work_is_named(
    tmp_path: Path,
    open_here: Open,
    filters: dict[str, str],
    kind: type[TideError],
    message: str,
) -> None:
    path = as_jsonl(tmp_path)
    with pytest.raises(kind) as error:
        open_here(path, filters=filters)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_null_matches_no_filter(tmp_path: Path, open_here: Open) -> None:
    rows = [row | {"lang": None} if i % 2 else row for i, row in enumerate(ROWS)]
    kept = open_here(write_jsonl(tmp_path / "d.jsonl", rows), filters={"lang": "python"})
    assert texts(kept) == pairs([row for row in rows if row["lang"] == "python"])
