"""Premasked set in, teacher cache out: one task after another, safe to kill and to run again.

A task is the shards that hold one range of samples, one per view. A worker reads them (hash and
every row checked), asks the teacher about all views and halves of a sample together, puts each
answer at the position it is for, and publishes one shard per view. Batches are formed within a
task from its rows alone, and a CPU worker always computes with `_CPU_THREADS` threads, so the bytes
depend neither on the number of workers nor on who took which task.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import torch
from safetensors.numpy import save

from stage1_teacher.build_plan import BuildPlan
from stage1_teacher.executors.local import LocalExecutor, default_num_workers
from stage1_teacher.premask import teacher_streams
from stage1_teacher.prepare import count_rows
from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import (
    FloatArray,
    ScoreRequest,
    Scores,
    ScoreSpec,
    Stream,
    Teacher,
    TeacherConfig,
)
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import FormatError
from tide_cache.manifest import Manifest, ShardFacts
from tide_cache.payloads import candidates, chunks, num_entries, payload_fields
from tide_cache.payloads.candidates import Candidates
from tide_cache.rows import PremaskedRow, table_to_rows
from tide_cache.shards import read_shard
from tide_cache.store import Store
from tide_cache.verify import check_row_of, set_schema
from tide_cache.writer import SetWriter, TaskRecord

logger = logging.getLogger(__name__)
_CPU_THREADS = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleQuestion:
    """All views of one sample as one request, and where each stream's answers belong.

    `slots[s]` = (view, payload entry of each wanted position (P,)) of stream s.
    """

    request: ScoreRequest
    slots: tuple[tuple[int, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One stream's answers for a row, and the payload entry that each of them feeds."""

    entry_P: np.ndarray
    scores: Scores


def run_build(
    plan: BuildPlan,
    *,
    num_workers: int | None = None,
    on_task: Callable[[TaskRecord, bool], None] | None = None,
) -> Manifest:
    """Build whatever is missing of the planned cache and return its manifest.

    `on_task(record, was_done)` is called for every task, those of an earlier run included. Raises
    CompatibilityError when the folder holds another build, StorageError when a disk is full.
    """
    writer = SetWriter(Store(plan.output_url), plan.header)
    complete = writer.begin()
    if complete is not None:
        logger.info("%s is complete already", plan.output_url)
        return complete
    done = writer.finished_tasks()
    for record in done.values():
        if on_task is not None:
            on_task(record, True)

    def finished(task: int, record: TaskRecord) -> None:
        if on_task is not None:
            on_task(record, False)

    workers = num_workers or default_num_build_workers(plan.config.teacher)
    executor = LocalExecutor(_WorkerMaker(plan), workers)
    executor.run([task for task in plan.tasks if task not in done], finished)
    return writer.finish(plan.tasks, codec_files=codec_files(plan))


