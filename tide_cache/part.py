"""A part of a set, some of its views or payloads, as a set of its own that says what it is part of.

Views are numbered anew from 0, in the order asked for: a student trained from a part of V' views
reads view `epoch mod V'`, as from any set. Where a view keeps its number and all payloads stay, its
shards are taken over byte for byte; any others are written anew from the columns that are kept,
under the part's own header. Only the shards of the wanted views are fetched. Each is fetched whole,
whatever columns are kept, because its sha256 is over all of it.

The part is written task by task as a build is: kill it and run it again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tide_cache.checked_shards import count_tables, read_checked, shards_by_task
from tide_cache.errors import CompatibilityError, ConfigError, did_you_mean
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
from tide_cache.merge import OF_ROWS, making
from tide_cache.payloads import codec_paths
from tide_cache.set_schema import set_schema
from tide_cache.shards import shard_bytes
from tide_cache.store import Store
from tide_cache.writer import SetWriter, Shard, Total

_NUM_FETCHERS = 4
OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartPlan:
    """What a part will be. `views[i]` is the whole's number of the part's view i."""

    whole: Manifest
    header: Header
    origins: tuple[OriginFacts, ...]
    views: tuple[int, ...]
    keeps_columns: bool

    @property
    def shards(self) -> list[ShardFacts]:
        """The shards of the whole that are fetched."""
        return [shard for shard in self.whole.shards if shard.view in self.views]

    @property
    def codec_files(self) -> list[str]:
        """The codec files that the kept payloads need."""
        header = self.header
        return list(codec_paths(header.payloads)) if isinstance(header, CacheHeader) else []

    @property
    def bytes_to_fetch(self) -> int:
        """How many bytes of the whole are fetched."""
        codec = [f for f in self.whole.files if f.path in self.codec_files]
        return sum(s.size_bytes for s in self.shards) + sum(f.size_bytes for f in codec)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        header = self.header
        payloads = [p.name for p in header.payloads] if isinstance(header, CacheHeader) else []
        return {
            "whole": identity(self.whole),
            "views": list(self.views),
            "payloads": payloads,
            "num_shards": len(self.shards),
            "bytes_to_fetch": self.bytes_to_fetch,
            "bytes_of_whole": sum(shard.size_bytes for shard in self.whole.shards)
            + sum(facts.size_bytes for facts in self.whole.files),
        }


def plan_part(
    whole: Manifest, *, views: Sequence[int] | None, payloads: Sequence[str] | None
) -> PartPlan:
    """Decide what the part of a set is; None stands for all views or payloads.

    Raises ConfigError for views or payloads that the set does not have.
    """
    chosen = tuple(range(whole.num_views)) if views is None else tuple(views)
    _check_views(chosen, whole)
    header = header_of(whole)
    values = header.model_dump()
    names: tuple[str, ...] | None = None
    if payloads is not None:
        kept = _chosen_payloads(whole, payloads)
        names = tuple(facts["name"] for facts in kept)
        values["payloads"] = kept
        if len(kept) < len(_payloads_of(header)):
            values["fidelity"] = ()  # it was measured of all of them together
    of_whole = identity(whole)
    values |= {
        "format_version": ORIGINS_VERSION,
        "num_views": len(chosen),
        "config": {
            **whole.config,
            "part_of": {
                "identity": of_whole,
                "views": list(chosen),
                "payloads": None if names is None else list(names),
            },
        },
    }
    origin = OriginFacts(
        relation="part",
        identity=of_whole,
        header_sha256=header_sha256(header),
        num_samples=whole.counts.get("num_samples", 0),
        views=chosen,
        payloads=names,
        made=making(whole),
    )
    return PartPlan(
        whole=whole,
        header=type(header).model_validate(values),
        origins=(*whole.origins, origin),
        views=chosen,
        keeps_columns=names is None or len(names) == len(_payloads_of(header)),
    )


def pull_part(
    plan: PartPlan, source: Store, output: Store, *, on_bytes: OnBytes | None = None
) -> Manifest:
    """Write the part; run it again after a kill. Returns its manifest.

    Raises FormatError naming a file that is not as listed, CompatibilityError when `output` holds
    another set.
    """
    tell = on_bytes or (lambda _: None)
    writer = SetWriter(output, plan.header, origins=plan.origins)
    tasks = list(shards_by_task(plan.whole))
    num_rows = sum(shard.num_rows for shard in plan.shards)
    done = writer.begin(Total(num_tasks=len(tasks), num_rows=num_rows))
    if done is not None:
        return done
    for facts in plan.whole.files:
        if facts.path in plan.codec_files:
            output.publish(facts.path, fetch_bytes(source, facts))
            tell(facts.size_bytes)
    finished = writer.finished_tasks()

    def work(number: int, shards: tuple[ShardFacts, ...]) -> None:
        wanted = [shards[view] for view in plan.views]
        if number not in finished:
            _write_task(plan, source, writer, number, wanted, is_first=number == tasks[0][0])
        tell(sum(shard.size_bytes for shard in wanted))

    with ThreadPoolExecutor(_NUM_FETCHERS) as pool:
        jobs = [pool.submit(work, number, shards) for number, shards in tasks]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return writer.finish([number for number, _ in tasks], codec_files=plan.codec_files)


def _payloads_of(header: Header) -> tuple[Any, ...]:
    """Return the payloads of a header, none of a premasked set's."""
    return header.payloads if isinstance(header, CacheHeader) else ()


