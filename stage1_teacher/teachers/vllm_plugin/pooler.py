"""From the hidden states of a step to rows of answers, without full logits ever leaving the worker.

What is wanted comes with each prompt (`PoolingParams.extra_kwargs`): rows, labels, and the spec,
so one engine answers any k, temperatures and shared vocabulary. The wanted rows of all prompts of a
step go through the head together, a slice at a time.
"""

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from stage1_teacher.scoring import rows_per_slice
from stage1_teacher.teachers.base import ScoreSpec
from stage1_teacher.teachers.vllm_answers import num_columns, pack_answers

TASK: PoolingTask = "token_classify"
ComputeLogits = Callable[[torch.Tensor], torch.Tensor | None]


class AnswerPooler(Pooler):
    """Answers (P, C) float32 on the CPU, one tensor per prompt of a step."""

    def __init__(
        self, compute_logits: ComputeLogits, *, vocab_size: int, head_slice_mib: int
    ) -> None:
        super().__init__()
        self._compute_logits = compute_logits
        self._vocab_size = vocab_size
        self._rows_per_slice = rows_per_slice(vocab_size, head_slice_mib)

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Return the one task: something per token."""
        return {TASK}

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor]:
        """Answer each prompt of a step at its wanted rows."""
        cursor = pooling_metadata.get_pooling_cursor()
        assert not cursor.is_partial_prefill(), "a step must hold whole prompts"
        lengths = cursor.num_scheduled_tokens_cpu.tolist()
        prompts = torch.split(hidden_states, lengths)
        asked = [params.extra_kwargs for params in pooling_metadata.pooling_params]
        answers: dict[int, torch.Tensor] = {}
        for spec, members in _by_spec(asked, self._vocab_size).items():
            rows, labels = zip(*(_wanted(asked[i], lengths[i]) for i in members), strict=True)
            device = hidden_states.device
            hidden_Pd = torch.cat(
                [
                    prompts[i][torch.tensor(r, device=device)]
                    for i, r in zip(members, rows, strict=True)
                ]
            )
            labels_P = torch.tensor([label for part in labels for label in part], device=device)
            answer_PC = self._answer(hidden_Pd, labels_P, spec)
            packed = torch.split(answer_PC, [len(part) for part in rows])
            answers |= dict(zip(members, packed, strict=True))
        return [answers[index] for index in range(len(asked))]

    def _answer(
        self, hidden_Pd: torch.Tensor, labels_P: torch.Tensor, spec: ScoreSpec
    ) -> torch.Tensor:
        parts = []
        for start in range(0, len(hidden_Pd), self._rows_per_slice):
            stop = start + self._rows_per_slice
            logits_PV = self._compute_logits(hidden_Pd[start:stop])
            if logits_PV is None:  # gathered on another rank, whose answer is taken
                parts.append(torch.zeros(len(hidden_Pd[start:stop]), num_columns(spec)))
                continue
            parts.append(pack_answers(logits_PV[:, : self._vocab_size], labels_P[start:stop], spec))
        return torch.cat(parts)


def _by_spec(asked: Iterable[dict[str, Any] | None], vocab_size: int) -> dict[ScoreSpec, list[int]]:
    """Group prompts by what is wanted of them; in practice a step has one spec."""
    groups: dict[ScoreSpec, list[int]] = {}
    for index, wanted in enumerate(asked):
        # vLLM measures memory with prompts that ask for nothing: take a usual question.
        spec = ScoreSpec(k=min(64, vocab_size), temperatures=(1.0, 2.0), vocab_size=vocab_size)
        if wanted is not None:
            spec = ScoreSpec(
                k=wanted["k"],
                temperatures=tuple(wanted["temperatures"]),
                vocab_size=wanted["vocab_size"],
            )
        groups.setdefault(spec, []).append(index)
    return groups


def _wanted(asked: dict[str, Any] | None, length: int) -> tuple[list[int], list[int]]:
    """Return rows and labels of a prompt; all rows where it asks for nothing."""
    if asked is None:
        return list(range(length)), [0] * length
    return asked["rows"], asked["labels"]
