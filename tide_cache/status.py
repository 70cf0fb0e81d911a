"""How far a set under way is, from its folder alone: anyone who can read it can watch it.

Times are those that the store gives its own files, so that no two clocks are compared: the speed is
what was recorded between the first task and the last, and the last activity is a time of day, not
an age.
"""

import json
from datetime import datetime
from typing import Any

from tide_cache.errors import FormatError, StorageError
from tide_cache.manifest import MANIFEST, MAX_MANIFEST_BYTES, CacheManifest, identity
from tide_cache.store import Store
from tide_cache.writer import (
    HEADER,
    SET_ASIDE,
    TASKS,
    TOTAL,
    SetAside,
    Total,
    parse_state,
    read_manifest,
    read_records,
)

CALIBRATION = "_build/calibration"


def status(store: Store) -> dict[str, Any]:
    """Return how far a premasked set or a cache is, as JSON values.

    `state`: calibrating, building or finished. Raises StorageError where nothing was begun.
    """
    if store.exists(MANIFEST):
        manifest = read_manifest(store)
        num_rows = manifest.counts.get("num_rows", 0)
        num_tasks = len({shard.task for shard in manifest.shards})
        return {
            "url": store.url,
            "state": "finished",
            "kind": "cache" if isinstance(manifest, CacheManifest) else "premasked",
            "identity": identity(manifest),
            "num_tasks": num_tasks,
            "num_tasks_done": num_tasks,
            "num_rows": num_rows,
            "num_rows_done": num_rows,
            "size_bytes": manifest.counts.get("size_bytes", 0),
            "dropped": dict(manifest.dropped),
            "set_aside": [],
        }
    if not store.exists(HEADER):
        if any(path.startswith(CALIBRATION) for path in store.list_files("_build")):
            return {"url": store.url, "state": "calibrating"}
        raise StorageError(
            f"{store.url}: neither a finished set nor one under way",
            hint="'tide-cache prepare' or 'tide-cache build' begins one",
        )
    return _under_way(store)


def _under_way(store: Store) -> dict[str, Any]:
    records = read_records(store)
    dropped: dict[str, int] = {}
    for record in records.values():
        for reason, count in record.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    num_rows = sum(record.counts.get("num_rows", 0) for record in records.values())
    total = None
    if store.exists(TOTAL):
        total = parse_state(store.read_bytes(TOTAL), Total, where=f"{store.url}/{TOTAL}")
    times = sorted(store.modified(TASKS))
    notes = [note for record in records.values() for note in record.notes]
    aside = [
        parse_state(data, SetAside, where=f"{store.url}/{SET_ASIDE}")
        for data in store.read_many(store.list_files(SET_ASIDE))
    ]
    facts = {
        "url": store.url,
        "state": "building",
        "kind": _kind(store),
        "num_tasks": total.num_tasks if total else None,
        "num_tasks_done": len(records),
        "num_rows": total.num_rows if total else None,
        "num_rows_done": num_rows,
        "size_bytes": sum(record.size_bytes for record in records.values()),
        "dropped": dropped,
        "notes": notes,
        "set_aside": [one.model_dump() for one in aside if one.task not in records],
        "last_task_at": times[-1].isoformat() if times else None,
    }
    return facts | _speed(times, num_rows, total)


def _kind(store: Store) -> str | None:
    try:
        kind = json.loads(store.read_bytes(HEADER, max_bytes=MAX_MANIFEST_BYTES))["kind"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise FormatError(f"{store.url}/{HEADER}: no header of a set under way") from error
    return kind if kind in ("cache", "premasked") else None


def _speed(times: list[datetime], num_rows: int, total: Total | None) -> dict[str, Any]:
    """Return rows per second between the first and the last record, and what is left at that."""
    if len(times) < 2 or times[-1] <= times[0]:
        return {"rows_per_s": None, "seconds_left": None}
    # The rows of the first task were done before its record.
    rows = num_rows * (len(times) - 1) / len(times)
    per_s = rows / (times[-1] - times[0]).total_seconds()
    left_s = (total.num_rows - num_rows) / per_s if total and per_s else None
    return {
        "rows_per_s": round(per_s, 2),
        "seconds_left": None if left_s is None else round(left_s),
    }


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the status as (label, text) pairs for a screen."""
    if facts["state"] == "calibrating":
        return [("state", "calibrating: no shard yet")]
    of_tasks = "?" if facts["num_tasks"] is None else f"{facts['num_tasks']:,}"
    of_rows = "?" if facts["num_rows"] is None else f"{facts['num_rows']:,}"
    out = [
        ("state", facts["state"]),
        ("tasks", f"{facts['num_tasks_done']:,} of {of_tasks}"),
        (
            "rows",
            f"{facts['num_rows_done']:,} of {of_rows}, {facts['size_bytes'] / 1e9:,.3f} GB",
        ),
    ]
    if facts.get("rows_per_s"):
        left = facts["seconds_left"]
        eta = "" if left is None else f", {left:,} s left at that"
        out.append(("speed", f"{facts['rows_per_s']:,} rows/s between first and last task{eta}"))
    if facts.get("last_task_at"):
        out.append(("last task", f"{facts['last_task_at']} by the store's clock"))
    if facts["dropped"]:
        out.append(("dropped", ", ".join(f"{n:,} {why}" for why, n in facts["dropped"].items())))
    out += [("note", note) for note in facts.get("notes", [])[:10]]
    out += [("failed", f"task {one['task']}: {one['error']}") for one in facts["set_aside"]]
    return out
