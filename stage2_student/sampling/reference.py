"""Plain block-diffusion sampling: the reference that a faster sampler must reproduce.

Text grows block by block. A new block starts as masks; a fixed number of forwards each commits the
most confident of its positions. Every forward recomputes the whole prefix and nothing is cached,
so a reader can hold it against the definition; the price is O(prefix) work a step (64 new tokens
after 70 cost 64 forwards of up to 134 positions).

Blocks are counted from the prompt's end, as the published sampler does: where the prompt's length
is no multiple of the block size it is the prompt's *first* block that is short, and generation
starts on a boundary. Training counts from the first position; `block_origin="sequence_start"`
generates in that geometry, so that the first new block completes the prompt's last one.

Not copied from it: a token that equals the pad token is a token like any other here, where the
published sampler hides it from attention; and probabilities are compared in float32.

Shapes: B rows of one prompt length, L positions so far, N positions of the new block, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from stage2_student.choices import check_choice
from tide_cache.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM

BlockOrigin = Literal["prompt_end", "sequence_start"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """What stays the same over a whole call of the sampler."""

    mask_token_id: int
    eos_token_id: int | None
    block_size: int
    max_new_tokens: int
    num_steps: int
    temperature: float
    generator: torch.Generator | None
    block_origin: BlockOrigin

    def __post_init__(self) -> None:
        for name in ("block_size", "max_new_tokens", "num_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.temperature > 0 and self.generator is None:
            raise ConfigError(
                f"generator: temperature {self.temperature} draws at random",
                hint="pass a torch.Generator, or temperature 0",
            )
        check_choice("block_origin", self.block_origin, BlockOrigin)


def generate_reference(
    model: "Qwen3ForCausalLM",
    prompt_ids: Sequence[int],
    *,
    mask_token_id: int,
    eos_token_id: int | None,
    max_new_tokens: int,
    num_steps: int,
    block_size: int = 32,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    block_origin: BlockOrigin = "prompt_end",
) -> list[int]:
    """Generate up to `max_new_tokens` after one prompt and return the new ids alone.

    `num_steps` is spread over the blocks, ceil(num_steps / number of blocks) each. Generation stops
    after the first block that holds `eos_token_id` (None: never); what follows that token in its
    block is returned too, see `cut_at_eos`. Temperature 0 takes the likeliest token, above 0 draws
    with `generator`. The logit of the mask token competes like any other, so that an untrained
    model can leave masks behind. Raises ConfigError on settings that cannot be followed, DataError
    on an empty prompt. Source: block diffusion (arXiv 2503.09573), low-confidence remasking
    (arXiv 2502.09992), TIDE's evaluation protocol.
    """
    (new_ids,) = generate_reference_batch(
        model,
        [prompt_ids],
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        max_new_tokens=max_new_tokens,
        num_steps=num_steps,
        block_size=block_size,
        temperature=temperature,
        generator=generator,
        block_origin=block_origin,
    )
    return new_ids


def generate_reference_batch(
    model: "Qwen3ForCausalLM",
    prompts: Sequence[Sequence[int]],
    *,
    mask_token_id: int,
    eos_token_id: int | None,
    max_new_tokens: int,
    num_steps: int,
    block_size: int = 32,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    block_origin: BlockOrigin = "prompt_end",
    batch_size: int = 256,
) -> list[list[int]]:
    """Generate after many prompts of any lengths; returns the new ids in the order of `prompts`.

    Prompts of one length share a forward (up to `batch_size` of them), which needs no padding. At
    temperature 0 each result is that of `generate_reference` on its prompt alone; above 0 the draws
    depend on the company a prompt is in. Raises as `generate_reference` does.
    """
    settings = _Settings(
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        num_steps=num_steps,
        temperature=temperature,
        generator=generator,
        block_origin=block_origin,
    )
    _require_explicit_masks(model)
    results: dict[int, list[int]] = {}
    with torch.no_grad(), _evaluating(model):
        for indices in _equal_length_batches([len(p) for p in prompts], batch_size):
            prompt_BL = torch.tensor([list(prompts[i]) for i in indices], device=model.device)
            results.update(zip(indices, _generate(model, prompt_BL, settings), strict=True))
    return [results[i] for i in range(len(prompts))]


def cut_at_eos(new_ids: Sequence[int], eos_token_id: int) -> list[int]:
    """Return the ids before the first `eos_token_id`, or all of them if there is none."""
    ids = list(new_ids)
    return ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids


def reveal_counts(num_masked: int, num_steps: int) -> tuple[int, ...]:
    """Plan how many of `num_masked` positions each forward commits, over at most `num_steps`.

    With r steps left a share 1/r of what is still masked is committed, rounded half to even; steps
    that would commit nothing are left out. The counts add up to `num_masked`. The share is formed
    in float32 in the published order of operations: at a tie its rounding error decides (32 in 5
    steps), and only so do the steps agree.
    """
    one = np.float32(1)
    counts: list[int] = []
    for steps_left in range(num_steps, 0, -1):
        now = one - (one - np.float32(steps_left / num_steps))
        after = one - (one - np.float32((steps_left - 1) / num_steps))
        share = 1.0 - float(after / now)
        counts.append(min(round(num_masked * share), num_masked))
        num_masked -= counts[-1]
    return tuple(count for count in counts if count)


def block_bounds(
    prompt_length: int, max_new_tokens: int, block_size: int, block_origin: BlockOrigin
) -> list[tuple[int, int]]:
    """Return (start, end) of the blocks to generate, in positions of prompt + new tokens."""
    end = prompt_length + max_new_tokens
    first = prompt_length
    if block_origin == "sequence_start":
        first -= prompt_length % block_size
    starts = range(first, end, block_size)
    return [(max(s, prompt_length), min(s + block_size, end)) for s in starts]


def staircase_mask(num_positions: int, block_size: int, offset: int) -> Tensor:
    """Build the bool (L, L) mask of generation: each position sees its own and earlier blocks.

    `offset` positions are missing from the first block. Rows are queries. It is the clean half of
    `tide_cache.geometry.block_diffusion_mask`: committed tokens are clean, and the block at work
    sees the blocks before it and itself.
    """
    block_L = (torch.arange(num_positions) + offset) // block_size
    return block_L[None, :] <= block_L[:, None]


def _generate(model: "Qwen3ForCausalLM", prompt_BL: Tensor, settings: _Settings) -> list[list[int]]:
    """Generate after prompts of one length; each row ends with the block of its first EOS."""
    num_rows, prompt_length = prompt_BL.shape
    origin = prompt_length if settings.block_origin == "prompt_end" else 0
    offset = -origin % settings.block_size
    bounds = block_bounds(
        prompt_length, settings.max_new_tokens, settings.block_size, settings.block_origin
    )
    steps_per_block = math.ceil(settings.num_steps / len(bounds))
    ids_BL = prompt_BL
    end_B = [prompt_length + settings.max_new_tokens] * num_rows
    running = set(range(num_rows))
    for start, end in bounds:
        block_BN = ids_BL.new_full((num_rows, end - start), settings.mask_token_id)
        ids_BL = torch.cat([ids_BL, block_BN], dim=1)
        mask_LL = staircase_mask(end, settings.block_size, offset).to(ids_BL.device)
        for num_reveal in reveal_counts(end - start, steps_per_block):
            logits_BNV = _block_logits(model, ids_BL, mask_LL, end - start)
            ids_BL[:, start:] = _commit(ids_BL[:, start:], logits_BNV, num_reveal, settings)
        for row in [r for r in running if settings.eos_token_id in ids_BL[r, start:].tolist()]:
            end_B[row] = end
            running.remove(row)
        if not running:
            break
    return [ids_BL[r, prompt_length : end_B[r]].tolist() for r in range(num_rows)]


def _block_logits(
    model: "Qwen3ForCausalLM", ids_BL: Tensor, mask_LL: Tensor, block_length: int
) -> Tensor:
    """Run the whole sequence and return the float32 logits of its last block, (B, N, V)."""
    position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    output = model(
        input_ids=ids_BL,
        attention_mask={"full_attention": mask_LL[None, None]},
        position_ids=position_L[None],
        use_cache=False,
        logits_to_keep=block_length,
    )
    logits_BNV: Tensor = output.logits.float()
    return logits_BNV


def _commit(block_BN: Tensor, logits_BNV: Tensor, num_reveal: int, settings: _Settings) -> Tensor:
    """Replace the `num_reveal` most confident masks of each row by their tokens.

    Confidence is the probability of the chosen token at temperature 1, whatever the temperature it
    was drawn at. Ties go to the leftmost position.
    """
    chosen_BN = _choose(logits_BNV, settings)
    confidence_BN = logits_BNV.softmax(-1).gather(-1, chosen_BN[..., None])[..., 0]
    masked_BN = block_BN == settings.mask_token_id
    confidence_BN = confidence_BN.masked_fill(~masked_BN, -math.inf)
    best_BN = confidence_BN.argsort(dim=-1, descending=True, stable=True)[:, :num_reveal]
    reveal_BN = torch.zeros_like(masked_BN).scatter(1, best_BN, True)
    return torch.where(reveal_BN, chosen_BN, block_BN)


def _choose(logits_BNV: Tensor, settings: _Settings) -> Tensor:
    """Take the likeliest token of each position, or draw one by the Gumbel-max trick."""
    if settings.temperature == 0:
        return logits_BNV.argmax(-1)
    # float64: in float32 the smallest uniform draws cut the noise off where it matters.
    uniform_BNV = torch.rand(
        logits_BNV.shape,
        dtype=torch.float64,
        device=logits_BNV.device,
        generator=settings.generator,
    )
    gumbel_BNV = -torch.log(-torch.log(uniform_BNV))
    return (logits_BNV.double() + settings.temperature * gumbel_BNV).argmax(-1)


def _equal_length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group the indices of prompts of one length, at most `batch_size` at a time."""
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        if length == 0:
            raise DataError(f"prompts[{index}]: expected at least one token, got none")
        by_length[length].append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), batch_size):
            yield indices[first : first + batch_size]


def _require_explicit_masks(model: "Qwen3ForCausalLM") -> None:
    """Refuse eager attention, which adds a bool mask to the scores as 0 and 1 without a word."""
    implementation = model.config._attn_implementation
    if implementation == "eager":
        raise ConfigError(
            "model: expected attention that honours a bool mask, got 'eager'",
            hint="load it with attn_implementation='sdpa'",
        )


@contextmanager
def _evaluating(model: "Qwen3ForCausalLM") -> Iterator[None]:
    """Switch dropout off, and restore the model's mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
