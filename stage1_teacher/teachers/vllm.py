"""The teacher as a vLLM engine: prompts in, reduced answers out.

Worth it where vLLM's kernels are what makes a teacher fast or fit: mixtures of experts, tensor
parallelism. A stream becomes prompts (`vllm_prompts`), the engine's worker reduces its logits
(`vllm_plugin`), and rows of candidates, logsumexps and log-probs come back (`vllm_answers`). Hidden
states do not: payload `hidden` and calibration are the transformers backend's.

Unlike a transformers worker, an engine computes on all cores, so bytes may differ between machines.
"""

import logging
from collections.abc import Sequence

import numpy as np

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
from stage1_teacher.teachers.checkpoint import find_mask_token_id, open_checkpoint, require_field
from stage1_teacher.teachers.families import find_family, resolve_layout
from stage1_teacher.teachers.identity import identify_teacher
from stage1_teacher.teachers.layouts import Layout, LayoutSpec
from stage1_teacher.teachers.vllm_answers import check_ids_are_exact, unpack_answers
from stage1_teacher.teachers.vllm_engine import Engine, start_engine
from stage1_teacher.teachers.vllm_probe import check_layout_is_obeyed
from stage1_teacher.teachers.vllm_prompts import Prompt, num_tokens, plan_prompts
from tide_cache.errors import CompatibilityError, ConfigError, DataError

logger = logging.getLogger(__name__)


class VllmTeacher:
    """A running engine that scores masked positions; see `base.Teacher`."""

    def __init__(
        self, engine: Engine, *, identity: TeacherIdentity, layout: LayoutSpec, vocab_size: int
    ) -> None:
        self.engine = engine
        self.identity = identity
        self.layout = layout
        self.vocab_size = vocab_size
        check_layout_is_obeyed(engine, layout, vocab_size)

    @property
    def mask_token_id(self) -> int:
        """The id the teacher sees at masked positions."""
        return self.layout.mask_token_id

    def score(self, requests: Sequence[ScoreRequest], spec: ScoreSpec) -> list[list[Scores]]:
        """Score every wanted position. Returns one `Scores` per stream, per request.

        Raises DataError for ids outside the vocabulary and for samples longer than
        `max_model_len`, NonFiniteLogitsError (a DataError) that names the request,
        CompatibilityError where the spec wants hidden states.
        """
        refuse_hidden(spec)
        check_requests(
            requests, spec.vocab_size, teacher=self.identity.name, vocab_size=self.vocab_size
        )
        prompts = plan_prompts(
            requests,
            self.layout.layout,
            block_size=self.layout.block_size,
            masked_id=masked_id(self.layout, self.vocab_size),
        )
        self._check_lengths(requests, prompts)
        logger.debug("%d prompts of %d tokens", len(prompts), num_tokens(prompts))
        parts: list[list[list[Scores]]] = [[[] for _ in request.streams] for request in requests]
        answers = self.engine.answer(prompts, _labels(requests, prompts), spec)
        for prompt, rows_PC in zip(prompts, answers, strict=True):
            scores, finite_P = unpack_answers(rows_PC, spec)
            if not finite_P.all():
                wanted = prompt.start + int(np.argmin(finite_P))
                index = prompt.request_index
                raise NonFiniteLogitsError.at(index, requests[index], prompt.stream_index, wanted)
            parts[prompt.request_index][prompt.stream_index].append(scores)
        return [[Scores.concatenate(stream, spec) for stream in streams] for streams in parts]

    def close(self) -> None:
        """Stop the engine's processes."""
        self.engine.close()

    def _check_lengths(self, requests: Sequence[ScoreRequest], prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if len(prompt.ids_N) > self.engine.max_prompt_tokens:
                index = prompt.request_index
                raise DataError(
                    f"{describe_request(index, requests[index])}: {len(prompt.ids_N)} tokens, the "
                    f"engine takes {self.engine.max_prompt_tokens}",
                    hint="raise teacher.vllm.max_model_len (up to the checkpoint's "
                    "max_position_embeddings), or prepare shorter samples",
                    reason="too_long",
                )


def load_vllm_teacher(
    config: TeacherConfig, identity: TeacherIdentity | None = None
) -> VllmTeacher:
    """Start an engine on the teacher that `config` names.

    `identity` spares hashing the weights again where the caller has it already. Raises ConfigError,
    CompatibilityError, FormatError.
    """
    checkpoint = open_checkpoint(config.model, config.revision)
    family = find_family(checkpoint)
    layout = LayoutSpec(
        layout=resolve_layout(config.attention, family),
        block_size=config.block_size,
        mask_token_id=find_mask_token_id(checkpoint, config),
        shared=True,
    )
    vocab_size = int(require_field(checkpoint.config, "vocab_size", checkpoint.config_path))
    check_ids_are_exact(vocab_size, checkpoint.name)
    if layout.mask_token_id >= vocab_size:
        raise ConfigError(
            f"mask_token_id: {checkpoint.name} has {vocab_size} rows of embedding, got "
            f"{layout.mask_token_id}"
        )
    if layout.layout.has_clean_half:
        logger.warning(
            "attention %s: vLLM runs the clean prefix again for every live block (5 times the "
            "tokens at 256 positions, 18 times at 1,024), backend hf once per sample",
            layout.layout,
        )
    engine = start_engine(config, checkpoint, family, layout)
    try:
        return VllmTeacher(
            engine,
            identity=identity or identify_teacher(config, checkpoint),
            layout=layout,
            vocab_size=vocab_size,
        )
    except BaseException:
        engine.close()
        raise


def refuse_hidden(spec: ScoreSpec) -> None:
    """Refuse a spec that wants hidden states. Raises CompatibilityError."""
    if spec.transform is not None:
        raise CompatibilityError(
            "teacher.backend: 'vllm' gives no hidden states, which payload hidden needs",
            hint="set teacher.backend: hf, or payloads: [candidates]",
        )


def masked_id(layout: LayoutSpec, vocab_size: int) -> int:
    """Return what stands at masked positions of a prompt (see `vllm_prompts`)."""
    return vocab_size if layout.layout is Layout.OBSERVED_FIRST else layout.mask_token_id


def _labels(requests: Sequence[ScoreRequest], prompts: Sequence[Prompt]) -> list[np.ndarray]:
    return [requests[prompt.request_index].clean_ids_L[prompt.rows_P] for prompt in prompts]
