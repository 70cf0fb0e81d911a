"""Bytes and speed of the `ranked` codec beside what other caches store, in one process.

Two kinds of answers. `scattered`: ids spread evenly over 151,936, logits the top of independent
normal ones: the worst case. `teacher`: a trained teacher's own, half of the positions to fit the
rank table on, the other half measured. Bytes are those of a whole Parquet file with the product's
writer options and the payload columns alone, in rows of 20 to 120 positions; rates are of one core,
encoding with writing and reading with decoding. Baselines on the same candidates, which lack the
logsumexps, the label's log-prob and the checksum: int32 ids and float16 logits as Parquet lists;
ids of 18 bits and float16 logits, the likeliest first, compressed row by row. Repeats of all are
interleaved and the best of each is reported, so that a busy machine slows all.

    python -m benchmarks.codec
    python -m benchmarks.codec --teacher runs/benchmark/code/teacher/final \
        --premasked runs/benchmark/code/premasked-held_out --json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tide_cache.payload_facts import RankedFacts
from tide_cache.payloads.candidates import Candidates
from tide_cache.payloads.candidates_ranked import RankedCandidates
from tide_cache.payloads.flat import Int64Array
from tide_cache.shards import ROWS_PER_GROUP, column_bytes, table_bytes

SETTINGS = ((16, 6), (32, 6), (64, 6), (128, 6), (64, 8))
TARGET_BYTES = {("scattered", 16): 50, ("scattered", 64): 165, ("teacher", 16): 40}
TARGET_BYTES |= {("teacher", 64): 100}
TARGET_ENCODE, TARGET_DECODE = 100_000, 250_000
MAX_K = max(k for k, _ in SETTINGS)
TEMPERATURES = (1.0, 2.0)
_VOCAB_SIZE, _SCALE = 151_936, 3.0
_DRAWN = 4096
_DRAWN_AT_ONCE = 32
# So many repeats of all that is drawn are longer than a page of any column.
_OFFSETS = 16
_ROW_SIZES = (20, 121)
_ZSTD_LEVEL = 3
_PACKED = "packed"
Answer = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Candidates with descending logits, the rank table that suits them, and rows to put them in.

    `num_positions_B` says how many positions each row takes.
    """

    candidates: Candidates
    id_of_rank_V: npt.NDArray[np.int32]
    num_positions_B: Int64Array

    def top(self, k: int) -> Candidates:
        """Return the k likeliest of each position."""
        made = self.candidates
        ids_PK, logits_PK = made.ids_PK[:, :k], made.logits_PK[:, :k]
        return replace(
            made, ids_PK=np.ascontiguousarray(ids_PK), logits_PK=np.ascontiguousarray(logits_PK)
        )


class Format(Protocol):
    """A way to store candidates in columns."""

    def encode(self, candidates: Candidates, num_positions_B: Int64Array) -> pa.Table:
        """Return the columns of B rows."""

    def write(self, table: pa.Table) -> bytes:
        """Return a Parquet file."""

    def decode(self, table: pa.Table, num_positions_B: Int64Array) -> Answer:
        """Return ids int32 (P, K) and logits float32 (P, K)."""


class Ranked:
    """The product's codec and writer."""

    def __init__(self, answers: Answers, k: int, bits: int) -> None:
        facts = RankedFacts.model_validate(
            {
                "k": k,
                "vocab_size": len(answers.id_of_rank_V),
                "temperatures": TEMPERATURES,
                "mean_logits_positions": 0,
                "bits": bits,
                "top_p": None,
                "min_k": None,
                "ranks": "answers",
            }
        )
        self.codec = RankedCandidates(facts, answers.id_of_rank_V)

    def encode(self, candidates: Candidates, num_positions_B: Int64Array) -> pa.Table:
        """Return the payload columns."""
        columns = self.codec.encode(candidates, num_positions_B)
        return pa.table(columns, schema=pa.schema(self.codec.fields()))

    def write(self, table: pa.Table) -> bytes:
        """Return a shard of these columns alone."""
        return table_bytes(table)

    def decode(self, table: pa.Table, num_positions_B: Int64Array) -> Answer:
        """Decode with every check."""
        found = self.codec.decode(table, num_positions_B)
        return found.ids_PK, found.logits_PK


