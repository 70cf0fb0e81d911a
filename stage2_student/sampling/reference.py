"""Plain block-diffusion sampling: the reference that the fast sampler must reproduce.

Text grows block by block. A new block starts as masks; a planned number of forwards each commits
the most confident of its positions. Every forward recomputes the whole prefix and nothing is
cached, so a reader can hold it against the definition; the price is O(prefix) work a step (64 new
tokens after 70 cost 64 forwards of up to 134 positions).

Not copied from the published sampler: a token that equals the pad token is a token like any other
here, where the published one hides it from attention; and probabilities are compared in float32.

Shapes: B rows of one prompt length, L positions so far, N positions of the new block, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage2_student.sampling.blocks import first_block_start, staircase_mask
from stage2_student.sampling.commit import choose, commit, gumbel_noise, row_generator
from stage2_student.sampling.conduct import check_batch_size, check_prompts, evaluating
from stage2_student.sampling.settings import GenerationSettings
from tide_cache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def generate_reference(
    model: "Qwen3ForCausalLM",
    prompts: Sequence[Sequence[int]],
    *,
    mask_token_id: int,
    eos_token_id: int | None,
    settings: GenerationSettings,
    batch_size: int = 256,
) -> list[list[int]]:
    """Generate after prompts of any lengths and return the new ids alone, in their order.

    Prompts of one length share a forward (up to `batch_size` of them), which needs no padding; the
    result of each is that of its prompt alone. Generation stops after the first block that holds
    `eos_token_id` (None: never); what follows that token in its block is returned too, see
    `blocks.cut_at_eos`. The logit of the mask token competes like any other, so that an untrained
    model can leave masks behind. Raises ConfigError on settings that cannot be followed, DataError
    on an empty prompt. Source: block diffusion (arXiv 2503.09573), low-confidence remasking and
    guidance (arXiv 2502.09992), TIDE's evaluation protocol.
    """
    check_prompts(
        prompts,
        max_length=model.config.max_position_embeddings,
        max_new_tokens=settings.max_new_tokens,
    )
    check_batch_size(batch_size)
    _require_explicit_masks(model)
    results: dict[int, list[int]] = {}
    with torch.no_grad(), evaluating(model):
        for indices in _equal_length_batches([len(p) for p in prompts], batch_size):
            prompt_BL = torch.tensor([list(prompts[i]) for i in indices], device=model.device)
            generators = [row_generator(settings.seed, i, model.device) for i in indices]
            answers = _generate(model, prompt_BL, mask_token_id, eos_token_id, settings, generators)
            results.update(zip(indices, answers, strict=True))
    return [results[i] for i in range(len(prompts))]


def _generate(
    model: "Qwen3ForCausalLM",
    prompt_BL: Tensor,
    mask_token_id: int,
    eos_token_id: int | None,
    settings: GenerationSettings,
    generators: list[torch.Generator],
) -> list[list[int]]:
    """Generate after prompts of one length; each row ends with the block of its first EOS."""
    num_rows, prompt_length = prompt_BL.shape
    origin = first_block_start(prompt_length, settings.block_size, settings.block_origin)
    bounds = settings.bounds(prompt_length)
    ids_BL = prompt_BL
    end_B = [prompt_length + settings.max_new_tokens] * num_rows
    running = set(range(num_rows))
    for start, end in bounds:
        block_BN = ids_BL.new_full((num_rows, end - start), mask_token_id)
        ids_BL = torch.cat([ids_BL, block_BN], dim=1)
        mask_LL = staircase_mask(end, settings.block_size, -origin % settings.block_size)
        for num_reveal in settings.reveal_plan(end - start, len(bounds)):
            if settings.threshold is not None and not (ids_BL[:, start:] == mask_token_id).any():
                break
            logits_BNV = _guided_logits(
                model, ids_BL, mask_LL, (prompt_length, end - start), mask_token_id, settings
            )
            chosen_BN, confidence_BN = choose(
                logits_BNV,
                temperature=settings.temperature,
                noise_PV=_noise(
                    logits_BNV, ids_BL[:, start:] == mask_token_id, settings, generators
                ),
            )
            ids_BL[:, start:] = commit(
                ids_BL[:, start:],
                chosen_BN,
                confidence_BN,
                masked_BN=ids_BL[:, start:] == mask_token_id,
                num_reveal_B=torch.full((num_rows,), num_reveal, device=ids_BL.device),
                threshold=settings.threshold,
            )
        for row in [r for r in running if eos_token_id in ids_BL[r, start:].tolist()]:
            end_B[row] = end
            running.remove(row)
        if not running:
            break
    return [ids_BL[r, prompt_length : end_B[r]].tolist() for r in range(num_rows)]


def _guided_logits(
    model: "Qwen3ForCausalLM",
    ids_BL: Tensor,
    mask_LL: Tensor,
    lengths: tuple[int, int],
    mask_token_id: int,
    settings: GenerationSettings,
) -> Tensor:
    """Return the block's logits; with guidance, moved away from those after a masked prompt.

    `lengths`: of the prompt and of the block.
    """
    prompt_length, block_length = lengths
    logits_BNV = _block_logits(model, ids_BL, mask_LL, block_length)
    if settings.cfg_scale == 0:
        return logits_BNV
    unprompted_BL = ids_BL.clone()
    unprompted_BL[:, :prompt_length] = mask_token_id
    unprompted_BNV = _block_logits(model, unprompted_BL, mask_LL, block_length)
    return unprompted_BNV + (settings.cfg_scale + 1) * (logits_BNV - unprompted_BNV)


def _block_logits(
    model: "Qwen3ForCausalLM", ids_BL: Tensor, mask_LL: Tensor, block_length: int
) -> Tensor:
    """Run the whole sequence and return the float32 logits of its last block, (B, N, V)."""
    position_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    output = model(
        input_ids=ids_BL,
        attention_mask={"full_attention": mask_LL[None, None].to(ids_BL.device)},
        position_ids=position_L[None],
        use_cache=False,
        logits_to_keep=block_length,
    )
    logits_BNV: Tensor = output.logits.float()
    return logits_BNV


def _noise(
    logits_BNV: Tensor,
    masked_BN: Tensor,
    settings: GenerationSettings,
    generators: list[torch.Generator],
) -> Tensor | None:
    """Draw for each row that has a mask from its own stream, or nothing at temperature 0."""
    if settings.temperature == 0:
        return None
    noise_BNV = torch.zeros_like(logits_BNV, dtype=torch.float64)
    for row in masked_BN.any(1).nonzero()[:, 0].tolist():
        noise_BNV[row] = gumbel_noise(tuple(logits_BNV.shape[1:]), generators[row])
    return noise_BNV


def _equal_length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group the indices of prompts of one length, at most `batch_size` at a time."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
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
