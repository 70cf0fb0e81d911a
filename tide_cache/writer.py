"""Writing a premasked set or a cache task by task, safe to kill at any moment and to run again.

State on disk is all there is: `_build/header.json` (what is being made), `_build/total.json` (how
much that is), one record per finished task in `_build/tasks/`, and the shards. Every file is
published by create-if-absent, a task's record after its shards, the manifest after all records;
then `_build` goes away. Writers share nothing else, no clock either, so any number of processes on
any number of machines may work on one folder, the same task at the same time included.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import Field, ValidationError

from tide_cache import card
from tide_cache.canonical import canonical_json, sha256_hex
from tide_cache.config import StrictModel
from tide_cache.errors import CompatibilityError, FormatError, MissingFileError, StorageError
from tide_cache.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    CacheHeader,
    CacheManifest,
    FileFacts,
    Header,
    Manifest,
    OriginFacts,
    PremaskedManifest,
    ShardFacts,
    manifest_bytes,
    parse_manifest,
    shard_path,
)
from tide_cache.payload_facts import Count
from tide_cache.shards import shard_bytes
from tide_cache.store import TEMPORARY_SUFFIX, Store

logger = logging.getLogger(__name__)
STATE = "_build"
HEADER = f"{STATE}/header.json"
TOTAL = f"{STATE}/total.json"
TASKS = f"{STATE}/tasks"
SET_ASIDE = f"{STATE}/set-aside"


class TaskRecord(StrictModel):
    """What one finished task put into the set; `notes`: what a person should know of it."""

    task: int = Field(ge=0)
    shards: tuple[ShardFacts, ...]
    counts: dict[str, Count]
    dropped: dict[str, Count]
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """The size of its shards."""
        return sum(shard.size_bytes for shard in self.shards)


class Total(StrictModel):
    """How much is to be done, for whoever watches from elsewhere."""

    num_tasks: Count
    num_rows: Count


class SetAside(StrictModel):
    """A task that failed, and why."""

    task: int = Field(ge=0)
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The bytes of a shard and how many rows are in them."""

    data: bytes
    num_rows: int


