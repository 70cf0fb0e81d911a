"""The teacher as a transformers model in this process: requests in, scores out.

Requests become sequences (`layouts`), sequences become padded batches (`batching`), a batch runs
once through the model's body, and the output head runs on wanted positions only, in slices of rows:
at 152,000 ids a full [B, L, V] tensor of float32 logits would take 9.3 GiB for 16,384 tokens, a
slice takes `head_slice_mib`. The head runs in the model's own type; everything after it is float32.

Shapes: B batch, N tokens of a sequence, R wanted positions of a batch, P of a stream, V vocabulary,
d hidden size.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
)
from stage1_teacher.teachers.batching import PaddedBatch, pad_batch, plan_batches
from stage1_teacher.teachers.checkpoint import find_mask_token_id, open_checkpoint
from stage1_teacher.teachers.families import find_family, resolve_layout
from stage1_teacher.teachers.identity import identify_teacher
from stage1_teacher.teachers.layouts import LayoutSpec, TeacherSequence, plan_sequences
from stage1_teacher.teachers.loading import load_model
from tide_cache.errors import ConfigError


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


class HfTeacher:
    """A loaded `*ForCausalLM` that scores masked positions; see `base.Teacher`."""

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
        self._token_budget = token_budget
        self.hidden_size = int(model.lm_head.weight.shape[1])
        self.rows_per_slice = rows_per_slice(self.vocab_size, head_slice_mib)
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

    def score(self, requests: Sequence[ScoreRequest], spec: ScoreSpec) -> list[list[Scores]]:
        """Score every wanted position. Returns one `Scores` per stream, per request.

        Batches depend on the requests of this call alone. Raises DataError for ids outside the
        vocabulary, NonFiniteLogitsError (a DataError) that names the request.
        """
        self._check(requests, spec.vocab_size)
        nothing = Scores.concatenate((), spec)
        transform = None
        if spec.transform is not None:
            transform = DeviceTransform(spec.transform, self.model.lm_head.weight.device)
        answers = [[nothing for _ in request.streams] for request in requests]
        for batch in self._hidden_batches(requests):
            labels_R = torch.from_numpy(_labels(requests, batch.spans))
            parts = []
            for start, logits_RV in self._logit_slices(batch):
                labels = labels_R[start : start + len(logits_RV)].to(logits_RV.device)
                with _traced(start, batch.spans, requests):
                    parts.append(reduce_logits(logits_RV, labels, spec))
            scores = Scores.concatenate(parts, spec)
            if transform is not None:
                codes_PR = transform.to_codes(batch.hidden_Rd)
                scores = dataclasses.replace(scores, hidden_codes_PR=codes_PR)
            for span in batch.spans:
                answer = scores.rows(span.start, span.stop)
                answers[span.request_index][span.stream_index] = answer
        return answers

    def hidden_states(self, requests: Sequence[ScoreRequest]) -> list[list[torch.Tensor]]:
        """Return what the output head reads at the wanted positions.

        One (P, d) tensor per stream, per request, on the CPU in the model's type.
        """
        self._check(requests, self.vocab_size)
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
        sequences = plan_sequences(requests, self.layout, max_tokens=self._token_budget)
        lengths = [len(sequence.tokens) for sequence in sequences]
        for members in plan_batches(lengths, self._token_budget):
            chosen = [sequences[index] for index in members]
            batch = pad_batch([sequence.tokens for sequence in chosen])
            rows_R, spans = _readout_rows(chosen, num_tokens=batch.ids.shape[1])
            hidden_BNd = self.forward(batch)
            index_R = torch.from_numpy(rows_R).to(hidden_BNd.device)
            yield HiddenBatch(hidden_Rd=hidden_BNd.flatten(0, 1)[index_R], spans=spans)

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
