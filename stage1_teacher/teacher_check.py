"""Asking the teacher again: does a cache hold what it says?

Hashes and signatures tell who made a cache, bounds that it can be trained from; only the teacher
tells whether the numbers are its own. A random sample of the cache's own rows is put to it,
the answers go through the cache's codecs, and each stored value must agree within the codec's own
error and the rounding of the teacher's type. Nobody who alters a cache knows which rows are asked.

Shapes: P payload positions of a row, K candidates, T temperatures, C chunks, R components.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stage1_teacher.build_worker import score_spec
from stage1_teacher.calibration_record import open_build_codecs
from stage1_teacher.measure import Progress
from stage1_teacher.questions import as_candidates, ask, checked_rows, merge, parts_of, sum_logprobs
from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import Scores, ScoreSpec, Teacher, TeacherConfig
from tide_cache.cache import Cache
from tide_cache.errors import CompatibilityError, ConfigError
from tide_cache.manifest import CacheManifest, TeacherFacts
from tide_cache.payloads import Codecs, num_entries
from tide_cache.payloads.candidates import NO_ID, Candidates
from tide_cache.rows import PremaskedRow

BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]

_SAMPLES_PER_READ = 16
# By how much two runs of one teacher may differ in a logit: batches of other sizes, another GPU.
_TOLERANCE: Final = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.6}
_MAX_NAMED = 100


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """A row whose payload is not the teacher's answer: at how many entries, and in what."""

    sample_id: str
    view: int
    payload: str
    num_entries: int
    num_differing: int


def check_against_teacher(
    cache: Cache, model: str, *, num_samples: int, seed: int, on_samples: Progress | None = None
) -> dict[str, Any]:
    """Ask the teacher `model` about `num_samples` samples, all views; returns a report as JSON.

    `rows` names up to 100 rows that differ, `num_rows_differing` counts all. Raises
    CompatibilityError for another teacher than the cache names, and what loading one raises.
    """
    manifest = cache.manifest
    if not isinstance(manifest, CacheManifest):
        raise CompatibilityError(f"{cache.url}: kind: expected a cache, got a {manifest.kind}")
    teacher = load_teacher(teacher_config(manifest.teacher_model, model, cache.url))
    found_sha256 = teacher.identity.weights_sha256
    if found_sha256 != manifest.teacher_model.weights_sha256:
        raise CompatibilityError(
            f"{cache.url}: teacher_model.weights_sha256: expected "
            f"{manifest.teacher_model.weights_sha256[:12]}… (of {manifest.teacher_model.name}), "
            f"got {found_sha256[:12]}… (of {model})",
            hint="name the checkpoint that the cache was built with",
        )
    check = _Check(cache, manifest, teacher)
    chosen = _choose(cache.num_samples, num_samples, seed)
    differing: list[Disagreement] = []
    for start in range(0, len(chosen), _SAMPLES_PER_READ):
        differing += check.samples(chosen[start : start + _SAMPLES_PER_READ])
        if on_samples is not None:
            on_samples(min(start + _SAMPLES_PER_READ, len(chosen)), len(chosen))
    rows = {(found.sample_id, found.view) for found in differing}
    return {
        "teacher": teacher.identity.name,
        "seed": seed,
        "num_samples": len(chosen),
        "num_rows": len(chosen) * cache.num_views,
        "num_entries": check.num_entries,
        "num_rows_differing": len(rows),
        "rows": [dataclasses.asdict(found) for found in differing[:_MAX_NAMED]],
    }


def teacher_config(facts: TeacherFacts, model: str, url: str) -> TeacherConfig:
    """Return how the cache's teacher was asked, with the receiver's own checkpoint.

    Of the manifest only these four are taken: what else its build was told is a stranger's.
    """
    try:
        return TeacherConfig.model_validate(
            {
                "model": model,
                "attention": facts.attention,
                "dtype": facts.dtype,
                "mask_token_id": facts.mask_token_id,
                **({} if facts.block_size is None else {"block_size": facts.block_size}),
            }
        )
    except ValueError as error:
        raise ConfigError(f"{url}: teacher_model: {error}") from error


class _Check:
    """Puts samples of one cache to its teacher."""

    def __init__(self, cache: Cache, manifest: CacheManifest, teacher: Teacher) -> None:
        self.cache = cache
        self.manifest = manifest
        self.teacher = teacher
        self.num_entries = 0
        files = tuple(facts for facts in manifest.files if facts.path.startswith("codec/"))
        self.codecs, transform = open_build_codecs(cache.store, manifest, files)
        self.spec = score_spec(manifest, transform)
        self.tolerance = _TOLERANCE[manifest.teacher_model.dtype]

    def samples(self, rows: Sequence[int]) -> list[Disagreement]:
        """Ask about some samples, all views together as a build does."""
        tables = [self.cache.read_rows(view, rows) for view in range(self.cache.num_views)]
        rows_V = [checked_rows(table, self.cache, view) for view, table in enumerate(tables)]
        views_S = list(zip(*rows_V, strict=True))
        questions = [ask(views, comp_demo=self.manifest.comp_demo) for views in views_S]
        answers = self.teacher.score([question.request for question in questions], self.spec)
        found = []
        for index, (views, question, streams) in enumerate(
            zip(views_S, questions, answers, strict=True)
        ):
            for view, row in enumerate(views):
                parts = parts_of(question, streams, view)
                num = num_entries(row, self.manifest.alignment)
                self.num_entries += num
                stored = tables[view].slice(index, 1)
                for payload, is_off in _compare(
                    stored, num, parts, self.codecs, self.spec, self.tolerance
                ).items():
                    if is_off.any():
                        found.append(_disagreement(row, payload, is_off))
        return found