class Lists:
    """Baseline: int32 ids and float16 logits as Parquet lists, in the teacher's order."""

    def __init__(self, k: int) -> None:
        self.k = k

    def encode(self, candidates: Candidates, num_positions_B: Int64Array) -> pa.Table:
        """Return two list columns."""
        offsets = pa.array(np.concatenate([[0], np.cumsum(self.k * num_positions_B)]), pa.int32())
        logits = candidates.logits_PK.astype(np.float16).reshape(-1)
        columns = {"ids": candidates.ids_PK.reshape(-1), "logits": logits}
        return pa.table(
            {name: pa.ListArray.from_arrays(offsets, pa.array(v)) for name, v in columns.items()}
        )

    def write(self, table: pa.Table) -> bytes:
        """Write with zstd and otherwise the library's defaults."""
        return _write(table, "zstd", _ZSTD_LEVEL)

    def decode(self, table: pa.Table, num_positions_B: Int64Array) -> Answer:
        """Return both lists end to end."""
        ids, logits = (table[name].combine_chunks().values for name in ("ids", "logits"))
        ids_PK = ids.to_numpy().reshape(-1, self.k)
        return ids_PK, logits.to_numpy().reshape(-1, self.k).astype(np.float32)


class Packed:
    """Baseline: 18 bits an id and float16 logits, the likeliest first, zstd for each row."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, candidates: Candidates, num_positions_B: Int64Array) -> pa.Table:
        """Return one binary column: all ids of a row, then all its logits."""
        packed_PX = pack18(candidates.ids_PK).reshape(len(candidates.ids_PK), -1)
        logits_PX = candidates.logits_PK.astype("<f2").view(np.uint8)
        rows, start = [], 0
        for num in num_positions_B.tolist():
            row = slice(start, start + num)
            data = packed_PX[row].tobytes() + logits_PX[row].tobytes()
            rows.append(self._compressor.compress(data))
            start += num
        return pa.table({_PACKED: pa.array(rows, pa.binary())})

    def write(self, table: pa.Table) -> bytes:
        """Write without a second compression."""
        return _write(table, "none", None)

    def decode(self, table: pa.Table, num_positions_B: Int64Array) -> Answer:
        """Decompress each row and unpack all together."""
        ids, logits = [], []
        rows = table[_PACKED].to_pylist()
        for row, num in zip(rows, num_positions_B.tolist(), strict=True):
            data = self._decompressor.decompress(row)
            cut = num * self.k * 9 // 4
            ids.append(data[:cut])
            logits.append(data[cut:])
        ids_PK = unpack18(np.frombuffer(b"".join(ids), np.uint8)).reshape(-1, self.k)
        logits_PK = np.frombuffer(b"".join(logits), "<f2").reshape(-1, self.k)
        return ids_PK, logits_PK.astype(np.float32)


def pack18(ids_PK: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Pack ids below 2^18, four to nine bytes; their number is a multiple of four."""
    a, b, c, d = ids_PK.reshape(-1, 4).astype(np.uint64).T
    packed = np.empty((len(a), 9), dtype=np.uint8)
    low = a | b << np.uint64(18) | c << np.uint64(36) | d << np.uint64(54)
    packed[:, :8] = low.view(np.uint8).reshape(-1, 8)
    packed[:, 8] = d >> np.uint64(10)
    return packed.reshape(-1)


