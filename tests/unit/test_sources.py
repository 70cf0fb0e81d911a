"""Every form of chat data gives the same source, and every broken one its own error."""

import gzip
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stage1_teacher.conversations import DROP_REASONS
from stage1_teacher.mixture import SourceConfig, parse_mixture
from stage1_teacher.sources import Conversation, Dropped, Source, open_source, sample_id
from tests.support import PROJECT_ROOT
from tide_cache.errors import ConfigError, DataError, TideError

ROWS = [
    {
        "prompt": f"Question {i}: où?",
        "response": "007" if i == 3 else f"Answer {i}\r\n",
        "lang": ["python", "go", "rust"][i % 3],
        "level": i // 4,
        "checked": i % 2 == 0,
    }
    for i in range(12)
]

Open = Callable[..., Source]


@pytest.fixture
def open_here(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """`open_source` of a path with options, with a cache of its own."""
    cache_dir = tmp_path_factory.mktemp("datasets-cache")

    def open_path(path: Any, **options: Any) -> Source:
        return open_source(SourceConfig(path=str(path), **options), cache_dir=cache_dir)

    return open_path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(source: Source) -> list[Any]:
    """Prompt and response of every row, or its reason to be dropped."""
    read = [source.conversation(index) for index in range(len(source))]
    return [
        row.reason if isinstance(row, Dropped) else tuple(m["content"] for m in row.messages)
        for row in read
    ]


def pairs(rows: list[dict[str, Any]]) -> list[Any]:
    return [(row["prompt"], row["response"]) for row in rows]


# ------------------------------------------------------------------------------------- the forms


def as_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "chat.jsonl", ROWS)


def as_gzip(folder: Path) -> Path:
    path = folder / "chat.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return path


def as_zstd(folder: Path) -> Path:
    path = folder / "chat.jsonl.zst"
    path.write_bytes(zstandard.compress(as_jsonl(folder).read_bytes()))
    return path


def as_json_document(folder: Path) -> Path:
    path = folder / "chat.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def as_parquet(folder: Path) -> Path:
    path = folder / "chat.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def as_csv(folder: Path) -> Path:
    path = folder / "chat.csv"
    datasets.Dataset.from_list(ROWS).to_pandas().to_csv(path, index=False, lineterminator="\n")
    return path


def as_tsv(folder: Path) -> Path:
    path = folder / "chat.tsv"
    frame = datasets.Dataset.from_list(ROWS).to_pandas()
    frame.to_csv(path, index=False, sep="\t", lineterminator="\n")
    return path


def as_arrow(folder: Path) -> Path:
    path = folder / "chat.arrow"
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def as_saved_dataset(folder: Path) -> Path:
    path = folder / "saved"
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(str(path))
    return path


def as_saved_dict(folder: Path) -> Path:
    path = folder / "saved"
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return path


def as_folder_of_jsonl(folder: Path) -> Path:
    write_jsonl(folder / "chat" / "train-00.jsonl", ROWS[:5])
    write_jsonl(folder / "chat" / "train-01.jsonl", ROWS[5:])
    write_jsonl(folder / "chat" / "test.jsonl", ROWS[:1])
    return folder / "chat"


def as_folder_of_tsv(folder: Path) -> Path:
    (folder / "chat").mkdir()
    as_tsv(folder / "chat")
    return folder / "chat"


def as_folder_of_parquet(folder: Path) -> Path:
    (folder / "chat" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "chat/data/train-00000-of-00001.parquet")
    return folder / "chat"


FORMS = [
    as_jsonl,
    as_gzip,
    as_zstd,
    as_json_document,
    as_parquet,
    as_csv,
    as_tsv,
    as_arrow,
    as_saved_dataset,
    as_saved_dict,
    as_folder_of_jsonl,
    as_folder_of_tsv,
    as_folder_of_parquet,
]


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


