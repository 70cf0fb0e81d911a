"""Caches made up for the loader's benchmark: real format and codecs, answers drawn at random.

What a reader does depends on how many rows, positions, candidates and components there are, not on
what they say. Lengths, masks and timesteps are drawn as real sets have them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from tide_cache.alignment import chunk_active, chunk_masked, fill
from tide_cache.manifest import (
    CacheHeader,
    Manifest,
    NoisingFacts,
    TeacherFacts,
    TokenizerFacts,
)
from tide_cache.payload_facts import ChunksFacts, HiddenFacts, PayloadFacts, RankedFacts
from tide_cache.payloads.candidates import CODEC_FILE, RANKS_TENSOR, Candidates
from tide_cache.payloads.candidates_ranked import RankedCandidates
from tide_cache.payloads.chunks import RawChunks
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE, HiddenCodec
from tide_cache.rows import AlignmentKind, PremaskedRow, rows_to_table
from tide_cache.store import Store
from tide_cache.writer import SetWriter

PayloadKind = Literal["candidates", "hidden", "chunks"]
TEMPERATURES = (1.0, 2.0)
BLOCK_SIZE = 32
_HIDDEN_SIZE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SetSize:
    """How large a set is."""

    num_samples: int
    samples_per_task: int
    num_views: int
    length: int
    vocab_size: int
    k: int
    num_components: int


def write_set(folder: Path, kind: PayloadKind, size: SetSize) -> Manifest:
    """Write a cache with one kind of payload (`hidden` has candidates beside it)."""
    random = np.random.default_rng(0)
    store = Store(folder)
    payloads = _payloads(kind, size)
    alignment: AlignmentKind = "chunks" if kind == "chunks" else "positions"
    writer = SetWriter(store, _header(alignment, payloads, size))
    writer.begin()
    codec_files = _publish_codec_files(store, kind, size, random)
    codecs = _codecs(payloads, size)
    starts = range(0, size.num_samples, size.samples_per_task)
    for task, start in enumerate(starts):
        numbers = range(start, min(start + size.samples_per_task, size.num_samples))
        tables, num_masked = [], 0
        for view in range(size.num_views):
            rows = [_row(random, number, view, kind, size) for number in numbers]
            num_B = np.array([_num_entries(row) for row in rows], dtype=np.int64)
            table = rows_to_table(rows, alignment)
            for codec in codecs:
                columns = codec.encode(_answers(codec, random, int(num_B.sum()), size), num_B)
                for field, column in zip(codec.fields(), columns, strict=True):
                    table = table.append_column(field, pa.chunked_array([column]))
            tables.append(table)
            num_masked += sum(int(row.student_mask_L.sum()) for row in rows)
        counts = {
            "num_samples": len(numbers),
            "num_rows": len(numbers) * size.num_views,
            "num_masked_positions": num_masked,
        }
        writer.publish_task(task, tables, counts=counts, dropped={})
    return writer.finish(range(len(starts)), codec_files=codec_files)


def losses_of(kind: PayloadKind) -> dict[str, float]:
    """Return losses that read the payload."""
    return {"calm": 1.0} if kind == "chunks" else {"tidal": 1.0}


def _row(
    random: np.random.Generator, number: int, view: int, kind: PayloadKind, size: SetSize
) -> PremaskedRow:
    # Replies are filled up to whole blocks, and then all rows of a length share one mask.
    num_blocks = size.length // BLOCK_SIZE
    length = BLOCK_SIZE * int(random.integers(max(1, num_blocks // 2), num_blocks + 1))
    prompt_length = length // 3
    ids_L = random.integers(2, size.vocab_size - 1, length).astype(np.int32)
    timestep = (view + random.random()) / size.num_views
    mask_L = (random.random(length) < timestep) & (np.arange(length) >= prompt_length)
    alignment_RX = np.array([[0, 0, length]], dtype=np.int32)
    if kind == "chunks":
        edges = np.arange(0, length + 1, 2, dtype=np.int32)
        alignment_RX = np.stack([edges[:-1], edges[1:], edges[:-1], edges[1:]], axis=1)
        masked_C = chunk_masked(mask_L, alignment_RX)
        mask_L = mask_L | fill(masked_C, alignment_RX[:, 0], alignment_RX[:, 1], length)
        mask_L[:prompt_length] = False
    return PremaskedRow(
        sample_id=f"{number:032x}",
        source="made",
        view=view,
        timestep=float(np.float32(max(timestep, 1e-3))),
        student_ids_L=ids_L,
        prompt_length=prompt_length,
        student_mask_L=mask_L,
        half_a_L=mask_L & (np.arange(length) // 4 % 2 == 0),
        teacher_ids_L=ids_L,
        alignment_RX=alignment_RX,
    )


def _num_entries(row: PremaskedRow) -> int:
    if row.alignment_RX.shape[1] == 3:
        return int(row.student_mask_L.sum())
    return int(chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length).sum())


def _payloads(kind: PayloadKind, size: SetSize) -> tuple[PayloadFacts, ...]:
    if kind == "chunks":
        return (ChunksFacts(),)
    ranked = RankedFacts(
        k=size.k,
        vocab_size=size.vocab_size,
        temperatures=TEMPERATURES,
        mean_logits_positions=0,
        bits=6,
        top_p=None,
        min_k=None,
        ranks="answers",
    )
    if kind == "candidates":
        return (ranked,)
    hidden = HiddenFacts(
        hidden_size=max(_HIDDEN_SIZE, size.num_components),
        vocab_size=size.vocab_size,
        bands=(size.num_components,),
        num_wide=0,
        step=0.25,
        fit_positions=1,
    )
    return (ranked, hidden)


def _codecs(payloads: tuple[PayloadFacts, ...], size: SetSize) -> list[Any]:
    made: list[Any] = []
    for facts in payloads:
        if isinstance(facts, RankedFacts):
            made.append(RankedCandidates(facts, np.arange(size.vocab_size, dtype=np.int32)))
        elif isinstance(facts, HiddenFacts):
            made.append(HiddenCodec(facts))
        elif isinstance(facts, ChunksFacts):
            made.append(RawChunks(facts))
    return made


def _publish_codec_files(
    store: Store, kind: PayloadKind, size: SetSize, random: np.random.Generator
) -> list[str]:
    files: dict[str, dict[str, Any]] = {}
    if kind != "chunks":
        files[CODEC_FILE] = {RANKS_TENSOR: np.arange(size.vocab_size, dtype=np.int32)}
    if kind == "hidden":
        hidden_size = max(_HIDDEN_SIZE, size.num_components)
        files[TRANSFORM_FILE] = {
            "analysis": np.eye(size.num_components, hidden_size, dtype=np.float32),
            "synthesis": np.eye(hidden_size, size.num_components, dtype=np.float32),
            "mean": np.zeros(hidden_size, np.float32),
        }
        weight_VD = random.standard_normal((size.vocab_size, hidden_size), dtype=np.float32)
        files[HEAD_FILE] = {"weight": weight_VD.astype(np.float16)}
    for path, tensors in files.items():
        store.publish(path, save(tensors))
    return list(files)


def _answers(codec: Any, random: np.random.Generator, num_positions: int, size: SetSize) -> Any:
    if isinstance(codec, RawChunks):
        return -random.exponential(2.0, num_positions).astype(np.float32)
    if isinstance(codec, HiddenCodec):
        return random.integers(-4, 5, (num_positions, size.num_components)).astype(np.int16)
    return _candidates(random, num_positions, size)


def _candidates(random: np.random.Generator, num_positions: int, size: SetSize) -> Candidates:
    """Draw ids without repetition and descending logits."""
    base_P1 = random.integers(0, size.vocab_size, (num_positions, 1))
    step_PK = random.integers(1, size.vocab_size // size.k, (num_positions, size.k))
    ids_PK = (base_P1 + np.cumsum(step_PK, axis=1)) % size.vocab_size
    logits_PK = -np.cumsum(random.exponential(0.5, (num_positions, size.k)), axis=1)
    # All other ids together as likely as a hundredth of them would be, each like the last stored.
    num_likely = (size.vocab_size - size.k) / 100
    total_PT = np.stack(
        [
            np.log(np.exp(logits_PK / t).sum(axis=1) + num_likely * np.exp(logits_PK[:, -1] / t))
            for t in TEMPERATURES
        ],
        axis=1,
    )
    return Candidates(
        ids_PK=ids_PK.astype(np.int32),
        logits_PK=logits_PK.astype(np.float32),
        logsumexp_PT=total_PT.astype(np.float32),
        label_logprob_P=-random.exponential(2.0, num_positions).astype(np.float32),
    )


def _header(
    alignment: AlignmentKind, payloads: tuple[PayloadFacts, ...], size: SetSize
) -> CacheHeader:
    tokenizer = TokenizerFacts(
        name="made",
        sha256="a" * 64,
        vocab_size=size.vocab_size,
        mask_token_id=size.vocab_size - 1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return CacheHeader(
        alignment=alignment,
        num_views=size.num_views,
        block_size=BLOCK_SIZE,
        student=tokenizer,
        teacher=tokenizer,
        shared_vocab_size=size.vocab_size if alignment == "positions" else None,
        noising=NoisingFacts(
            drawn=True, seed=0, num_timesteps=8, t_min=0.001, t_max=1.0, demo_ratio=0.5
        ),
        sources=(),
        config={},
        provenance={},
        premasked_sha256="b" * 64,
        comp_demo=True,
        teacher_model=TeacherFacts(
            name="made",
            revision=None,
            family="made",
            weights_sha256="c" * 64,
            config_sha256="d" * 64,
            vocab_size=size.vocab_size,
            dtype="float32",
            attention="published",
            backend="hf",
            block_size=BLOCK_SIZE,
            mask_token_id=size.vocab_size - 1,
            device="cpu",
        ),
        payloads=payloads,
        build_config={},
        build_provenance={},
    )
