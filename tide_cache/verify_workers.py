"""Checking shards in processes: this one alone, or several that share the list of shards.

A worker gets the set once, when it starts, and then numbers of shards. A worker that is killed (a
shard that takes more memory than there is, say) ends the whole run with an error; whoever resumes
goes on from what was found good. Workers end with the process that started them.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tide_cache.errors import StorageError
from tide_cache.manifest import Manifest
from tide_cache.parent_watch import exit_with_parent
from tide_cache.payloads import Codecs
from tide_cache.shard_checks import Level, ShardResult, check_shard
from tide_cache.store import Store

_Set = tuple[Store, Manifest, Codecs | None, Level]
_set_of_worker: _Set | None = None


def check_shards(
    store: Store,
    manifest: Manifest,
    codecs: Codecs | None,
    indices: Sequence[int],
    *,
    level: Level,
    num_workers: int,
) -> Iterator[tuple[int, ShardResult]]:
    """Yield the number of each shard of `indices` and what was found in it, as they are done.

    Raises StorageError when a worker dies.
    """
    num_workers = min(num_workers, len(indices))
    if num_workers <= 1:
        for index in indices:
            yield index, check_shard(store, manifest, manifest.shards[index], codecs, level)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        # A fork would copy locks that threads of this process hold.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(store, manifest, codecs, level),
    )
    try:
        futures = {pool.submit(_check, index): index for index in indices}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise StorageError(
            f"{store.url}: a process that checked shards died: killed, or out of memory",
            hint="run the same command again, with --workers 1 and --resume FILE",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(*of_set: *_Set) -> None:
    global _set_of_worker
    _set_of_worker = of_set
    exit_with_parent()


def _check(index: int) -> ShardResult:
    assert _set_of_worker is not None
    store, manifest, codecs, level = _set_of_worker
    return check_shard(store, manifest, manifest.shards[index], codecs, level)
