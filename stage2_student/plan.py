"""A run before it runs: everything opened and checked that is cheap, and what it will amount to.

`open_run` reads manifests, configs and tokenizers, and refuses here whatever can be refused. The
plan is what `--dry-run` prints: steps, epochs, positions, parameters.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stage2_student.compatibility import check_alike, check_objective, check_student
from stage2_student.config import TrainConfig, deciding_keys
from stage2_student.metrics import require_trackers
from stage2_student.mixture import MixedFetcher, MixedOrder
from stage2_student.optimizer import require_optimizer
from stage2_student.shard_needs import RemotePlan, ShardFetcher, ShardNeeds, plan_fetching
from stage2_student.stream import FetchAhead, GlobalOrder
from stage2_student.student import build_without_storage, check_weights
from stage2_student.student_source import StudentSource, fetch_weights, open_student
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import CompatibilityError, ConfigError
from tide_cache.order import is_one_pool

# The row groups of two windows are in use at a window's edge.
_WINDOWS_KEPT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """The parts of a run that fit together; `fetching` where sets are remote ones.

    `orders` are those of the single `caches`, `order` that of the run. No weights are loaded.
    """

    config: TrainConfig
    caches: tuple[Cache, ...]
    orders: tuple[GlobalOrder, ...]
    evaluation_cache: Cache | None
    source: StudentSource
    order: GlobalOrder | MixedOrder
    max_steps: int
    fetching: RemotePlan | None = None

    @property
    def cache(self) -> Cache:
        """The first cache; what the student's input looks like is the same in all."""
        return self.caches[0]

    @property
    def identity(self) -> str:
        """The sha256 that names what is trained on: a cache's own, or that of several, in order."""
        identities = [cache.identity for cache in self.caches]
        if len(identities) == 1:
            return identities[0]
        return hashlib.sha256("\n".join(identities).encode()).hexdigest()

    def close(self) -> None:
        """Close the sets."""
        for cache in (*self.caches, self.evaluation_cache):
            if cache is not None:
                cache.close()

    def num_steps_of(self, number: int) -> int:
        """Return how many steps of the run read a cache."""
        order = self.order
        return order.num_steps_of(number) if isinstance(order, MixedOrder) else self.max_steps

    def shard_needs(self, number: int) -> ShardNeeds:
        """Return which shards of a cache the steps of this run need."""
        return ShardNeeds(
            self.orders[number],
            self.caches[number],
            max_steps=self.num_steps_of(number),
            prefetch=self.config.stream.prefetch,
        )

    def fetcher(self) -> FetchAhead | None:
        """Return who fetches the shards of remote caches ahead."""
        copies = [cache.copies for cache in self.caches]
        num_remote = sum(each is not None for each in copies)
        fetchers = [
            None
            if each is None
            else ShardFetcher(self.shard_needs(number), each, num_sharing=num_remote)
            for number, each in enumerate(copies)
        ]
        if isinstance(self.order, MixedOrder):
            return MixedFetcher(self.order, fetchers) if num_remote else None
        return fetchers[0]

    @property
    def deciding_keys(self) -> dict[str, Any]:
        """The keys and values that decide what this run learns from its sets."""
        keys = deciding_keys(self.config)
        pool = self.config.stream.shards_per_pool
        if all(is_one_pool(len(cache.row_groups_per_shard), pool) for cache in self.caches):
            # A pool that holds the view is as good as any other, and as none.
            keys["stream.shards_per_pool"] = None
        return keys


def open_run(config: TrainConfig, cache_urls: str | Sequence[str]) -> OpenRun:
    """Open and check a run over one cache or several.

    Raises ConfigError, CompatibilityError, FormatError, StorageError.
    """
    urls = [cache_urls] if isinstance(cache_urls, str) else list(cache_urls)
    require_trackers(config.metrics.report_to)
    require_optimizer(config.optimizer, config.student.dtype)
    _check_weights(config, urls)
    caches = tuple(_open_set(url, config) for url in urls)
    source = open_student(config.student)
    for cache in caches:
        check_student(cache, source)
        check_objective(cache, config.objective, source.num_embedding_rows)
    check_alike(caches)
    evaluation_cache = None
    if config.evaluation.cache is not None:
        evaluation_cache = open_cache(config.evaluation.cache, local=config.local_store, check=True)
        check_student(evaluation_cache, source)
    orders = tuple(_order_of(cache, config) for cache in caches)
    steps_per_epoch = [order.steps_per_epoch for order in orders]
    max_steps = config.max_steps or (config.epochs or 1) * sum(steps_per_epoch)
    order: GlobalOrder | MixedOrder = orders[0]
    if len(orders) > 1:
        order = MixedOrder(orders, config.cache_weights or steps_per_epoch, max_steps=max_steps)
    run = OpenRun(
        config=config,
        caches=caches,
        orders=orders,
        evaluation_cache=evaluation_cache,
        source=source,
        order=order,
        max_steps=max_steps,
    )
    remote = [
        (run.shard_needs(number), cache.copies)
        for number, cache in enumerate(caches)
        if cache.copies is not None
    ]
    if not remote:
        return run
    fetching = plan_fetching(remote, [] if evaluation_cache is None else [evaluation_cache])
    fetching.require_room()
    return replace(run, fetching=fetching)


