"""What calibration found, kept beside a build so that it is done once.

A claim, the codec files and then a record are published into the folder of the cache before its
first shard, by create-if-absent: whoever comes second (a run after a crash, another machine on the
same build) takes what is there, so all shards are encoded alike. Builds that begin side by side let
one of them calibrate. Claim and record say for which
teacher, set and config: what another build left half done is refused, never taken for one's own.
"""

import gc
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from stage1_teacher.borrowed_codecs import borrow_codecs
from stage1_teacher.build_plan import BuildPlan
from stage1_teacher.calibrate import (
    Calibration,
    CalibrationPlan,
    require_open,
    run_calibration,
)
from stage1_teacher.measure import Progress
from stage1_teacher.settings import codec_files
from stage1_teacher.teachers import load_open_teacher
from stage1_teacher.turns import one_for_all
from tide_cache.cache import Cache
from tide_cache.canonical import canonical_json, sha256_hex
from tide_cache.codec_files import read_tensors
from tide_cache.config import StrictModel
from tide_cache.errors import FormatError, StorageError
from tide_cache.manifest import CacheHeader, CacheManifest, FileFacts
from tide_cache.payload_facts import FidelityFacts, PayloadFacts
from tide_cache.payloads import Codecs, make_codecs
from tide_cache.payloads.candidates import CODEC_FILE
from tide_cache.payloads.hidden import TRANSFORM_FILE, Transform
from tide_cache.store import Store
from tide_cache.writer import STATE, require_same

logger = logging.getLogger(__name__)
RECORD = f"{STATE}/calibration.json"
CLAIM = f"{STATE}/calibration-key.json"
TURNS = f"{STATE}/calibration-turns"
_KEY = ("premasked_sha256", "comp_demo", "teacher_model", "build_config")


class CalibrationRecord(StrictModel):
    """Payloads as fitted, what was measured of them, and the codec files with their hashes."""

    key: dict[str, Any]
    payloads: tuple[PayloadFacts, ...]
    fidelity: tuple[FidelityFacts, ...]
    files: tuple[FileFacts, ...]


def ensure_record(
    plan: BuildPlan, premasked: Cache, *, on_slice: Progress | None = None
) -> CalibrationRecord:
    """Return the record of this build, made now where there is none.

    Loads the teacher only where something has to be fitted or measured. Raises CompatibilityError
    where the folder holds the record of another build.
    """
    store = Store(plan.output_url)
    key = record_key(plan)
    if store.exists(RECORD):
        return _read(store, key)
    if store.exists(CLAIM):
        _claim(store, key)  # refuse another build before the teacher is asked
    if plan.calibration is None:
        return CalibrationRecord(key=key, payloads=plan.with_chunks(()), fidelity=(), files=())
    with one_for_all(store, TURNS, lambda: store.exists(RECORD)) as is_mine:
        if not is_mine:
            return _read(store, key)
        if plan.config.codec_from is not None:
            payloads, data_of = borrow_codecs(plan, plan.config.codec_from)
            record = _publish(store, plan, payloads, (), data_of)
        else:
            record = _calibrate(plan, plan.calibration, premasked, store, on_slice)
    # The workers, or an engine that measures what is free, need the memory of this teacher.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def _calibrate(
    plan: BuildPlan,
    calibration: CalibrationPlan,
    premasked: Cache,
    store: Store,
    on_slice: Progress | None,
) -> CalibrationRecord:
    config = plan.config.teacher
    teacher = require_open(load_open_teacher(config, plan.teacher), config.backend, "calibration")
    found = run_calibration(calibration, premasked, teacher, on_slice=on_slice)
    return publish_record(store, plan, found)


def publish_record(store: Store, plan: BuildPlan, found: Calibration) -> CalibrationRecord:
    """Publish codec files and record; returns what stands in the store afterwards.

    Raises CompatibilityError where another build began here, StorageError where codec files lie
    about that nobody claims.
    """
    return _publish(
        store,
        plan,
        plan.with_chunks(found.chosen.payloads),
        found.fidelity(),
        codec_files(found.chosen, found.fit),
    )


def _publish(
    store: Store,
    plan: BuildPlan,
    payloads: tuple[PayloadFacts, ...],
    fidelity: tuple[FidelityFacts, ...],
    data_of: Mapping[str, bytes],
) -> CalibrationRecord:
    key = record_key(plan)
    is_first = _claim(store, key)
    files = []
    for path, data in sorted(data_of.items()):
        if not store.publish(path, data):
            present = store.read_bytes(path)
            if is_first and present != data:
                store.remove(CLAIM)
                raise StorageError(
                    f"{store.url}/{path}: exists with other content and belongs to no build",
                    hint=f"write to an empty folder, or remove {store.url}/codec and run the same "
                    "command again",
                )
            data = present
        files.append(FileFacts(path=path, size_bytes=len(data), sha256=sha256_hex(data)))
    record = CalibrationRecord(
        key=key,
        payloads=payloads,
        fidelity=fidelity,
        files=tuple(files),
    )
    store.publish(RECORD, canonical_json(record.model_dump(mode="json")))
    return _read(store, key)


def _claim(store: Store, key: dict[str, Any]) -> bool:
    """Claim the codec files for a build. Returns whether nobody had; raises CompatibilityError."""
    if store.publish(CLAIM, canonical_json(key)):
        return True
    present = json.loads(store.read_bytes(CLAIM))
    require_same(store, mine=json.loads(canonical_json(key)), present=present)
    return False


def record_key(plan: BuildPlan) -> dict[str, Any]:
    """Return what must be equal for two builds to share a calibration, as JSON values."""
    values = {name: plan.header_values[name] for name in _KEY}
    values["teacher_model"] = plan.teacher_model.model_dump(mode="json")
    return dict(values)


def open_build_codecs(
    store: Store, header: CacheHeader, files: tuple[FileFacts, ...]
) -> tuple[Codecs, Transform | None]:
    """Make the codecs of a build under way, and the transform of its hidden states.

    Raises FormatError where a codec file was changed since calibration.
    """
    tensors = {
        path: read_tensors(store, files, path)
        for path in (CODEC_FILE, TRANSFORM_FILE)
        if any(facts.path == path for facts in files)
    }
    transform = None
    if header.hidden is not None:
        transform = Transform.from_tensors(header.hidden, tensors[TRANSFORM_FILE])
    return make_codecs(header.payloads, tensors.get(CODEC_FILE)), transform


def record_of(manifest: CacheManifest) -> CalibrationRecord:
    """Return the record that a finished cache was built with."""
    values = manifest.model_dump(mode="json")
    return CalibrationRecord(
        key={name: values[name] for name in _KEY},
        payloads=manifest.payloads,
        fidelity=manifest.fidelity,
        files=tuple(facts for facts in manifest.files if facts.path.startswith("codec/")),
    )


def _read(store: Store, key: dict[str, Any]) -> CalibrationRecord:
    try:
        record = CalibrationRecord.model_validate_json(store.read_bytes(RECORD))
    except ValidationError as error:
        raise FormatError(
            f"{store.url}/{RECORD}: not a calibration record",
            hint=f"remove it and {store.url}/codec, and run the same command again",
        ) from error
    require_same(store, mine=json.loads(canonical_json(key)), present=record.key)
    return record
