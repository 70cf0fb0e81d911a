"""Fit codecs to a teacher, measure settings against its full logits, choose among them.

What a payload must hold depends on how sure the teacher is, and nobody can know that without
asking it: at T = 2 the tail of an uncertain teacher is most of its signal. So before a build (and
for `tide-cache calibrate`) the teacher answers a few thousand positions in full. They are fitted on
and measured on apart, and a third group is kept for checking a finished cache.

Shapes: P positions, V shared vocabulary, D hidden size.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from stage1_teacher.calibration_sample import (
    ChosenRows,
    Sample,
    choose_rows,
    corpus_counts,
    read_rows,
    sample_student,
    sample_teacher,
    shared_head,
)
from stage1_teacher.hidden_fit import Head, fit_basis
from stage1_teacher.measure import (
    NOISED_TEACHER,
    Answers,
    Case,
    Progress,
    StudentLogits,
    Weight,
    measure_cases,
    noised_teacher,
    score_sample,
    store_sample,
    student_logits,
)
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.settings import (
    Fit,
    FittedSetting,
    Setting,
    configured_setting,
    fit_setting,
    ladder,
    rank_ids,
)
from stage1_teacher.teachers import load_open_teacher
from stage1_teacher.teachers.base import OpenTeacher, ScoreSpec, TeacherConfig
from tide_cache.cache import Cache
from tide_cache.codec_files import read_tensors
from tide_cache.errors import CompatibilityError, ConfigError
from tide_cache.manifest import CacheManifest
from tide_cache.payload_facts import FidelityFacts, LossFidelity
from tide_cache.payloads import open_codecs, read_mean_logits
from tide_cache.payloads.candidates import CODEC_FILE
from tide_cache.payloads.hidden import TRANSFORM_FILE, Transform
from tide_cache.rows import PremaskedRow
from tide_cache.tails import NEEDS_MEAN, Tail

logger = logging.getLogger(__name__)
_RANK_POSITIONS = 4096
_COMPARED_TAILS: tuple[Tail, ...] = (
    "mean", "mean_student", "student", "bucket", "uniform", "none",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPlan:
    """Which rows are fitted on and which measured on, decided before a teacher is loaded.

    `setting` is what the config asks for by name; None where it leaves the choice to us.
    """

    config: BuildConfig
    vocab_size: int
    setting: Setting | None
    fit_rows: ChosenRows
    measure_rows: ChosenRows
    num_payload_positions: int
    row_bytes: int

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is fitted or measured at all."""
        return bool(self.fit_rows.rows or self.measure_rows.rows)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """One line of the table: a setting under one tail."""

    fitted: FittedSetting
    tail: Tail
    weight: Weight
    losses: tuple[LossFidelity, ...]

    @property
    def worst_cosine(self) -> float:
        """The least cosine over all losses."""
        return min(loss.cosine for loss in self.losses)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """What came of it. `measured` is empty where nothing was asked to be measured."""

    plan: CalibrationPlan
    fit: Fit
    chosen: FittedSetting
    measured: tuple[Measured, ...]
    student: str
    num_positions: int

    def fidelity(self) -> tuple[FidelityFacts, ...]:
        """Return what the manifest records: the chosen setting under its default tail."""
        is_auto = self.plan.setting is None
        return tuple(
            FidelityFacts(
                setting=line.fitted.setting.name,
                tail=line.tail,
                student=self.student,
                num_positions=self.num_positions,
                bytes_per_position=round(line.weight.bytes_per_position, 2),
                target=self.plan.config.fidelity if is_auto else None,
                losses=line.losses,
            )
            for line in self.measured
            if line.fitted.setting == self.chosen.setting and line.tail == default_tail(line.fitted)
        )


def plan_calibration(config: BuildConfig, premasked: Cache, vocab_size: int) -> CalibrationPlan:
    """Choose the rows; a pure function of config and set. Raises ConfigError."""
    manifest = premasked.manifest
    setting = None
    if config.payload != "auto":
        setting = configured_setting(config, manifest.alignment)
        assert setting is not None
        if setting.k > vocab_size:
            raise ConfigError(
                f"candidates.k: expected at most the {vocab_size} ids of the shared vocabulary, "
                f"got {setting.k}"
            )
    # All three groups, as `check_cache` chooses them: the last of a small set takes what is left.
    fit_rows, measure_rows, _ = choose_rows(premasked, wanted_positions(config, setting))
    if config.fidelity_positions and not measure_rows.rows:
        measure_rows = fit_rows
    return CalibrationPlan(
        config=config,
        vocab_size=vocab_size,
        setting=setting,
        fit_rows=fit_rows,
        measure_rows=measure_rows,
        num_payload_positions=manifest.counts.get("num_payload_positions", 0),
        row_bytes=manifest.counts.get("size_bytes", 0),
    )


