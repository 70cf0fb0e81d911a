"""Generating with a student: what one calls from Python.

from stage2_student.sampler import GenerationSettings, Sampler, load_for_generation

student = load_for_generation("runs/wedlm/student/final")
sampler = Sampler(
    student.model,
    mask_token_id=student.mask_token_id,
    eos_token_id=student.eos_token_id,
    settings=GenerationSettings(max_new_tokens=256, threshold=0.9),
)
ids = student.tokenizer("Once upon a time")["input_ids"]
(answer,) = sampler.generate([ids])
print(student.tokenizer.decode(answer.text_ids))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stage2_student.sampling.blocks import BlockOrigin, cut_at_eos
from stage2_student.sampling.loading import LoadedStudent, load_for_generation
from stage2_student.sampling.reference import generate_reference
from stage2_student.sampling.settings import Generation, GenerationSettings

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

__all__ = [
    "BlockOrigin",
    "DenoisingStep",
    "Generation",
    "GenerationSettings",
    "LoadedStudent",
    "Sampler",
    "cut_at_eos",
    "load_for_generation",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingStep:
    """The state of one prompt after a forward, for whoever watches.

    `prompt_index` counts in `prompts`; `ids` are the new ids so far, those of the block at work
    with the mask token where nothing is committed yet; `block_start` is where that block begins in
    `ids`; `is_block_finished`: it is not touched again.
    """

    prompt_index: int
    ids: list[int]
    block_start: int
    is_block_finished: bool


class Sampler:
    """Generates with one model under one set of settings."""

    def __init__(
        self,
        model: "Qwen3ForCausalLM",
        *,
        mask_token_id: int,
        eos_token_id: int | None,
        settings: GenerationSettings,
    ) -> None:
        self.model = model
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.settings = settings

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 32,
        prompt_numbers: Sequence[int] | None = None,
        on_step: Callable[[DenoisingStep], None] | None = None,
    ) -> list[Generation]:
        """Generate after prompts of any lengths, in their order.

        At temperature 0 a result depends on its prompt alone; above 0 also on the seed and on the
        prompt's number (`prompt_numbers`; default: its index), never on the company in its batch.
        `on_step` is called after each forward for each prompt that took part in it. Raises
        ConfigError or DataError, naming what cannot be followed.
        """
        answers = generate_reference(
            self.model,
            prompts,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_id,
            settings=self.settings,
            batch_size=batch_size,
        )
        return [
            Generation(ids=ids, eos_token_id=self.eos_token_id, num_forwards=0, num_positions=0)
            for ids in answers
        ]