def _write_task(
    plan: PartPlan,
    source: Store,
    writer: SetWriter,
    number: int,
    shards_V: Sequence[ShardFacts],
    *,
    is_first: bool,
) -> None:
    whole = header_of(plan.whole)
    read_V = [read_checked(source, shard, whole) for shard in shards_V]
    made_V = []
    for view, (shard, (data, table)) in enumerate(zip(shards_V, read_V, strict=True)):
        if plan.keeps_columns and shard.view == view:
            made_V.append(Shard(data=data, num_rows=shard.num_rows))
            continue
        kept = _renumbered(table.select(set_schema(plan.header).names), view)
        data = shard_bytes(kept.combine_chunks(), plan.header, task=number, view=view)
        made_V.append(Shard(data=data, num_rows=shard.num_rows))
    counts = count_tables([table for _, table in read_V], plan.header)
    dropped: Counter[str] = Counter()
    if is_first:  # what rows do not tell is told of the whole
        counts.update({n: c for n, c in plan.whole.counts.items() if n not in OF_ROWS})
        dropped.update(plan.whole.dropped)
    writer.publish_shards(number, made_V, counts=counts, dropped=dropped)


def _renumbered(table: pa.Table, view: int) -> pa.Table:
    at = table.schema.get_field_index("view")
    field = table.schema.field(at)
    return table.set_column(at, field, pa.array([view] * table.num_rows, type=field.type))


def _check_views(views: tuple[int, ...], whole: Manifest) -> None:
    if not views or len(set(views)) != len(views):
        raise ConfigError(f"views: expected some, each once, got {list(views)}")
    outside = [view for view in views if not 0 <= view < whole.num_views]
    if outside:
        raise ConfigError(f"views: expected numbers in 0..{whole.num_views - 1}, got {outside[0]}")


def _chosen_payloads(whole: Manifest, names: Sequence[str]) -> list[dict[str, Any]]:
    if not isinstance(whole, CacheManifest):
        raise CompatibilityError("payloads: a premasked set has none")
    known = [facts.name for facts in whole.payloads]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"payloads: expected some of {', '.join(known)}, got {name!r}"
                f"{did_you_mean(name, known)}"
            )
    if "hidden" in names and "candidates" not in names:
        raise ConfigError("payloads: hidden comes with candidates, which pin the top")
    return [facts.model_dump() for facts in whole.payloads if facts.name in names]
