"""Reading sources: the hub, without a network, in batches, in worker processes, real data."""

import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest

from stage1_teacher.mixture import SourceConfig, parse_mixture
from stage1_teacher.sources import Conversation, Source, open_source, sample_id
from tests.source_forms import (
    CARD,
    ROWS,
    Open,
    as_csv,
    as_folder_of_parquet,
    as_jsonl,
    as_saved_dict,
    run_python,
    write_jsonl,
)
from tide_cache.errors import DataError

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
