"""The training loop: read a step's batches, update, report, evaluate, save.

Everything that a step depends on is a function of its number (rows, view, learning rate, lambda,
seed), so a run is resumed by counting: load the newest checkpoint, cut the metrics behind it, go
on. What one update is stands in `update`; what may be refused beforehand in `plan`.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stage2_student import checkpoints
from stage2_student.attention import attention_implementation
from stage2_student.batches import BatchReader, InputForm
from stage2_student.checkpoints import Checkpoint
from stage2_student.compatibility import teacher_reading
from stage2_student.config import TrainConfig
from stage2_student.evaluate import Evaluation, evaluate
from stage2_student.metrics import METRICS_FILE, MetricsFile, Tracker, open_trackers
from stage2_student.optimizer import load_optimizer, optimizer_tensors, save_optimizer
from stage2_student.plan import OpenRun, open_run
from stage2_student.progress import NoProgress, TrainProgress
from stage2_student.release.model_card import write_card
from stage2_student.release.released_format import save_released, weights
from stage2_student.release.training_record import make_record, write_record
from stage2_student.running import set_up_layers
from stage2_student.step_report import Meter, peak_memory_bytes, step_metrics
from stage2_student.stream import StepBatches, StepStream, StreamState
from stage2_student.student import Student, load_model, load_student
from stage2_student.student_source import read_model_config
from stage2_student.update import StepCounts, StepOutcome, Updater, make_accelerator
from tide_cache.canonical import pretty_json
from tide_cache.errors import TideError

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

logger = logging.getLogger(__name__)
FINAL = "final"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary:
    """What a run came to. The last four are of this process, not of earlier ones.

    `stall_s`: seconds waited for data; `peak_memory_gb`: of the GPU, or of the process.
    """

    output: str
    final: str
    cache_identity: str
    steps: int
    resumed_from_step: int
    epochs: float
    last_metrics: dict[str, Any]
    evaluation: dict[str, Any] | None
    seconds: float
    tokens_per_s: float
    stall_s: float = 0.0
    peak_memory_gb: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return asdict(self)


def train(
    config: TrainConfig,
    cache_urls: str | Path | Sequence[str | Path],
    *,
    resume: str = checkpoints.AUTO,
    progress: TrainProgress | None = None,
) -> TrainSummary:
    """Train a student from a cache or several, going on from the newest checkpoint in the output.

    `resume` is `auto`, `never` or the folder of a checkpoint. Raises ConfigError, FormatError and
    CompatibilityError before a model is loaded; StorageError when the disk is full; TideError when
    the loss is no number any more.
    """
    urls = [cache_urls] if isinstance(cache_urls, str | Path) else cache_urls
    run = open_run(config, [str(url) for url in urls])
    point = checkpoints.find_resume_point(Path(config.output), resume)
    if point is not None:
        point.require_config(run.deciding_keys)
        point.stream.require_cache(run.identity, where=str(point.folder))
    try:
        trainer = Trainer(run, point, progress or NoProgress())
        summary = trainer.train()
        accelerator = trainer.accelerator
        # Whatever exchanges gradients must go before the process group does: as the last that holds
        # the group it would join the group's threads while they wait for the interpreter.
        del trainer
        accelerator.free_memory()
        accelerator.end_training()
        return summary
    finally:
        run.close()


class Trainer:
    """One run on one rank."""

    def __init__(self, run: OpenRun, point: Checkpoint | None, progress: TrainProgress) -> None:
        self.run, self.config = run, run.config
        self.output = Path(run.config.output)
        self.accelerator = make_accelerator(run.config)
        self.progress = progress if self.is_main else NoProgress()
        self.first_step = 0 if point is None else point.step
        student = Student(set_up_layers(self._load(point), run.config.student)).train()
        self.updater = Updater(student, run.config, self.accelerator, max_steps=run.max_steps)
        self.student = self.updater.student
        if point is not None:
            path = point.folder / checkpoints.OPTIMIZER_FILE
            load_optimizer(self.updater.optimizer, self.student, path)
        self.stream = self._open_stream()
        self.metrics_file = MetricsFile(self.output / METRICS_FILE)
        self.trackers: list[Tracker] = []
        self.last_metrics: dict[str, Any] = {}
        self.last_evaluation: Evaluation | None = None
        self.evaluated_step = -1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files."""
        return bool(self.accelerator.is_main_process)

    def train(self) -> TrainSummary:
        """Run all steps that are left, save the student, and return the summary."""
        began_s = time.monotonic()
        self._begin()
        meter = Meter(self.stream, self.accelerator.device)
        steps = self.stream.steps(self.first_step, self.run.max_steps)
        try:
            for work in steps:
                counts = self.updater.count(work)
                reports = self._reports(work.rows.step + 1)
                outcome = self.updater.update(work, counts, wants_insight=reports)
                meter.add(counts.num_tokens)
                if reports:
                    self._report_step(work, counts, outcome, meter)
                self._after_step(work.rows.step + 1)
        finally:
            steps.close()
            self.progress.close()
            for tracker in self.trackers:
                tracker.close()
        return self._finish(time.monotonic() - began_s, meter)

    def _saves(self, done: int) -> bool:
        return done == self.run.max_steps or done % self.config.checkpoints.every == 0

    def _reports(self, done: int) -> bool:
        return self._saves(done) or done % self.config.metrics.every == 0

    def _report_step(
        self, work: StepBatches, counts: StepCounts, outcome: StepOutcome, meter: Meter
    ) -> None:
        metrics = step_metrics(
            work,
            counts,
            outcome,
            updater=self.updater,
            accelerator=self.accelerator,
            several_caches=len(self.run.caches) > 1,
        )
        metrics |= meter.lap()
        self._require_finite(metrics)
        self._report(metrics["step"], metrics)
        self.progress.update(metrics["step"], metrics["loss"], metrics["tokens_per_s"])
        self.last_metrics = metrics

    def _after_step(self, done: int) -> None:
        """Evaluate and save where it is time."""
        every = self.config.evaluation.every
        if done == self.run.max_steps or (every is not None and done % every == 0):
            self._evaluate(done)
        if self._saves(done):
            self._save(done)

    def _require_finite(self, metrics: dict[str, Any]) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            return
        present = checkpoints.list_checkpoints(self.output)
        last = f"; the last checkpoint is {present[-1]}" if present else ""
        raise TideError(
            f"step {metrics['step']}: loss {metrics['loss']}, gradient norm "
            f"{metrics['grad_norm']}{last}",
            hint="lower optimizer.learning_rate, or set optimizer.max_grad_norm, and train into "
            "another output",
        )

    def _evaluate(self, done: int) -> None:
        self._measure(done)
        if self.last_evaluation is not None:
            self._report(done, {"step": done, **self.last_evaluation.as_metrics()})
        self.accelerator.wait_for_everyone()

    def _measure(self, done: int) -> None:
        cache, config = self.run.evaluation_cache, self.config.evaluation
        # Where weights are spread over ranks none can measure alone.
        if cache is None or not (self.is_main or self.updater.is_sharded):
            return
        self.evaluated_step = done
        self.last_evaluation = evaluate(
            self.student,
            cache,
            batch_size=config.batch_size,
            max_samples=config.max_samples,
            mask_token_id=self.run.source.mask_token_id,
        )

    def _last_reported(self) -> dict[str, Any]:
        lines = [line for line in self.metrics_file.read() if "loss" in line]
        return lines[-1] if lines else {}

    def _report(self, done: int, metrics: dict[str, Any]) -> None:
        if self.is_main:
            self.metrics_file.write(metrics)
            for tracker in self.trackers:
                tracker.log(done, metrics)

    def _save(self, done: int) -> None:
        if self.is_main or self.updater.is_sharded:
            student = self._student_writer(done)
            state = optimizer_tensors(self.updater.optimizer, self.student)
        if self.is_main:

            def write(folder: Path) -> None:
                student(folder)
                save_optimizer(state, folder / checkpoints.OPTIMIZER_FILE)

            checkpoints.write_checkpoint(
                self.output,
                StreamState(num_steps_done=done, cache_identity=self.run.identity),
                deciding_keys=self.run.deciding_keys,
                config=self.config.model_dump(mode="json"),
                write_files=write,
                keep=self.config.checkpoints.keep,
            )
        self.accelerator.wait_for_everyone()

    def _student_writer(self, done: int, *, with_card: bool = False) -> Callable[[Path], None]:
        """Gather the weights, and return what writes the student into a folder."""
        tensors = weights(self.student.model)

        def write(folder: Path) -> None:
            save_released(
                self.student.model,
                self.run.source.tokenizer,
                folder,
                block_size=self.run.cache.manifest.block_size,
                mask_token_id=self.run.source.mask_token_id,
                tensors=tensors,
            )
            record = make_record(
                self.run,
                steps_done=done,
                num_ranks=self.accelerator.num_processes,
                last_metrics=self.last_metrics,
                evaluation=self.last_evaluation if self.evaluated_step == done else None,
            )
            write_record(record, folder)
            if with_card:
                write_card(folder, record, load_from=FINAL)

        return write

    def _begin(self) -> None:
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            checkpoints.clear_leftovers(self.output, self.first_step)
            self.metrics_file.keep_until(self.first_step)
            run_config = self.config.model_dump(mode="json")
            self.trackers = open_trackers(self.config.metrics, self.output, run_config)
        self.accelerator.wait_for_everyone()
        self.progress.start(self.first_step, self.run.max_steps)

    def _finish(self, seconds: float, meter: Meter) -> TrainSummary:
        final, path = self.output / FINAL, self.output / SUMMARY_FILE
        if self.first_step == self.run.max_steps and final.is_dir() and path.is_file():
            logger.info("%s: the run is complete already", self.output)
            return TrainSummary(**json.loads(path.read_text(encoding="utf-8")))
        if self.last_evaluation is None and self.first_step == self.run.max_steps:
            self._measure(self.run.max_steps)  # stopped between its last checkpoint and its end
        self.last_metrics = self.last_metrics or self._last_reported()
        summary = TrainSummary(
            output=str(self.output),
            final=str(final),
            cache_identity=self.run.identity,
            steps=self.run.max_steps,
            resumed_from_step=self.first_step,
            epochs=self.run.max_steps / self.run.order.steps_per_epoch,
            last_metrics=self.last_metrics,
            evaluation=self.last_evaluation.as_json() if self.last_evaluation else None,
            seconds=round(seconds, 3),
            stall_s=round(self.stream.stall_s, 3),
            peak_memory_gb=round(peak_memory_bytes(self.accelerator.device) / 1e9, 3),
            tokens_per_s=round(meter.num_tokens / seconds, 1) if seconds else 0.0,
        )
        if self.is_main or self.updater.is_sharded:
            student = self._student_writer(self.run.max_steps, with_card=True)
        if self.is_main:
            checkpoints.publish_folder(final, student)
            path.write_bytes(pretty_json(summary.as_json()))
        self.accelerator.wait_for_everyone()
        return summary

    def _load(self, point: Checkpoint | None) -> "Qwen3ForCausalLM":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.config.student.dtype]
        attention = attention_implementation(self.config.student.attention, self.accelerator.device)
        if point is None:
            return load_student(
                self.run.source,
                dtype=dtype,
                attention_implementation=attention,
                seed=self.config.seed,
            )
        values = json.loads((point.folder / "config.json").read_text(encoding="utf-8"))
        config = read_model_config(values, where=str(point.folder))
        return load_model(point.folder, config, dtype=dtype, attention_implementation=attention)

    def _open_stream(self) -> StepStream:
        form = InputForm(
            block_size=self.run.cache.manifest.block_size,
            mask_token_id=self.run.source.mask_token_id,
            attention=self.student.model.config._attn_implementation,
            device=self.accelerator.device,
        )
        readers = [
            BatchReader(cache, form=form, teacher=teacher_reading(cache, self.config.objective))
            for cache in self.run.caches
        ]
        return StepStream(
            self.run.order,
            readers,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            micro_batch_size=self.config.stream.micro_batch_size,
            workers=self.config.stream.workers,
            prefetch=self.config.stream.prefetch,
            fetch_ahead=self.run.fetcher(),
        )
