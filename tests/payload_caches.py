"""Small caches of every payload and codec, written through the product's own writer.

Rows and logits are those of `cache_builders`. A teacher's hidden state is a fixed random function
of the row, and its output head's bias is what the logits are about, so that both payloads agree in
shape though not in value: no test of the format needs them to.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.cache_builders import (
    SHARED,
    SetShape,
    cache_header,
    candidates_of,
    count_rows,
    end_to_end,
    save_tokenizer,
    teacher_chunk_logprobs,
    write_premasked,
)
from tests.payload_builders import TEMPERATURES, encode
from tide_cache.cache import open_cache
from tide_cache.manifest import CacheManifest
from tide_cache.payload_facts import (
    CandidatesFacts,
    ChunksFacts,
    HiddenFacts,
    PayloadFacts,
    RankedFacts,
)
from tide_cache.payloads import Codec, make_codecs, num_entries
from tide_cache.payloads.candidates import (
    CODEC_FILE,
    MEAN_LOGITS_TENSOR,
    RANKS_TENSOR,
    Candidates,
    keep_top_p,
)
from tide_cache.payloads.chunks import RawChunks
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE, HiddenCodec, limits
from tide_cache.rows import PremaskedRow, rows_to_table, table_to_rows
from tide_cache.shards import read_shard
from tide_cache.store import Store
from tide_cache.writer import SetWriter

_COMMON: dict[str, Any] = {
    "k": 8, "vocab_size": SHARED, "temperatures": TEMPERATURES, "mean_logits_positions": 10
}  # fmt: skip
_HIDDEN = HiddenFacts(
    hidden_size=12, vocab_size=SHARED, bands=(2, 3, 4), num_wide=2, step=0.25, fit_positions=99
)
_FIXED = RankedFacts(**_COMMON, bits=6, ranks="answers")
_RAGGED = RankedFacts(**_COMMON, bits=8, ranks="corpus", top_p=0.8, min_k=2)
PAYLOADS: dict[str, tuple[PayloadFacts, ...]] = {
    "raw": (CandidatesFacts(**_COMMON), ChunksFacts()),
    "ranked": (_FIXED, ChunksFacts()),
    "top-p": (_RAGGED,),
    "hidden": (_FIXED, _HIDDEN),
    "chunks": (ChunksFacts(),),
}


@dataclass(frozen=True, kw_only=True)
class MadeCache:
    """A cache with the premasked set and the tokenizer that it was made of, beside it."""

    folder: Path
    manifest: CacheManifest

    @property
    def tokenizer(self) -> Path:
        return self.folder.parent / "tokenizer"


def make_cache(folder: Path, kind: str, shape: SetShape | None = None) -> MadeCache:
    """Make the cache `kind` of `PAYLOADS` in `folder`, and its premasked set beside it."""
    alignment: Any = "chunks" if kind == "chunks" else "positions"
    shape = shape or SetShape(samples_per_task=12, ragged=True, lone_share=0.3)
    save_tokenizer(folder.parent / "tokenizer")
    premasked = folder.parent / "premasked"
    write_premasked(premasked, folder.parent / "tokenizer", replace(shape, alignment=alignment))
    source, store, payloads = open_cache(premasked), Store(folder), PAYLOADS[kind]
    writer = SetWriter(store, cache_header(source.manifest, source.identity, payloads))
    writer.begin()
    codec_files = {path: save(tensors) for path, tensors in codec_tensors(payloads).items()}
    for path, data in codec_files.items():
        store.publish(path, data)
    codecs = make_codecs(payloads, codec_tensors(payloads).get(CODEC_FILE))
    tasks = sorted({shard.task for shard in source.manifest.shards})
    for task in tasks:
        shards = [shard for shard in source.manifest.shards if shard.task == task]
        rows_V = [
            table_to_rows(read_shard(source.store, shard.path), alignment) for shard in shards
        ]
        tables = []
        for rows in rows_V:
            table = rows_to_table(rows, alignment)
            for codec in codecs.present:
                payload = _encode_rows(rows, codec, alignment)
                for field in payload.schema:
                    table = table.append_column(field, payload[field.name])
            tables.append(table)
        all_rows = [row for rows in rows_V for row in rows]
        counts = count_rows(all_rows, len(rows_V[0]))
        name = "num_payload_positions" if alignment == "positions" else "num_active_chunks"
        counts[name] = sum(num_entries(row, alignment) for row in all_rows)
        writer.publish_task(task, tables, counts=counts, dropped={})
    manifest = writer.finish(tasks, codec_files=sorted(codec_files))
    assert isinstance(manifest, CacheManifest)
    return MadeCache(folder=folder, manifest=manifest)


def codec_tensors(payloads: tuple[PayloadFacts, ...]) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of each codec file that a cache of these payloads has."""
    random = np.random.default_rng(7)
    files: dict[str, dict[str, np.ndarray]] = {}
    for facts in payloads:
        if isinstance(facts, CandidatesFacts):
            files[CODEC_FILE] = {MEAN_LOGITS_TENSOR: np.linspace(-1, 1, SHARED, dtype=np.float32)}
        if isinstance(facts, RankedFacts):
            files[CODEC_FILE][RANKS_TENSOR] = random.permutation(SHARED).astype(np.int32)
        if isinstance(facts, HiddenFacts):
            size, kept = facts.hidden_size, facts.num_components
            files[TRANSFORM_FILE] = {
                "analysis": random.normal(size=(kept, size)).astype(np.float32),
                "synthesis": random.normal(size=(size, kept)).astype(np.float32),
                "mean": random.normal(size=size).astype(np.float32),
            }
            files[HEAD_FILE] = {
                "weight": random.normal(size=(SHARED, size)).astype(np.float16),
                "bias": random.normal(size=SHARED).astype(np.float16),
            }
    return files


def _encode_rows(rows: list[PremaskedRow], codec: Codec, alignment: Any) -> Any:
    num_B = np.array([num_entries(row, alignment) for row in rows], dtype=np.int64)
    if isinstance(codec, RawChunks):
        return encode(codec, np.concatenate([teacher_chunk_logprobs(row) for row in rows]), num_B)
    if isinstance(codec, HiddenCodec):
        limit_R = limits(codec.facts).astype(int)
        codes = [
            np.random.default_rng([6, int(row.sample_id, 16), row.view]).integers(
                -limit_R, limit_R + 1, (num, len(limit_R))
            )
            for row, num in zip(rows, num_B.tolist(), strict=True)
        ]
        return encode(codec, np.concatenate(codes).astype(np.int16), num_B)
    return encode(codec, _answers(rows, codec.facts), num_B)


def _answers(rows: list[PremaskedRow], facts: CandidatesFacts) -> Candidates:
    answers = end_to_end([candidates_of(row, facts) for row in rows])
    if isinstance(facts, RankedFacts) and facts.top_p is not None and facts.min_k is not None:
        return keep_top_p(answers, top_p=facts.top_p, min_k=facts.min_k)
    return answers
