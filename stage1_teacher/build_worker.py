"""One worker of a build: reads a task, asks the teacher, encodes and writes, all at the same time.

A task is the shards that hold one range of samples, one per view. They are read (hash and every row
checked), the teacher is asked about all views and halves of a sample together, each answer is put
at the position it is for, and one shard per view is published. Reading the next task, asking about
this one, encoding its answers, and writing the task before go on in threads of their own, so that
the teacher waits for neither disk nor codec. Batches are formed within a task from its rows alone,
and a CPU worker always computes with `CPU_THREADS` threads, so the bytes depend neither on the
number of workers nor on who took which task.
"""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch

from stage1_teacher.build_plan import BuildPlan
from stage1_teacher.calibration_record import open_build_codecs
from stage1_teacher.questions import (
    Part,
    SampleQuestion,
    as_candidates,
    ask,
    checked_rows,
    merge,
    parts_of,
    sum_logprobs,
)
from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import (
    DROP_HINT,
    NonFiniteLogitsError,
    Scores,
    ScoreSpec,
    Teacher,
)
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import FormatError, TideError
from tide_cache.manifest import CacheHeader, FileFacts, ShardFacts
from tide_cache.payloads import Codec, num_entries, payload_fields
from tide_cache.payloads.hidden import Transform
from tide_cache.row_counts import count_rows
from tide_cache.rows import PremaskedRow
from tide_cache.set_schema import set_schema
from tide_cache.shards import read_shard
from tide_cache.store import Store
from tide_cache.writer import SetWriter, TaskRecord

CPU_THREADS = 1
# One task is read, one is with the teacher, one is written.
_DEPTH = 3
# Answers of so many slices of samples may wait for the encoder.
_WAITING_SLICES = 2
_LOOK_S = 0.5
SMALLER_BUDGET = "num_rows_at_smaller_token_budget"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildJob:
    """What a worker needs to build any task; picklable. `files`: the codec files."""

    plan: BuildPlan
    header: CacheHeader
    files: tuple[FileFacts, ...]


@dataclasses.dataclass(frozen=True)
class MakeBuildWorker:
    """Makes the worker of a process; picklable, unlike a loaded teacher."""

    job: BuildJob

    def __call__(self, slot: int) -> "BuildWorker":
        """Load the teacher on the GPU of this slot, if there are GPUs."""
        plan = self.job.plan
        config = plan.config.teacher
        if config.device == "auto" and not config.spans_devices and torch.cuda.is_available():
            config = config.model_copy(
                update={"device": f"cuda:{slot % torch.cuda.device_count()}"}
            )
        torch.set_num_threads(CPU_THREADS)
        return BuildWorker(self.job, load_teacher(config, plan.teacher))


@dataclasses.dataclass(kw_only=True, slots=True)
class Seconds:
    """Where the time of a worker's threads went."""

    reading: float = 0.0
    asking: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the time within as that of a part."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - began_s)


@dataclasses.dataclass(kw_only=True, slots=True)
class _Task:
    """The rows of a task that stay, and what is to be said of the others."""

    number: int
    tables_V: list[pa.Table]
    rows_V: list[list[PremaskedRow]]
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    notes: list[str] = dataclasses.field(default_factory=list)
    num_rows_at_smaller_budget: int = 0

    def without(self, gone_S: Sequence[int]) -> None:
        """Leave some samples out."""
        if not gone_S:
            return
        kept = np.setdiff1d(np.arange(self.tables_V[0].num_rows), gone_S)
        self.tables_V = [table.take(pa.array(kept)) for table in self.tables_V]
        self.rows_V = [[rows[index] for index in kept] for rows in self.rows_V]


