"""Small sets to train from, written through the product's own writer, without stage 1.

A tokenizer of 40 ids in a folder, rows whose ids depend on the sample and whose masks on the view,
and a "teacher" that is a fixed random function of (sample, view), so that a test can ask for the
same logits online that the cache holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.payload_builders import (
    encode,
    from_cells,
    logsumexp,
    resealed,
    to_cells,
    top_candidates,
)
from tests.set_builders import premasked_header
from tide_cache.alignment import chunk_active, chunk_masked, fill, payload_positions
from tide_cache.cache import open_cache
from tide_cache.manifest import CacheHeader, Header, Manifest, TeacherFacts, TokenizerFacts
from tide_cache.payload_facts import CandidatesFacts, ChunksFacts, PayloadFacts
from tide_cache.payloads import Codec, make_codecs, num_entries
from tide_cache.payloads.candidates import CODEC_FILE, MEAN_LOGITS_TENSOR, Candidates
from tide_cache.payloads.candidates_raw import RawCandidates
from tide_cache.payloads.chunks import RawChunks
from tide_cache.rows import AlignmentKind, PremaskedRow, rows_to_table, table_to_rows
from tide_cache.shards import read_shard
from tide_cache.store import Store
from tide_cache.tokenizer_hash import tokenizer_sha256
from tide_cache.writer import SetWriter

NUM_IDS = 40
MASK_TOKEN, MASK_ID, EOS_ID, PAD_ID = "<|mask|>", 39, 1, 0
SHARED = NUM_IDS - 1
RowChange = Callable[[PremaskedRow], PremaskedRow]
Spoil = Callable[[str, bytes], bytes]


def save_tokenizer(folder: Path, *, with_mask: bool = True, letters: str = "abcdefg") -> Path:
    """Save a tokenizer of whole words: 39 of them and, at id 39, the mask token."""
    words = ["<pad>", "<eos>", *letters]
    words += [f"word{n}" for n in range(SHARED - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"mask_token": MASK_TOKEN} if with_mask else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", **extra
    )
    fast.save_pretrained(folder)
    return folder


def tokenizer_facts(folder: Path) -> TokenizerFacts:
    """What `prepare` would say of a tokenizer in `folder`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = tokenizer.backend_tokenizer.to_str()
    return TokenizerFacts(
        name="tiny",
        sha256=tokenizer_sha256(text, mask_token=tokenizer.mask_token),
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


@dataclass(frozen=True, kw_only=True)
class SetShape:
    """How many rows, how long, in which blocks. `ragged`: lengths need not fill whole blocks."""

    num_samples: int = 20
    num_views: int = 2
    samples_per_task: int = 300
    block_size: int = 4
    max_blocks: int = 4
    ragged: bool = False
    lone_share: float = 0.0
    alignment: AlignmentKind = "positions"


def make_row(shape: SetShape, number: int, view: int) -> PremaskedRow:
    """A row of evenly spaced ids, which can be learnt.

    `lone_share` of the rows have two positions without a teacher position.
    """
    random = np.random.default_rng([1, number])
    length = int(random.integers(1, shape.max_blocks + 1)) * shape.block_size
    if shape.ragged:
        length = max(2, length - int(random.integers(0, shape.block_size)))
    prompt_length = int(random.integers(1, min(length, 2 * shape.block_size)))
    start, stride = random.integers(0, 37), random.integers(1, 4)
    ids = (2 + (start + stride * np.arange(length)) % (SHARED - 2)).astype(np.int32)
    is_lone = length >= 4 and random.random() < shape.lone_share
    cut = length // 2  # positions cut and cut + 1 have no partner
    runs = [[0, 0, cut], [cut + 2, cut, length - cut - 2]] if is_lone else [[0, 0, length]]
    teacher_ids = np.delete(ids, [cut, cut + 1]) if is_lone else ids
    of_view = np.random.default_rng([2, number, view])
    timestep = (view + float(of_view.random())) / shape.num_views
    mask = (of_view.random(length) < timestep) & (np.arange(length) >= prompt_length)
    return PremaskedRow(
        sample_id=f"{number:032x}",
        source="made",
        view=view,
        timestep=float(np.float32(max(timestep, 0.01))),
        student_ids_L=ids,
        prompt_length=prompt_length,
        student_mask_L=mask,
        half_a_L=mask & (of_view.random(length) < 0.5),
        teacher_ids_L=teacher_ids,
        alignment_RX=np.array([run for run in runs if run[2] > 0], dtype=np.int32),
    )


def with_chunks(row: PremaskedRow) -> PremaskedRow:
    """The same row with another tokenizer's sequence beside it, aligned by chunks.

    One to three student tokens against one or two of the teacher's; a sixth of the chunks are left
    out, so that masked positions outside all chunks occur, and some chunks straddle the prompt.
    """
    random = np.random.default_rng([4, int(row.sample_id, 16)])
    length = len(row.student_ids_L)
    edges = [0]
    while edges[-1] < length:
        edges.append(min(edges[-1] + int(random.integers(1, 4)), length))
    teacher_edges = np.concatenate([[0], np.cumsum(random.integers(1, 3, len(edges) - 1))])
    table_C4 = np.stack([edges[:-1], edges[1:], teacher_edges[:-1], teacher_edges[1:]], axis=1)
    chunks_C4 = table_C4[random.random(len(table_C4)) > 1 / 6].astype(np.int32)
    start_C, end_C = chunks_C4[:, 0], chunks_C4[:, 1]
    mask_L = row.student_mask_L | fill(
        chunk_masked(row.student_mask_L, chunks_C4), start_C, end_C, length
    )
    mask_L[: row.prompt_length] = False
    in_half_L = fill(random.random(len(chunks_C4)) < 0.5, start_C, end_C, length)
    return replace(
        row,
        student_mask_L=mask_L,
        half_a_L=mask_L & in_half_L,
        teacher_ids_L=random.integers(2, SHARED, int(teacher_edges[-1])).astype(np.int32),
        alignment_RX=chunks_C4,
    )


def write_premasked(
    folder: Path,
    tokenizer_folder: Path,
    shape: SetShape = SetShape(),
    *,
    change: RowChange = lambda row: row,
    **header: Any,
) -> Manifest:
    """Write a premasked set; `change` may spoil its rows."""
    facts = tokenizer_facts(tokenizer_folder)
    is_shared = shape.alignment == "positions"
    values: dict[str, Any] = {
        "student": facts,
        "teacher": facts,
        "alignment": shape.alignment,
        "shared_vocab_size": SHARED if is_shared else None,
    }
    made = premasked_header(shape.num_views, shape.block_size, **{**values, **header})
    writer = SetWriter(Store(folder), made)
    writer.begin()
    starts = range(0, shape.num_samples, shape.samples_per_task)
    for task, start in enumerate(starts):
        numbers = range(start, min(start + shape.samples_per_task, shape.num_samples))
        rows_V = [
            [change(row if is_shared else with_chunks(row)) for row in rows]
            for rows in ([make_row(shape, n, v) for n in numbers] for v in range(shape.num_views))
        ]
        counts = count_rows([row for rows in rows_V for row in rows], len(numbers))
        tables = [rows_to_table(rows, shape.alignment) for rows in rows_V]
        writer.publish_task(task, tables, counts=counts, dropped={})
    return writer.finish(range(len(starts)))


def teacher_logits(row: PremaskedRow, scale: float = 3.0) -> np.ndarray:
    """The teacher's logits at the payload positions of a row, float32 (P, SHARED)."""
    positions = payload_positions(row.student_mask_L, row.alignment_RX)
    random = np.random.default_rng([3, int(row.sample_id, 16), row.view])
    logits_LV = scale * random.standard_normal((len(row.student_ids_L), SHARED))
    return logits_LV[positions].astype(np.float32)


def teacher_chunk_logprobs(row: PremaskedRow) -> np.ndarray:
    """The teacher's log-prob of each entry of a `chunks` payload, float32 (C,)."""
    alignment: AlignmentKind = "positions" if row.alignment_RX.shape[1] == 3 else "chunks"
    random = np.random.default_rng([5, int(row.sample_id, 16), row.view])
    return -random.exponential(2.0, num_entries(row, alignment)).astype(np.float32)


def active_chunks(row: PremaskedRow) -> np.ndarray:
    """The chunks of a row that count, (C, 4)."""
    active_C = chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length)
    return row.alignment_RX[active_C]


