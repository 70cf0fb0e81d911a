"""What a shard says of itself: the header of the set that it was written for, its task and view.

A shard whose bytes are as listed can still be another's: listed under another name, or in the
manifest of another set. Its stamp tells.
"""

import json
from typing import Any

from pydantic import ValidationError

from tide_cache.canonical import fingerprint
from tide_cache.errors import FormatError
from tide_cache.manifest import CacheHeader, Header, Manifest, ShardFacts
from tide_cache.shards import METADATA_KEY, ShardFile


def read_stamp(file: ShardFile, *, where: str) -> dict[str, Any]:
    """Return the `{header, task, view}` that a shard carries. Raises FormatError without one."""
    metadata = file.schema_found.metadata or {}
    try:
        stamp = json.loads(metadata[METADATA_KEY])
        if isinstance(stamp, dict) and set(stamp) == {"header", "task", "view"}:
            return stamp
    except (KeyError, ValueError, RecursionError):
        pass
    raise FormatError(f"{where}: no tide_cache metadata: not a shard of this format")


def check_stamp(stamp: dict[str, Any], manifest: Manifest, shard: ShardFacts) -> None:
    """Raise FormatError unless a shard says that it is this task and view of this set."""
    if (stamp["task"], stamp["view"]) != (shard.task, shard.view):
        raise FormatError(
            f"holds task {stamp['task']} view {stamp['view']}: shards were exchanged or renamed"
        )
    # A shard that a merged set or a part has as it was carries the header it was made with.
    if fingerprint(stamp["header"]) in {origin.header_sha256 for origin in manifest.origins}:
        return
    kind = CacheHeader if isinstance(manifest, CacheHeader) else Header
    try:
        # As today's program reads it: keys that came later have their defaults on both sides.
        theirs = kind.model_validate(stamp["header"]).model_dump(mode="json")
    except ValidationError as error:
        raise FormatError("its tide_cache metadata is no header of this format") from error
    mine = manifest.model_dump(mode="json")
    differing = [key for key in sorted(theirs) if theirs[key] != mine.get(key)]
    if differing:
        raise FormatError(f"belongs to another set (differing: {', '.join(differing)})")
