"""The teacher as a transformers model in this process: requests in, scores out.

Requests become sequences (`layouts`), sequences become padded batches (`batching`), a batch runs
once through the model's body, and the output head runs on wanted positions only, in slices of rows:
at 152,000 ids a full [B, L, V] tensor of float32 logits would take 9.3 GiB for 16,384 tokens, a
slice takes `head_slice_mib`. The head runs in the model's own type; everything after it is float32.
A batch that does not fit the memory halves the token budget (`memory`).

Shapes: B batch, N tokens of a sequence, R wanted positions of a batch, P of a stream, V vocabulary,
d hidden size.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from stage1_teacher.hidden_fit import DeviceTransform
from stage1_teacher.scoring import reduce_logits, rows_per_slice
from stage1_teacher.teachers.attention import batch_mask, check_mask_is_obeyed, run_body
from stage1_teacher.teachers.base import (
    NonFiniteLogitsError,
    ScoreRequest,
    Scores,
    ScoreSpec,
    TeacherConfig,
    TeacherIdentity,
    check_requests,
    describe_request,
)
from stage1_teacher.teachers.batching import PaddedBatch, pad_batch, plan_batches
from stage1_teacher.teachers.checkpoint import find_mask_token_id, open_checkpoint
from stage1_teacher.teachers.families import find_family, resolve_layout
from stage1_teacher.teachers.identity import identify_teacher
from stage1_teacher.teachers.layouts import LayoutSpec, TeacherSequence, plan_sequences
from stage1_teacher.teachers.loading import load_model
from stage1_teacher.teachers.memory import (
    BatchLoad,
    BatchOutOfMemory,
    TeacherMemoryError,
    free_memory,
    out_of_memory_names,
    smaller_budget,
)
from tide_cache.errors import ConfigError

logger = logging.getLogger(__name__)
Answers = TypeVar("Answers")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Rows `start` to `stop` of a batch's hidden states answer one stream of one request."""

    request_index: int
    stream_index: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HiddenBatch:
    """What the output head reads at the wanted positions of one forward."""

    hidden_Rd: torch.Tensor
    spans: tuple[Span, ...]
    load: BatchLoad