def wanted_positions(config: BuildConfig, setting: Setting | None) -> list[int]:
    """Return how many positions are fitted on, measured on, and kept for checking a cache."""
    fit = config.candidates.mean_logits_positions
    is_ranked = setting is None or setting.bits is not None
    if fit == 0 and is_ranked and config.candidates.ranks == "answers":
        fit = _RANK_POSITIONS
    if setting is None or setting.nats is not None:
        fit = max(fit, config.hidden.fit_positions)
    return [fit, config.fidelity_positions, config.fidelity_positions]


def open_teacher(config: TeacherConfig, what: str) -> OpenTeacher:
    """Load a model whose hidden states and head can be had. Raises CompatibilityError."""
    return require_open(load_open_teacher(config), config.backend, what)


def require_open(teacher: object, backend: str, what: str) -> OpenTeacher:
    """Return the teacher if its hidden states and head can be had. Raises CompatibilityError."""
    if not isinstance(teacher, OpenTeacher):
        raise CompatibilityError(
            f"teacher.backend: {backend!r} gives no full logits, which {what} needs",
            hint="set teacher.backend: hf",
        )
    return teacher


def run_calibration(
    plan: CalibrationPlan,
    premasked: Cache,
    teacher: OpenTeacher,
    *,
    compare: bool = False,
    on_slice: Progress | None = None,
) -> Calibration:
    """Fit, measure and choose. `compare`: measure the whole ladder and every tail, for a table.

    Raises ConfigError where `payload: auto` finds nothing that reaches the target.
    """
    fit = make_fit(plan, premasked, teacher)
    settings = [] if plan.setting is None else [plan.setting]
    if plan.setting is None or compare:
        settings = list(dict.fromkeys([*settings, *ladder(plan.vocab_size)]))
    fitted = [fit_setting(setting, fit) for setting in settings]
    if not plan.config.fidelity_positions:
        return Calibration(
            plan=plan, fit=fit, chosen=fitted[0], measured=(), student=NOISED_TEACHER,
            num_positions=0,
        )  # fmt: skip
    sample, rows = _ask(plan, premasked, plan.measure_rows, teacher)
    head = shared_head(teacher, plan.vocab_size)
    student, student_name = _student(
        plan.config, plan.vocab_size, rows, sample, head, fit.mean_logits_V
    )
    measured = measure_settings(
        fitted, sample, head, student, fit, compare=compare, on_slice=on_slice
    )
    chosen = fitted[0] if plan.setting is not None else choose(measured, plan.config.fidelity)
    return Calibration(
        plan=plan,
        fit=fit,
        chosen=chosen,
        measured=tuple(measured),
        student=student_name,
        num_positions=sample.num_positions,
    )


def _ask(
    plan: CalibrationPlan, premasked: Cache, chosen: ChosenRows, teacher: OpenTeacher
) -> tuple[Sample, list[PremaskedRow]]:
    return sample_teacher(
        teacher,
        read_rows(premasked, chosen),
        comp_demo=plan.config.comp_demo,
        bad_samples=plan.config.bad_samples,
    )


def make_fit(plan: CalibrationPlan, premasked: Cache, teacher: OpenTeacher) -> Fit:
    """Learn from the fit rows what codecs need: mean logits, rank table, basis (on first use)."""
    config = plan.config.candidates
    sample, _ = _ask(plan, premasked, plan.fit_rows, teacher)
    head = shared_head(teacher, plan.vocab_size)
    k = plan.setting.k if plan.setting is not None else min(64, plan.vocab_size)
    mean_V, count_V = _means_and_counts(sample, head, k)
    from_corpus = config.ranks == "corpus" or not sample.num_positions
    if from_corpus:
        count_V = corpus_counts(premasked, plan.vocab_size)
    keeps_mean = bool(config.mean_logits_positions and sample.num_positions)
    return Fit(
        vocab_size=plan.vocab_size,
        temperatures=config.temperatures,
        num_positions=sample.num_positions,
        mean_logits_V=mean_V if keeps_mean else None,
        id_of_rank_V=rank_ids(count_V, mean_V),
        ranks="corpus" if from_corpus else "answers",
        head=head,
        basis=functools.cache(
            functools.partial(fit_basis, sample.hidden_PD, head, config.temperatures)
        ),
    )


