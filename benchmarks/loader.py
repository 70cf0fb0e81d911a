"""Rows and positions per second of the training reader, beside plain ways to read the same.

For a cache of each payload, made up: `row_by_row` asks the set for one row after the other and
decodes it, `one_thread` makes whole batches in the caller's thread, `cold` is the product's reader
(threads that read ahead) on a set that was never opened and whose pages were dropped from memory,
`checked` the same with every shard and row checked at its first use, as in training, `warm` with
all row groups decoded before, `http` from a web server on loopback in a process of its own into an
empty local store, `http_again` with a filled store, which is checked first. All read the same
batches in the same order, in one process, repeats interleaved; the best is reported. `sha256` (of
all shards, one core) is what no checked copy can beat. Peak memory is that of the process while one
of them runs, above what it held before.

`stall` says what share of a step the reader takes beside a step of `--step-ms`, during which the
processor is free, as beside a GPU: the seconds for which steps after the first were waited for.

    python -m benchmarks.loader
    python -m benchmarks.loader --payload hidden --samples 8192 --workers 4 --json
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch

from benchmarks.loader_sets import BLOCK_SIZE, PayloadKind, SetSize, losses_of, write_set
from stage2_student.attention import BY_ROWS
from stage2_student.batches import BatchReader, InputForm
from stage2_student.compatibility import teacher_reading
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.shard_needs import ShardFetcher, ShardNeeds
from stage2_student.stream import GlobalOrder, StepStream
from tide_cache.cache import Cache, open_cache
from tide_cache.local_copies import LocalStoreConfig

_GROUPS_IN_USE = 16
_ROWS_ALONE = 256
_SERVER_START_S = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one way of reading came to."""

    num_rows: int
    num_masked: int
    seconds: float
    first_step_s: float
    peak_bytes: int | None

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "rows_per_s": round(self.num_rows / self.seconds, 1),
            "masked_positions_per_s": round(self.num_masked / self.seconds),
            "first_step_s": round(self.first_step_s, 4),
            "peak_mb": None if self.peak_bytes is None else round(self.peak_bytes / 1e6, 1),
        }