class SetWriter:
    """Writes one set of shards; every method may be called again after a crash."""

    def __init__(
        self, store: Store, header: Header, *, origins: Sequence[OriginFacts] = ()
    ) -> None:
        self.store = store
        self.header = header
        self.origins = tuple(origins)
        self.is_first = False

    def begin(self, total: Total | None = None) -> Manifest | None:
        """Claim the folder for this header. Returns the manifest when the set is complete already.

        `total` is for those who watch; `is_first` says afterwards whether nobody had begun. Raises
        CompatibilityError, naming the differing keys, when the folder holds another set.
        """
        if self.store.exists(MANIFEST):
            manifest = read_manifest(self.store)
            mine = self.header.model_dump(mode="json")
            present = _header_of(manifest, type(self.header))
            if present["format_version"] < self.header.format_version:
                mine = _known_to(mine, present)
            # What is finished stays finished when the program gets another version.
            accepted = {"format_version": self.header.format_version, **self._provenance()}
            require_same(self.store, mine=mine, present={**present, **accepted})
            self._sweep()  # whoever finished it may have been killed before it had cleaned up
            return manifest
        mine = self.header.model_dump(mode="json")
        self.is_first = self.store.publish(HEADER, canonical_json(mine))
        if not self.is_first:
            require_same(self.store, mine=mine, present=json.loads(self.store.read_bytes(HEADER)))
        if total is not None:
            self.store.publish(TOTAL, canonical_json(total.model_dump(mode="json")))
        return None

    def finished_tasks(self) -> dict[int, TaskRecord]:
        """Return the records of the tasks that are done, by task number."""
        return read_records(self.store)

    def record_of(self, task: int) -> TaskRecord | None:
        """Return the record of a task that any writer has finished, also of a set that is done."""
        try:
            path = _record_path(task)
            return parse_state(
                self.store.read_bytes(path), TaskRecord, where=f"{self.store.url}/{path}"
            )
        except MissingFileError:
            pass  # not done yet, or the set is and whoever finished it has swept the records
        if not self.store.exists(MANIFEST):
            return None
        shards = tuple(s for s in read_manifest(self.store).shards if s.task == task)
        num_rows = sum(shard.num_rows for shard in shards)
        return TaskRecord(task=task, shards=shards, counts={"num_rows": num_rows}, dropped={})

    def publish_task(
        self,
        task: int,
        tables_V: Sequence[pa.Table],
        *,
        counts: Mapping[str, int],
        dropped: Mapping[str, int],
        notes: Sequence[str] = (),
    ) -> TaskRecord:
        """Publish the shards of a task, one table per view, then its record.

        A task whose rows were all dropped has a record without shards. Raises StorageError when the
        folder is no longer the one that was begun.
        """
        # One at a time: the bytes of a view are let go before the next one is encoded.
        shards_V = (
            Shard(data=shard_bytes(table, self.header, task=task, view=view), num_rows=num_rows)
            for view, table in enumerate(tables_V)
            if (num_rows := table.num_rows)
        )
        return self.publish_shards(task, shards_V, counts=counts, dropped=dropped, notes=notes)

    def publish_shards(
        self,
        task: int,
        shards_V: Iterable[Shard],
        *,
        counts: Mapping[str, int],
        dropped: Mapping[str, int],
        notes: Sequence[str] = (),
    ) -> TaskRecord:
        """Publish the shards of a task from their bytes, view 0 first, then its record."""
        self._require_begun()
        try:
            shards = [self._publish_shard(task, view, shard) for view, shard in enumerate(shards_V)]
        except StorageError:
            self._require_begun()  # the mount may have gone while a file was written
            raise
        record = TaskRecord(
            task=task,
            shards=tuple(shards),
            counts=dict(counts),
            dropped=dict(dropped),
            notes=tuple(notes),
        )
        data = canonical_json(record.model_dump(mode="json"))
        self.store.publish(_record_path(task), data)
        if self.store.exists(MANIFEST):
            self._sweep()  # another writer has finished the set in between
        return record

    def set_aside(self, task: int, error: str) -> None:
        """Note that a task failed, for those who watch; trying it again removes the note."""
        path = f"{SET_ASIDE}/{task:05d}.json"
        values = SetAside(task=task, error=error).model_dump(mode="json")
        self.store.remove(path)
        self.store.publish(path, canonical_json(values))

    def forget_set_aside(self) -> None:
        """Remove the notes of failed tasks: they are tried again."""
        self.store.remove(SET_ASIDE)

    def finish(self, tasks: Sequence[int], *, codec_files: Sequence[str] = ()) -> Manifest:
        """Publish card and manifest from the records of `tasks`, in order, and remove the state.

        Another writer may do the same at the same time, or have done it. Raises StorageError when a
        record or a shard is missing.
        """
        records = self.finished_tasks()
        if self.store.exists(MANIFEST):
            self._sweep()
            return read_manifest(self.store)
        missing = [task for task in tasks if task not in records]
        if missing:
            raise StorageError(
                f"{self.store.url}: {len(missing)} of {len(tasks)} tasks are not done (first: "
                f"{missing[0]})",
                hint="run the same command again",
            )
        ordered = [records[task] for task in tasks]
        manifest = self._manifest(ordered, codec_files)
        self._check_sizes(manifest)
        self.store.publish(MANIFEST, manifest_bytes(manifest))
        self._sweep()
        return read_manifest(self.store)

    def _require_begun(self) -> None:
        """Refuse to write where the header has gone: into the empty folder below a lost mount."""
        if not (self.store.exists(HEADER) or self.store.exists(MANIFEST)):
            raise StorageError(
                f"{self.store.url}: {HEADER} has gone since this command began",
                hint="was the folder removed, or a mount lost? Restore it and run the same command "
                "again",
            )

    def _publish_shard(self, task: int, view: int, shard: Shard) -> ShardFacts:
        path, data = shard_path(task, view), shard.data
        facts = ShardFacts(
            path=path,
            task=task,
            view=view,
            num_rows=shard.num_rows,
            size_bytes=len(data),
            sha256=sha256_hex(data),
        )
        if not self.store.publish(path, data):
            present = self.store.sha256(path)
            if present != facts.sha256:
                raise StorageError(
                    f"{self.store.url}/{path}: exists with other content (expected "
                    f"{facts.sha256[:12]}…, got {present[:12]}…)",
                    hint="it was changed, or made on another kind of machine: remove it and run "
                    "the same command again",
                )
        return facts

    def _manifest(self, records: Sequence[TaskRecord], codec_files: Sequence[str]) -> Manifest:
        counts: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        for record in records:
            counts.update(record.counts)
            dropped.update(record.dropped)
        shards = tuple(shard for record in records for shard in record.shards)
        counts["size_bytes"] = sum(shard.size_bytes for shard in shards)
        values: dict[str, Any] = {
            **self.header.model_dump(),
            "counts": dict(counts),
            "dropped": dict(dropped),
            "shards": shards,
            "origins": self.origins,
        }
        kind = CacheManifest if isinstance(self.header, CacheHeader) else PremaskedManifest
        files = [self._file_facts(path) for path in codec_files]
        readme = card.dataset_card(kind.model_validate({**values, "files": files})).encode()
        self.store.publish("README.md", readme)
        files.append(self._file_facts("README.md"))
        return kind.model_validate({**values, "files": files})

    def _file_facts(self, path: str) -> FileFacts:
        data = self.store.read_bytes(path)
        return FileFacts(path=path, size_bytes=len(data), sha256=sha256_hex(data))

    def _check_sizes(self, manifest: Manifest) -> None:
        for shard in manifest.shards:
            size_bytes = self.store.size_bytes(shard.path)
            if size_bytes != shard.size_bytes:
                raise StorageError(
                    f"{self.store.url}/{shard.path}: expected {shard.size_bytes} bytes, got "
                    f"{size_bytes}",
                    hint=f"remove it and {_record_path(shard.task)}, then run the same "
                    "command again",
                )

    def _sweep(self) -> None:
        """Remove build state and the temporary files that killed writers left."""
        self.store.remove(STATE)
        files = self.store.list_files()
        leftovers = [path for path in files if path.endswith(TEMPORARY_SUFFIX)]
        for path in leftovers:
            self.store.remove(path)
        if leftovers:
            logger.info("removed %d leftovers of interrupted runs", len(leftovers))

    def _provenance(self) -> dict[str, Any]:
        mine = self.header.model_dump(mode="json")
        return {name: value for name, value in mine.items() if name.endswith("provenance")}