def measure_settings(
    fitted: Sequence[FittedSetting],
    sample: Sample,
    head: Head,
    student: StudentLogits,
    fit: Fit,
    *,
    compare: bool,
    on_slice: Progress | None = None,
) -> list[Measured]:
    """Measure settings under their default tails; with `compare` the first under every tail."""
    spec = ScoreSpec(
        k=max(one.setting.k for one in fitted),
        temperatures=fit.temperatures,
        vocab_size=fit.vocab_size,
    )
    scores = score_sample(sample, head, spec)
    cases: list[Case] = []
    owners: list[tuple[FittedSetting, Weight]] = []
    for one in fitted:
        answers, weight = store_sample(one, sample, scores)
        tails = [default_tail(one)]
        if compare and one.setting == _tail_example(fitted):
            tails += [t for t in _COMPARED_TAILS if t not in tails and _is_possible(t, fit)]
        for tail in tails:
            cases.append(Case(name=one.setting.name, tail=tail, answers=answers))
            owners.append((one, weight))
    results = measure_cases(
        cases,
        sample,
        head,
        student,
        temperatures=fit.temperatures,
        mean_logits_V=fit.mean_logits_V,
        on_slice=on_slice,
    )
    return [
        Measured(fitted=one, tail=case.tail, weight=weight, losses=losses)
        for (one, weight), case, losses in zip(owners, cases, results, strict=True)
    ]


def default_tail(fitted: FittedSetting) -> Tail:
    """Return the tail that stage 2 takes by default for a cache of this setting."""
    tail = fitted.setting.default_tail
    return "uniform" if tail == "mean" and not fitted.candidates.mean_logits_positions else tail


def choose(measured: Sequence[Measured], target: float) -> FittedSetting:
    """Return the smallest setting that reaches the target under its default tail.

    Raises ConfigError, naming the best, where none does.
    """
    lines = [line for line in measured if line.tail == default_tail(line.fitted)]
    good = [line for line in lines if line.worst_cosine >= target]
    if not good:
        best = max(lines, key=lambda line: line.worst_cosine)
        raise ConfigError(
            f"fidelity: no payload reaches a gradient cosine of {target:g} for every loss; the "
            f"best, {best.fitted.setting.name}, reaches {best.worst_cosine:.4f}",
            hint="lower fidelity, or name a payload: 'tide-cache calibrate' prints the table",
        )
    return min(good, key=lambda line: line.weight.bytes_per_position).fitted


def check_cache(
    plan: CalibrationPlan,
    premasked: Cache,
    cache: Cache,
    teacher: OpenTeacher,
    *,
    on_slice: Progress | None = None,
) -> tuple[tuple[LossFidelity, ...], int]:
    """Measure a finished cache on positions that were neither fitted nor measured on.

    Returns the fidelity of its losses under its default tail, and the number of positions.
    """
    manifest = cache.manifest
    assert isinstance(manifest, CacheManifest)
    facts = manifest.candidates
    if facts is None:
        raise CompatibilityError(f"{cache.url}: payloads: expected candidates, got chunks alone")
    *_, chosen = choose_rows(premasked, wanted_positions(plan.config, plan.setting))
    if not chosen.rows:
        raise ConfigError(
            f"{premasked.url}: no rows are left that calibration has not used",
            hint="lower fidelity_positions or candidates.mean_logits_positions in config and cache",
        )
    sample, rows = _ask(plan, premasked, chosen, teacher)
    in_cache = rows_in(cache, [row.sample_id for row in rows])
    stored = read_stored(cache, manifest, in_cache, sample.num_positions_B)
    mean_V = stored.mean_logits_V
    head = shared_head(teacher, facts.vocab_size)
    student, _ = _student(plan.config, facts.vocab_size, rows, sample, head, mean_V)
    tail: Tail = "uniform" if mean_V is None else "mean"
    if stored.answers.hidden_PD is not None:
        tail = "hidden"
    (losses,) = measure_cases(
        [Case(name="cache", tail=tail, answers=stored.answers)],
        sample,
        head,
        student,
        temperatures=facts.temperatures,
        mean_logits_V=mean_V,
        on_slice=on_slice,
    )
    return losses, sample.num_positions


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stored:
    """What a finished cache says of some rows, and its mean logits."""

    answers: Answers
    mean_logits_V: npt.NDArray[np.float32] | None