class Bench:
    """One cache and all ways to read an epoch of it."""

    def __init__(self, folder: Path, kind: PayloadKind, options: argparse.Namespace) -> None:
        self.folder = folder
        self.kind = kind
        self.options = options
        self.manifest = open_cache(folder).manifest

    def row_by_row(self) -> Reading:
        """Read a part of the epoch one row at a time."""
        cache = open_cache(self.folder, num_groups_kept=_GROUPS_IN_USE)
        reader, order = self._reader(cache), self._order(cache)
        rows = np.concatenate([order.at(step).rows_G for step in range(order.steps_per_epoch)])

        def read() -> Iterator[int]:
            for row in rows[:_ROWS_ALONE]:
                yield reader.read(0, np.array([row])).num_masked

        return _measure(read, len(rows[:_ROWS_ALONE]))

    def one_thread(self) -> Reading:
        """Read an epoch in the caller's thread."""
        return self._epoch(open_cache(self.folder, num_groups_kept=_GROUPS_IN_USE), workers=0)

    def cold(self) -> Reading:
        """Read an epoch with threads, nothing in memory."""
        _drop_pages(self.folder)
        return self._epoch(open_cache(self.folder, num_groups_kept=_GROUPS_IN_USE))

    def checked(self) -> Reading:
        """The same as training does it: everything checked at its first use."""
        _drop_pages(self.folder)
        cache = open_cache(self.folder, num_groups_kept=_GROUPS_IN_USE, check=True)
        return self._epoch(cache)

    def warm(self) -> Reading:
        """Read an epoch with threads, all row groups decoded before."""
        cache = open_cache(self.folder, num_groups_kept=1 << 20)
        self._epoch(cache)
        return self._epoch(cache)

    def http(self, url: str, store: Path) -> tuple[Reading, Reading]:
        """Read an epoch from a web server into an empty store, and again from the full store."""
        both = []
        for _ in range(2):
            local = LocalStoreConfig(folder=str(store))
            cache = open_cache(url, num_groups_kept=_GROUPS_IN_USE, local=local)
            both.append(self._epoch(cache))
            cache.close()
        return both[0], both[1]

    def sha256_s(self) -> float:
        """Return the seconds that hashing the shards of a view takes."""
        began_s = time.perf_counter()
        for shard in self.manifest.shards:
            if shard.view == 0:
                hashlib.sha256((self.folder / shard.path).read_bytes()).digest()
        return time.perf_counter() - began_s

    def stall(self) -> dict[str, Any]:
        """Return the share of steps that is waiting, and what reading a step takes one thread."""
        alone = self.one_thread()
        cache = open_cache(self.folder, num_groups_kept=_GROUPS_IN_USE, check=True)
        stream, order = self._stream(cache), self._order(cache)
        num_steps = min(order.steps_per_epoch, self.options.stall_steps)
        began_s = first_s = 0.0
        for work in stream.steps(0, num_steps):
            if work.rows.step == 0:
                began_s, first_s = time.perf_counter(), stream.stall_s
            time.sleep(self.options.step_ms / 1000)
        seconds = time.perf_counter() - began_s
        return {
            "step_ms": self.options.step_ms,
            "num_steps": num_steps,
            "reading_ms_per_step": round(1000 * alone.seconds / order.steps_per_epoch, 2),
            "first_step_s": round(first_s, 3),
            "share": round((stream.stall_s - first_s) / seconds, 4),
        }

    def _epoch(self, cache: Cache, workers: int | None = None) -> Reading:
        stream, order = self._stream(cache, workers), self._order(cache)

        def read() -> Iterator[int]:
            for work in stream.steps(0, order.steps_per_epoch):
                yield sum(batch.num_masked for batch in work.batches)

        return _measure(read, cache.num_samples)

    def _order(self, cache: Cache) -> GlobalOrder:
        return GlobalOrder(
            seed=0,
            group_sizes=cache.row_group_sizes,
            num_views=cache.num_views,
            batch_size=self.options.batch_size,
            groups_per_shard=cache.row_groups_per_shard,
            shards_per_pool=64,
        )

    def _reader(self, cache: Cache) -> BatchReader:
        objective = ObjectiveConfig(losses=losses_of(self.kind))
        return BatchReader(
            cache,
            form=InputForm(
                block_size=BLOCK_SIZE,
                mask_token_id=self.options.vocab_size - 1,
                attention=BY_ROWS,
                device=torch.device("cpu"),
            ),
            teacher=teacher_reading(cache, objective),
        )

    def _stream(self, cache: Cache, workers: int | None = None) -> StepStream:
        order, prefetch = self._order(cache), self.options.prefetch
        fetcher = None
        if cache.copies is not None:
            needs = ShardNeeds(order, cache, max_steps=order.steps_per_epoch, prefetch=prefetch)
            fetcher = ShardFetcher(needs, cache.copies)
        return StepStream(
            order,
            [self._reader(cache)],
            rank=0,
            world_size=1,
            micro_batch_size=None,
            workers=self.options.workers if workers is None else workers,
            prefetch=prefetch,
            fetch_ahead=fetcher,
        )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures, by payload."""
    torch.set_num_threads(1)
    kinds = get_args(PayloadKind) if options.payload == "all" else (options.payload,)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        found = {kind: _measure_kind(Path(scratch, kind), kind, options) for kind in kinds}
    return {
        "cpus": os.cpu_count(),
        "workers": options.workers,
        "prefetch": options.prefetch,
        "batch_size": options.batch_size,
        "length": options.length,
        "payloads": found,
    }


def _measure_kind(folder: Path, kind: PayloadKind, options: argparse.Namespace) -> dict[str, Any]:
    size = SetSize(
        num_samples=options.samples,
        samples_per_task=options.samples_per_shard,
        num_views=1,
        length=options.length,
        vocab_size=options.vocab_size,
        k=options.k,
        num_components=options.components,
    )
    write_set(folder, kind, size)
    bench = Bench(folder, kind, options)
    runs: list[dict[str, Reading]] = []
    hash_s = []
    with _web_server(folder) as url:
        for repeat in range(options.repeats):
            runs.append(
                {
                    "row_by_row": bench.row_by_row(),
                    "one_thread": bench.one_thread(),
                    "cold": bench.cold(),
                    "checked": bench.checked(),
                    "warm": bench.warm(),
                }
            )
            hash_s.append(bench.sha256_s())
            remote = bench.http(url, folder.with_name(f"{kind}-store-{repeat}"))
            runs[-1] |= dict(zip(("http", "http_again"), remote, strict=True))
    best = {name: min((run[name] for run in runs), key=_seconds_per_row) for name in runs[0]}
    shards = bench.manifest.shards
    size_bytes = sum(shard.size_bytes for shard in shards)
    return {
        "num_shards": len(shards),
        "num_rows": options.samples,
        "num_masked_positions": bench.manifest.counts["num_masked_positions"],
        "size_mb": round(size_bytes / 1e6, 2),
        **{name: reading.as_json() for name, reading in best.items()},
        "sha256_mb_per_s": round(size_bytes / 1e6 / min(hash_s), 1),
        "cold_over_row_by_row": _ratio(best["cold"], best["row_by_row"]),
        "checked_over_cold": _ratio(best["checked"], best["cold"]),
        "cold_over_one_thread": _ratio(best["cold"], best["one_thread"]),
        "stall": bench.stall(),
    }


def _seconds_per_row(reading: Reading) -> float:
    return reading.seconds / reading.num_rows


def _ratio(one: Reading, other: Reading) -> float:
    return round(_seconds_per_row(other) / _seconds_per_row(one), 2)


def _measure(read: Callable[[], Iterator[int]], num_rows: int) -> Reading:
    _hand_back_memory()
    before = _reset_peak()
    began_s = time.perf_counter()
    num_masked, first_step_s = 0, None
    for count in read():
        num_masked += count
        first_step_s = first_step_s or time.perf_counter() - began_s
    seconds = time.perf_counter() - began_s
    peak = _memory("VmHWM")
    return Reading(
        num_rows=num_rows,
        num_masked=num_masked,
        seconds=seconds,
        first_step_s=first_step_s or 0.0,
        peak_bytes=None if peak is None or before is None else peak - before,
    )


def _hand_back_memory() -> None:
    """Let go of what earlier measurements left, so that this one's peak is its own."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> int | None:
    """Let the kernel forget the peak of this process; returns what it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS")


def _memory(name: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def _drop_pages(folder: Path) -> None:
    for path in folder.rglob("*.parquet"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _web_server(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _wait_for(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait_for(port: int) -> None:
    deadline_s = time.monotonic() + _SERVER_START_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("the web server did not start")


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--payload", choices=["all", *get_args(PayloadKind)], default="all")
    parser.add_argument("--samples", type=int, default=4096, help="rows of the view read (4096)")
    parser.add_argument("--samples-per-shard", type=int, default=512)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, at most (512)")
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=16, help="candidates (16)")
    parser.add_argument("--components", type=int, default=205, help="of a hidden state (205)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a step (32)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prefetch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="best of so many (3)")
    parser.add_argument("--step-ms", type=float, default=250.0, help="of a training step (250)")
    parser.add_argument("--stall-steps", type=int, default=40, help="steps beside which to read")
    parser.add_argument("--folder", help="where to write the sets; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures = measure(options)
    if options.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for kind, facts in figures["payloads"].items():
        sys.stdout.write(f"{kind}: {facts['num_rows']:,} rows, {facts['size_mb']} MB\n")
        for name, value in facts.items():
            if isinstance(value, dict):
                told = ", ".join(f"{inner} {figure:,}" for inner, figure in value.items())
                sys.stdout.write(f"  {name:<22} {told}\n")
            elif name not in ("num_rows", "size_mb"):
                sys.stdout.write(f"  {name:<22} {value:,}\n")


if __name__ == "__main__":
    main()
