"""Payload settings against full logits: what each weighs and how faithful its gradients are.

The sample goes through the real codec and the writer's own Parquet options, so bytes are those of
a cache; what comes back is completed by a tail and its gradients are compared with those of the
full logits. Nothing of size (P, V) outlives a slice of positions; slices run in threads (numpy
leaves the interpreter's lock) and are summed in order, so the figures do not depend on them.

Shapes: P positions, V shared vocabulary, K candidates, D hidden size.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from stage1_teacher.calibration_sample import Sample
from stage1_teacher.hidden_fit import Head
from stage1_teacher.questions import as_candidates
from stage1_teacher.scoring import reduce_logits
from stage1_teacher.settings import FittedSetting
from stage1_teacher.teachers.base import Scores, ScoreSpec
from tide_cache.fidelity import GradientSums, gradients, loss_keys
from tide_cache.payload_facts import LossFidelity
from tide_cache.payloads.candidates import Candidates
from tide_cache.shards import compressed_column_bytes
from tide_cache.tails import Tail, complete

Float32Array = npt.NDArray[np.float32]
StudentLogits = Callable[[int, int], Float32Array]
Progress = Callable[[int, int], None]

NOISED_TEACHER = "noised teacher"
_NOISE = 0.5
_SLICE_FLOATS = 1 << 21  # 8 MiB: a slice of gradients stays in a cache


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """What a payload says of the sample, decoded."""

    candidates: Candidates
    hidden_PD: Float32Array | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """A payload's answers, completed by one tail."""

    name: str
    tail: Tail
    answers: Answers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """What a setting costs: bytes a position by column, and seconds to decode a position."""

    bytes_by_column: dict[str, float]
    decode_s_per_position: float

    @property
    def bytes_per_position(self) -> float:
        """All columns together."""
        return sum(self.bytes_by_column.values())


def score_sample(sample: Sample, head: Head, spec: ScoreSpec) -> Scores:
    """Reduce the sample's full logits to what candidates of up to `spec.k` ids need."""
    parts = []
    step = max(1, _SLICE_FLOATS * 8 // spec.vocab_size)
    for start in range(0, sample.num_positions, step):
        logits_PV = head.logits(sample.hidden_PD[start : start + step])
        labels_P = sample.labels_P[start : start + step].clamp_max(spec.vocab_size - 1)
        parts.append(reduce_logits(logits_PV, labels_P.to(logits_PV.device), spec))
    return Scores.concatenate(parts, spec)


def store_sample(fitted: FittedSetting, sample: Sample, scores: Scores) -> tuple[Answers, Weight]:
    """Encode the sample under a setting, weigh it, and decode it again."""
    nums_B = sample.num_positions_B
    codec, hidden_codec = fitted.codecs.candidates, fitted.codecs.hidden
    assert codec is not None
    columns: list[pa.Array] = codec.encode(as_candidates(scores, fitted.candidates), nums_B)
    if hidden_codec is not None and fitted.transform is not None:
        codes_PR = fitted.transform.to_codes(sample.hidden_PD.float().numpy())
        columns += hidden_codec.encode(codes_PR, nums_B)
    table = pa.table(columns, schema=pa.schema(fitted.codecs.fields()))
    began_s = time.perf_counter()
    candidates = codec.decode(table, nums_B)
    hidden_PD = None
    if hidden_codec is not None and fitted.transform is not None:
        hidden_PD = fitted.transform.to_hidden(hidden_codec.decode(table, nums_B))
    decode_s = time.perf_counter() - began_s
    num_positions = max(sample.num_positions, 1)
    weight = Weight(
        bytes_by_column={
            name: size / num_positions for name, size in compressed_column_bytes(table).items()
        },
        decode_s_per_position=decode_s / num_positions,
    )
    return Answers(candidates=candidates, hidden_PD=hidden_PD), weight


def noised_teacher(sample: Sample, head: Head, mean_V: Float32Array) -> StudentLogits:
    """Return a stand-in for a student: the teacher, led astray by what it says elsewhere.

    s = z + 0.5 (z of another position - mean z): errors of the size and the correlations that
    logits have, unlike independent noise on each.
    """
    order = np.random.Generator(np.random.Philox(key=0)).permutation(sample.num_positions)
    other_PD = sample.hidden_PD[torch.from_numpy(order)]

    def logits(start: int, stop: int) -> Float32Array:
        own_PV = head.logits(sample.hidden_PD[start:stop]).cpu().numpy()
        other_PV = head.logits(other_PD[start:stop]).cpu().numpy()
        return np.asarray(own_PV + np.float32(_NOISE) * (other_PV - mean_V), dtype=np.float32)

    return logits


def student_logits(hidden_PD: Tensor, head: Head) -> StudentLogits:
    """Return a real student's logits at the sample's positions."""

    def logits(start: int, stop: int) -> Float32Array:
        found: Float32Array = head.logits(hidden_PD[start:stop]).cpu().numpy()
        return found

    return logits


def measure_cases(
    cases: Sequence[Case],
    sample: Sample,
    head: Head,
    student: StudentLogits,
    *,
    temperatures: tuple[float, ...],
    mean_logits_V: Float32Array | None,
    on_slice: Progress | None = None,
) -> list[tuple[LossFidelity, ...]]:
    """Compare the gradients of every case with the full ones. Returns a result per case."""
    keys = loss_keys(temperatures)
    vocab_size = len(head.weight_VD)
    step = max(1, _SLICE_FLOATS // vocab_size)
    starts = range(0, sample.num_positions, step)

    def one_slice(start: int) -> list[npt.NDArray[np.float64]]:
        stop = min(start + step, sample.num_positions)
        full_PV = head.logits(sample.hidden_PD[start:stop]).cpu().numpy()
        student_PV = student(start, stop)
        sums = [GradientSums(len(keys)) for _ in cases]
        for column, temperature in enumerate(temperatures):
            full = list(gradients(student_PV, full_PV, temperature))
            for case, of_case in zip(cases, sums, strict=True):
                rebuilt_PV = _rebuild(
                    case, start, stop, temperatures, column, vocab_size, head, mean_logits_V,
                    student_PV,
                )  # fmt: skip
                found = gradients(student_PV, rebuilt_PV, temperature)
                for number, (full_g_PV, payload_g_PV) in enumerate(zip(full, found, strict=True)):
                    of_case.add(column * len(full) + number, full_g_PV, payload_g_PV)
        return [of_case.sums_4N for of_case in sums]

    totals = [GradientSums(len(keys)) for _ in cases]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, found in enumerate(pool.map(one_slice, starts), start=1):
            for total, sums_4N in zip(totals, found, strict=True):
                total.sums_4N += sums_4N
            if on_slice is not None:
                on_slice(number, len(starts))
    return [total.result(keys) for total in totals]


def _rebuild(
    case: Case,
    start: int,
    stop: int,
    temperatures: tuple[float, ...],
    column: int,
    vocab_size: int,
    head: Head,
    mean_logits_V: Float32Array | None,
    student_PV: Float32Array,
) -> Float32Array:
    replayed: dict[str, Any] = {}
    if case.answers.hidden_PD is not None:
        hidden_PD = torch.from_numpy(case.answers.hidden_PD[start:stop])
        replayed["replayed_logits_PV"] = head.logits(hidden_PD).cpu().numpy()
    return complete(
        case.answers.candidates.rows(start, stop),
        case.tail,
        temperatures=temperatures,
        column=column,
        vocab_size=vocab_size,
        mean_logits_V=mean_logits_V,
        student_logits_PV=student_PV,
        **replayed,
    )