def rows_in(cache: Cache, sample_ids: Sequence[str]) -> list[int]:
    """Return where samples stand in a cache. Raises CompatibilityError where one is missing."""
    column = cache.read_rows(0, range(cache.num_samples), ["sample_id"])["sample_id"]
    row_of = {sample_id: row for row, sample_id in enumerate(column.to_pylist())}
    missing = [sample_id for sample_id in sample_ids if sample_id not in row_of]
    if missing:
        raise CompatibilityError(
            f"{cache.url}: expected sample {missing[0]} of the premasked set, found none",
            hint="was it built from another set, or the sample dropped by its build? "
            "'tide-cache inspect' shows both",
        )
    return [row_of[sample_id] for sample_id in sample_ids]


def read_stored(
    cache: Cache,
    manifest: CacheManifest,
    rows: Sequence[int],
    num_positions_B: npt.NDArray[np.int64],
) -> Stored:
    """Decode the payloads of some rows of a finished cache. Raises FormatError."""
    facts, codecs = manifest.candidates, open_codecs(cache.store, manifest)
    assert facts is not None and codecs.candidates is not None
    table = cache.read_rows(0, rows)
    hidden_PD = mean_V = None
    if codecs.hidden is not None and manifest.hidden is not None:
        tensors = read_tensors(cache.store, manifest.files, TRANSFORM_FILE)
        transform = Transform.from_tensors(manifest.hidden, tensors)
        hidden_PD = transform.to_hidden(codecs.hidden.decode(table, num_positions_B))
    if facts.mean_logits_positions:
        tensors = read_tensors(cache.store, manifest.files, CODEC_FILE)
        mean_V = read_mean_logits(tensors, facts, where=f"{cache.url}/{CODEC_FILE}")
    answers = Answers(
        candidates=codecs.candidates.decode(table, num_positions_B), hidden_PD=hidden_PD
    )
    return Stored(answers=answers, mean_logits_V=mean_V)


def _student(
    config: BuildConfig,
    vocab_size: int,
    rows: Sequence[PremaskedRow],
    sample: Sample,
    head: Head,
    mean_logits_V: npt.NDArray[np.float32] | None,
) -> tuple[StudentLogits, str]:
    """Return the student whose logits gradients are taken at, and its name."""
    if config.student is None:
        mean_V = np.zeros(vocab_size, np.float32) if mean_logits_V is None else mean_logits_V
        return noised_teacher(sample, head, mean_V), NOISED_TEACHER
    teacher = config.teacher
    student = open_teacher(
        TeacherConfig(
            model=config.student,
            attention="block_diffusion",
            dtype=teacher.dtype,
            device=teacher.device,
            block_size=teacher.block_size,
            token_budget=teacher.token_budget,
        ),
        "calibrate",
    )
    if student.vocab_size < vocab_size:
        raise CompatibilityError(
            f"student: {config.student} has {student.vocab_size} logits, the payload speaks of "
            f"{vocab_size} ids"
        )
    hidden_PD = sample_student(student, rows)
    return student_logits(hidden_PD, shared_head(student, vocab_size)), student.identity.name


def _means_and_counts(
    sample: Sample, head: Head, k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the mean logits (V,) and how often each id is among a position's k likeliest."""
    vocab_size = len(head.weight_VD)
    total_V = np.zeros(vocab_size, dtype=np.float64)
    count_V = np.zeros(vocab_size, dtype=np.int64)
    step = max(1, (1 << 24) // vocab_size)
    for start in range(0, sample.num_positions, step):
        logits_PV = head.logits(sample.hidden_PD[start : start + step])
        total_V += logits_PV.sum(dim=0, dtype=torch.float64).cpu().numpy()
        ids = torch.topk(logits_PV, k, dim=-1).indices.flatten()
        count_V += torch.bincount(ids, minlength=vocab_size).cpu().numpy()
    return (total_V / max(sample.num_positions, 1)).astype(np.float32), count_V


def _tail_example(fitted: Sequence[FittedSetting]) -> Setting | None:
    """Return the setting whose tails a table compares: the one asked for, or k = 64."""
    plain = [one.setting for one in fitted if one.setting.nats is None]
    if plain and plain[0] == fitted[0].setting:
        return plain[0]
    return max(plain, key=lambda setting: (setting.k <= 64, setting.k), default=None)


def _is_possible(tail: Tail, fit: Fit) -> bool:
    return tail not in NEEDS_MEAN or fit.mean_logits_V is not None
