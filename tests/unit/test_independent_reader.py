"""The schemas are enough: a reader written from them alone reads what the product's reads.

And the tools that people have already read the rows: datasets, pandas, DuckDB.
"""

import ast
import shutil
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import pytest

from tests import independent_reader
from tests.cache_builders import (
    SetShape,
    numbered_from,
    save_tokenizer,
    write_cache,
    write_premasked,
)
from tests.payload_caches import PAYLOADS, make_cache
from tests.support import PROJECT_ROOT
from tide_cache.cache import Cache, open_cache
from tide_cache.codec_files import read_tensors
from tide_cache.manifest import CacheManifest
from tide_cache.merge import merge, plan_merge
from tide_cache.part import plan_part, pull_part
from tide_cache.payloads import num_entries, open_codecs
from tide_cache.payloads.candidates import NO_ID
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE, Transform, read_head
from tide_cache.rows import PremaskedRow, table_to_rows
from tide_cache.store import Store

FORMAT_1 = PROJECT_ROOT / "tests/data/format-1"
SETS = [*PAYLOADS, "format-1/positions", "format-1/chunks", "merged", "part"]


@pytest.fixture(scope="module", params=SETS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param.startswith("format-1/"):
        return FORMAT_1.parent / request.param / "cache"
    cache = tmp_path_factory.mktemp("caches") / "cache"
    if request.param == "part":
        make_cache(cache.with_name("whole"), next(iter(PAYLOADS)))
        return pulled_part(cache.with_name("whole"), cache)
    if request.param == "merged":
        return merged(cache)
    make_cache(cache, request.param)
    return cache


def pulled_part(whole: Path, folder: Path) -> Path:
    """The second view of a set, numbered anew: format 3."""
    plan = plan_part(open_cache(whole).manifest, views=[1], payloads=None)
    pull_part(plan, Store(whole), Store(folder))
    return folder


def merged(folder: Path) -> Path:
    """Two sets over different samples as one: format 3."""
    save_tokenizer(folder.with_name("tokenizer"))
    urls = []
    for number in range(2):
        premasked, cache = (folder.with_name(f"{kind}-{number}") for kind in ("p", "c"))
        shape = SetShape(num_samples=9 + number, samples_per_task=4)
        write_premasked(
            premasked, folder.with_name("tokenizer"), shape, change=numbered_from(100 * number)
        )
        write_cache(cache, premasked, k=7, mean_logits=True)
        urls.append(str(cache))
    merge(plan_merge(urls), Store(folder))
    return folder


def test_it_is_short_and_knows_nothing_of_the_program() -> None:
    text = Path(independent_reader.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    assert {name.split(".")[0] for name in names} <= {
        "json", "struct", "zlib", "collections", "pathlib", "typing", "numpy", "pyarrow"
    }  # fmt: skip


def test_both_readers_find_the_same(folder: Path) -> None:
    manifest, tensors, theirs = independent_reader.read_set(folder)
    cache = open_cache(folder)
    ours = [
        row for shard in cache.manifest.shards for row in rows_of(cache, shard.task, shard.view)
    ]
    assert len(theirs) == len(ours) == manifest["counts"]["num_rows"]
    column = {"positions": "align_runs", "chunks": "chunks"}[manifest["alignment"]]
    for row, their in zip(ours, theirs, strict=True):
        for name in ("sample_id", "source", "view", "timestep", "prompt_length"):
            assert getattr(row, name) == their[name]
        np.testing.assert_array_equal(row.student_ids_L, their["student_ids"])
        np.testing.assert_array_equal(row.teacher_ids_L, their["teacher_ids"])
        np.testing.assert_array_equal(row.student_mask_L, their["student_mask"])
        np.testing.assert_array_equal(row.half_a_L, their["half_a"])
        np.testing.assert_array_equal(row.alignment_RX, their[column])
    check_payloads(cache, theirs)
    check_tensors(cache, tensors)


def rows_of(cache: Cache, task: int, view: int) -> list[PremaskedRow]:
    """The rows of a shard, read by number."""
    before = sum(s.num_rows for s in cache.manifest.shards if s.view == view and s.task < task)
    (shard,) = [s for s in cache.manifest.shards if (s.task, s.view) == (task, view)]
    table = cache.read_rows(view, range(before, before + shard.num_rows))
    return table_to_rows(table, cache.manifest.alignment)


def check_payloads(cache: Cache, theirs: list[dict[str, Any]]) -> None:
    """Compare every payload, value for value, view by view."""
    manifest = cache.manifest
    assert isinstance(manifest, CacheManifest)
    codecs = open_codecs(cache.store, manifest)
    for view in range(cache.num_views):
        table = cache.read_rows(view, range(cache.num_samples))
        rows = table_to_rows(table, manifest.alignment)
        num_B = np.array([num_entries(row, manifest.alignment) for row in rows], dtype=np.int64)
        assert num_B.sum() > 10
        their_rows = [row for row in theirs if row["view"] == view]

        def joined(name: str, their_rows: list[dict[str, Any]] = their_rows) -> np.ndarray:
            return np.concatenate([row[name] for row in their_rows if len(row[name])])

        if codecs.chunks is not None:
            found = codecs.chunks.decode(table, num_B)
            np.testing.assert_array_equal(found, joined("chunk_logprob"))
        if codecs.candidates is not None:
            answers = codecs.candidates.decode(table, num_B)
            their_ids = [ids for row in their_rows for ids in row["cand_ids"]]
            their_logits = [logits for row in their_rows for logits in row["cand_logits"]]
            for ids_K, logits_K, ids, logits in zip(
                answers.ids_PK, answers.logits_PK, their_ids, their_logits, strict=True
            ):
                np.testing.assert_array_equal(ids_K[ids_K != NO_ID], ids)
                np.testing.assert_array_equal(logits_K[ids_K != NO_ID], logits)
            np.testing.assert_array_equal(answers.logsumexp_PT, joined("cand_logsumexp"))
            np.testing.assert_array_equal(answers.label_logprob_P, joined("cand_label_logprob"))
            if answers.tail_logshare_PT is not None:
                np.testing.assert_array_equal(answers.tail_logshare_PT, joined("cand_tail"))
        if codecs.hidden is not None:
            facts = codecs.hidden.facts
            tensors = read_tensors(cache.store, manifest.files, TRANSFORM_FILE)
            hidden_PD = Transform.from_tensors(facts, tensors).to_hidden(
                codecs.hidden.decode(table, num_B)
            )
            # float32 sums over 9 components, in whatever order BLAS takes them.
            np.testing.assert_allclose(joined("hidden"), hidden_PD, rtol=1e-5, atol=1e-3)


def check_tensors(cache: Cache, theirs: dict[str, np.ndarray]) -> None:
    for facts in cache.manifest.files:
        if facts.path.startswith("codec/"):
            stem = Path(facts.path).stem
            for name, tensor in read_tensors(cache.store, cache.manifest.files, facts.path).items():
                np.testing.assert_array_equal(theirs[f"{stem}.{name}"], tensor)
    manifest = cache.manifest
    if isinstance(manifest, CacheManifest) and manifest.hidden is not None:
        head = read_tensors(cache.store, manifest.files, HEAD_FILE)
        weight_VD, bias_V = read_head(head, manifest.hidden, where=HEAD_FILE)
        np.testing.assert_array_equal(weight_VD, theirs["head.weight"])
        assert bias_V is not None
        np.testing.assert_array_equal(bias_V, theirs["head.bias"])


def test_the_tools_that_people_have_read_the_rows(folder: Path, tmp_path: Path) -> None:
    # Hub metadata of a checkout is none of the set's; a copy has just its files.
    copy = shutil.copytree(folder, tmp_path / "copy")
    _, _, rows = independent_reader.read_set(copy)
    expected = {(row["sample_id"], row["view"]): row["student_ids"].tolist() for row in rows}
    assert len(expected) == len(rows)

    loaded = datasets.load_dataset(str(copy), split="train", cache_dir=str(tmp_path / "hub"))
    found = {(r["sample_id"], r["view"]): r["student_ids"] for r in loaded}
    assert found == expected

    frames = [pd.read_parquet(path) for path in sorted(copy.glob("data/*/*.parquet"))]
    frame = pd.concat(frames)
    assert {
        (sample, view): ids.tolist()
        for sample, view, ids in zip(
            frame["sample_id"], frame["view"], frame["student_ids"], strict=True
        )
    } == expected

    query = f"select sample_id, view, student_ids from read_parquet('{copy}/data/*/*.parquet')"
    found = {(sample, view): ids for sample, view, ids in duckdb.sql(query).fetchall()}
    assert found == expected
