"""Checking a premasked set or a cache from its manifest alone: hashes, schema and every bound.

Three levels, each with all of the one before: `manifest` reads nothing but the manifest; `files`
compares sizes and sha256s and finds files that nobody listed; `deep`, the default, decodes every
row and every payload (`shard_checks`), compares the views and counts again what the manifest
counts. Problems are collected, not raised, so that one report names them all. Shards are checked
by any number of processes, and a run that was killed goes on from its resume file (`good_shards`).
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tide_cache.errors import TideError
from tide_cache.good_shards import GoodShards
from tide_cache.manifest import CacheManifest, Manifest, identity
from tide_cache.payloads import Codecs, check_codec_files, open_codecs
from tide_cache.promises import broken_promises, wrong_counts
from tide_cache.shard_checks import SAMPLE_BYTES, Level, ShardResult, checked_file
from tide_cache.store import Store
from tide_cache.verify_workers import check_shards
from tide_cache.writer import read_manifest

Progress = Callable[[str], None]
# Below this a second process costs more than it saves: it takes a second to start.
_BYTES_PER_WORKER = 64 << 20


@dataclass(kw_only=True, slots=True)
class Report:
    """What `verify_set` found. `ok` when there are no problems.

    `num_shards` counts the shards that were checked, now or before (`num_shards_resumed`), and are
    the files that the manifest lists. `signature`: None where nobody asked, `good`, or what is
    wrong with it. `teacher_check`: what stage 1 found by asking the teacher again.
    """

    url: str
    identity: str
    kind: str
    level: Level = "deep"
    num_shards: int = 0
    num_shards_resumed: int = 0
    num_rows: int = 0
    num_payload_entries: int = 0
    size_bytes: int = 0
    signature: str | None = None
    teacher_check: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {**asdict(self), "ok": self.ok}


def verify_set(
    store: Store,
    *,
    level: Level = "deep",
    num_workers: int = 1,
    resume: Path | None = None,
    on_shard: Progress | None = None,
) -> Report:
    """Check what the manifest and the format promise, up to `level`.

    With `resume`, shards that the file says were found good are not read again, and those that are
    found good now are added to it; a set that is sound removes it. Raises StorageError or
    FormatError only when there is no readable manifest, ConfigError when `resume` is another set's.
    """
    manifest = read_manifest(store)
    report = Report(url=store.url, identity=identity(manifest), kind=manifest.kind, level=level)
    report.problems += broken_promises(manifest)
    if level == "manifest":
        report.num_shards = len(manifest.shards)
        report.num_rows = sum(shard.num_rows for shard in manifest.shards)
        report.size_bytes = sum(shard.size_bytes for shard in manifest.shards)
        return report
    _check_files(store, manifest, report)
    codecs = _open_codecs(store, manifest, report) if level == "deep" else None
    good = GoodShards(resume, store, report.identity, level) if resume is not None else None
    results = _check_shards(store, manifest, codecs, report, good, num_workers, on_shard)
    _gather(manifest, results, report)
    if level == "deep":
        _check_samples(manifest, results, report)
    if good is not None and report.ok:
        good.remove()
    return report


def wrong_identity(found: str, expected: str) -> list[str]:
    """Return a line unless a set's identity is the one that it was named by.

    Hashes that are all right tell that a set is whole, not whose it is: who forges rows and makes
    every hash anew has made another sound set. Its identity is another one.
    """
    if found == expected.strip().lower():
        return []
    return [f"identity: expected {expected}, got {found}: another set than the one that was named"]


def default_workers(manifest: Manifest) -> int:
    """Return how many processes a set is worth: a core for each 64 MB, at most all of them."""
    size_bytes = sum(shard.size_bytes for shard in manifest.shards)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, len(manifest.shards), size_bytes // _BYTES_PER_WORKER))


def _check_files(store: Store, manifest: Manifest, report: Report) -> None:
    listed = {facts.path for facts in manifest.files} | {s.path for s in manifest.shards}
    for facts in manifest.files:
        try:
            with checked_file(store, facts):
                pass
        except TideError as error:
            report.problems.append(f"file {facts.path}: {error.message}")
    # A loader that globs data/ would read these, so they count.
    for path in store.list_files("data") + store.list_files("codec"):
        if path not in listed:
            report.problems.append(f"file {path}: not in the manifest")


def _open_codecs(store: Store, manifest: Manifest, report: Report) -> Codecs | None:
    """Return the codecs of a cache; where its codec files are no good, say so and return None."""
    if not isinstance(manifest, CacheManifest):
        return None
    try:
        check_codec_files(store, manifest)
        return open_codecs(store, manifest)
    except TideError as error:
        report.problems.append(error.message)
        return None


def _check_shards(
    store: Store,
    manifest: Manifest,
    codecs: Codecs | None,
    report: Report,
    good: GoodShards | None,
    num_workers: int,
    on_shard: Progress | None,
) -> list[ShardResult]:
    """Return what was found in each shard, in the manifest's order."""
    found: dict[int, ShardResult] = {}
    if good is not None:
        found = good.known(manifest.shards)
        report.num_shards_resumed = len(found)
    for index in found:
        if on_shard is not None:
            on_shard(manifest.shards[index].path)
    left = [index for index in range(len(manifest.shards)) if index not in found]
    for index, result in check_shards(
        store, manifest, codecs, left, level=report.level, num_workers=num_workers
    ):
        found[index] = result
        if good is not None and result.is_good:
            good.add(manifest.shards[index], result)
        if on_shard is not None:
            on_shard(manifest.shards[index].path)
    return [found[index] for index in range(len(manifest.shards))]


def _gather(manifest: Manifest, results: list[ShardResult], report: Report) -> None:
    for shard, result in zip(manifest.shards, results, strict=True):
        report.problems += result.problems
        if result.is_readable:
            report.num_shards += 1
            report.num_rows += shard.num_rows
            report.size_bytes += shard.size_bytes


def _check_samples(manifest: Manifest, results: list[ShardResult], report: Report) -> None:
    """Compare the samples of the views, look for samples that occur twice, compare the counts."""
    counts: Counter[str] = Counter()
    samples_of_task: dict[int, bytes] = {}
    for shard, result in zip(manifest.shards, results, strict=True):
        counts.update(result.counts)
        if result.samples is None:
            continue
        if samples_of_task.setdefault(shard.task, result.samples) != result.samples:
            report.problems.append(f"shard {shard.path}: not the samples of the other views")
    samples = np.frombuffer(b"".join(samples_of_task.values()), dtype=f"V{SAMPLE_BYTES}")
    num_twice = len(samples) - len(np.unique(samples))
    if num_twice:
        report.problems.append(f"{num_twice} samples occur twice")
    report.num_payload_entries = _num_entries(manifest, counts)
    if report.ok:
        report.problems += wrong_counts(manifest, dict(counts))


def _num_entries(manifest: Manifest, counts: Counter[str]) -> int:
    if not isinstance(manifest, CacheManifest):
        return 0
    return counts["num_payload_positions"] + counts["num_active_chunks"]