def _compare(
    stored: Any,
    num: int,
    parts: Sequence[Any],
    codecs: Codecs,
    spec: ScoreSpec,
    tolerance: float,
) -> dict[str, BoolArray]:
    """Return by payload which entries of a row differ from the teacher's answer."""
    num_B = np.array([num], dtype=np.int64)
    differing: dict[str, BoolArray] = {}
    if codecs.candidates is not None:
        scores = merge(parts, spec, num)
        found = codecs.candidates.decode(stored, num_B)
        expected = as_candidates(scores, codecs.candidates.facts)
        differing["candidates"] = candidates_differ(
            found, expected, codecs.candidates.facts.temperatures, tolerance
        )
        if codecs.hidden is not None and spec.transform is not None:
            differing["hidden"] = _hidden_differs(
                codecs.hidden.decode(stored, num_B), scores, spec, tolerance
            )
    if codecs.chunks is not None:
        expected_C = sum_logprobs(parts, num)
        found_C = codecs.chunks.decode(stored, num_B)
        # A chunk sums the log-probs of its tokens, a few of them.
        differing["chunks"] = np.abs(found_C - expected_C) > 4 * tolerance
    return differing


def candidates_differ(
    found: Candidates, expected: Candidates, temperatures: tuple[float, ...], tolerance: float
) -> BoolArray:
    """Say which positions hold other candidates than the teacher's, bool (P,).

    An id that only one side has is no difference where its logit is that of the other's least: the
    last of k may be any of those that tie.
    """
    scale_T = np.asarray(temperatures)
    off_PT = np.abs(found.logsumexp_PT - expected.logsumexp_PT) * scale_T > 2 * tolerance
    is_off_P = off_PT.any(axis=1)
    error_P = np.zeros(len(is_off_P)) if found.error_P is None else found.error_P
    slack_P1 = (error_P + 2 * tolerance)[:, None]
    expected_at_PK = _logits_at(found.ids_PK, expected)
    # An id that the teacher's list lacks can be as likely as its least, and no likelier.
    is_new_PK = np.isnan(expected_at_PK)
    expected_PK = np.where(is_new_PK, _least(expected)[:, None], expected_at_PK)
    with np.errstate(invalid="ignore"):
        is_far_PK = ~(np.abs(found.logits_PK - expected_PK) <= slack_P1)
    is_far_PK &= (found.ids_PK != NO_ID) & (found.logits_PK != expected_PK)
    missing_PK = np.isnan(_logits_at(expected.ids_PK, found)) & (expected.ids_PK != NO_ID)
    is_missed_PK = missing_PK & (expected.logits_PK > _least(found)[:, None] + slack_P1)
    return np.asarray(is_off_P | is_far_PK.any(axis=1) | is_missed_PK.any(axis=1))


def _logits_at(ids_PK: npt.NDArray[np.int32], known: Candidates) -> npt.NDArray[np.float64]:
    """Return the logits that `known` has for these ids, (P, K), NaN where it has none."""
    first_P1 = np.arange(len(ids_PK), dtype=np.int64)[:, None] << 24  # no vocabulary is larger
    is_id_PK = known.ids_PK != NO_ID
    keys = (first_P1 + known.ids_PK)[is_id_PK]
    if not len(keys):
        return np.full(ids_PK.shape, np.nan)
    order = np.argsort(keys)
    keys, logits = keys[order], known.logits_PK[is_id_PK][order].astype(np.float64)
    wanted_PK = first_P1 + ids_PK
    at_PK = np.minimum(np.searchsorted(keys, wanted_PK), len(keys) - 1)
    return np.where((keys[at_PK] == wanted_PK) & (ids_PK != NO_ID), logits[at_PK], np.nan)


def _least(candidates: Candidates) -> npt.NDArray[np.float64]:
    is_id_PK = candidates.ids_PK != NO_ID
    logits_PK = np.where(is_id_PK, candidates.logits_PK.astype(np.float64), np.inf)
    return np.asarray(logits_PK.min(axis=1, initial=np.inf))


def _hidden_differs(
    code_PR: npt.NDArray[np.int16], scores: Scores, spec: ScoreSpec, tolerance: float
) -> BoolArray:
    """Compare codes: of two runs, a component may fall to either side of a half step.

    The length of the difference is held against that of the answer, as types round relatively.
    """
    assert scores.hidden_codes_PR is not None and spec.transform is not None
    expected_PR = scores.hidden_codes_PR.astype(np.float64)
    distance_P = np.linalg.norm(code_PR - expected_PR, axis=1)
    rounding = np.sqrt(expected_PR.shape[1])
    relative = min(0.25, 10 * tolerance)
    limit_P = rounding + relative * np.linalg.norm(expected_PR, axis=1)
    return np.asarray(distance_P > limit_P)


def _disagreement(row: PremaskedRow, payload: str, is_off: BoolArray) -> Disagreement:
    return Disagreement(
        sample_id=row.sample_id,
        view=row.view,
        payload=payload,
        num_entries=len(is_off),
        num_differing=int(is_off.sum()),
    )


def _choose(num_rows: int, num_samples: int, seed: int) -> list[int]:
    chosen = np.random.default_rng(seed).permutation(num_rows)[:num_samples]
    return sorted(chosen.tolist())