def unpack18(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Undo `pack18`."""
    rows = packed.reshape(-1, 9)
    low = np.ascontiguousarray(rows[:, :8]).view(np.uint64)[:, 0]
    ids = np.empty((len(rows), 4), dtype=np.int32)
    for column in range(4):
        ids[:, column] = (low >> np.uint64(18 * column)) & np.uint64(0x3FFFF)
    ids[:, 3] |= rows[:, 8].astype(np.int32) << np.int32(10)
    return ids.reshape(-1)


def scattered_answers(num_positions: int, seed: int) -> Answers:
    """Make answers whose ids tell nothing of each other.

    Whole rows of logits are drawn for a few thousand positions. They serve several times, each time
    in another order, with fresh ids and all logits a little higher, so that nothing recurs.
    """
    random = np.random.default_rng(seed)
    num_drawn = min(num_positions, _DRAWN)
    starts = range(0, num_drawn, _DRAWN_AT_ONCE)
    parts = [_draw_top(random, min(_DRAWN_AT_ONCE, num_drawn - start)) for start in starts]
    logits_PK, totals_PT, label_P = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = [random.permutation(num_drawn) for _ in range(-(-num_positions // num_drawn))]
    chosen_P = np.concatenate(order)[:num_positions]
    higher_P1 = (np.arange(num_positions) // num_drawn % _OFFSETS / 128)[:, None]
    return Answers(
        candidates=Candidates(
            ids_PK=_distinct_ids(random, num_positions),
            logits_PK=(logits_PK[chosen_P] + higher_P1).astype(np.float32),
            logsumexp_PT=(totals_PT[chosen_P] + higher_P1 / TEMPERATURES).astype(np.float32),
            label_logprob_P=label_P[chosen_P].astype(np.float32),
        ),
        id_of_rank_V=np.arange(_VOCAB_SIZE, dtype=np.int32),
        num_positions_B=_row_sizes(random, num_positions),
    )


def teacher_answers(teacher: Path, premasked: Path, num_positions: int, seed: int) -> Answers:
    """Ask a trained teacher; ids are ranked by half of its answers and the others are returned."""
    asked = _ask(teacher, premasked, 2 * num_positions)
    middle = asked.candidates.num_positions // 2
    return Answers(
        candidates=asked.candidates.rows(middle, 2 * middle),
        id_of_rank_V=fit_ranks(asked.candidates.rows(0, middle), asked.mean_logits_V),
        num_positions_B=_row_sizes(np.random.default_rng(seed), middle),
    )


def fit_ranks(
    candidates: Candidates, mean_logits_V: npt.NDArray[np.float64]
) -> npt.NDArray[np.int32]:
    """Order ids by how often they are candidates, then by mean logit, then by themselves."""
    num_V = np.bincount(candidates.ids_PK.reshape(-1), minlength=len(mean_logits_V))
    order = np.lexsort((np.arange(len(num_V)), -mean_logits_V, -num_V))
    return order.astype(np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    candidates: Candidates
    mean_logits_V: npt.NDArray[np.float64]


def _ask(folder: Path, premasked_folder: Path, num_positions: int) -> _Asked:
    """Ask a teacher about so many positions, or all that the set has, view after view."""
    import torch

    from benchmarks.teacher import load
    from stage1_teacher.questions import ask, checked_rows
    from tide_cache.cache import open_cache

    torch.set_num_threads(1)
    premasked = open_cache(premasked_folder)
    teacher = load(folder, premasked.manifest.block_size)
    parts: list[Candidates] = []
    sum_V = np.zeros(teacher.vocab_size)
    num_asked = 0
    for view in range(premasked.num_views):
        table = premasked.read_rows(view, range(premasked.num_samples))
        for row in checked_rows(table, premasked, view):
            question = ask([row], comp_demo=True)
            if num_asked >= num_positions or not question.request.streams:
                continue
            with torch.no_grad():
                (hidden,) = teacher.hidden_states([question.request])
                logits_PV = torch.cat([teacher.logits(part) for part in hidden]).numpy()
            entry_P = np.concatenate([entry for _, entry in question.slots])
            wanted = [stream.wanted_P for stream in question.request.streams]
            label_P = question.request.clean_ids_L[np.concatenate(wanted)]
            order_P = np.argsort(entry_P)
            parts.append(_top_of(logits_PV[order_P], label_P[order_P]))
            sum_V += logits_PV.sum(axis=0, dtype=np.float64)
            num_asked += len(entry_P)
    return _Asked(candidates=_joined(parts), mean_logits_V=sum_V / num_asked)


def _top_of(logits_PV: npt.NDArray[np.float32], label_P: npt.NDArray[np.integer]) -> Candidates:
    ids_PK = np.argsort(-logits_PV, axis=1, kind="stable")[:, :MAX_K].astype(np.int32)
    total_PT = np.stack([_logsumexp(logits_PV / t) for t in TEMPERATURES], axis=1)
    label_logit_P = np.take_along_axis(logits_PV, label_P[:, None], axis=1)[:, 0]
    return Candidates(
        ids_PK=ids_PK,
        logits_PK=np.take_along_axis(logits_PV, ids_PK, axis=1),
        logsumexp_PT=total_PT.astype(np.float32),
        label_logprob_P=np.minimum(label_logit_P - total_PT[:, 0], 0).astype(np.float32),
    )


def _joined(parts: Sequence[Candidates]) -> Candidates:
    names = ("ids_PK", "logits_PK", "logsumexp_PT", "label_logprob_P")
    joined: dict[str, Any] = {n: np.concatenate([getattr(p, n) for p in parts]) for n in names}
    return Candidates(**joined)


def _draw_top(
    random: np.random.Generator, num_positions: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Draw whole rows of logits: the largest (P, MAX_K), logsumexps (P, T), a likely label (P,)."""
    logits_PV = random.standard_normal((num_positions, _VOCAB_SIZE), dtype=np.float32) * _SCALE
    total_PT = np.stack([_logsumexp(logits_PV / t) for t in TEMPERATURES], axis=1)
    mass_PV = np.cumsum(np.exp(logits_PV - total_PT[:, :1].astype(np.float32)), axis=1)
    drawn_P = random.random(num_positions) * mass_PV[:, -1]
    label_P = np.array([np.searchsorted(m, d) for m, d in zip(mass_PV, drawn_P, strict=True)])
    label_logit_P = np.take_along_axis(logits_PV, label_P[:, None], axis=1)[:, 0]
    logits_PV.partition(_VOCAB_SIZE - MAX_K, axis=1)
    top_PK = -np.sort(-logits_PV[:, -MAX_K:], axis=1)
    return top_PK, total_PT, np.minimum(label_logit_P - total_PT[:, 0], 0.0)


def _distinct_ids(random: np.random.Generator, num_positions: int) -> npt.NDArray[np.int32]:
    """Draw ids (P, MAX_K) evenly, distinct in each position, in random order."""
    ids_PK = random.integers(0, _VOCAB_SIZE, (num_positions, MAX_K), dtype=np.int32)
    while True:
        again_P = (np.diff(np.sort(ids_PK, axis=1), axis=1) == 0).any(axis=1)
        if not again_P.any():
            return ids_PK
        ids_PK[again_P] = random.integers(0, _VOCAB_SIZE, (int(again_P.sum()), MAX_K), np.int32)


def _row_sizes(random: np.random.Generator, num_positions: int) -> Int64Array:
    """Cut positions into rows of 20 to 120; the last takes what is left."""
    sizes = random.integers(*_ROW_SIZES, size=num_positions // _ROW_SIZES[0] + 1)
    stops = np.minimum(np.cumsum(sizes), num_positions)
    return np.diff(np.unique(np.concatenate([[0], stops]))).astype(np.int64)


def _logsumexp(logits_PV: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    peak_P1 = logits_PV.max(axis=1, keepdims=True)
    summed_P = np.exp(logits_PV - peak_P1).sum(axis=1, dtype=np.float64)
    return np.asarray(peak_P1[:, 0] + np.log(summed_P), dtype=np.float64)


def _write(table: pa.Table, compression: str, level: int | None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression=compression,
        compression_level=level,
        row_group_size=ROWS_PER_GROUP,
    )
    written: bytes = sink.getvalue().to_pybytes()
    return written


class Run:
    """One format on one set of answers, in batches of a row group: bytes, and the best times."""

    def __init__(self, kind: Format, candidates: Candidates, num_positions_B: Int64Array) -> None:
        self.kind = kind
        self.num_positions = candidates.num_positions
        self.sizes = [
            num_positions_B[start : start + ROWS_PER_GROUP]
            for start in range(0, len(num_positions_B), ROWS_PER_GROUP)
        ]
        stops = np.cumsum([int(size_B.sum()) for size_B in self.sizes]).tolist()
        starts = [0, *stops[:-1]]
        self.parts = [candidates.rows(a, b) for a, b in zip(starts, stops, strict=True)]
        self.data = self.kind.write(self._encode())
        self.best_s: dict[str, float] = {}

    def once(self) -> None:
        """Time every step once more."""
        table = self._timed("codec_encode", self._encode)
        self._timed("encode", lambda: self.kind.write(self._encode()))
        self._timed("codec_decode", lambda: self._decode(table))
        self._timed("decode", self._read)

    def figures(self) -> dict[str, float]:
        """Return bytes per position and positions per second."""
        rates = {f"{n}_per_s": round(self.num_positions / s) for n, s in self.best_s.items()}
        return {"bytes": round(len(self.data) / self.num_positions, 2), **rates}

    def column_bytes(self) -> dict[str, float]:
        """Return bytes per position of every column, and what the file has besides."""
        sizes = column_bytes(pq.ParquetFile(pa.BufferReader(self.data)).metadata)
        sizes["(file)"] = len(self.data) - sum(sizes.values())
        return {name: round(size / self.num_positions, 2) for name, size in sizes.items()}

    def _encode(self) -> pa.Table:
        pairs = zip(self.parts, self.sizes, strict=True)
        return pa.concat_tables([self.kind.encode(part, size_B) for part, size_B in pairs])

    def _decode(self, table: pa.Table) -> None:
        start = 0
        for size_B in self.sizes:
            self.kind.decode(table.slice(start, len(size_B)), size_B)
            start += len(size_B)

    def _read(self) -> None:
        file = pq.ParquetFile(pa.BufferReader(self.data), page_checksum_verification=True)
        for group, size_B in enumerate(self.sizes):
            self.kind.decode(file.read_row_group(group, use_threads=False), size_B)

    def _timed(self, name: str, step: Callable[[], Any]) -> Any:
        began_s = time.perf_counter()
        result = step()
        spent_s = time.perf_counter() - began_s
        self.best_s[name] = min(self.best_s.get(name, spent_s), spent_s)
        return result


def measure(answers: Answers, num_repeats: int) -> list[dict[str, Any]]:
    """Return the figures of every setting with both baselines beside it."""
    return [_measure(answers, k, bits, num_repeats) for k, bits in SETTINGS]


def _measure(answers: Answers, k: int, bits: int, num_repeats: int) -> dict[str, Any]:
    made = answers.top(k)
    kinds: dict[str, Format] = {
        "ranked": Ranked(answers, k, bits),
        "lists": Lists(k),
        "packed": Packed(k),
    }
    _check(kinds, made)
    runs = {name: Run(kind, made, answers.num_positions_B) for name, kind in kinds.items()}
    for _ in range(num_repeats):
        for run in runs.values():
            run.once()
    figures: dict[str, Any] = {name: run.figures() for name, run in runs.items()}
    by_column = runs["ranked"].column_bytes()
    return {"k": k, "bits": bits, **figures, "ranked_bytes_by_column": by_column}


def _check(kinds: dict[str, Format], candidates: Candidates) -> None:
    """Assert that every format gives the first position's ids back."""
    first, num_B = candidates.rows(0, 1), np.ones(1, dtype=np.int64)
    for kind in kinds.values():
        ids_PK, _ = kind.decode(kind.encode(first, num_B), num_B)
        assert set(ids_PK[0].tolist()) == set(first.ids_PK[0].tolist())


def _print_table(name: str, figures: list[dict[str, Any]], num_positions: int) -> None:
    print(f"{name}: {num_positions:,} positions, one core; bytes and thousands per second")
    print(f"  {'':<13}{'bytes':>8}{'target':>8}{'encode':>8}{'decode':>8}{'codec alone':>16}")
    for setting in figures:
        for kind in ("ranked", "lists", "packed"):
            found = setting[kind]
            target = TARGET_BYTES.get((name, setting["k"])) if kind == "ranked" else None
            target = target if setting["bits"] == 6 else None
            label = f"k={setting['k']} {setting['bits']} bits" if kind == "ranked" else f"  {kind}"
            print(
                f"  {label:<13}{found['bytes']:>8.1f}{target or '':>8}"
                f"{found['encode_per_s'] / 1e3:>8.0f}{found['decode_per_s'] / 1e3:>8.0f}"
                f"{found['codec_encode_per_s'] / 1e3:>8.0f}"
                f"{found['codec_decode_per_s'] / 1e3:>8.0f}"
            )
    print(f"  targets: encode {TARGET_ENCODE / 1e3:.0f}, decode {TARGET_DECODE / 1e3:.0f}")


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--positions", type=int, default=131_072, help="measured, at most (131072)")
    parser.add_argument("--repeats", type=int, default=3, help="best of so many repeats (3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (0)")
    parser.add_argument("--teacher", type=Path, help="folder of a trained teacher")
    parser.add_argument("--premasked", type=Path, help="premasked set to ask it about")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if (options.teacher is None) != (options.premasked is None):
        parser.error("--teacher and --premasked go together")
    kinds = {"scattered": scattered_answers(options.positions, options.seed)}
    if options.teacher is not None:
        kinds["teacher"] = teacher_answers(
            options.teacher, options.premasked, options.positions, options.seed
        )
    report: dict[str, Any] = {}
    for name, answers in kinds.items():
        num_positions = answers.candidates.num_positions
        figures = measure(answers, options.repeats)
        report[name] = {"num_positions": num_positions, "settings": figures}
        if not options.json:
            _print_table(name, figures, num_positions)
    if options.json:
        targets = {f"{name} k={k}": size for (name, k), size in TARGET_BYTES.items()}
        report["targets"] = {"bytes": targets, "encode_per_s": TARGET_ENCODE}
        report["targets"] |= {"decode_per_s": TARGET_DECODE}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