def write_cache(
    folder: Path,
    premasked: Path,
    *,
    payloads: tuple[str, ...] = ("candidates",),
    k: int = SHARED,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    mean_logits: bool = False,
    codec_version: Literal[1, 2] = 2,
    spoil: Spoil = lambda _column, cell: cell,
    reseal: bool = False,
    comp_demo: bool = True,
) -> Manifest:
    """Write the cache of a premasked set, its payloads under the codec `raw`.

    `spoil` may change cells of payload columns, checksums included; `reseal` then makes the
    checksums right again, so that whatever else is wrong has to be noticed.
    """
    source = open_cache(premasked)
    known: dict[str, PayloadFacts] = {
        "candidates": CandidatesFacts(
            codec_version=codec_version,
            k=k,
            vocab_size=SHARED,
            temperatures=temperatures,
            mean_logits_positions=10 if mean_logits else 0,
        ),
        "chunks": ChunksFacts(codec_version=codec_version),
    }
    chosen = tuple(known[name] for name in payloads)
    alignment = source.manifest.alignment
    store = Store(folder)
    header = cache_header(source.manifest, source.identity, chosen, comp_demo=comp_demo)
    writer = SetWriter(store, header)
    writer.begin()
    codec_files = []
    if mean_logits:
        mean_V = np.linspace(-1, 1, SHARED, dtype=np.float32)
        store.publish(CODEC_FILE, save({MEAN_LOGITS_TENSOR: mean_V}))
        codec_files.append(CODEC_FILE)
    tasks = sorted({shard.task for shard in source.manifest.shards})
    for task in tasks:
        tables, all_rows = [], []
        for shard in [s for s in source.manifest.shards if s.task == task]:
            table = read_shard(source.store, shard.path)
            rows = table_to_rows(table, alignment)
            all_rows += rows
            for codec in make_codecs(chosen, None).present:
                payload = encode_rows(rows, codec, spoil=spoil, reseal=reseal)
                for field in payload.schema:
                    table = table.append_column(field, payload[field.name])
            tables.append(table)
        counts = count_rows(all_rows, tables[0].num_rows)
        name = "num_payload_positions" if alignment == "positions" else "num_active_chunks"
        counts[name] = sum(num_entries(row, alignment) for row in all_rows)
        writer.publish_task(task, tables, counts=counts, dropped={})
    return writer.finish(tasks, codec_files=codec_files)


