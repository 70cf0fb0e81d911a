"""Premasked set in, teacher cache out, safe to kill and to run again.

First the teacher is calibrated: codecs are fitted to it, once for all workers. Then an executor has
workers build tasks (`build_worker`); what is done, by whomever, is never done again. Whoever finds
all tasks done publishes the manifest. A build may be a share of one (`--shard-range`): any number
of them, anywhere, fill the same folder.
"""

import functools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stage1_teacher.build_plan import BuildPlan
from stage1_teacher.build_worker import BuildJob, MakeBuildWorker, one_thread
from stage1_teacher.calibration_record import CalibrationRecord, ensure_record, record_of
from stage1_teacher.events import NO_EVENTS, EventLog
from stage1_teacher.executors.base import Executor
from stage1_teacher.executors.local import LocalExecutor, default_num_workers
from stage1_teacher.measure import Progress
from stage1_teacher.teachers.base import TeacherConfig
from tide_cache.cache import open_cache
from tide_cache.errors import TideError
from tide_cache.manifest import MANIFEST, CacheManifest, Manifest
from tide_cache.store import Store
from tide_cache.writer import SetWriter, TaskRecord, Total, read_manifest

logger = logging.getLogger(__name__)
# What every worker imports, once for all.
_PRELOAD = ("torch", "transformers", "stage1_teacher.build_worker", "stage1_teacher.teachers.hf")
OnTask = Callable[[TaskRecord, bool], None]


class TasksFailedError(TideError):
    """Some tasks were set aside; all others are done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRange:
    """Share `index` of `count` of the tasks, for builds that run side by side."""

    index: int
    count: int

    def of(self, tasks: Sequence[int]) -> list[int]:
        """Return every `count`-th task, so that shares take equally long."""
        return list(tasks[self.index :: self.count])


_WHOLE = ShardRange(index=0, count=1)


def run_build(
    plan: BuildPlan,
    *,
    num_workers: int | None = None,
    executor: Executor | None = None,
    on_task: OnTask | None = None,
    on_calibration: Progress | None = None,
    log: EventLog = NO_EVENTS,
) -> CacheManifest:
    """Build whatever is missing of the planned cache and return its manifest.

    `on_task(record, was_done)` is called for every task, those of an earlier run included. Raises
    TasksFailedError naming the tasks that were set aside once the others are done,
    CompatibilityError when the folder holds another build, StorageError when a disk is full.
    """
    manifest = run_share(
        plan,
        _WHOLE,
        num_workers=num_workers,
        executor=executor,
        on_task=on_task,
        on_calibration=on_calibration,
        log=log,
    )
    assert manifest is not None  # the whole is done, or an error says why not
    return manifest


def run_share(
    plan: BuildPlan,
    share: ShardRange,
    *,
    num_workers: int | None = None,
    executor: Executor | None = None,
    on_task: OnTask | None = None,
    on_calibration: Progress | None = None,
    log: EventLog = NO_EVENTS,
) -> CacheManifest | None:
    """Build one share of a cache as `run_build` does.

    Returns the manifest where all shares are done with it, None where others are missing.
    """
    if executor is None:
        executor = local_executor(plan.config.teacher, num_workers)
    store = Store(plan.output_url)
    record = executor.call(functools.partial(_record, plan), on_calibration)
    header = plan.header(record.payloads, record.fidelity)
    writer = SetWriter(store, header)
    complete = writer.begin(Total(num_tasks=len(plan.tasks), num_rows=plan.num_rows))
    if complete is not None:
        logger.info("%s is complete already", plan.output_url)
        return _cache_manifest(complete)
    writer.forget_set_aside()
    done = writer.finished_tasks()
    mine = share.of(plan.tasks)
    log.write("begin", output=plan.output_url, num_tasks=len(mine), num_done=len(done))
    report = on_task or (lambda record, was_done: None)
    for task in mine:
        if task in done:
            report(done[task], True)

    def finished(task: int, record: TaskRecord) -> None:
        log.write("task_done", task=task, **record.counts, size_bytes=record.size_bytes)
        for note in record.notes:
            logger.warning("task %d: %s", task, note)
            log.write("note", task=task, note=note)
        report(record, False)

    maker = MakeBuildWorker(BuildJob(plan=plan, header=header, files=record.files))
    missing = [task for task in mine if task not in done]
    if not writer.is_first and missing:
        # Another build may be at work here: begin elsewhere, or both do the same all along.
        turn = random.randrange(len(missing))
        missing = missing[turn:] + missing[:turn]
    failed = executor.run(maker, missing, finished, log)
    for task, error in failed.items():
        writer.set_aside(task, error.message)
    _require_none(failed, num_tasks=len(mine))
    if share != _WHOLE and not _all_done(writer, plan.tasks):
        log.write("share_done", index=share.index, count=share.count)
        return None
    codec_files = [facts.path for facts in record.files]
    manifest = _cache_manifest(writer.finish(plan.tasks, codec_files=codec_files))
    log.write("finished", size_bytes=manifest.counts["size_bytes"])
    return manifest


def _require_none(failed: dict[int, TideError], *, num_tasks: int) -> None:
    if not failed:
        return
    first = min(failed)
    others = ", ".join(str(task) for task in sorted(failed)[:10])
    raise TasksFailedError(
        f"{len(failed)} of {num_tasks} tasks failed and were set aside ({others}); the others are "
        f"done. Task {first}: {failed[first].message}",
        hint=failed[first].hint or "repair what they name and run the same command again",
    )


def _all_done(writer: SetWriter, tasks: Sequence[int]) -> bool:
    done = writer.finished_tasks()
    return all(task in done for task in tasks) or writer.store.exists(MANIFEST)


def _cache_manifest(manifest: Manifest) -> CacheManifest:
    assert isinstance(manifest, CacheManifest)  # a writer's manifest is of its header's kind
    return manifest


def local_executor(config: TeacherConfig, num_workers: int | None) -> LocalExecutor:
    """Return an executor with one worker per GPU, or per processor, unless told otherwise."""
    return LocalExecutor(num_workers or default_num_build_workers(config), preload=_PRELOAD)


def _record(plan: BuildPlan, on_slice: Progress | None) -> CalibrationRecord:
    """Return the calibration of this build: that of the finished cache, if there is one."""
    store = Store(plan.output_url)
    if store.exists(MANIFEST):
        manifest = read_manifest(store)
        if isinstance(manifest, CacheManifest):
            return record_of(manifest)
    with one_thread():
        return ensure_record(plan, open_cache(plan.premasked_url), on_slice=on_slice)


def default_num_build_workers(config: TeacherConfig) -> int:
    """Return one worker per GPU that may be used, or one per processor without a GPU."""
    if config.device == "cpu" or not torch.cuda.is_available():
        # A vLLM engine takes all processors itself.
        return 1 if config.backend == "vllm" else default_num_workers()
    spread = config.device != "auto" or config.spans_devices
    return 1 if spread else torch.cuda.device_count()