class HfTeacher:
    """A loaded `*ForCausalLM` that scores masked positions; see `base.Teacher`.

    `token_budget` and `rows_per_slice` begin as configured and shrink, for good, where the memory
    does not hold them. Other batches round otherwise: see `score`.
    """

    def __init__(
        self,
        model: Any,
        *,
        identity: TeacherIdentity,
        layout: LayoutSpec,
        mask_by_layer_type: bool,
        token_budget: int,
        head_slice_mib: int,
    ) -> None:
        self.model = model
        self.identity = identity
        self.layout = layout
        self.vocab_size = int(model.lm_head.weight.shape[0])
        self._mask_by_layer_type = mask_by_layer_type
        self.token_budget = token_budget
        self.hidden_size = int(model.lm_head.weight.shape[1])
        self.rows_per_slice = rows_per_slice(self.vocab_size, head_slice_mib)
        self._configured = (self.token_budget, self.rows_per_slice)
        if layout.mask_token_id >= self.vocab_size:
            raise ConfigError(
                f"mask_token_id: {identity.name} has {self.vocab_size} rows of embedding, got "
                f"{layout.mask_token_id}"
            )
        check_mask_is_obeyed(model, mask_by_layer_type=mask_by_layer_type)

    @property
    def mask_token_id(self) -> int:
        """The id the teacher sees at masked positions."""
        return self.layout.mask_token_id

    @property
    def has_shrunk(self) -> bool:
        """Say whether batches are smaller than configured, since the memory did not hold them."""
        return (self.token_budget, self.rows_per_slice) != self._configured

    def score(self, requests: Sequence[ScoreRequest], spec: ScoreSpec) -> list[list[Scores]]:
        """Score every wanted position. Returns one `Scores` per stream, per request.

        Batches, and so the bytes, depend on the requests of this call and on `token_budget` as it
        stands at its end. Budgets differ by rounding alone. Measured on random weights at 16,384
        and 512: float32 2e-6 of the largest logit; bfloat16 2% (rms 1.3% of the logits' spread, KL
        1e-4 nats). In a mixture of experts, where a router may break a near tie the other way, up
        to 4e-3 of the largest logit in float32, and 48% (rms 7%, KL 3e-3) in bfloat16.

        Raises DataError for ids outside the vocabulary, NonFiniteLogitsError (a DataError) that
        names the request, TeacherMemoryError where one stream alone does not fit the memory.
        """
        self._check(requests, spec.vocab_size)
        return self._within_memory(requests, lambda: self._score(requests, spec))

    def hidden_states(self, requests: Sequence[ScoreRequest]) -> list[list[torch.Tensor]]:
        """Return what the output head reads at the wanted positions.

        One (P, d) tensor per stream, per request, on the CPU in the model's type. Raises as
        `score` does.
        """
        self._check(requests, self.vocab_size)
        return self._within_memory(requests, lambda: self._hidden_states(requests))

    def _score(self, requests: Sequence[ScoreRequest], spec: ScoreSpec) -> list[list[Scores]]:
        nothing = Scores.concatenate((), spec)
        transform = None
        if spec.transform is not None:
            transform = DeviceTransform(spec.transform, self.model.lm_head.weight.device)
        answers = [[nothing for _ in request.streams] for request in requests]
        for batch in self._hidden_batches(requests):
            with out_of_memory_names(batch.load, in_head=True):
                scores = self._reduce(batch, requests, spec, transform)
            for span in batch.spans:
                answer = scores.rows(span.start, span.stop)
                answers[span.request_index][span.stream_index] = answer
        return answers

    def _reduce(
        self,
        batch: HiddenBatch,
        requests: Sequence[ScoreRequest],
        spec: ScoreSpec,
        transform: DeviceTransform | None,
    ) -> Scores:
        """Run the head over a batch's hidden states, in slices, and keep what `spec` asks for."""
        labels_R = torch.from_numpy(_labels(requests, batch.spans))
        parts = []
        for start, logits_RV in self._logit_slices(batch):
            labels = labels_R[start : start + len(logits_RV)].to(logits_RV.device)
            with _traced(start, batch.spans, requests):
                parts.append(reduce_logits(logits_RV, labels, spec))
        scores = Scores.concatenate(parts, spec)
        if transform is None:
            return scores
        return dataclasses.replace(scores, hidden_codes_PR=transform.to_codes(batch.hidden_Rd))

    def _hidden_states(self, requests: Sequence[ScoreRequest]) -> list[list[torch.Tensor]]:
        weight = self.model.lm_head.weight
        nothing = torch.empty((0, weight.shape[1]), dtype=weight.dtype)
        answers = [[nothing for _ in request.streams] for request in requests]
        for batch in self._hidden_batches(requests):
            hidden_Rd = batch.hidden_Rd.cpu()
            for span in batch.spans:
                rows_Pd = hidden_Rd[span.start : span.stop]
                answers[span.request_index][span.stream_index] = rows_Pd
        return answers

    @torch.no_grad()
    def logits(self, hidden_Pd: torch.Tensor) -> torch.Tensor:
        """Apply the output head to hidden states (P, d). Returns float32 (P, V) on its device.

        The whole (P, V) is made: hand over slices.
        """
        weight = self.model.lm_head.weight
        logits_PV: torch.Tensor = self.model.lm_head(hidden_Pd.to(weight.device, weight.dtype))
        return logits_PV.float()

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output head's weight (V, d) and bias (V,) or None, where they are.

        A tied head is its embedding; heads with a scale or soft-capping are refused on loading.
        """
        return self.model.lm_head.weight, self.model.lm_head.bias

    @torch.no_grad()
    def forward(self, batch: PaddedBatch) -> torch.Tensor:
        """Run the model's body on a padded batch. Returns hidden states (B, N, d)."""
        device = self.model.get_input_embeddings().weight.device
        ids, positions, stream, block, order = (
            torch.from_numpy(array_BN).to(device)
            for array_BN in (batch.ids, batch.position_ids, batch.stream, batch.block, batch.order)
        )
        return run_body(
            self.model,
            ids.long(),
            positions.long(),
            batch_mask(stream, block, order),
            mask_by_layer_type=self._mask_by_layer_type,
        )

    def _hidden_batches(self, requests: Sequence[ScoreRequest]) -> Iterator[HiddenBatch]:
        """Run all requests, one batch at a time, and keep what is wanted."""
        sequences = plan_sequences(requests, self.layout, max_tokens=self.token_budget)
        lengths = [len(sequence.tokens) for sequence in sequences]
        for members in plan_batches(lengths, self.token_budget):
            chosen = [sequences[index] for index in members]
            load = _load(chosen)
            with out_of_memory_names(load, in_head=False):
                hidden_Rd, spans = self._run(chosen)
            yield HiddenBatch(hidden_Rd=hidden_Rd, spans=spans, load=load)

    def _run(self, sequences: Sequence[TeacherSequence]) -> tuple[torch.Tensor, tuple[Span, ...]]:
        batch = pad_batch([sequence.tokens for sequence in sequences])
        rows_R, spans = _readout_rows(sequences, num_tokens=batch.ids.shape[1])
        hidden_BNd = self.forward(batch)
        index_R = torch.from_numpy(rows_R).to(hidden_BNd.device)
        return hidden_BNd.flatten(0, 1)[index_R], spans

    def _within_memory(
        self, requests: Sequence[ScoreRequest], attempt: Callable[[], Answers]
    ) -> Answers:
        """Do a call, and again with a smaller budget as often as it runs out of memory."""
        while True:
            try:
                return attempt()
            except BatchOutOfMemory as error:
                load, in_head, reason = error.load, error.in_head, error.reason
            free_memory()
            self._shrink(requests, load, in_head=in_head, reason=reason)

    def _shrink(
        self, requests: Sequence[ScoreRequest], load: BatchLoad, *, in_head: bool, reason: str
    ) -> None:
        """Halve what a batch takes. Raises TeacherMemoryError where nothing is left to halve."""
        named = describe_request(load.longest_request, requests[load.longest_request])
        slices_can_be_cut = in_head and self.rows_per_slice > 1
        if not (load.can_be_cut or slices_can_be_cut):
            error = TeacherMemoryError(
                f"{named}: out of memory: one of its streams alone takes "
                f"{load.longest_tokens:,} tokens, which cannot be cut ({reason})",
                hint="prepare shorter samples (max_length), or give the teacher more room: "
                "teacher.dtype bfloat16, teacher.device_map auto over several GPUs, fewer workers",
            )
            error.request_index = load.longest_request
            raise error
        changes = []
        if load.can_be_cut:
            smaller = smaller_budget(self.token_budget, load)
            changes.append(f"token budget {self.token_budget} -> {smaller}")
            self.token_budget = smaller
        if slices_can_be_cut:
            smaller = self.rows_per_slice // 2
            changes.append(f"slices of the head {self.rows_per_slice} -> {smaller} rows")
            self.rows_per_slice = smaller
        logger.warning(
            "%s: out of memory in %s (sequences: %d, longest: %d tokens): %s, from here on (%s)",
            named,
            "the output head" if in_head else "a forward",
            load.num_sequences,
            load.longest_tokens,
            ", ".join(changes),
            reason,
        )

    def _logit_slices(self, batch: HiddenBatch) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, float32 logits) over the rows of a batch, a slice at a time."""
        for start in range(0, len(batch.hidden_Rd), self.rows_per_slice):
            yield start, self.logits(batch.hidden_Rd[start : start + self.rows_per_slice])

    def _check(self, requests: Sequence[ScoreRequest], vocab_size: int) -> None:
        check_requests(requests, vocab_size, teacher=self.identity.name, vocab_size=self.vocab_size)


def load_hf_teacher(config: TeacherConfig, identity: TeacherIdentity | None = None) -> HfTeacher:
    """Load the teacher that `config` names with transformers.

    `identity` spares hashing the weights again where the caller has it already. Raises ConfigError,
    CompatibilityError, FormatError.
    """
    checkpoint = open_checkpoint(config.model, config.revision)
    family = find_family(checkpoint)
    layout = LayoutSpec(
        layout=resolve_layout(config.attention, family),
        block_size=config.block_size,
        mask_token_id=find_mask_token_id(checkpoint, config),
        shared=config.passes == "shared",
    )
    model = load_model(
        checkpoint,
        family,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        device_map=config.device_map,
        attn_implementation=config.attn_implementation,
    )
    return HfTeacher(
        model,
        identity=identity or identify_teacher(config, checkpoint),
        layout=layout,
        mask_by_layer_type=family.mask_by_layer_type,
        token_budget=config.token_budget,
        head_slice_mib=config.head_slice_mib,
    )


def _load(sequences: Sequence[TeacherSequence]) -> BatchLoad:
    longest = max(sequences, key=lambda sequence: len(sequence.tokens))
    return BatchLoad(
        num_sequences=len(sequences),
        num_tokens=len(sequences) * len(longest.tokens),
        longest_tokens=len(longest.tokens),
        longest_streams=len(longest.readouts),
        longest_request=longest.request_index,
    )


def _readout_rows(
    sequences: Sequence[TeacherSequence], num_tokens: int
) -> tuple[npt.NDArray[np.int64], tuple[Span, ...]]:
    """Flatten the readouts of a padded batch into rows of (B * N) and the spans they fill."""
    rows, spans, start = [], [], 0
    for number, sequence in enumerate(sequences):
        for readout in sequence.readouts:
            stop = start + len(readout.rows_P)
            rows.append(readout.rows_P.astype(np.int64) + number * num_tokens)
            spans.append(
                Span(
                    request_index=sequence.request_index,
                    stream_index=readout.stream_index,
                    start=start,
                    stop=stop,
                )
            )
            start = stop
    return np.concatenate(rows), tuple(spans)


def _labels(requests: Sequence[ScoreRequest], spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Collect the true ids at the wanted positions, in the order of `spans`."""
    labels = []
    for span in spans:
        request = requests[span.request_index]
        labels.append(request.clean_ids_L[request.streams[span.stream_index].wanted_P])
    return np.concatenate(labels).astype(np.int64)


@contextmanager
def _traced(start: int, spans: Sequence[Span], requests: Sequence[ScoreRequest]) -> Iterator[None]:
    """Let a failure in a slice of logits that begins at row `start` name request and position."""
    try:
        yield
    except NonFiniteLogitsError as error:
        assert error.row is not None
        row = start + error.row
        span = next(span for span in spans if span.start <= row < span.stop)
        request = requests[span.request_index]
        named = NonFiniteLogitsError.at(
            span.request_index, request, span.stream_index, row - span.start
        )
        named.row = row
        raise named from error