class BuildWorker:
    """Builds tasks with a loaded teacher. See `executors.base.Worker`."""

    depth = _DEPTH

    def __init__(self, job: BuildJob, teacher: Teacher) -> None:
        self.plan, self.header = job.plan, job.header
        self.teacher = teacher
        self.premasked = open_cache(self.plan.premasked_url)
        self.writer = SetWriter(Store(self.plan.output_url), self.header)
        self.codecs, transform = open_build_codecs(self.writer.store, self.header, job.files)
        self.spec = score_spec(self.header, transform)
        self.seconds = Seconds()
        self._closed = threading.Event()
        self._waiting = threading.Semaphore(_WAITING_SLICES)
        self._reader, self._asker, self._encoder, self._writer = (
            # Threads of OpenMP are counted by thread.
            ThreadPoolExecutor(1, name, torch.set_num_threads, (CPU_THREADS,))
            for name in ("read", "ask", "encode", "write")
        )

    def __call__(self, task: int) -> TaskRecord:
        """Build and publish one task. Raises DataError naming a row that cannot be answered."""
        return self.submit(task).result()

    def submit(self, task: int) -> "Future[TaskRecord]":
        """Begin a task behind those that were submitted before."""
        read = self._reader.submit(self._read, task)
        asked = self._asker.submit(lambda: self._ask_all(read.result()))
        return self._writer.submit(lambda: self._publish(task, asked.result()))

    def close(self) -> None:
        """Begin nothing more, and stop asking before the next slice."""
        self._closed.set()
        for pool in (self._reader, self._asker, self._encoder, self._writer):
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, task: int) -> _Task | TaskRecord:
        """Read a task, or return its record where another builder was first."""
        record = self.writer.record_of(task)
        if record is not None:
            return record
        with self.seconds.of("reading"):
            tables = read_task(self.premasked, task)
            rows = [checked_rows(table, self.premasked, view) for view, table in enumerate(tables)]
        return _Task(number=task, tables_V=tables, rows_V=rows)

    def _ask_all(self, task: _Task | TaskRecord) -> "tuple[_Task, _Payloads] | TaskRecord":
        """Ask the teacher slice by slice; answers are encoded while the next slice is asked."""
        if isinstance(task, TaskRecord):
            return task
        num_samples, step = task.tables_V[0].num_rows, self.plan.config.samples_per_batch
        encoded: _Payloads = []
        gone: list[int] = []
        for start in range(0, num_samples, step):
            samples = list(zip(*(rows[start : start + step] for rows in task.rows_V), strict=True))
            with self.seconds.of("asking"):
                asked = self._ask(samples, task)
            gone += [start + index for index in range(len(samples)) if index not in asked.kept]
            while not self._waiting.acquire(timeout=_LOOK_S) or self._closed.is_set():
                if self._closed.is_set():
                    raise InterruptedError("the build was stopped")
            encoded.append(self._encoder.submit(self._encode_slice, asked))
        task.without(gone)
        return task, encoded

    def _ask(self, samples: list[tuple[PremaskedRow, ...]], task: _Task) -> "_Asked":
        """Ask about some samples, all views together.

        A sample whose logits are not numbers is an error, or left out and counted, as the config
        has it.
        """
        kept = list(range(len(samples)))
        questions = [ask(views, comp_demo=self.plan.config.comp_demo) for views in samples]
        while True:
            try:
                chosen = [questions[index] for index in kept]
                answers = self.teacher.score([q.request for q in chosen], self.spec)
                break
            except NonFiniteLogitsError as error:
                if self.plan.config.bad_samples == "fail" or error.request_index is None:
                    raise _with_hint(error) from error
                del kept[error.request_index]
                task.dropped[error.reason] += 1
                task.notes.append(f"left out: {error.message}")
        if getattr(self.teacher, "has_shrunk", False):
            task.num_rows_at_smaller_budget += len(kept) * len(task.rows_V)
        return _Asked(kept=kept, samples=samples, questions=chosen, answers=answers)

    def _encode_slice(self, asked: "_Asked") -> list[pa.Table]:
        """Return the encoded payloads of a slice of samples, a table per view."""
        try:
            with self.seconds.of("encoding"):
                return [
                    self._encode([asked.samples[index][view] for index in asked.kept], parts)
                    for view, parts in enumerate(asked.parts_VS(self.header.num_views))
                ]
        finally:
            self._waiting.release()

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
            joined = np.concatenate([np.empty(0, np.float32), *logprobs])
            columns |= _named(codecs.chunks, codecs.chunks.encode(joined, nums_S))
        schema = pa.schema(payload_fields(self.header))
        return pa.table([columns[name] for name in schema.names], schema=schema)

    def _publish(self, number: int, asked: "tuple[_Task, _Payloads] | TaskRecord") -> TaskRecord:
        if isinstance(asked, TaskRecord):
            return asked
        task, encoded = asked
        slices = [future.result() for future in encoded]
        with self.seconds.of("writing"):
            tables = [
                self._with_payload(table, [payload[view] for payload in slices])
                for view, table in enumerate(task.tables_V)
            ]
            counts = count_rows(task.rows_V)
            if task.num_rows_at_smaller_budget:
                counts[SMALLER_BUDGET] = task.num_rows_at_smaller_budget
                task.notes.append(
                    f"{task.num_rows_at_smaller_budget} rows were asked in smaller batches than "
                    "configured, which rounds otherwise: the memory did not hold more"
                )
            return self.writer.publish_task(
                number, tables, counts=counts, dropped=task.dropped, notes=task.notes
            )

    def _with_payload(self, table: pa.Table, payloads: list[pa.Table]) -> pa.Table:
        payload = pa.concat_tables(payloads)
        columns = [table[name].combine_chunks() for name in table.schema.names]
        columns += [payload[name] for name in payload.schema.names]
        return pa.table(columns, schema=set_schema(self.header))


_Payloads = list["Future[list[pa.Table]]"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """Answers to the samples that stay: `kept` are their indices among `samples`."""

    kept: list[int]
    samples: list[tuple[PremaskedRow, ...]]
    questions: list[SampleQuestion]
    answers: list[list[Scores]]

    def parts_VS(self, num_views: int) -> list[list[list[Part]]]:
        """Return the answers by view, by sample."""
        return [
            [
                parts_of(question, streams, view)
                for question, streams in zip(self.questions, self.answers, strict=True)
            ]
            for view in range(num_views)
        ]


def _with_hint(error: NonFiniteLogitsError) -> TideError:
    named = NonFiniteLogitsError(error.message, hint=DROP_HINT)
    named.request_index, named.stream_index = error.request_index, error.stream_index
    return named


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute as workers do, so that bytes do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(CPU_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