CARD = """---
license: apache-2.0
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files: hard.jsonl
---
# A card
"""


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


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "d.jsonl: empty source (no rows)"),
        ("d.jsonl", b" \n\n", "d.jsonl: empty source (no rows)"),
        ("d.json", b"[]", "d.json: empty source (no rows)"),
        ("d.csv", b"", "d.csv: empty source (no rows)"),
        ("d.csv", b"prompt,response\n", "d.csv: empty source (no rows)"),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n\n{"prompt":"a","resp\n{"prompt":"a"}\n',
            "d.jsonl, line 3: not valid JSON: ",
        ),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n{"prompt":"a","response":',
            "d.jsonl, line 2: not valid JSON: Expecting value (column 26)",
        ),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n["a","b"]\n',
            "d.jsonl, line 2: expected a JSON object per line, got list",
        ),
        (
            "d.jsonl",
            b'{"prompt":"a","response":"b"}\n{"prompt":"\\ud800","response":"b"}\n',
            "d.jsonl, line 2: an escape such as \\ud800 that is half a character",
        ),
        (
            "d.json",
            b'[\n{"prompt":"a","response":"b"},\n{"prompt":"a" "response":"b"}\n]',
            "d.json, line 3: not valid JSON: Expecting ',' delimiter",
        ),
        (
            "d.json",
            b'{"prompt":"a","response":"b"}\n{"prompt":"a"',
            "d.json, line 2: not valid JSON",
        ),
        ("d.jsonl.gz", b"no gzip", "d.jsonl.gz"),
        ("d.csv", b"prompt,response\na,b\na,b,c\n", "cannot be read: Error tokenizing data."),
        ("d.parquet", b"garbage", "d.parquet: cannot be read: Parquet file size is 7 bytes"),
        ("d.arrow", b"garbage", "d.arrow: cannot be read: "),
        ("d.txt", b"hello", "d.txt: unknown kind of file '.txt', expected .jsonl, .json,"),
        ("d.jsonl", b'{"text":"a"}\n', "expected one pair of chat columns, found none among text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(
    tmp_path: Path, open_here: Open, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_here(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert message in str(error.value)


def test_the_broken_file_of_a_folder_is_named(tmp_path: Path, open_here: Open) -> None:
    write_jsonl(tmp_path / "d/train-00.jsonl", ROWS)
    (tmp_path / "d/train-01.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"d/train-01\.jsonl, line 2: not valid JSON"):
        open_here(tmp_path / "d")


def test_a_truncated_gzip_file_is_named(tmp_path: Path, open_here: Open) -> None:
    path = as_gzip(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"chat\.jsonl\.gz.*(end-of-stream|EOF)"):
        open_here(path)


def test_tables_without_rows_are_empty_sources(tmp_path: Path, open_here: Open) -> None:
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "d.parquet")
    empty = datasets.Dataset.from_dict({"prompt": [], "response": []})
    empty.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("\n")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "splits" / "test.csv").write_text("prompt,response\n")
    for name, split in [("d.parquet", None), ("saved", None), ("folder", None), ("splits", "test")]:
        with pytest.raises(DataError, match=rf"{name}: empty source") as error:
            open_here(tmp_path / name, split=split)
        assert error.value.reason == "empty_source"


def test_a_missing_path_is_named_with_its_neighbours(tmp_path: Path, open_here: Open) -> None:
    as_jsonl(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean 'chat\.jsonl'\?\)"):
        open_here(tmp_path / "chta.jsonl")
    with pytest.raises(DataError, match=r"missing does not exist\)$"):
        open_here(tmp_path / "missing" / "chat.jsonl")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: no data files found"):
        open_here(tmp_path / "none")


def test_a_folder_that_looks_like_a_pattern_is_explained(tmp_path: Path, open_here: Open) -> None:
    write_jsonl(tmp_path / "we[ir]d" / "d.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no data files found; its name holds one of .*rename it"):
        open_here(tmp_path / "we[ir]d")


FULL_DISK = """
import resource, sys
from pathlib import Path
from stage1_teacher.mixture import SourceConfig
from stage1_teacher.sources import open_source
from tide_cache.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    open_source(SourceConfig(path=sys.argv[1]), cache_dir=Path(sys.argv[2]))
except StorageError as error:
    print(error)
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=PROJECT_ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_a_disk_that_takes_no_more_is_a_storage_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "big.jsonl", ROWS * 2000)
    done = run_python(FULL_DISK, str(path), str(tmp_path / "cache"))
    assert done.stdout.startswith(f"{path}: File too large (")
    assert "set HF_DATASETS_CACHE to a folder with room" in done.stdout


# --------------------------------------------------------------------------- hub, network, output

WITHOUT_NETWORK = """
import sys
tried = []
sys.addaudithook(lambda event, _: tried.append(event) if event.startswith("socket.") else None)
from pathlib import Path
from stage1_teacher.mixture import SourceConfig
from stage1_teacher.sources import open_source
for path in sys.argv[2:]:
    open_source(SourceConfig(path=path), cache_dir=Path(sys.argv[1])).scan()
assert not [event for event in tried if event in ("socket.connect", "socket.getaddrinfo")], tried
"""


def test_local_data_needs_no_network_and_prints_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "folder" / "train.jsonl", ROWS)
    paths = [as_jsonl(tmp_path), as_csv(tmp_path), as_saved_dict(tmp_path), tmp_path / "folder"]
    done = run_python(
        WITHOUT_NETWORK, str(tmp_path / "cache"), *map(str, paths), HF_HUB_OFFLINE="0"
    )
    assert done.stdout == ""
    assert "Generating" not in done.stderr


def test_progress_bars_are_left_as_they_were(tmp_path: Path, open_here: Open) -> None:
    assert not datasets.are_progress_bars_disabled()
    open_here(as_jsonl(tmp_path))
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        open_here(as_jsonl(tmp_path))
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()


FROM_THE_HUB = """
import sys
from pathlib import Path
from stage1_teacher.mixture import SourceConfig
from stage1_teacher.sources import open_source
source = open_source(SourceConfig(path="owner/chat"), cache_dir=Path(sys.argv[1]))
print(source.name, source.revision, source.license, source.scan().fingerprint)
"""


def test_a_dataset_of_the_hub_is_read_from_an_earlier_download(tmp_path: Path) -> None:
    """Offline, the same calls as online find what `datasets` and the hub's client left behind."""
    folder, cache_dir, hub = as_folder_of_parquet(tmp_path), tmp_path / "cache", tmp_path / "hub"
    local = open_source(SourceConfig(path=str(folder)), cache_dir=cache_dir)
    commit = "c0ffee" * 6 + "abcd"
    (downloaded,) = cache_dir.glob("**/*-train.arrow")
    shutil.copytree(downloaded.parent, cache_dir / "owner___chat" / "default" / "0.0.0" / commit)
    repository = hub / "datasets--owner--chat"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "README.md").write_text(CARD)
    done = run_python(FROM_THE_HUB, str(cache_dir), HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(hub))
    expected = ["owner/chat", commit, "apache-2.0", local.scan().fingerprint]
    assert done.stdout.split() == expected


