"""`tide-cache calibrate`: the table of settings, or a finished cache against its teacher.

Both load the teacher that the build's config names; nothing is written.
"""

import dataclasses
from typing import Any

import numpy as np

from stage1_teacher.build_plan import make_plan
from stage1_teacher.calibrate import (
    Calibration,
    CalibrationPlan,
    check_cache,
    open_teacher,
    plan_calibration,
    run_calibration,
)
from stage1_teacher.measure import Progress
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.settings import Setting
from stage1_teacher.teachers import open_config
from tide_cache.cache import Cache
from tide_cache.errors import CompatibilityError
from tide_cache.manifest import CacheManifest, identity


def plan_of(config: BuildConfig, premasked: Cache) -> CalibrationPlan:
    """Check that set, teacher and config fit together, and plan. Raises as `make_plan` does.

    A payload of chunks alone is refused: it is exact. Whatever the build's backend is, transformers
    is asked.
    """
    config = config.model_copy(update={"teacher": open_config(config.teacher)})
    plan = make_plan(config, premasked, "")
    if plan.calibration is None:
        raise CompatibilityError(
            f"{premasked.url}: payloads: expected candidates or hidden, got chunks alone, which "
            "are exact: there is nothing to calibrate",
        )
    return plan.calibration


def compare_settings(
    plan: CalibrationPlan, premasked: Cache, *, on_slice: Progress | None = None
) -> Calibration:
    """Measure the whole ladder of settings, and every tail of one of them.

    Never refuses for want of fidelity: the table says what each setting reaches.
    """
    config = plan.config
    positions = config.fidelity_positions or 2048
    named = config.model_copy(update={"payload": None, "fidelity_positions": positions})
    setting = plan.setting or Setting(k=min(64, plan.vocab_size), bits=6)
    plan = dataclasses.replace(plan, config=named, setting=setting)
    if not plan.measure_rows.rows:
        plan = dataclasses.replace(
            plan_calibration(named, premasked, plan.vocab_size), setting=setting
        )
    teacher = open_teacher(config.teacher, "calibrate")
    return run_calibration(plan, premasked, teacher, compare=True, on_slice=on_slice)


def check_finished(
    plan: CalibrationPlan, premasked: Cache, cache: Cache, *, on_slice: Progress | None = None
) -> dict[str, Any]:
    """Measure a finished cache on positions that its calibration never saw, beside its promise.

    Raises CompatibilityError unless the cache was built from this set, by this teacher.
    """
    manifest = cache.manifest
    if not isinstance(manifest, CacheManifest):
        raise CompatibilityError(f"{cache.url}: kind: expected a cache, got a {manifest.kind}")
    if manifest.premasked_sha256 != identity(premasked.manifest):
        raise CompatibilityError(
            f"{cache.url}: premasked_sha256: expected {identity(premasked.manifest)[:12]}… (of "
            f"{premasked.url}), got {manifest.premasked_sha256[:12]}…",
            hint="name the set that the cache was built from",
        )
    teacher = open_teacher(plan.config.teacher, "calibrate --cache")
    built_by, found_sha256 = manifest.teacher_model, teacher.identity.weights_sha256
    if found_sha256 != built_by.weights_sha256:
        raise CompatibilityError(
            f"{cache.url}: teacher_model.weights_sha256: expected {built_by.weights_sha256[:12]}… "
            f"(of {built_by.name}), got {found_sha256[:12]}… (of {teacher.identity.name})",
            hint="set teacher.model to the teacher that the cache was built with",
        )
    losses, num_positions = check_cache(plan, premasked, cache, teacher, on_slice=on_slice)
    promised = manifest.fidelity[0].losses if manifest.fidelity else ()
    by_key = {(p.loss, p.weight, p.temperature): p for p in promised}
    lines = []
    for found in losses:
        promise = by_key.get((found.loss, found.weight, found.temperature))
        lines.append(
            {
                **found.model_dump(),
                "promised_cosine": None if promise is None else promise.cosine,
                "promised_relative_error": None if promise is None else promise.relative_error,
            }
        )
    apart = [abs(li["cosine"] - li["promised_cosine"]) for li in lines if li["promised_cosine"]]
    return {
        "cache": cache.url,
        "identity": cache.identity,
        "num_positions": num_positions,
        "losses": lines,
        "worst_cosine": min(loss.cosine for loss in losses),
        "largest_difference": round(float(np.max(apart)), 6) if apart else None,
    }