def read_records(store: Store) -> dict[int, TaskRecord]:
    """Return the records of finished tasks, by task number."""
    paths = [path for path in store.list_files(TASKS) if path.endswith(".json")]
    where = f"{store.url}/{TASKS}"
    found = [parse_state(data, TaskRecord, where=where) for data in store.read_many(paths)]
    return {record.task: record for record in found}


State = TypeVar("State", bound=StrictModel)


def parse_state(data: bytes, model: type[State], *, where: str) -> State:
    """Read a record of a set under way. Raises FormatError, which tells nothing of the content."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise FormatError(
            f"{where}: not a record of a set under way: {field}: {problem['msg']}",
            hint="this folder was not begun by tide-cache, or is damaged: begin in an empty one",
        ) from None


def _record_path(task: int) -> str:
    return f"{TASKS}/{task:05d}.json"


def require_same(store: Store, *, mine: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise CompatibilityError, naming the differing keys, unless two headers are equal."""
    differing = sorted(_differences(mine, present))
    if differing:
        shown = ", ".join(differing[:6]) + (", …" if len(differing) > 6 else "")
        raise CompatibilityError(
            f"{store.url}: holds another set; differing: {shown}",
            hint="write to an empty folder, or restore what this one was begun with"
            + (" (the program's version included)" if "provenance" in shown else ""),
        )


def read_manifest(store: Store) -> Manifest:
    """Read and check the manifest of a set. Raises StorageError or FormatError."""
    if not store.exists(MANIFEST):
        unfinished = store.exists(HEADER)
        raise StorageError(
            f"{store.url}: no {MANIFEST}"
            + (": the set is not finished" if unfinished else ": not a cache or premasked set"),
            hint="run the command that was making it again" if unfinished else None,
        )
    data = store.read_bytes(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    return parse_manifest(data, where=f"{store.url}/{MANIFEST}")


def _known_to(mine: Any, present: Any) -> Any:
    """Leave out the keys that an older program did not have."""
    if isinstance(mine, dict) and isinstance(present, dict):
        return {key: _known_to(mine[key], present[key]) for key in mine if key in present}
    return mine


def _header_of(manifest: Manifest, kind: type[Header]) -> dict[str, Any]:
    values = manifest.model_dump(mode="json")
    return {name: values.get(name) for name in kind.model_fields}


def _differences(mine: Any, present: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys at which two JSON values differ."""
    if isinstance(mine, dict) and isinstance(present, dict):
        found = []
        for key in mine.keys() | present.keys():
            found += _differences(mine.get(key), present.get(key), f"{prefix}{key}.")
        return found
    return [] if mine == present else [prefix.rstrip(".")]