def count_rows(rows: list[PremaskedRow], num_samples: int) -> dict[str, int]:
    """The counts of a task, as `prepare` and `build` name them."""
    return {
        "num_samples": num_samples,
        "num_rows": len(rows),
        "num_positions": sum(len(row.student_ids_L) for row in rows),
        "num_masked_positions": sum(int(row.student_mask_L.sum()) for row in rows),
    }


def encode_rows(rows: list[PremaskedRow], codec: Codec, *, spoil: Spoil, reseal: bool) -> pa.Table:
    """The columns of one payload, spoilt cell by cell."""
    if isinstance(codec, RawCandidates):
        answers = [candidates_of(row, codec.facts) for row in rows]
        nums_B = [answer.num_positions for answer in answers]
        table = encode(codec, end_to_end(answers), np.array(nums_B, dtype=np.int64))
    else:
        assert isinstance(codec, RawChunks)
        logprobs = [teacher_chunk_logprobs(row) for row in rows]
        nums_B = [len(logprob_C) for logprob_C in logprobs]
        table = encode(codec, np.concatenate(logprobs), np.array(nums_B, dtype=np.int64))
    cells = {name: [spoil(name, cell) for cell in old] for name, old in to_cells(table).items()}
    return (resealed if reseal else from_cells)(cells, table.schema)