@pytest.mark.skipif(not datasets.config.HF_HUB_OFFLINE, reason="would reach the hub")
def test_a_name_that_is_nowhere_is_refused(
    tmp_path: Path, open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write_jsonl(tmp_path / "owner" / "chats.jsonl", ROWS)
    with pytest.raises(DataError) as error:
        open_here("owner/chat")
    assert str(error.value).startswith(
        "owner/chat: no such file or folder (did you mean 'chats.jsonl'?); the hub says: Couldn't"
    )
    assert error.value.hint == "HF_HUB_OFFLINE is set"
    # A reader of `datasets` by that name exists; it must not read the working directory.
    with pytest.raises(DataError, match=r"json: no such file or folder$"):
        open_here("json")


# --------------------------------------------------------------------------------------- reading


def test_batches_give_what_single_rows_give(tmp_path: Path, open_here: Open) -> None:
    rows = [{"prompt": f"q{i}", "response": None if i % 7 == 0 else f"a{i}"} for i in range(700)]
    source = open_here(write_jsonl(tmp_path / "d.jsonl", rows))
    indices = np.random.default_rng(0).permutation(700)[:600]
    assert list(source.conversations(indices.tolist())) == [
        source.conversation(int(index)) for index in indices
    ]
    assert list(source.conversations([])) == []
    assert source.scan().num_dropped == {"content_null": 100}
    for outside in (-1, 700):
        with pytest.raises(IndexError):
            source.conversation(outside)
        with pytest.raises(IndexError, match=rf"row {outside} of 700"):
            list(source.conversations([0, outside]))


def ids_of(source: Source, start: int, stop: int) -> list[bytes]:
    read = source.conversations(range(start, stop))
    return [sample_id(row.messages).encode() for row in read if isinstance(row, Conversation)]


def test_a_source_travels_to_worker_processes(tmp_path: Path, open_here: Open) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS * 1000)
    source = open_here(path, filters={"checked": True})
    # Row numbers where rows are left out, and never the text.
    assert len(pickle.dumps(source)) < 8 * len(source) + 4000
    assert len(pickle.dumps(open_here(path))) < 4000
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(ids_of, source, start, start + 3000) for start in (0, 3000)]
        ids = [sample for part in parts for sample in part.result()]
    assert ids == source.scan().sample_id_R.tolist()


@pytest.mark.parametrize(
    ("line", "num_rows", "start"),
    [
        ("gsm8k/train.jsonl", 7473, "Natalia sold clips"),
        ("mbpp/mbpp.jsonl[prompt_column:text,response_column:code]", 974, "Write a function to"),
        (
            "humaneval/HumanEval.jsonl[prompt_column:prompt,response_column:canonical_solution]",
            164,
            "from typing import List",
        ),
    ],
)
def test_real_data(shared_dir: Path, tmp_path: Path, line: str, num_rows: int, start: str) -> None:
    (config,) = parse_mixture(line)
    config = config.model_copy(update={"path": str(shared_dir / "data" / config.path)})
    source = open_source(config, cache_dir=tmp_path)
    scan = source.scan()
    assert len(source) == num_rows
    assert scan.num_dropped == {}
    first = source.conversation(0)
    assert isinstance(first, Conversation)
    assert first.messages[0]["content"].lstrip().startswith(start)
    assert first.messages[0]["role"] == "user"
    rows = [json.loads(line) for line in Path(config.path).read_text().splitlines()]
    prompt, response = source.layout.columns
    assert scan.sample_id_R[-1].decode() == sample_id(
        [
            {"role": "user", "content": rows[-1][prompt]},
            {"role": "assistant", "content": rows[-1][response]},
        ]
    )
