"""What a report draws: the teacher over the timestep, from a bounded sample of a cache's rows.

Row groups are taken evenly over the shards of every view, so that each view and each end of the set
has its say; of a cache of millions of rows no more than `max_rows` are read. Rows are checked as
`verify` checks them before anything is made of them. Entropies count what lies outside the stored
candidates as one outcome: they are the least that they can be.

Shapes: B rows, P payload positions, C active chunks, K candidates, T temperatures, S timestep bins.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tide_cache.alignment import chunk_active, payload_positions
from tide_cache.cache import Cache
from tide_cache.manifest import CacheManifest
from tide_cache.payloads import Codecs, num_entries, open_codecs
from tide_cache.payloads.candidates import NO_ID, Candidates
from tide_cache.rows import PremaskedRow, row_fields, table_to_rows
from tide_cache.shard_checks import check_row_of
from tide_cache.shards import column_bytes, open_shard

NUM_BINS = 16
_SHARDS_FOR_BYTES = 8
FloatArray = npt.NDArray[np.float64]


@dataclass(kw_only=True, slots=True)
class OverTime:
    """Sums of one quantity by timestep; the bins divide (0, 1] evenly."""

    sum_S: FloatArray = field(default_factory=lambda: np.zeros(NUM_BINS))
    count_S: FloatArray = field(default_factory=lambda: np.zeros(NUM_BINS))

    def add(self, timestep_P: FloatArray, value_P: FloatArray) -> None:
        """Count values at their timesteps."""
        bin_P = np.clip((timestep_P * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
        np.add.at(self.sum_S, bin_P, value_P)
        np.add.at(self.count_S, bin_P, 1.0)

    def points(self) -> list[tuple[float, float]]:
        """Return (middle of the bin, mean) of each bin that has values."""
        return [
            ((at + 0.5) / NUM_BINS, float(self.sum_S[at] / self.count_S[at]))
            for at in range(NUM_BINS)
            if self.count_S[at]
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """What the teacher said at one masked position: log p(true id), and candidates with p."""

    label_logprob: float
    candidates: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRow:
    """A row to read: its fields, and the guesses by position."""

    row: PremaskedRow
    guesses: dict[int, Guess]
    chunk_logprobs: dict[int, float]


@dataclass(kw_only=True, slots=True)
class ReportData:
    """Everything that a report draws. `sight`: what the teacher saw of the masked tokens."""

    sight: str = ""
    num_rows: int = 0
    num_positions: int = 0
    num_chunks: int = 0
    temperature: float | None = None
    accuracy: OverTime = field(default_factory=OverTime)
    label_prob: OverTime = field(default_factory=OverTime)
    entropy: OverTime = field(default_factory=OverTime)
    chunk_prob: OverTime = field(default_factory=OverTime)
    tail: dict[float, list[tuple[int, float]]] = field(default_factory=dict)
    chunk_lengths: tuple[Counter[int], Counter[int]] = field(
        default_factory=lambda: (Counter(), Counter())
    )
    bytes_by_column: dict[str, int] = field(default_factory=dict)
    rows_by_source: dict[str, int] = field(default_factory=dict)
    shown: list[ShownRow] = field(default_factory=list)


def gather(cache: Cache, *, max_rows: int = 2048, num_shown: int = 3) -> ReportData:
    """Read a sample of a set and take what a report draws from it.

    Raises FormatError or DataError where a row or a payload is not sound.
    """
    data = ReportData()
    manifest = cache.manifest
    codecs = Codecs()
    if isinstance(manifest, CacheManifest):
        codecs = open_codecs(cache.store, manifest)
        data.sight = "other half revealed" if manifest.comp_demo else "all masks hidden"
    if codecs.candidates is not None:
        temperatures = codecs.candidates.facts.temperatures
        data.temperature = min(temperatures, key=lambda t: abs(np.log(t)))
    tails: dict[float, FloatArray] = {}
    for view in range(cache.num_views if cache.num_samples else 0):
        budget = max(1, max_rows // cache.num_views)
        for rows in _sampled_rows(cache, budget):
            _add_rows(data, tails, cache, codecs, view, rows, num_shown)
    if data.num_positions:
        data.tail = {
            t: [(k + 1, float(s / data.num_positions)) for k, s in enumerate(sum_K)]
            for t, sum_K in tails.items()
        }
    data.bytes_by_column = _bytes_by_column(cache)
    for source in manifest.sources:
        taken = data.rows_by_source.get(source.name, 0)
        data.rows_by_source[source.name] = taken + source.num_rows_taken
    return data


def _sampled_rows(cache: Cache, budget: int) -> list[npt.NDArray[np.int64]]:
    """Return runs of rows, each within one row group, evenly over a view."""
    ends = np.cumsum(cache.row_group_sizes)
    num_groups = len(ends)
    num_taken = max(1, min(num_groups, -(-budget // 64)))
    each = max(1, budget // num_taken)
    found = []
    for group in np.unique(np.linspace(0, num_groups - 1, num_taken).astype(np.int64)):
        start = int(ends[group] - cache.row_group_sizes[group])
        found.append(np.arange(start, min(start + each, int(ends[group]))))
    return found


def _add_rows(
    data: ReportData,
    tails: dict[float, FloatArray],
    cache: Cache,
    codecs: Codecs,
    view: int,
    numbers: npt.NDArray[np.int64],
    num_shown: int,
) -> None:
    manifest = cache.manifest
    wanted = [column.name for column in row_fields(manifest.alignment)]
    for codec in (codecs.candidates, codecs.chunks):
        wanted += [column.name for column in codec.fields()] if codec is not None else []
    table = cache.read_rows(view, numbers, wanted)
    rows = table_to_rows(table, manifest.alignment)
    for row in rows:
        check_row_of(row, manifest, view)
    nums_B = np.asarray([num_entries(row, manifest.alignment) for row in rows], dtype=np.int64)
    timestep_B = np.asarray([row.timestep for row in rows])
    data.num_rows += len(rows)
    candidates, chunk_logprob_C = None, None
    if codecs.candidates is not None:
        candidates = codecs.candidates.decode(table, nums_B)
        temperatures = codecs.candidates.facts.temperatures
        _add_candidates(data, tails, candidates, temperatures, rows, np.repeat(timestep_B, nums_B))
    if codecs.chunks is not None:
        chunk_logprob_C = codecs.chunks.decode(table, nums_B)
        data.num_chunks += len(chunk_logprob_C)
        data.chunk_prob.add(
            np.repeat(timestep_B, nums_B), np.exp(chunk_logprob_C.astype(np.float64))
        )
    if manifest.alignment == "chunks":
        for row in rows:
            data.chunk_lengths[0].update((row.alignment_RX[:, 1] - row.alignment_RX[:, 0]).tolist())
            data.chunk_lengths[1].update((row.alignment_RX[:, 3] - row.alignment_RX[:, 2]).tolist())
    starts = np.concatenate([[0], np.cumsum(nums_B)])
    for index, row in enumerate(rows):
        # One sample as each view masks it first: that is what there is to see.
        is_new = view not in {shown.row.view for shown in data.shown}
        if len(data.shown) >= num_shown or not (is_new or view == cache.num_views - 1):
            break
        here = slice(int(starts[index]), int(starts[index + 1]))
        data.shown.append(_shown(row, candidates, chunk_logprob_C, here, data.temperature, codecs))


def _add_candidates(
    data: ReportData,
    tails: dict[float, FloatArray],
    candidates: Candidates,
    temperatures: tuple[float, ...],
    rows: list[PremaskedRow],
    timestep_P: FloatArray,
) -> None:
    label_P = _labels(rows)
    if not len(label_P):
        return
    top_P = candidates.ids_PK[np.arange(len(label_P)), candidates.logits_PK.argmax(axis=1)]
    data.num_positions += len(label_P)
    data.accuracy.add(timestep_P, (top_P == label_P).astype(np.float64))
    data.label_prob.add(timestep_P, np.exp(candidates.label_logprob_P.astype(np.float64)))
    for column, temperature in enumerate(temperatures):
        prob_PK = _probabilities(candidates, temperature, column)
        rest_PK = 1.0 - np.cumsum(-np.sort(-prob_PK, axis=1), axis=1)
        sum_K = np.clip(rest_PK, 0.0, 1.0).sum(axis=0)
        tails[temperature] = tails.get(temperature, 0.0) + sum_K
        if temperature == data.temperature:
            rest_P1 = np.clip(rest_PK[:, -1:], 0.0, 1.0)
            data.entropy.add(timestep_P, _entropy(np.concatenate([prob_PK, rest_P1], axis=1)))


def _labels(rows: list[PremaskedRow]) -> npt.NDArray[np.int32]:
    """Return the true ids at the payload positions of rows, int32 (P,)."""
    return np.concatenate(
        [
            np.empty(0, dtype=np.int32),
            *(
                row.student_ids_L[payload_positions(row.student_mask_L, row.alignment_RX)]
                for row in rows
            ),
        ]
    )


def _probabilities(candidates: Candidates, temperature: float, column: int) -> FloatArray:
    total_P1 = candidates.logsumexp_PT[:, column, None].astype(np.float64)
    with np.errstate(over="ignore"):
        prob_PK = np.exp(candidates.logits_PK.astype(np.float64) / temperature - total_P1)
    prob_PK[candidates.ids_PK == NO_ID] = 0.0
    return np.minimum(prob_PK, 1.0)


def _entropy(prob_PK: FloatArray) -> FloatArray:
    """Return the entropy of each row of probabilities, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_PK = np.where(prob_PK > 0, -prob_PK * np.log(prob_PK), 0.0)
    return np.asarray(terms_PK.sum(axis=1))


