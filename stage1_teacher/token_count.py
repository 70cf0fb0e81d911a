"""How many tokens a build will run, counted by laying its requests out as the teacher does.

A build scores `samples_per_batch` samples of a task per call, all views and halves of a sample in
one request; a call's sequences and batches are pure functions of its rows (`layouts`, `batching`).
So the count over all calls is exact. On a large set a bounded number of calls, spread evenly, is
read and the rest scaled by samples; the spread between calls gives the standard error.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from stage1_teacher.calibrate import CalibrationPlan
from stage1_teacher.calibration_sample import read_rows
from stage1_teacher.payload_config import BuildConfig
from stage1_teacher.questions import ask, checked_rows
from stage1_teacher.teachers.base import ScoreRequest
from stage1_teacher.teachers.batching import plan_batches
from stage1_teacher.teachers.layouts import LayoutSpec, plan_sequences
from tide_cache.cache import Cache


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenCount:
    """What forwards hold. Additive, but for `longest`; scaled counts are fractions.

    `num_computed`: tokens with padding. `num_pairs`: (query, key) pairs that attention computes,
    masked or not, since the mask is dense. `num_scored`: positions that the output head reads.
    """

    num_tokens: float = 0
    num_computed: float = 0
    num_pairs: float = 0
    num_scored: float = 0
    num_forwards: float = 0
    longest: int = 0

    def __add__(self, other: "TokenCount") -> "TokenCount":
        names = [field.name for field in dataclasses.fields(self) if field.name != "longest"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return TokenCount(**sums, longest=max(self.longest, other.longest))

    def times(self, factor: float) -> "TokenCount":
        """Return the counts of `factor` times as many rows."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "longest"]
        scaled = {name: getattr(self, name) * factor for name in names}
        return TokenCount(**scaled, longest=self.longest)

    @property
    def padding_share(self) -> float:
        """Return the share of computed tokens that is padding."""
        return 1 - self.num_tokens / self.num_computed if self.num_computed else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SetCount:
    """Counts over a whole set: as configured, and with plain separate passes.

    `num_read` of `num_samples` samples were laid out; `relative_error`: the standard error of
    `configured.num_computed` over it, 0 where all were read, None where one call cannot tell.
    """

    configured: TokenCount
    separate: TokenCount
    calibration: TokenCount
    num_samples: int
    num_read: int
    relative_error: float | None

    @property
    def is_exact(self) -> bool:
        """Say whether every sample was laid out."""
        return self.num_read == self.num_samples


def count_call(
    requests: Sequence[ScoreRequest], layout: LayoutSpec, token_budget: int
) -> TokenCount:
    """Count what one call of a teacher's `score` or `hidden_states` runs."""
    sequences = plan_sequences(requests, layout, max_tokens=token_budget)
    lengths = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64)
    num_computed = num_pairs = num_forwards = 0
    for members in plan_batches(lengths.tolist(), token_budget):
        longest = int(lengths[list(members)].max())
        num_forwards += 1
        num_computed += len(members) * longest
        num_pairs += len(members) * longest**2
    return TokenCount(
        num_tokens=int(lengths.sum()),
        num_computed=num_computed,
        num_pairs=num_pairs,
        num_scored=sum(len(s.wanted_P) for request in requests for s in request.streams),
        num_forwards=num_forwards,
        longest=int(lengths.max(initial=0)),
    )


def count_set(
    config: BuildConfig,
    premasked: Cache,
    layout: LayoutSpec,
    calibration: CalibrationPlan | None,
    *,
    max_samples: int,
) -> SetCount:
    """Count a build's tokens, of a set of more than `max_samples` samples by a part of its calls.

    Raises DataError naming a row that is not sound.
    """
    calls = build_calls(premasked, config.samples_per_batch)
    chosen = choose_calls(calls, max_samples)
    budget = config.teacher.token_budget
    plain = dataclasses.replace(layout, shared=False)
    counts = [
        (count_call(requests, layout, budget), count_call(requests, plain, budget))
        for requests in (_requests(config, premasked, call) for call in chosen)
    ]
    num_samples = sum(len(call) for call in calls)
    num_read = sum(len(call) for call in chosen)
    scale = num_samples / num_read
    per_sample = [
        ours.num_computed / len(call) for (ours, _), call in zip(counts, chosen, strict=True)
    ]
    return SetCount(
        configured=sum((ours for ours, _ in counts), TokenCount()).times(scale),
        separate=sum((theirs for _, theirs in counts), TokenCount()).times(scale),
        calibration=_calibration_count(config, premasked, layout, calibration),
        num_samples=num_samples,
        num_read=num_read,
        relative_error=0.0 if num_read == num_samples else _relative_error(per_sample),
    )


def build_calls(premasked: Cache, samples_per_batch: int) -> list[range]:
    """Return the samples of every call of a build, as ranges of rows of a view."""
    calls, begin = [], 0
    for shard in premasked.manifest.shards:
        if shard.view:
            continue
        end = begin + shard.num_rows
        calls += [
            range(start, min(start + samples_per_batch, end))
            for start in range(begin, end, samples_per_batch)
        ]
        begin = end
    return calls


def choose_calls(calls: Sequence[range], max_samples: int) -> list[range]:
    """Choose calls evenly spread over the set, so many that they hold about `max_samples`."""
    num_samples = sum(len(call) for call in calls)
    if num_samples <= max_samples:
        return list(calls)
    wanted = max(1, min(len(calls), round(len(calls) * max_samples / num_samples)))
    middles = (np.arange(wanted) + 0.5) * len(calls) / wanted
    return [calls[int(index)] for index in middles]


def _requests(config: BuildConfig, premasked: Cache, call: range) -> list[ScoreRequest]:
    rows_V = [
        checked_rows(premasked.read_rows(view, call), premasked, view)
        for view in range(premasked.num_views)
    ]
    samples = zip(*rows_V, strict=True)
    return [ask(views, comp_demo=config.comp_demo).request for views in samples]


def _calibration_count(
    config: BuildConfig, premasked: Cache, layout: LayoutSpec, plan: CalibrationPlan | None
) -> TokenCount:
    """Count the forwards of calibration: one call on the fit rows, one on the measured rows."""
    if plan is None:
        return TokenCount()
    groups = [plan.fit_rows]
    if config.fidelity_positions:
        groups.append(plan.measure_rows)
    total = TokenCount()
    for chosen in groups:
        rows = read_rows(premasked, chosen)
        requests = [ask([row], comp_demo=config.comp_demo).request for row in rows]
        total += count_call(requests, layout, config.teacher.token_budget)
    return total


def _relative_error(per_sample: Sequence[float]) -> float | None:
    if len(per_sample) < 2:
        return None
    values = np.asarray(per_sample)
    return float(values.std(ddof=1) / np.sqrt(len(values)) / values.mean())