def candidates_of(row: PremaskedRow, facts: CandidatesFacts) -> Candidates:
    logits_PV = teacher_logits(row)
    labels_P = row.student_ids_L[payload_positions(row.student_mask_L, row.alignment_RX)]
    label_P = logits_PV[np.arange(len(labels_P)), labels_P] - logsumexp(logits_PV)
    return replace(
        top_candidates(logits_PV, facts.k, temperatures=facts.temperatures),
        label_logprob_P=np.minimum(label_P, 0).astype(np.float32),
    )


def end_to_end(answers: list[Candidates]) -> Candidates:
    names = ("ids_PK", "logits_PK", "logsumexp_PT", "label_logprob_P")
    return Candidates(
        **{name: np.concatenate([getattr(answer, name) for answer in answers]) for name in names}
    )


def cache_header(
    manifest: Manifest,
    identity: str,
    payloads: tuple[PayloadFacts, ...],
    *,
    comp_demo: bool = True,
) -> CacheHeader:
    common = {
        name: getattr(manifest, name)
        for name in Header.model_fields
        if name not in ("kind", "format", "format_version")
    }
    return CacheHeader(
        **common,
        premasked_sha256=identity,
        comp_demo=comp_demo,
        teacher_model=TeacherFacts(
            name="random",
            revision=None,
            family="random",
            weights_sha256="b" * 64,
            config_sha256="c" * 64,
            vocab_size=NUM_IDS,
            dtype="float32",
            attention="published",
            backend="hf",
            block_size=manifest.block_size,
            mask_token_id=MASK_ID,
            device="cpu",
        ),
        payloads=payloads,
        build_config={},
        build_provenance={"command": "tests", "tide_cache": "0", "git_revision": None},
    )


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """A tokenizer, a premasked set and a cache in one folder, and configs for them."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def premasked(self) -> Path:
        return self.folder / "premasked"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def config(self, **changes: Any) -> dict[str, Any]:
        """A config of a tiny student from nothing; `changes` replace whole sections."""
        return {
            "output": str(self.folder / "run"),
            "student": {
                "init": "random",
                "tokenizer": str(self.tokenizer),
                "architecture": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
            },
            "objective": {"losses": {"ce": 1.0, "tidal": 1.0}},
            "stream": {"batch_size": 8},
            "optimizer": {"learning_rate": 1e-3},
            "max_steps": 12,
            "device": "cpu",
            "checkpoints": {"every": 5},
            "metrics": {"every": 1},
            **changes,
        }

    def write_config(self, **changes: Any) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config(**changes)), encoding="utf-8")
        return path


def make_workshop(
    folder: Path,
    shape: SetShape = SetShape(),
    **cache_options: Any,
) -> Workshop:
    """Make all three in `folder`."""
    workshop = Workshop(folder=folder)
    save_tokenizer(workshop.tokenizer)
    write_premasked(workshop.premasked, workshop.tokenizer, shape)
    write_cache(workshop.cache, workshop.premasked, **cache_options)
    return workshop


def changed(**changes: Any) -> RowChange:
    """A change that replaces fields of every row."""
    return lambda row: replace(row, **changes)


def numbered_from(start: int) -> RowChange:
    """A change that makes other samples of the same rows."""
    return lambda row: replace(row, sample_id=f"{int(row.sample_id, 16) + start:032x}")