def _shown(
    row: PremaskedRow,
    candidates: Candidates | None,
    chunk_logprob_C: npt.NDArray[np.float32] | None,
    here: slice,
    temperature: float | None,
    codecs: Codecs,
) -> ShownRow:
    guesses: dict[int, Guess] = {}
    if candidates is not None and codecs.candidates is not None and temperature is not None:
        column = codecs.candidates.facts.temperatures.index(temperature)
        part = candidates.rows(here.start, here.stop)
        prob_PK = _probabilities(part, temperature, column)
        positions = payload_positions(row.student_mask_L, row.alignment_RX)
        for at, position in enumerate(positions.tolist()):
            best = np.argsort(-prob_PK[at], kind="stable")[:5]
            pairs = tuple(
                (int(part.ids_PK[at, k]), float(prob_PK[at, k]))
                for k in best
                if part.ids_PK[at, k] != NO_ID
            )
            guesses[position] = Guess(
                label_logprob=float(part.label_logprob_P[at]), candidates=pairs
            )
    logprobs = {} if chunk_logprob_C is None else _by_position(row, chunk_logprob_C[here])
    return ShownRow(row=row, guesses=guesses, chunk_logprobs=logprobs)


def _by_position(row: PremaskedRow, logprob_C: npt.NDArray[np.float32]) -> dict[int, float]:
    """Return the log-prob of the chunk that each student position of an active chunk lies in."""
    if row.alignment_RX.shape[1] == 3:
        positions = payload_positions(row.student_mask_L, row.alignment_RX)
        return dict(zip(positions.tolist(), logprob_C.tolist(), strict=True))
    active = row.alignment_RX[chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length)]
    return {
        position: logprob
        for (start, end, *_), logprob in zip(active.tolist(), logprob_C.tolist(), strict=True)
        for position in range(start, end)
    }


def _bytes_by_column(cache: Cache) -> dict[str, int]:
    """Return the compressed bytes of each column, of a few shards scaled to all of them."""
    shards = cache.manifest.shards
    if not shards:
        return {}
    at = np.unique(np.linspace(0, len(shards) - 1, _SHARDS_FOR_BYTES).astype(np.int64))
    found: Counter[str] = Counter()
    size_bytes = 0
    for shard in (shards[index] for index in at):
        with open_shard(cache.store, shard.path) as file:
            found.update(column_bytes(file.metadata))
        size_bytes += shard.size_bytes
    found["(headers and indexes)"] = max(0, size_bytes - sum(found.values()))
    scale = sum(shard.size_bytes for shard in shards) / max(1, size_bytes)
    return {name: round(size * scale) for name, size in found.items()}


def token_names(tokenizer: Any, ids: set[int]) -> dict[int, str]:
    """Return the text of each id that the tokenizer knows; special tokens by their name."""
    names = {}
    for number in ids:
        text = tokenizer.decode([number], skip_special_tokens=False)
        names[number] = text or (tokenizer.id_to_token(number) or "")
    return names
