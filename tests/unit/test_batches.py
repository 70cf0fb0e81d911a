"""Rows become tensors: equal to the row-by-row reading, and nothing unchecked becomes an index."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from stage2_student.attention import BY_ROWS
from stage2_student.batches import BatchReader, InputForm, decode_rows
from stage2_student.compatibility import candidates_facts, candidates_reading
from stage2_student.teacher_rows import CandidatesReading, TeacherReading, read_mean_logits
from tests.cache_builders import (
    MASK_ID,
    NUM_IDS,
    SetShape,
    active_chunks,
    changed,
    make_workshop,
    save_tokenizer,
    teacher_chunk_logprobs,
    teacher_logits,
    write_cache,
    write_premasked,
)
from tide_cache.alignment import payload_positions, teacher_partners
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import DataError, FormatError, TideError
from tide_cache.manifest import CacheManifest
from tide_cache.payloads import open_codecs
from tide_cache.payloads.candidates_raw import RawCandidates
from tide_cache.rows import PremaskedRow, row_schema, rows_to_table, table_to_rows

SHAPE = SetShape(num_samples=30, ragged=True, lone_share=0.5)


def reader(cache: Cache, teacher: TeacherReading | None) -> BatchReader:
    form = InputForm(
        block_size=cache.manifest.block_size,
        mask_token_id=MASK_ID,
        attention=BY_ROWS,
        device=torch.device("cpu"),
    )
    return BatchReader(cache, form=form, teacher=teacher)


def with_teacher(cache: Cache) -> BatchReader:
    manifest = cache.manifest
    assert isinstance(manifest, CacheManifest)
    codecs = open_codecs(cache.store, manifest)
    reading = TeacherReading(
        alignment=manifest.alignment,
        candidates=None
        if codecs.candidates is None
        else candidates_reading(cache, codecs, tail="auto"),
        chunks=codecs.chunks,
    )
    return reader(cache, reading)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return open_cache(make_workshop(tmp_path_factory.mktemp("set"), SHAPE).cache)


def rows_of(cache: Cache, view: int, rows: Sequence[int]) -> list[PremaskedRow]:
    return table_to_rows(cache.read_rows(view, rows), "positions")


def some_rows() -> list[tuple[int, list[int]]]:
    random = np.random.default_rng(4)
    return [(n % 2, random.permutation(30)[: 1 + 3 * n].tolist()) for n in range(8)]


@pytest.mark.parametrize(("view", "numbers"), some_rows())
def test_a_batch_says_what_its_rows_say(cache: Cache, view: int, numbers: list[int]) -> None:
    batch = with_teacher(cache).read(view, np.array(numbers))
    flat = 0
    for number, row in enumerate(rows_of(cache, view, numbers)):
        assert int(batch.labelled_per_row_B[number]) == len(row.student_ids_L) - row.prompt_length
        for position in np.flatnonzero(row.student_mask_L).tolist():
            token = int(batch.masked_index_P[flat])
            assert int(batch.input_ids_1N[0, token]) == MASK_ID
            assert int(batch.position_ids_1N[0, token]) == position
            assert int(batch.labels_P[flat]) == row.student_ids_L[position]
            assert int(batch.row_P[flat]) == number
            assert float(batch.timestep_P[flat]) == np.float32(row.timestep)
            flat += 1
    assert flat == batch.num_masked
    assert batch.num_tokens == sum(len(row.student_ids_L) for row in rows_of(cache, view, numbers))
    assert batch.num_filled == 0


@pytest.mark.parametrize(("view", "numbers"), some_rows())
def test_the_teacher_stands_at_its_positions(cache: Cache, view: int, numbers: list[int]) -> None:
    batch = with_teacher(cache).read(view, np.array(numbers))
    rows = rows_of(cache, view, numbers)
    expected_QV = np.concatenate([teacher_logits(row) for row in rows])
    assert batch.teacher.candidates is not None
    assert np.array_equal(batch.teacher.candidates.dense(2.0).numpy(), expected_QV)
    at_Q = []  # the entries of P that have a partner
    offset = 0
    for row in rows:
        masked = np.flatnonzero(row.student_mask_L)
        wanted = payload_positions(row.student_mask_L, row.alignment_RX)
        at_Q += [offset + int(np.searchsorted(masked, p)) for p in wanted]
        offset += len(masked)
    assert batch.teacher.index_Q.tolist() == at_Q


@pytest.fixture(scope="module")
def chunk_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    shape = replace(SHAPE, alignment="chunks", lone_share=0.0)
    folder = tmp_path_factory.mktemp("chunks")
    return open_cache(make_workshop(folder, shape, payloads=("chunks",)).cache)


@pytest.mark.parametrize(("view", "numbers"), some_rows())
def test_active_chunks_stand_at_their_tokens(
    chunk_cache: Cache, view: int, numbers: list[int]
) -> None:
    batch = with_teacher(chunk_cache).read(view, np.array(numbers))
    rows = table_to_rows(chunk_cache.read_rows(view, numbers), "chunks")
    assert batch.teacher.chunks is not None
    assert batch.teacher.candidates is None
    index_E: list[int] = []
    chunk_E: list[int] = []
    timestep_C: list[float] = []
    offset = 0
    for row in rows:
        masked = np.flatnonzero(row.student_mask_L).tolist()
        for start, end, _, _ in active_chunks(row).tolist():
            index_E += [offset + masked.index(p) for p in range(start, end)]
            chunk_E += [len(timestep_C)] * (end - start)
            timestep_C.append(float(np.float32(row.timestep)))
        offset += len(masked)
    assert batch.teacher.chunks.index_E.tolist() == index_E
    assert batch.teacher.chunks.chunk_E.tolist() == chunk_E
    assert batch.teacher.chunks.timestep_C.tolist() == timestep_C
    expected_C = np.concatenate([teacher_chunk_logprobs(row) for row in rows])
    assert np.array_equal(batch.teacher.chunks.logprob_C.numpy(), expected_C)


def test_the_chunk_set_has_every_kind_of_chunk(chunk_cache: Cache) -> None:
    rows = table_to_rows(chunk_cache.read_rows(1, range(30)), "chunks")
    straddling = [r for r in rows for a, b, _, _ in r.alignment_RX if a < r.prompt_length < b]
    sizes = {int(b - a) for r in rows for a, b, _, _ in active_chunks(r)}
    outside = sum(int(r.student_mask_L.sum()) for r in rows) - sum(
        int(b - a) for r in rows for a, b, _, _ in active_chunks(r)
    )
    assert straddling
    assert sizes == {1, 2, 3}
    assert outside > 0


def test_with_one_tokenizer_each_position_is_a_chunk(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, SHAPE, payloads=("candidates", "chunks"))
    batch = with_teacher(open_cache(workshop.cache)).read(1, np.arange(30))
    chunks = batch.teacher.chunks
    assert chunks is not None
    assert torch.equal(chunks.index_E, batch.teacher.index_Q)
    assert chunks.chunk_E.tolist() == list(range(len(chunks.logprob_C)))
    assert torch.equal(chunks.timestep_C, batch.timestep_P[chunks.index_E])


def test_a_part_of_a_chunk_is_refused(tmp_path: Path) -> None:
    def unmask_one(row: PremaskedRow) -> PremaskedRow:
        for start, end, _, _ in active_chunks(row).tolist():
            if end - start > 1:
                mask_L = row.student_mask_L.copy()
                mask_L[start] = False
                return replace(row, student_mask_L=mask_L, half_a_L=row.half_a_L & mask_L)
        return row

    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    shape = SetShape(num_samples=9, num_views=1, alignment="chunks")
    write_premasked(tmp_path / "set", tokenizer, shape, change=unmask_one)
    write_cache(tmp_path / "cache", tmp_path / "set", payloads=("chunks",))
    with pytest.raises(DataError, match="student_mask: expected whole chunks, got a part"):
        with_teacher(open_cache(tmp_path / "cache")).read(0, np.arange(9))


def test_some_rows_of_the_set_have_lone_positions(cache: Cache) -> None:
    batch = with_teacher(cache).read(1, np.arange(30))
    assert 0 < len(batch.teacher.index_Q) < batch.num_masked
    row = next(r for r in rows_of(cache, 1, range(30)) if len(r.alignment_RX) > 1)
    assert (teacher_partners(row.alignment_RX, len(row.student_ids_L)) == -1).sum() == 2


class WatchedCache(Cache):
    """Remembers which columns were asked for."""

    asked: tuple[str, ...] = ()

    def read_rows(self, view: int, rows: Any, columns: Sequence[str] = ()) -> pa.Table:
        self.asked = tuple(columns)
        return super().read_rows(view, rows, columns)


def test_only_the_columns_of_the_losses_are_read(cache: Cache) -> None:
    watched = WatchedCache(cache.store, cache.manifest)
    reader(watched, None).read(0, np.arange(3))
    rows = {"sample_id", "student_ids", "prompt_length", "student_mask", "timestep"}
    assert set(watched.asked) == rows
    with_teacher(watched).read(0, np.arange(3))
    payload = {"cand_ids", "cand_logits", "cand_logsumexp", "cand_label_logprob", "cand_crc32"}
    assert set(watched.asked) == rows | payload | {"align_runs"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_ids_L": np.array([2, 3, NUM_IDS, 4], np.int32)}, "position 2: student_ids"),
        ({"student_ids_L": np.array([2, -1, 5, 4], np.int32)}, "position 1: student_ids"),
        ({"prompt_length": 5}, "prompt_length: expected 0..4, got 5"),
        ({"prompt_length": -1}, "prompt_length: expected 0..4, got -1"),
        ({"timestep": 0.0}, "timestep: expected in"),
        ({"timestep": float("nan")}, "timestep: expected in"),
        ({"prompt_length": 3}, "student_mask: expected only positions from 3"),
        ({"alignment_RX": np.array([[0, 0, 9]], np.int32)}, r"alignment entry 0 = \[0, 9\)"),
        ({"alignment_RX": np.array([[-2, 0, 3]], np.int32)}, r"alignment entry 0 = \[-2, 1\)"),
    ],
)
def test_a_row_out_of_bounds_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    good = changed(
        student_ids_L=np.array([2, 3, 5, 4], np.int32),
        teacher_ids_L=np.array([2, 3, 5, 4], np.int32),
        prompt_length=1,
        student_mask_L=np.array([False, False, True, True]),
        half_a_L=np.zeros(4, bool),
        alignment_RX=np.array([[0, 0, 4]], np.int32),
    )

    def spoil(row: PremaskedRow) -> PremaskedRow:
        row = good(row)
        return replace(row, **changes) if row.sample_id.endswith("3") else row

    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    shape = SetShape(num_samples=5, num_views=1)
    clean, spoilt = tmp_path / "clean", tmp_path / "spoilt"
    write_premasked(clean, tokenizer, shape, change=good)
    write_cache(tmp_path / "cache", clean)
    assert with_teacher(open_cache(tmp_path / "cache")).read(0, np.arange(5)).num_masked == 10
    write_premasked(spoilt, tokenizer, shape, change=spoil)
    facts = candidates_facts(open_cache(tmp_path / "cache").manifest)
    assert facts is not None
    codec = RawCandidates(facts)
    # Rows of the spoilt set with the payload columns of the clean one.
    table = open_cache(spoilt).read_rows(0, range(5))
    payload = open_cache(tmp_path / "cache").read_rows(0, range(5))
    for field in payload.schema:
        if field.name.startswith("cand_"):
            table = table.append_column(field, payload[field.name])

    class Spoilt(Cache):
        def read_rows(self, view: int, rows: Any, columns: Sequence[str] = ()) -> pa.Table:
            return table.select(list(columns)) if columns else table

    opened = open_cache(spoilt)
    candidates = CandidatesReading(codec=codec, tail="uniform", mean_logits_V=None)
    reading = TeacherReading(alignment="positions", candidates=candidates)
    with pytest.raises(DataError, match=f"sample 0*3 view 0.*{message}"):
        reader(Spoilt(opened.store, opened.manifest), reading).read(0, np.arange(5))


def hostile(column: str, values: list[Any]) -> pa.Table:
    """Two good rows of 10 positions, one column of which is replaced."""
    row = PremaskedRow(
        sample_id="s",
        source="made",
        view=0,
        timestep=0.5,
        student_ids_L=np.arange(2, 12, dtype=np.int32),
        prompt_length=2,
        student_mask_L=np.arange(10) > 6,
        half_a_L=np.zeros(10, bool),
        teacher_ids_L=np.arange(2, 12, dtype=np.int32),
        alignment_RX=np.array([[0, 0, 10]], np.int32),
    )
    table = rows_to_table([row, row], "positions")
    at = table.schema.get_field_index(column)
    field = row_schema("positions").field(column).with_nullable(True)
    return table.set_column(at, field, pa.array(values, field.type))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("student_mask", [b"\x80\x03", b"\x80"], "a mask of the wrong size"),
        ("student_mask", [b"\x80\x03\x00", b"\x80"], "a mask of the wrong size"),
        ("student_mask", [b"\x80\x07", b"\x80\x03"], "bits set behind the last position"),
        ("student_mask", [b"\x83\x03", b"\x80\x03"], "set outside the labelled part"),
        ("student_mask", [None, b"\x80\x03"], "a missing value"),
        ("student_ids", [list(range(2, 12)), []], "a row without ids"),
        ("student_ids", [list(range(2, 12)), None], "a missing value"),
        ("timestep", [0.5, 1.5], "timestep"),
    ],
)
def test_hostile_columns_are_refused(column: str, values: list[Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        decode_rows(hostile(column, values), num_ids=NUM_IDS)


def test_a_good_table_passes_the_same_way() -> None:
    rows = decode_rows(hostile("timestep", [0.5, 1.0]), num_ids=NUM_IDS)
    assert rows.masked_BL.sum(axis=1).tolist() == [3, 3]


DAMAGES = [
    ("cand_ids", lambda data: data[:-4], "cand_ids: expected .* bytes"),
    ("cand_ids", lambda data: b"\xff" * len(data), "cand_ids: expected ids in 0..38"),
    ("cand_logits", lambda data: b"\xff" * len(data), "cand_logits: expected numbers"),
    ("cand_logsumexp", lambda data: data + data, "cand_logsumexp: expected .* bytes"),
]


# Without a checksum, and behind one that a forger made right.
@pytest.mark.parametrize("sealing", [{"codec_version": 1}, {"reseal": True}])
@pytest.mark.parametrize(("column", "spoil", "message"), DAMAGES)
def test_a_damaged_payload_names_its_sample(
    tmp_path: Path, column: str, spoil: Any, message: str, sealing: dict[str, Any]
) -> None:
    workshop = make_workshop(
        tmp_path,
        SetShape(num_samples=4, num_views=1),
        spoil=lambda name, data: spoil(data) if name == column and data else data,
        **sealing,
    )
    with pytest.raises(FormatError, match=rf"sample 0+\d view 0: {message}"):
        with_teacher(open_cache(workshop.cache)).read(0, np.arange(4))


@pytest.mark.parametrize(
    ("payload", "column"),
    [
        ("candidates", "cand_logits"),
        ("candidates", "cand_label_logprob"),
        ("candidates", "cand_crc32"),
        ("chunks", "chunk_logprob"),
        ("chunks", "chunk_crc32"),
    ],
)
def test_a_changed_bit_is_noticed_and_names_its_sample(
    tmp_path: Path, payload: str, column: str
) -> None:
    """In no way out of bounds: the lowest bit of a number in one row out of four."""
    seen = []

    def flip(name: str, cell: bytes) -> bytes:
        if name != column or not cell:
            return cell
        seen.append(cell)
        return bytes([cell[0] ^ 1]) + cell[1:] if len(seen) == 2 else cell

    shape = SetShape(num_samples=4, num_views=1)
    workshop = make_workshop(tmp_path, shape, payloads=(payload,), spoil=flip)
    crc = "cand_crc32" if payload == "candidates" else "chunk_crc32"
    with pytest.raises(FormatError, match=rf"sample 0+[1-3] view 0: {crc}: .* was changed"):
        with_teacher(open_cache(workshop.cache)).read(0, np.arange(4))


def test_mean_logits_are_held_against_the_manifest(tmp_path: Path) -> None:
    cache = open_cache(make_workshop(tmp_path, k=5, mean_logits=True).cache)
    facts = candidates_facts(cache.manifest)
    assert facts is not None
    assert read_mean_logits(cache, facts).shape == (39,)
    path = tmp_path / "cache/codec/candidates.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(FormatError, match=r"candidates\.safetensors: sha256 mismatch"):
        read_mean_logits(cache, facts)


def test_a_batch_without_targets_keeps_its_rows_and_counts_nothing(cache: Cache) -> None:
    batch = with_teacher(cache).read(1, np.arange(6))
    empty = batch.without_targets()
    assert torch.equal(empty.input_ids_1N, batch.input_ids_1N)
    counts: list[int] = [empty.num_masked, len(empty.teacher.index_Q), empty.num_tokens]
    assert [*counts, int(empty.labelled_per_row_B.sum())] == [0, 0, 0, 0]


def test_an_unknown_sample_is_no_silent_pass(cache: Cache) -> None:
    with pytest.raises(IndexError, match="rows outside"):
        reader(cache, None).read(0, np.array([30]))
    with pytest.raises((TideError, IndexError)):
        reader(cache, None).read(7, np.array([0]))