def _check_weights(config: TrainConfig, urls: list[str]) -> None:
    weights = config.cache_weights
    if weights is None:
        return
    if len(weights) != len(urls):
        raise ConfigError(
            f"cache_weights: expected one for each --cache ({len(urls)}), got {len(weights)}"
        )
    if config.epochs is not None and len(urls) > 1:
        raise ConfigError(
            "epochs: with cache_weights the caches are read through at different times",
            hint="set max_steps instead, or leave cache_weights out",
        )


def _open_set(url: str, config: TrainConfig) -> Cache:
    groups = config.stream.groups_per_window * _WINDOWS_KEPT
    cache = open_cache(url, num_groups_kept=groups, local=config.local_store, check=True)
    if not cache.num_samples:
        raise CompatibilityError(f"{cache.url}: num_samples: expected at least 1 row, got 0")
    return cache


def _order_of(cache: Cache, config: TrainConfig) -> GlobalOrder:
    return GlobalOrder(
        seed=config.seed,
        group_sizes=cache.row_group_sizes,
        num_views=cache.num_views,
        batch_size=config.stream.batch_size,
        groups_per_window=config.stream.groups_per_window,
        groups_per_shard=cache.row_groups_per_shard,
        shards_per_pool=config.stream.shards_per_pool,
    )


def describe(run: OpenRun) -> dict[str, Any]:
    """Return what a run will amount to, as JSON values. Checks the shapes of the weights too."""
    source = run.source
    if source.folder is not None:
        check_weights(fetch_weights(source), source.model_config)
    parts = [_describe_set(run, number) for number in range(len(run.caches))]
    several = {"caches": parts} if len(parts) > 1 else {}
    return {
        "cache": run.cache.url if len(parts) == 1 else [part["cache"] for part in parts],
        "cache_identity": run.identity,
        "output": run.config.output,
        "student": source.name,
        "num_parameters": num_parameters(source),
        "losses": run.config.objective.weights,
        "num_samples": sum(part["num_samples"] for part in parts),
        "num_views": max(part["num_views"] for part in parts),
        "steps_per_epoch": run.order.steps_per_epoch,
        "max_steps": run.max_steps,
        "epochs": round(run.max_steps / run.order.steps_per_epoch, 3),
        "views_read": max(part["views_read"] for part in parts),
        "num_masked_positions": sum(part["num_masked_positions"] for part in parts),
        "num_positions": sum(part["num_positions"] for part in parts),
        **several,
        **({} if run.fetching is None else {"local_store": run.fetching.as_json()}),
    }


def _describe_set(run: OpenRun, number: int) -> dict[str, Any]:
    cache, counts = run.caches[number], run.caches[number].manifest.counts
    epochs = run.num_steps_of(number) / run.orders[number].steps_per_epoch
    return {
        "cache": cache.url,
        "cache_identity": cache.identity,
        "num_samples": cache.num_samples,
        "num_views": cache.num_views,
        "steps": run.num_steps_of(number),
        "epochs": round(epochs, 3),
        "views_read": min(math.ceil(epochs), cache.num_views),
        "num_masked_positions": round(
            counts.get("num_masked_positions", 0) / cache.num_views * epochs
        ),
        "num_positions": round(counts.get("num_positions", 0) / cache.num_views * epochs),
    }


def num_parameters(source: StudentSource) -> int:
    """Count the parameters of the student, tied ones once."""
    model = build_without_storage(source.model_config)
    grown = source.num_embedding_rows - source.model_config.vocab_size
    tables = 1 if source.model_config.tie_word_embeddings else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    return int(total + grown * tables * source.model_config.hidden_size)
