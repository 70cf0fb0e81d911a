"""Which shards a `verify` that was killed had found good, so that the next one goes on from there.

One line of JSON a shard, appended as each is found good; a line that was cut short by a kill is
ignored. A line holds only for the set whose identity the first line names, for its shard's sha256,
and, on a local disk, for the very file that was read (inode, size and time of its last write).
"""

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tide_cache.canonical import canonical_json
from tide_cache.errors import ConfigError, StorageError
from tide_cache.manifest import ShardFacts
from tide_cache.shard_checks import Level, ShardResult
from tide_cache.store import Store

_FORMAT = "tide-cache verify 1"
_LEVELS: tuple[Level, ...] = ("manifest", "files", "deep")


class GoodShards:
    """The resume file of one set at one level."""

    def __init__(self, path: Path, store: Store, identity: str, level: Level) -> None:
        self._path = path
        self._store = store
        self._level = level
        self._lines = self._read(identity)

    def known(self, shards: Sequence[ShardFacts]) -> dict[int, ShardResult]:
        """Return by number what was found in the shards that need not be read again."""
        found = {}
        for index, shard in enumerate(shards):
            line = self._lines.get(shard.path)
            if (
                line is not None
                and line["sha256"] == shard.sha256
                and _LEVELS.index(line["level"]) >= _LEVELS.index(self._level)
                and line["file"] == self._file_of(shard)
            ):
                found[index] = _result(line)
        return found

    def add(self, shard: ShardFacts, result: ShardResult) -> None:
        """Append a shard that was found good."""
        samples = None if result.samples is None else base64.b64encode(result.samples).decode()
        self._append(
            {
                "path": shard.path,
                "sha256": shard.sha256,
                "level": self._level,
                "file": self._file_of(shard),
                "counts": result.counts,
                "samples": samples,
            }
        )

    def remove(self) -> None:
        """Remove the file: there is nothing left to go on with."""
        self._path.unlink(missing_ok=True)

    def _read(self, identity: str) -> dict[str, dict[str, Any]]:
        head = {"format": _FORMAT, "identity": identity}
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            self._append(head)
            return {}
        except OSError as error:
            raise self._explained(error) from error
        found = [value for line in lines if (value := _parse(line)) is not None]
        if not found or found[0] != head:
            raise ConfigError(
                f"{self._path}: not the resume file of this set ({identity[:12]}…)",
                hint="name another file, or remove this one",
            )
        if lines[-1]:  # cut short: the next line must not be joined to it
            self._append(None)
        return {line["path"]: line for line in found[1:]}

    def _append(self, value: Any) -> None:
        data = b"\n" if value is None else canonical_json(value)
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> StorageError:
        return StorageError(f"{self._path}: cannot keep the resume file: {error.strerror or error}")

    def _file_of(self, shard: ShardFacts) -> list[int] | None:
        """Return what tells a local file from another at the same path; None of a remote one."""
        if not self._store.is_local:
            return None
        try:
            stat = Path(self._store.path(shard.path)).lstat()
        except OSError:
            return []
        return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _result(line: dict[str, Any]) -> ShardResult:
    samples = line["samples"]
    return ShardResult(
        problems=(),
        samples=None if samples is None else base64.b64decode(samples),
        counts={sys.intern(name): int(count) for name, count in line["counts"].items()},
    )
