"""A run before it runs: everything opened and checked that is cheap, and what it will amount to.

`open_run` reads manifests, configs and tokenizers, and refuses here whatever can be refused. The
plan is what `--dry-run` prints: steps, epochs, positions, parameters.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from stage2_student.compatibility import check_objective, check_student
from stage2_student.config import TrainConfig, deciding_keys
from stage2_student.metrics import require_trackers
from stage2_student.optimizer import require_optimizer
from stage2_student.shard_needs import RemotePlan, ShardNeeds, plan_fetching
from stage2_student.stream import GlobalOrder
from stage2_student.student import build_without_storage, check_weights
from stage2_student.student_source import StudentSource, fetch_weights, open_student
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import CompatibilityError
from tide_cache.order import is_one_pool

# The row groups of two windows are in use at a window's edge.
_WINDOWS_KEPT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """The parts of a run that fit together; `fetching` where the set is a remote one.

    No weights are loaded.
    """

    config: TrainConfig
    cache: Cache
    evaluation_cache: Cache | None
    source: StudentSource
    order: GlobalOrder
    max_steps: int
    fetching: RemotePlan | None = None

    def close(self) -> None:
        """Close the sets."""
        for cache in (self.cache, self.evaluation_cache):
            if cache is not None:
                cache.close()

    @property
    def shard_needs(self) -> ShardNeeds:
        """Which shards the steps of this run need."""
        prefetch = self.config.stream.prefetch
        return ShardNeeds(self.order, self.cache, max_steps=self.max_steps, prefetch=prefetch)

    @property
    def deciding_keys(self) -> dict[str, Any]:
        """The keys and values that decide what this run learns from this set."""
        keys = deciding_keys(self.config)
        if is_one_pool(len(self.cache.row_groups_per_shard), self.config.stream.shards_per_pool):
            # A pool that holds the view is as good as any other, and as none.
            keys["stream.shards_per_pool"] = None
        return keys


def open_run(config: TrainConfig, cache_url: str) -> OpenRun:
    """Open and check a run. Raises ConfigError, CompatibilityError, FormatError, StorageError."""
    require_trackers(config.metrics.report_to)
    require_optimizer(config.optimizer, config.student.dtype)
    groups = config.stream.groups_per_window * _WINDOWS_KEPT
    cache = open_cache(cache_url, num_groups_kept=groups, local=config.local_store)
    if not cache.num_samples:
        raise CompatibilityError(f"{cache.url}: num_samples: expected at least 1 row, got 0")
    source = open_student(config.student)
    check_student(cache, source)
    check_objective(cache, config.objective, source.num_embedding_rows)
    evaluation_cache = None
    if config.evaluation.cache is not None:
        evaluation_cache = open_cache(config.evaluation.cache, local=config.local_store)
        check_student(evaluation_cache, source)
    order = GlobalOrder(
        seed=config.seed,
        group_sizes=cache.row_group_sizes,
        num_views=cache.num_views,
        batch_size=config.stream.batch_size,
        groups_per_window=config.stream.groups_per_window,
        groups_per_shard=cache.row_groups_per_shard,
        shards_per_pool=config.stream.shards_per_pool,
    )
    max_steps = config.max_steps or (config.epochs or 1) * order.steps_per_epoch
    run = OpenRun(
        config=config,
        cache=cache,
        evaluation_cache=evaluation_cache,
        source=source,
        order=order,
        max_steps=max_steps,
    )
    if cache.copies is None:
        return run
    others = [] if evaluation_cache is None else [evaluation_cache]
    fetching = plan_fetching(run.shard_needs, cache.copies, others)
    fetching.require_room()
    return replace(run, fetching=fetching)


def describe(run: OpenRun) -> dict[str, Any]:
    """Return what a run will amount to, as JSON values. Checks the shapes of the weights too."""
    source, counts = run.source, run.cache.manifest.counts
    if source.folder is not None:
        check_weights(fetch_weights(source), source.model_config)
    num_rows_view = run.cache.num_samples
    epochs = run.max_steps / run.order.steps_per_epoch
    return {
        "cache": run.cache.url,
        "cache_identity": run.cache.identity,
        "output": run.config.output,
        "student": source.name,
        "num_parameters": num_parameters(source),
        "losses": run.config.objective.weights,
        "num_samples": num_rows_view,
        "num_views": run.cache.num_views,
        "steps_per_epoch": run.order.steps_per_epoch,
        "max_steps": run.max_steps,
        "epochs": round(epochs, 3),
        "views_read": min(math.ceil(epochs), run.cache.num_views),
        "num_masked_positions": round(
            counts.get("num_masked_positions", 0) / run.cache.num_views * epochs
        ),
        "num_positions": round(counts.get("num_positions", 0) / run.cache.num_views * epochs),
        **({} if run.fetching is None else {"local_store": run.fetching.as_json()}),
    }


def num_parameters(source: StudentSource) -> int:
    """Count the parameters of the student, tied ones once."""
    model = build_without_storage(source.model_config)
    grown = source.num_embedding_rows - source.model_config.vocab_size
    tables = 1 if source.model_config.tie_word_embeddings else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    return int(total + grown * tables * source.model_config.hidden_size)
