"""What a run says of itself beside its weights: `training.json`, in checkpoints and final students.

The model card is made of it and of nothing else, so a folder that was copied away from its run can
still tell what it was trained on. It is handed on with the weights: no path of this machine stands
in it (of a local folder its last name alone), no password of a URL, and nothing measured in
seconds, so that a resumed run writes the same bytes.
"""

import math
import re
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from pydantic import Field, ValidationError

from stage2_student.config import TrainConfig
from stage2_student.evaluate import Evaluation
from stage2_student.metrics import MEASURED_KEYS, Metrics
from stage2_student.plan import OpenRun, num_parameters
from stage2_student.student_source import RANDOM, StudentSource
from tide_cache.cache import Cache
from tide_cache.canonical import pretty_json
from tide_cache.card import describe_fidelity, describe_payload, teacher_license
from tide_cache.config import StrictModel
from tide_cache.errors import FormatError
from tide_cache.manifest import CacheManifest, SourceFacts
from tide_cache.provenance import collect
from tide_cache.store import without_password

RECORD_FILE = "training.json"
_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "torchao")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
# Keys of a config that hold a folder or a URL.
_PLACE_KEYS = ("output", "init", "tokenizer", "cache")


class TeacherRecord(StrictModel):
    """The teacher whose answers a cache holds. `licence`: as the cache's build recorded it."""

    name: str
    revision: str | None
    licence: str
    weights_sha256: str
    dtype: str
    attention: str
    backend: str


class SetRecord(StrictModel):
    """A cache or premasked set as its manifest describes it; `identity` names its exact bytes."""

    name: str
    identity: str
    kind: str
    format_version: int
    num_samples: int
    num_views: int
    num_masked_positions: int
    alignment: str
    block_size: int
    comp_demo: bool
    payloads: tuple[str, ...]
    fidelity: tuple[str, ...]
    teacher: TeacherRecord | None
    sources: tuple[SourceFacts, ...]


class StartRecord(StrictModel):
    """The student before the run. `licence` of its weights, None where nobody said it."""

    init: str
    revision: str | None
    licence: str | None
    is_hub_name: bool
    num_parameters: int
    mask_token_id: int


class ProgramRecord(StrictModel):
    """Which program made it, with what (see `tide_cache.provenance`)."""

    command: str
    tide_cache: str
    git_revision: str | None
    python: str
    machine: str
    packages: dict[str, str]


class TrainingRecord(StrictModel):
    """What a student was trained on, how far, under which config, and what was measured."""

    record_version: Literal[1] = 1
    identity: str = Field(description="of what was trained on: a set's own, or that of several")
    caches: tuple[SetRecord, ...]
    evaluation_set: SetRecord | None
    student: StartRecord
    config: TrainConfig
    steps_done: int
    max_steps: int
    epochs: float
    num_ranks: int
    last_metrics: dict[str, float | int]
    evaluation: Evaluation | None
    provenance: ProgramRecord


def make_record(
    run: OpenRun,
    *,
    steps_done: int,
    num_ranks: int,
    last_metrics: Metrics,
    evaluation: Evaluation | None,
) -> TrainingRecord:
    """Return the record of a run after `steps_done` steps; figures that are no numbers go."""
    held_out = run.evaluation_cache
    return TrainingRecord(
        identity=run.identity,
        caches=tuple(_describe_set(cache) for cache in run.caches),
        evaluation_set=None if held_out is None else _describe_set(held_out),
        student=_describe_start(run.source),
        config=public_config(run.config),
        steps_done=steps_done,
        max_steps=run.max_steps,
        epochs=round(steps_done / run.order.steps_per_epoch, 4),
        num_ranks=num_ranks,
        last_metrics={
            name: value
            for name, value in last_metrics.items()
            if name not in MEASURED_KEYS and math.isfinite(value)
        },
        evaluation=evaluation,
        provenance=ProgramRecord.model_validate(collect("tide-train", _PACKAGES)),
    )


def write_record(record: TrainingRecord, folder: Path) -> None:
    """Write `training.json` into a folder."""
    (folder / RECORD_FILE).write_bytes(pretty_json(record.model_dump(mode="json")))


def read_record(folder: Path) -> TrainingRecord | None:
    """Read the record of a student's folder, None where it has none. Raises FormatError."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        return TrainingRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FormatError(
            f"{path}: {where + ': ' if where else ''}{problem['msg']}",
            hint=f"remove {RECORD_FILE} to go on without what it says",
        ) from error


def public_name(place: str) -> str:
    """Return a folder or URL as others may read it.

    Of an absolute or home path, or a `file://` URL, the last name; of another URL everything but
    user, password and query (which is where signed URLs carry their keys).
    """
    if _URL.match(place) and not place.startswith("file://"):
        return without_password(place).partition("?")[0].replace("***@", "")
    path = place.removeprefix("file://").rstrip("/\\")
    if PureWindowsPath(path).drive:
        return PureWindowsPath(path).name
    return Path(path).name if path.startswith(("/", "~", "..")) else path


def public_config(config: TrainConfig) -> TrainConfig:
    """Return a config without what belongs to the machine it ran on."""
    values = config.model_dump(mode="json", exclude={"local_store"})
    return TrainConfig.model_validate(_public(values))


def _public(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _public(part, name) for name, part in value.items()}
    return public_name(value) if key in _PLACE_KEYS and isinstance(value, str) else value


def _describe_set(cache: Cache) -> SetRecord:
    manifest = cache.manifest
    built = manifest if isinstance(manifest, CacheManifest) else None
    return SetRecord(
        name=public_name(cache.url),
        identity=cache.identity,
        kind=manifest.kind,
        format_version=manifest.format_version,
        num_samples=cache.num_samples,
        num_views=cache.num_views,
        num_masked_positions=manifest.counts.get("num_masked_positions", 0),
        alignment=manifest.alignment,
        block_size=manifest.block_size,
        comp_demo=built is not None and built.comp_demo,
        payloads=tuple(map(describe_payload, built.payloads if built else ())),
        fidelity=tuple(map(describe_fidelity, built.fidelity if built else ())),
        teacher=None if built is None else _describe_teacher(built),
        sources=tuple(
            source.model_copy(update={"name": public_name(source.name)})
            for source in manifest.sources
        ),
    )


def _describe_teacher(manifest: CacheManifest) -> TeacherRecord:
    teacher = manifest.teacher_model
    return TeacherRecord(
        name=public_name(teacher.name),
        revision=teacher.revision,
        licence=teacher_license(manifest),
        weights_sha256=teacher.weights_sha256,
        dtype=teacher.dtype,
        attention=teacher.attention,
        backend=teacher.backend,
    )


def _describe_start(source: StudentSource) -> StartRecord:
    return StartRecord(
        init=public_name(source.name),
        revision=source.revision,
        licence=source.license,
        is_hub_name=source.name != RANDOM and not Path(source.name).is_dir(),
        num_parameters=num_parameters(source),
        mask_token_id=source.mask_token_id,
    )
