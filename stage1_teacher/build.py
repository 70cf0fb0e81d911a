"""Premasked set in, teacher cache out: one task after another, safe to kill and to run again.

First the teacher is calibrated: codecs are fitted to it, once for all workers. A task is the shards
that hold one range of samples, one per view. A worker reads them (hash and every row checked), asks
the teacher about all views and halves of a sample together, puts each answer at the position it is
for, and publishes one shard per view. Batches are formed within a task from its rows alone, and a
CPU worker always computes with `_CPU_THREADS` threads, so the bytes depend neither on the number of
workers nor on who took which task.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch

from stage1_teacher.build_plan import BuildPlan
from stage1_teacher.calibration_record import (
    CalibrationRecord,
    ensure_record,
    open_build_codecs,
    record_of,
)
from stage1_teacher.executors.local import LocalExecutor, default_num_workers
from stage1_teacher.measure import Progress
from stage1_teacher.prepare import count_rows
from stage1_teacher.questions import (
    Part,
    as_candidates,
    ask,
    checked_rows,
    merge,
    parts_of,
    sum_logprobs,
)
from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import Scores, ScoreSpec, Teacher, TeacherConfig
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import FormatError
from tide_cache.manifest import (
    MANIFEST,
    CacheHeader,
    CacheManifest,
    FileFacts,
    Manifest,
    ShardFacts,
)
from tide_cache.payloads import Codec, num_entries, payload_fields
from tide_cache.payloads.hidden import Transform
from tide_cache.rows import PremaskedRow
from tide_cache.shards import read_shard
from tide_cache.store import Store
from tide_cache.verify import set_schema
from tide_cache.writer import SetWriter, TaskRecord, read_manifest

logger = logging.getLogger(__name__)
_CPU_THREADS = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildJob:
    """What a worker needs to build any task; picklable. `files`: the codec files."""

    plan: BuildPlan
    header: CacheHeader
    files: tuple[FileFacts, ...]


def run_build(
    plan: BuildPlan,
    *,
    num_workers: int | None = None,
    on_task: Callable[[TaskRecord, bool], None] | None = None,
    on_calibration: Progress | None = None,
) -> CacheManifest:
    """Build whatever is missing of the planned cache and return its manifest.

    `on_task(record, was_done)` is called for every task, those of an earlier run included. Raises
    CompatibilityError when the folder holds another build, StorageError when a disk is full.
    """
    store = Store(plan.output_url)
    record = _record(plan, store, on_calibration)
    header = plan.header(record.payloads, record.fidelity)
    writer = SetWriter(store, header)
    complete = writer.begin()
    if complete is not None:
        logger.info("%s is complete already", plan.output_url)
        return _cache_manifest(complete)
    done = writer.finished_tasks()
    for task_record in done.values():
        if on_task is not None:
            on_task(task_record, True)

    def finished(task: int, record: TaskRecord) -> None:
        if on_task is not None:
            on_task(record, False)

    workers = num_workers or default_num_build_workers(plan.config.teacher)
    job = BuildJob(plan=plan, header=header, files=record.files)
    executor = LocalExecutor(_WorkerMaker(job), workers)
    executor.run([task for task in plan.tasks if task not in done], finished)
    codec_files = [facts.path for facts in record.files]
    return _cache_manifest(writer.finish(plan.tasks, codec_files=codec_files))


def _cache_manifest(manifest: Manifest) -> CacheManifest:
    assert isinstance(manifest, CacheManifest)  # a writer's manifest is of its header's kind
    return manifest


def _record(plan: BuildPlan, store: Store, on_slice: Progress | None) -> CalibrationRecord:
    """Return the calibration of this build: that of the finished cache, if there is one."""
    if store.exists(MANIFEST):
        manifest = read_manifest(store)
        if isinstance(manifest, CacheManifest):
            return record_of(manifest)
    with _one_thread(plan.config.teacher):
        return ensure_record(plan, open_cache(plan.premasked_url), on_slice=on_slice)


@contextmanager
def _one_thread(config: TeacherConfig) -> Iterator[None]:
    """Let torch compute as workers do, so that bytes do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(_CPU_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_num_build_workers(config: TeacherConfig) -> int:
    """Return one worker per GPU that may be used, or one per processor without a GPU."""
    if config.device == "cpu" or not torch.cuda.is_available():
        # A vLLM engine takes all processors itself.
        return 1 if config.backend == "vllm" else max(1, default_num_workers() // _CPU_THREADS)
    spread = config.device != "auto" or config.spans_devices
    return 1 if spread else torch.cuda.device_count()


@dataclasses.dataclass(frozen=True)
class _WorkerMaker:
    """Makes the worker of a process; picklable, unlike a loaded teacher."""

    job: BuildJob

    def __call__(self, slot: int) -> "BuildWorker":
        plan = self.job.plan
        config = plan.config.teacher
        if config.device == "auto" and not config.spans_devices and torch.cuda.is_available():
            config = config.model_copy(
                update={"device": f"cuda:{slot % torch.cuda.device_count()}"}
            )
        torch.set_num_threads(_CPU_THREADS)
        return BuildWorker(self.job, load_teacher(config, plan.teacher))


class BuildWorker:
    """Builds tasks with a loaded teacher."""

    def __init__(self, job: BuildJob, teacher: Teacher) -> None:
        self.plan, self.header = job.plan, job.header
        self.teacher = teacher
        self.premasked = open_cache(self.plan.premasked_url)
        self.writer = SetWriter(Store(self.plan.output_url), self.header)
        self.codecs, transform = open_build_codecs(self.writer.store, self.header, job.files)
        self.spec = score_spec(self.header, transform)

    def __call__(self, task: int) -> TaskRecord:
        """Build and publish one task. Raises DataError naming a row that cannot be answered."""
        tables_V = read_task(self.premasked, task)
        rows_V = [checked_rows(table, self.premasked, view) for view, table in enumerate(tables_V)]
        payload_V: list[list[pa.Table]] = [[] for _ in rows_V]
        num_samples = tables_V[0].num_rows
        step = self.plan.config.samples_per_batch
        for start in range(0, num_samples, step):
            views = [rows[start : start + step] for rows in rows_V]
            for view, encoded in enumerate(self._answer(views)):
                payload_V[view].append(encoded)
        tables = [self._with_payload(t, p) for t, p in zip(tables_V, payload_V, strict=True)]
        counts = count_rows(rows_V)
        return self.writer.publish_task(task, tables, counts=counts, dropped={})

    def _answer(self, rows_VS: Sequence[Sequence[PremaskedRow]]) -> list[pa.Table]:
        """Return the encoded payloads of all samples, a table per view."""
        samples = list(zip(*rows_VS, strict=True))
        questions = [ask(views, comp_demo=self.plan.config.comp_demo) for views in samples]
        answers = self.teacher.score([q.request for q in questions], self.spec)
        return [
            self._encode(
                rows,
                [
                    parts_of(question, streams, view)
                    for question, streams in zip(questions, answers, strict=True)
                ],
            )
            for view, rows in enumerate(rows_VS)
        ]

    def _encode(self, rows: Sequence[PremaskedRow], parts_S: Sequence[Sequence[Part]]) -> pa.Table:
        """Encode the answers to the rows of one view. Raises FormatError naming the row."""
        try:
            return self._encode_together(rows, parts_S)
        except FormatError:
            for row, parts in zip(rows, parts_S, strict=True):
                try:
                    self._encode_together([row], [parts])
                except FormatError as error:
                    where = f"sample {row.sample_id} view {row.view}"
                    raise FormatError(f"{where}: {error.message}", hint=error.hint) from error
            raise

    def _encode_together(
        self, rows: Sequence[PremaskedRow], parts_S: Sequence[Sequence[Part]]
    ) -> pa.Table:
        alignment, codecs = self.header.alignment, self.codecs
        nums_S = np.array([num_entries(row, alignment) for row in rows], dtype=np.int64)
        columns: dict[str, pa.Array] = {}
        if codecs.candidates is not None:
            merged = Scores.concatenate(
                [merge(p, self.spec, int(n)) for p, n in zip(parts_S, nums_S, strict=True)],
                self.spec,
            )
            found = as_candidates(merged, codecs.candidates.facts)
            columns |= _named(codecs.candidates, codecs.candidates.encode(found, nums_S))
            if codecs.hidden is not None:
                assert merged.hidden_codes_PR is not None
                encoded = codecs.hidden.encode(merged.hidden_codes_PR, nums_S)
                columns |= _named(codecs.hidden, encoded)
        if codecs.chunks is not None:
            logprobs = [sum_logprobs(p, int(n)) for p, n in zip(parts_S, nums_S, strict=True)]
            encoded = codecs.chunks.encode(np.concatenate(logprobs), nums_S)
            columns |= _named(codecs.chunks, encoded)
        schema = pa.schema(payload_fields(self.header))
        return pa.table([columns[name] for name in schema.names], schema=schema)

    def _with_payload(self, table: pa.Table, payloads: list[pa.Table]) -> pa.Table:
        payload = pa.concat_tables(payloads)
        columns = [table[name].combine_chunks() for name in table.schema.names]
        columns += [payload[name] for name in payload.schema.names]
        return pa.table(columns, schema=set_schema(self.header))


def score_spec(header: CacheHeader, transform: Transform | None) -> ScoreSpec:
    """Return what is asked of the teacher; the true token's log-prob comes with every answer."""
    facts = header.candidates
    if facts is None:
        return ScoreSpec(k=0, temperatures=(), vocab_size=header.teacher_model.vocab_size)
    return ScoreSpec(
        k=facts.k,
        temperatures=facts.temperatures,
        vocab_size=facts.vocab_size,
        transform=transform,
    )


def _named(codec: Codec, arrays: Sequence[pa.Array]) -> dict[str, pa.Array]:
    return dict(zip((field.name for field in codec.fields()), arrays, strict=True))


def read_task(premasked: Cache, task: int) -> list[pa.Table]:
    """Read the shards of a task, one table per view, after checking size and sha256.

    Raises FormatError that names the shard, or when views do not hold the same samples in order.
    """
    shards = [shard for shard in premasked.manifest.shards if shard.task == task]
    tables = [_read_checked(premasked, shard) for shard in shards]
    for shard, table in zip(shards, tables, strict=True):
        for column in ("sample_id", "teacher_ids", "student_ids"):
            if not table[column].equals(tables[0][column]):
                raise FormatError(
                    f"{premasked.url}/{shard.path}: {column}: expected the values of view 0: all "
                    "views hold the same samples in the same order"
                )
    return tables


def _read_checked(premasked: Cache, shard: ShardFacts) -> pa.Table:
    store = premasked.store
    size_bytes = store.size_bytes(shard.path)
    found = store.sha256(shard.path) if size_bytes == shard.size_bytes else None
    if found != shard.sha256:
        problem = (
            f"expected {shard.size_bytes} bytes, got {size_bytes}"
            if found is None
            else f"sha256 mismatch (expected {shard.sha256[:12]}…, got {found[:12]}…)"
        )
        raise FormatError(
            f"shard {shard.path}: {problem}",
            hint=f"make it again: remove it and its record, or the folder {premasked.url}, and run "
            "'tide-cache prepare'",
        )
    table = read_shard(store, shard.path)
    expected = set_schema(premasked.manifest)
    if not table.schema.equals(expected, check_metadata=False):
        raise FormatError(
            f"shard {shard.path}: schema: expected {expected.names}, got {table.schema.names}"
        )
    return table.replace_schema_metadata(None)
