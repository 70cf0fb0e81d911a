"""Several sets of one recipe become one: rows move as they are, no payload is encoded again.

A sample that several sets have comes from the first that has it. Tasks keep their order and their
rows, so that the merged set is the first set's rows, then what the second adds, and so on. Of the
first set, a task that loses no row is taken over byte for byte: a push of the merged set sends what
was added and nothing else. Tasks of the other sets get new numbers, which stand in their shards, so
these are written anew from their Arrow columns. The result is written task by task as a build is:
kill it and run it again.

Sample ids of all sets are held in memory: about 100 bytes a sample.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tide_cache import provenance
from tide_cache.canonical import sha256_hex
from tide_cache.checked_shards import count_tables, read_checked, shards_by_task
from tide_cache.compare import require_mergeable
from tide_cache.errors import ConfigError, FormatError
from tide_cache.fetch import fetch_bytes
from tide_cache.manifest import (
    ORIGINS_VERSION,
    CacheHeader,
    CacheManifest,
    Header,
    Manifest,
    OriginFacts,
    ShardFacts,
    header_of,
    header_sha256,
    identity,
)
from tide_cache.payload_facts import FidelityFacts
from tide_cache.shards import open_shard, read_row_groups
from tide_cache.store import Store
from tide_cache.writer import SetWriter, Shard, Total, read_manifest

DUPLICATE = "duplicate_in_merge"
_PACKAGES = ("numpy", "pyarrow")
OF_ROWS = frozenset(
    {
        "num_samples",
        "num_rows",
        "num_positions",
        "num_labelled_positions",
        "num_masked_positions",
        "num_rows_without_mask",
        "num_payload_positions",
        "num_active_chunks",
        "size_bytes",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeTask:
    """One task of the merged set: which task of which source, and which of its rows go.

    `kept`: the rows that stay, None where all do. `is_copied`: its shards are taken over as bytes.
    """

    number: int
    source: int
    shards: tuple[ShardFacts, ...]
    kept: tuple[int, ...] | None
    is_copied: bool

    @property
    def num_samples(self) -> int:
        """How many samples stay."""
        return self.shards[0].num_rows if self.kept is None else len(self.kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergePlan:
    """What a merge will write, decided from manifests and sample ids alone."""

    stores: tuple[Store, ...]
    manifests: tuple[Manifest, ...]
    header: Header
    origins: tuple[OriginFacts, ...]
    tasks: tuple[MergeTask, ...]
    duplicates_of: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "sources": [
                {
                    "url": store.url,
                    "identity": identity(manifest),
                    "num_samples": manifest.counts.get("num_samples", 0),
                    "num_duplicates": duplicates,
                }
                for store, manifest, duplicates in zip(
                    self.stores, self.manifests, self.duplicates_of, strict=True
                )
            ],
            "num_samples": sum(task.num_samples for task in self.tasks),
            "num_tasks": len(self.tasks),
            "num_tasks_copied": sum(task.is_copied for task in self.tasks),
            "num_duplicates": sum(self.duplicates_of),
        }


def plan_merge(urls: Sequence[str]) -> MergePlan:
    """Check that the sets can become one, and decide which rows go where.

    Reads manifests and the `sample_id` column. Raises CompatibilityError naming the fields that
    differ, ConfigError for fewer than two sets, one named twice or no rows at all.
    """
    stores = tuple(Store(url) for url in urls)
    if len(stores) < 2:
        raise ConfigError("merge: expected at least two sets", hint="name them one after another")
    manifests = tuple(read_manifest(store) for store in stores)
    identities = [identity(manifest) for manifest in manifests]
    for at, name in enumerate(identities):
        if name in identities[:at]:
            raise ConfigError(
                f"merge: {urls[at]} is the same set as {urls[identities.index(name)]}"
            )
    require_mergeable(manifests, [store.url for store in stores])
    tasks, duplicates_of = _plan_tasks(stores, manifests)
    if not tasks:
        raise ConfigError("merge: none of the sets has rows")
    return MergePlan(
        stores=stores,
        manifests=manifests,
        header=_merged_header(manifests),
        origins=_merged_origins(manifests, duplicates_of),
        tasks=tuple(tasks),
        duplicates_of=tuple(duplicates_of),
    )


def merge(
    plan: MergePlan, output: Store, *, on_task: Callable[[int], None] | None = None
) -> Manifest:
    """Write the merged set; run it again after a kill. Returns its manifest.

    Every shard read is checked against its manifest. Raises FormatError naming the one that is not
    as listed, CompatibilityError when `output` holds another set.
    """
    writer = SetWriter(output, plan.header, origins=plan.origins)
    total = sum(task.num_samples for task in plan.tasks) * plan.header.num_views
    done = writer.begin(Total(num_tasks=len(plan.tasks), num_rows=total))
    if done is not None:
        return done
    codec_files = _copy_codec_files(plan, output)
    finished = writer.finished_tasks()
    rest = _rest_by_task(plan)
    for task in plan.tasks:
        if task.number not in finished:
            _write_task(plan, task, writer, rest.get(task.number, (Counter(), Counter())))
        if on_task is not None:
            on_task(task.number)
    return writer.finish([task.number for task in plan.tasks], codec_files=codec_files)


def _plan_tasks(
    stores: Sequence[Store], manifests: Sequence[Manifest]
) -> tuple[list[MergeTask], list[int]]:
    seen: set[str] = set()
    planned: list[MergeTask] = []
    duplicates_of = []
    for source, (store, manifest) in enumerate(zip(stores, manifests, strict=True)):
        duplicates = 0
        for number, shards in shards_by_task(manifest):
            samples = _sample_ids(store, shards[0])
            kept = [row for row, sample in enumerate(samples) if sample not in seen]
            duplicates += len(samples) - len(kept)
            seen.update(samples)
            if not kept:
                continue
            is_whole = len(kept) == len(samples)
            following = planned[-1].number + 1 if planned else 0
            planned.append(
                MergeTask(
                    number=number if source == 0 else following,
                    source=source,
                    shards=shards,
                    kept=None if is_whole else tuple(kept),
                    is_copied=source == 0 and is_whole,
                )
            )
        duplicates_of.append(duplicates)
    return planned, duplicates_of


def _sample_ids(store: Store, shard: ShardFacts) -> list[str]:
    with open_shard(store, shard.path) as file:
        table = read_row_groups(store, shard.path, file, None, ["sample_id"])
    if table.num_rows != shard.num_rows:
        raise FormatError(
            f"{store.url}/{shard.path}: expected {shard.num_rows} rows, got {table.num_rows}",
            hint=f"run 'tide-cache verify {store.url}'",
        )
    samples: list[str] = table["sample_id"].to_pylist()
    return samples


def _write_task(
    plan: MergePlan,
    task: MergeTask,
    writer: SetWriter,
    rest: tuple[Counter[str], Counter[str]],
) -> None:
    store = plan.stores[task.source]
    read_V = [read_checked(store, shard, plan.header) for shard in task.shards]
    tables_V = [table for _, table in read_V]
    if task.kept is not None:
        wanted = _the_same_samples(tables_V, task, store)
        tables_V = [table.take(pa.array(wanted)) for table in tables_V]
    counts = count_tables(tables_V, plan.header) + rest[0]
    if task.is_copied:
        shards_V = [Shard(data=data, num_rows=table.num_rows) for data, table in read_V]
        writer.publish_shards(task.number, shards_V, counts=counts, dropped=rest[1])
    else:
        tables_V = [table.combine_chunks() for table in tables_V]
        writer.publish_task(task.number, tables_V, counts=counts, dropped=rest[1])


def _the_same_samples(
    tables_V: Sequence[pa.Table], task: MergeTask, store: Store
) -> tuple[int, ...]:
    """Return the rows that stay; refuses views that hold other samples."""
    first = tables_V[0]["sample_id"]
    for shard, table in zip(task.shards, tables_V, strict=True):
        if not pc.all(pc.equal(table["sample_id"], first)).as_py():
            raise FormatError(f"{store.url}/{shard.path}: not the samples of the other views")
    assert task.kept is not None
    return task.kept


def _copy_codec_files(plan: MergePlan, output: Store) -> list[str]:
    """Publish the codec files, which are equal in all sources. Returns their paths."""
    paths = []
    for facts in plan.manifests[0].files:
        if facts.path.startswith("codec/"):
            output.publish(facts.path, fetch_bytes(plan.stores[0], facts))
            paths.append(facts.path)
    return paths


def _rest_by_task(plan: MergePlan) -> dict[int, tuple[Counter[str], Counter[str]]]:
    """Return what rows do not tell, counted with the first task of each source."""
    found: dict[int, tuple[Counter[str], Counter[str]]] = {}
    first_of: dict[int, int] = {}
    for task in plan.tasks:
        first_of.setdefault(task.source, task.number)
    for source, manifest in enumerate(plan.manifests):
        # A set of duplicates alone has no task: what it dropped is told with the very first.
        number = first_of.get(source, plan.tasks[0].number)
        counts, dropped = found.setdefault(number, (Counter(), Counter()))
        counts.update({n: c for n, c in manifest.counts.items() if n not in OF_ROWS})
        dropped.update(manifest.dropped)
        if plan.duplicates_of[source]:
            dropped[DUPLICATE] += plan.duplicates_of[source]
    return found


def _merged_header(manifests: Sequence[Manifest]) -> Header:
    first = manifests[0]
    made_by = provenance.collect("tide-cache merge", _PACKAGES)
    configs = [manifest.config for manifest in manifests]
    values = header_of(first).model_dump()
    values |= {
        "format_version": ORIGINS_VERSION,
        "sources": merged_sources(manifests),
        "config": {**_common(configs), "merged_from": [identity(m) for m in manifests]},
        "provenance": made_by,
    }
    if not isinstance(first, CacheManifest):
        return Header.model_validate(values)
    caches = [manifest for manifest in manifests if isinstance(manifest, CacheManifest)]
    premasked = list(dict.fromkeys(cache.premasked_sha256 for cache in caches))
    devices = sorted({cache.teacher_model.device for cache in caches})
    values |= {
        "premasked_sha256": premasked[0]
        if len(premasked) == 1
        else sha256_hex("".join(f"{name}\n" for name in premasked).encode()),
        "teacher_model": {**values["teacher_model"], "device": ", ".join(devices)},
        "fidelity": _each_once([facts for cache in caches for facts in cache.fidelity]),
        "build_config": _common([cache.build_config for cache in caches]),
        "build_provenance": made_by,
    }
    return CacheHeader.model_validate(values)


def _each_once(fidelity: Sequence[FidelityFacts]) -> tuple[FidelityFacts, ...]:
    kept: list[FidelityFacts] = []
    for facts in fidelity:
        if facts not in kept:
            kept.append(facts)
    return tuple(kept)


def merged_sources(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return all sources, each once; rows taken of the same one by several sets are summed."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for source in (source for manifest in manifests for source in manifest.sources):
        key = (source.name, source.fingerprint, source.licence, source.num_rows)
        if key in found:
            found[key]["num_rows_taken"] += source.num_rows_taken
        else:
            found[key] = source.model_dump()
    return list(found.values())


def _merged_origins(
    manifests: Sequence[Manifest], duplicates_of: Sequence[int]
) -> tuple[OriginFacts, ...]:
    """Return the sources, each behind what it was itself made from."""
    origins: list[OriginFacts] = []
    for manifest, duplicates in zip(manifests, duplicates_of, strict=True):
        origins += manifest.origins
        origins.append(
            OriginFacts(
                relation="merged",
                identity=identity(manifest),
                header_sha256=header_sha256(header_of(manifest)),
                num_samples=manifest.counts.get("num_samples", 0) - duplicates,
                num_duplicates=duplicates,
                made=making(manifest),
            )
        )
    return tuple(origins)


def making(manifest: Manifest) -> dict[str, Any]:
    """Return what a set says of its own making."""
    made: dict[str, Any] = {"config": manifest.config, "provenance": manifest.provenance}
    if isinstance(manifest, CacheManifest):
        made["build_config"] = manifest.build_config
        made["build_provenance"] = manifest.build_provenance
        made["teacher_model"] = manifest.teacher_model.model_dump(mode="json")
        made["premasked_sha256"] = manifest.premasked_sha256
    return made


def _common(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the keys of configs that are equal in all of them."""
    first, rest = configs[0], configs[1:]
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in rest)
    }
