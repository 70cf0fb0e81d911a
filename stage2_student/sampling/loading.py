"""A student opened for generation: weights, tokenizer and the ids that a sampler must know."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stage2_student.student import load_student
from stage2_student.student_source import StudentConfig, StudentSource, open_student
from tide_cache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStudent:
    """A student ready to generate.

    `eos_token_id` is the tokenizer's (None: it has none); `block_size` what the checkpoint says of
    itself, None where it says nothing.
    """

    name: str
    model: "Qwen3ForCausalLM"
    tokenizer: "PreTrainedTokenizerBase"
    mask_token_id: int
    eos_token_id: int | None
    block_size: int | None


def load_for_generation(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LoadedStudent:
    """Load a released student, or one of ours (`final/` of a run), from a folder or the hub.

    Weights come strictly and no code of the checkpoint runs. Errors: those of
    `open_for_generation`, and FormatError for a broken file.
    """
    source = open_for_generation(name_or_folder, revision=revision)
    return load_opened(source, dtype=dtype, device=device)


def open_for_generation(
    name_or_folder: str | Path, *, revision: str | None = None
) -> StudentSource:
    """Read a student's config and tokenizer, and no weights.

    Raises ConfigError where it cannot be found or was never trained to fill masks,
    CompatibilityError for another architecture.
    """
    source = open_student(StudentConfig(init=str(name_or_folder), revision=revision))
    if source.needs_mask_row:
        raise ConfigError(
            f"student {source.name!r}: expected a block-diffusion student, got an autoregressive "
            "Qwen3, which never saw a mask",
            hint="train one from it with tide-train, or name a released BD3LM student",
        )
    return source


def load_opened(
    source: StudentSource, *, dtype: torch.dtype, device: torch.device | str
) -> LoadedStudent:
    """Load the weights of what `open_for_generation` returned."""
    model = load_student(source, dtype=dtype, attention_implementation="sdpa", seed=0)
    return LoadedStudent(
        name=source.name,
        model=model.to(device).eval(),
        tokenizer=source.tokenizer,
        mask_token_id=source.mask_token_id,
        eos_token_id=source.tokenizer.eos_token_id,
        block_size=source.block_size,
    )