def default_num_build_workers(config: TeacherConfig) -> int:
    """Return one worker per GPU that may be used, or one per processor without a GPU."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return max(1, default_num_workers() // _CPU_THREADS)
    spread = config.device != "auto" or config.device_map is not None
    return 1 if spread else torch.cuda.device_count()


def codec_files(plan: BuildPlan) -> tuple[str, ...]:
    """Return the files that the payload needs once per cache."""
    return (candidates.MEAN_LOGITS_FILE,) if plan.fit_rows else ()


@dataclasses.dataclass(frozen=True)
class _WorkerMaker:
    """Makes the worker of a process; picklable, unlike a loaded teacher."""

    plan: BuildPlan

    def __call__(self, slot: int) -> "BuildWorker":
        config = self.plan.config.teacher
        if config.device == "auto" and config.device_map is None and torch.cuda.is_available():
            config = config.model_copy(
                update={"device": f"cuda:{slot % torch.cuda.device_count()}"}
            )
        torch.set_num_threads(_CPU_THREADS)
        return BuildWorker(self.plan, load_teacher(config, self.plan.teacher))


class BuildWorker:
    """Builds tasks with a loaded teacher."""

    def __init__(self, plan: BuildPlan, teacher: Teacher) -> None:
        self.plan = plan
        self.teacher = teacher
        self.premasked = open_cache(plan.premasked_url)
        self.writer = SetWriter(Store(plan.output_url), plan.header)
        self._fit()

    def __call__(self, task: int) -> TaskRecord:
        """Build and publish one task. Raises DataError naming a row that cannot be answered."""
        tables_V = read_task(self.premasked, task)
        rows_V = [checked_rows(table, self.premasked, view) for view, table in enumerate(tables_V)]
        columns_V: list[list[dict[str, bytes]]] = [[] for _ in rows_V]
        num_samples = tables_V[0].num_rows
        step = self.plan.config.samples_per_batch
        for start in range(0, num_samples, step):
            views = [rows[start : start + step] for rows in rows_V]
            for view, encoded in enumerate(self._answer(views)):
                columns_V[view] += encoded
        tables = [self._with_payload(t, c) for t, c in zip(tables_V, columns_V, strict=True)]
        counts = count_rows(rows_V)
        return self.writer.publish_task(task, tables, counts=counts, dropped={})

    def _answer(self, rows_VS: Sequence[Sequence[PremaskedRow]]) -> list[list[dict[str, bytes]]]:
        """Return the encoded payloads of every row, by view, then by sample."""
        samples = list(zip(*rows_VS, strict=True))
        questions = [ask(views, comp_demo=self.plan.config.comp_demo) for views in samples]
        answers = self.teacher.score([q.request for q in questions], self.plan.spec)
        encoded: list[list[dict[str, bytes]]] = [[] for _ in rows_VS]
        for views, question, streams in zip(samples, questions, answers, strict=True):
            for view, row in enumerate(views):
                parts = [
                    Part(entry_P=entry_P, scores=scores)
                    for (of_view, entry_P), scores in zip(question.slots, streams, strict=True)
                    if of_view == view
                ]
                encoded[view].append(self._encode(row, parts))
        return encoded

    def _encode(self, row: PremaskedRow, parts: Sequence[Part]) -> dict[str, bytes]:
        header, where = self.plan.header, f"sample {row.sample_id} view {row.view}"
        num = num_entries(row, header.alignment)
        columns: dict[str, bytes] = {}
        if header.candidates is not None:
            merged = merge(parts, self.plan.spec, num)
            columns |= candidates.encode(as_candidates(merged), header.candidates, where=where)
        if header.chunks is not None:
            columns |= chunks.encode(sum_logprobs(parts, num), header.chunks, where=where)
        return columns

    def _with_payload(self, table: pa.Table, encoded: list[dict[str, bytes]]) -> pa.Table:
        columns = [table[name].combine_chunks() for name in table.schema.names]
        columns += [
            pa.array([columns[name] for columns in encoded], type=pa.binary())
            for name in (field.name for field in payload_fields(self.plan.header))
        ]
        return pa.table(columns, schema=set_schema(self.plan.header))

    def _fit(self) -> None:
        """Publish the mean logits if they are wanted and absent; every worker gets the same."""
        store, facts = self.writer.store, self.plan.header.candidates
        if facts is None or not self.plan.fit_rows or store.exists(candidates.MEAN_LOGITS_FILE):
            return
        table = self.premasked.read_rows(0, self.plan.fit_rows)
        questions = [
            ask([row], comp_demo=self.plan.config.comp_demo)
            for row in checked_rows(table, self.premasked, 0)
        ]
        mean_V, num_positions = self.teacher.mean_logits(
            [question.request for question in questions], facts.vocab_size
        )
        assert num_positions == facts.mean_logits_positions
        data = save({candidates.MEAN_LOGITS_TENSOR: mean_V.astype(np.float32)})
        store.publish(candidates.MEAN_LOGITS_FILE, data)


def ask(views: Sequence[PremaskedRow], *, comp_demo: bool) -> SampleQuestion:
    """Put all views of a sample into one request: one stream per CompDemo half that has answers."""
    streams, slots = [], []
    for view, row in enumerate(views):
        for part in teacher_streams(row, comp_demo=comp_demo):
            if len(part.payload_P):
                streams.append(Stream(masked_L=part.masked_L, wanted_P=part.wanted_P))
                slots.append((view, part.payload_P))
    request = ScoreRequest(
        clean_ids_L=views[0].teacher_ids_L,
        streams=tuple(streams),
        name=f"sample {views[0].sample_id}",
    )
    return SampleQuestion(request=request, slots=tuple(slots))


def merge(parts: Sequence[Part], spec: ScoreSpec, num_positions: int) -> Scores:
    """Put the answers of a row's streams at the payload positions they are for.

    Every position is answered by exactly one stream: the pass in which it was masked.
    """
    together = Scores.concatenate([part.scores for part in parts], spec)
    entry_P = np.concatenate([np.empty(0, np.int64), *[part.entry_P for part in parts]])
    order_P = np.argsort(entry_P)
    assert np.array_equal(entry_P[order_P], np.arange(num_positions))
    fields = dataclasses.fields(Scores)
    return Scores(**{field.name: getattr(together, field.name)[order_P] for field in fields})


def sum_logprobs(parts: Sequence[Part], num_chunks: int) -> FloatArray:
    """Sum log p(true token) over the teacher tokens of each active chunk. Returns float32 (C,).

    Every chunk is answered by exactly one stream, by all its tokens together.
    """
    total_C = np.zeros(num_chunks, dtype=np.float64)
    for part in parts:
        np.add.at(total_C, part.entry_P, part.scores.label_logprob_P)
    return total_C.astype(np.float32)


def as_candidates(scores: Scores) -> Candidates:
    """Return the teacher's answer in the form that codecs take: ids ascending."""
    return candidates.sort_by_id(
        Candidates(
            ids_PK=scores.topk_ids_PK,
            logits_PK=scores.topk_logits_PK,
            logsumexp_PT=scores.logsumexp_PT,
            label_logprob_P=scores.label_logprob_P,
        )
    )


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


def checked_rows(table: pa.Table, premasked: Cache, view: int) -> list[PremaskedRow]:
    """Take the rows out of a table and check every field. Raises DataError naming the sample."""
    rows = table_to_rows(table, premasked.manifest.alignment)
    for row in rows:
        check_row_of(row, premasked.manifest, view)
    return rows


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
