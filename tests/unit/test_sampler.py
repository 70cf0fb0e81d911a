"""The reference sampler against its definition, on a tiny model with random weights.

An independent sampler with a KV cache stands beside it: it prefills each finished prefix once and
runs the block at work against stored keys, so it shares neither masks nor positions with ours.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen3ForCausalLM

from stage2_student.sampling import reference
from stage2_student.sampling.blocks import (
    BlockOrigin,
    block_bounds,
    cut_at_eos,
    reveal_counts,
    staircase_mask,
)
from stage2_student.sampling.settings import GenerationSettings
from tests.sampling_models import EOS, MASK, VOCAB, random_prompts, tiny_model
from tide_cache.errors import ConfigError, DataError
from tide_cache.geometry import block_diffusion_mask


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model()


def generate_reference_batch(
    model: Qwen3ForCausalLM,
    prompts: list[list[int]],
    *,
    mask_token_id: int,
    eos_token_id: int | None,
    batch_size: int = 256,
    **settings: Any,
) -> list[list[int]]:
    return reference.generate_reference(
        model,
        prompts,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        settings=GenerationSettings(**settings),
        batch_size=batch_size,
    )


def generate_reference(model: Qwen3ForCausalLM, prompt: list[int], **settings: Any) -> list[int]:
    (new_ids,) = generate_reference_batch(model, [prompt], **settings)
    return new_ids


@torch.no_grad()
def _generate_with_cache(
    model: Qwen3ForCausalLM,
    prompt: list[int],
    *,
    block_size: int,
    new: int,
    reveal: int,
    mask_token_id: int = MASK,
) -> list[int]:
    """Greedy, `reveal` tokens a step, no stop; the prompt's first block is the short one."""
    cache = DynamicCache(config=model.config)

    def run(ids: list[int], start: int) -> Any:
        visible = torch.ones(1, 1, len(ids), start + len(ids), dtype=torch.bool)
        return model(
            input_ids=torch.tensor([ids]),
            attention_mask={"full_attention": visible},
            position_ids=torch.arange(start, start + len(ids))[None],
            past_key_values=cache,
        ).logits[0]

    done = 0
    first = len(prompt) % block_size or block_size
    for end in range(first, len(prompt) + 1, block_size):
        run(prompt[done:end], done)
        done = end
    out: list[int] = []
    for _ in range(new // block_size):
        block = [mask_token_id] * block_size
        for _ in range(block_size // reveal):
            logits = run(block, done)
            cache.crop(-block_size)
            top, token = logits.softmax(-1).max(-1)
            top[[i for i, t in enumerate(block) if t != mask_token_id]] = -1.0
            for i in top.topk(reveal).indices.tolist():
                block[i] = int(token[i])
        run(block, done)
        done += block_size
        out += block
    return out


@pytest.mark.parametrize("prompt_length", [1, 7, 8, 13, 24])
@pytest.mark.parametrize("reveal", [1, 2, 8])
def test_equals_a_sampler_that_caches_keys(
    model: Qwen3ForCausalLM, prompt_length: int, reveal: int
) -> None:
    seen: set[int] = set()
    for prompt in random_prompts((prompt_length,) * 4):
        ours = generate_reference(
            model,
            prompt,
            mask_token_id=MASK,
            eos_token_id=None,
            block_size=8,
            max_new_tokens=24,
            num_steps=24 // reveal,
        )
        assert ours == _generate_with_cache(model, prompt, block_size=8, new=24, reveal=reveal)
        seen.update(ours)
    assert len(seen) > 4  # a constant answer would prove little


def test_a_committed_mask_token_stays_a_mask(model: Qwen3ForCausalLM) -> None:
    (prompt,) = random_prompts((9,))
    settings: dict[str, Any] = {
        "eos_token_id": None,
        "block_size": 8,
        "max_new_tokens": 16,
        "num_steps": 16,
    }
    favourite = max(generate_reference(model, prompt, mask_token_id=MASK, **settings))
    new_ids = generate_reference(model, prompt, mask_token_id=favourite, **settings)
    assert favourite in new_ids
    assert new_ids == _generate_with_cache(
        model, prompt, block_size=8, new=16, reveal=1, mask_token_id=favourite
    )


def test_a_batch_of_unequal_lengths_equals_one_by_one(model: Qwen3ForCausalLM) -> None:
    prompts = random_prompts((3, 9, 3, 16, 9, 3, 1))
    plain = generate_reference_batch(
        model, prompts, mask_token_id=MASK, eos_token_id=None, max_new_tokens=20, num_steps=10
    )
    # A token that some prompts produce early and others never: rows must stop on their own.
    stop = next(t for t in plain[0][:8] if not all(t in row for row in plain))
    settings: dict[str, Any] = {
        "mask_token_id": MASK,
        "eos_token_id": stop,
        "max_new_tokens": 20,
        "num_steps": 10,
        "block_size": 8,
    }
    batch = generate_reference_batch(model, prompts, batch_size=2, **settings)
    assert batch == [generate_reference(model, prompt, **settings) for prompt in prompts]
    assert len({len(row) for row in batch}) > 1
    for row in batch:
        # Whole blocks: nothing follows the block of the first stop token.
        blocks = [row[i : i + 8] for i in range(0, len(row), 8)]
        assert all(stop not in block for block in blocks[:-1])
        assert stop in blocks[-1] or len(row) == 20


def test_block_origin_sequence_start_completes_the_prompts_block(model: Qwen3ForCausalLM) -> None:
    (prompt,) = random_prompts((13,))
    new_ids = generate_reference(
        model,
        prompt,
        mask_token_id=MASK,
        eos_token_id=None,
        block_size=8,
        max_new_tokens=3,
        num_steps=1,
        block_origin="sequence_start",
    )
    # Training's own view of the same state: the noised half of [xt, x0] over 16 positions.
    clean = torch.tensor([prompt + [MASK] * 3])
    positions = torch.arange(16)
    mask = torch.from_numpy(block_diffusion_mask(16, 8))
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([clean, clean], dim=1),
            attention_mask={"full_attention": mask[None, None]},
            position_ids=torch.cat([positions, positions])[None],
        ).logits
    assert new_ids == logits[0, 13:16].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("prompt_length", "origin", "expected"),
    [
        (5, "prompt_end", [(5, 13), (13, 21), (21, 25)]),
        (8, "prompt_end", [(8, 16), (16, 24), (24, 28)]),
        (5, "sequence_start", [(5, 8), (8, 16), (16, 24), (24, 25)]),
        (8, "sequence_start", [(8, 16), (16, 24), (24, 28)]),
    ],
)
def test_block_bounds(
    prompt_length: int, origin: BlockOrigin, expected: list[tuple[int, int]]
) -> None:
    assert block_bounds(prompt_length, 20, 8, origin) == expected


def test_staircase_is_the_clean_half_of_the_training_mask() -> None:
    training = torch.from_numpy(block_diffusion_mask(21, 8))
    assert torch.equal(staircase_mask(21, 8, 0), training[21:, 21:])


@pytest.mark.parametrize(
    ("num_masked", "num_steps", "expected"),
    [
        (32, 32, (1,) * 32),
        (32, 8, (4,) * 8),
        (3, 3, (1, 1, 1)),
        (5, 8, (1, 1, 1, 1, 1)),  # steps with nothing to do are left out
        (32, 5, (6, 6, 7, 6, 7)),
        (8, 3, (3, 2, 3)),
        (4, 3, (1, 1, 2)),  # exact arithmetic would give 1, 2, 1
    ],
)
def test_reveal_counts(num_masked: int, num_steps: int, expected: tuple[int, ...]) -> None:
    assert reveal_counts(num_masked, num_steps) == expected


@given(num_masked=st.integers(1, 128), num_steps=st.integers(1, 300))
def test_reveal_counts_commit_every_position(num_masked: int, num_steps: int) -> None:
    counts = reveal_counts(num_masked, num_steps)
    assert sum(counts) == num_masked
    assert 0 < len(counts) <= num_steps
    assert min(counts) > 0


def test_temperature_draws_from_the_models_distribution(model: Qwen3ForCausalLM) -> None:
    (prompt,) = random_prompts((6,))
    temperature, num_draws = 1.7, 20_000
    drawn = generate_reference_batch(
        model,
        [prompt] * num_draws,
        mask_token_id=MASK,
        eos_token_id=None,
        max_new_tokens=1,
        num_steps=1,
        temperature=temperature,
        seed=3,
        batch_size=num_draws,
    )
    observed = torch.bincount(torch.tensor(drawn)[:, 0], minlength=VOCAB) / num_draws
    mask = staircase_mask(7, 32, 32 - 6)[None, None]
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[*prompt, MASK]]), attention_mask={"full_attention": mask}
        ).logits[0, -1]
    wanted = (logits / temperature).softmax(-1)
    tolerance = 5 * (wanted * (1 - wanted) / num_draws).sqrt() + 1e-6  # five standard errors
    assert (observed - wanted).abs().le(tolerance).all()
    assert (observed - logits.softmax(-1)).abs().gt(tolerance).any()


def test_temperature_is_repeatable_from_its_seed(model: Qwen3ForCausalLM) -> None:
    def draw(seed: int) -> list[int]:
        return generate_reference(
            model,
            [1, 2, 3],
            mask_token_id=MASK,
            eos_token_id=None,
            max_new_tokens=16,
            num_steps=16,
            temperature=2.0,
            seed=seed,
        )

    torch.manual_seed(0)
    first = draw(7)
    torch.manual_seed(1)  # the global stream must not matter
    assert draw(7) == first
    assert draw(8) != first


def test_the_models_mode_is_restored(model: Qwen3ForCausalLM) -> None:
    seen: list[bool] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    model.train()
    try:
        generate_reference(
            model, [1], mask_token_id=MASK, eos_token_id=None, max_new_tokens=1, num_steps=1
        )
        assert model.training
    finally:
        hook.remove()
        model.eval()
    assert seen == [False]


def test_cut_at_eos() -> None:
    assert cut_at_eos([4, 5, EOS, 6, EOS], EOS) == [4, 5]
    assert cut_at_eos([4, 5], EOS) == [4, 5]
    assert cut_at_eos([EOS], EOS) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"temperature": -0.5}, "temperature: expected 0 or more, got -0.5"),
        ({"temperature": math.inf}, "temperature: expected 0 or more, got inf"),
        ({"cfg_scale": -1.0}, "cfg_scale: expected 0 or more, got -1.0"),
        ({"num_steps": None, "threshold": 1.5}, "threshold: expected a probability from 0 to 1"),
        ({"threshold": 0.9}, "num_steps: expected none beside threshold, got 4"),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*63 - 1, got -1"),
        ({"block_origin": "prompt-end"}, r"\(did you mean 'prompt_end'\?\)"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_followed(
    model: Qwen3ForCausalLM, changed: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "max_new_tokens": 4,
        "num_steps": 4,
    }
    with pytest.raises(ConfigError, match=message):
        generate_reference_batch(model, [[1, 2]], **(settings | changed))


def test_an_empty_prompt_is_named(model: Qwen3ForCausalLM) -> None:
    with pytest.raises(DataError, match=r"prompts\[1\]: expected at least one token, got none"):
        generate_reference_batch(
            model, [[1], []], mask_token_id=MASK, eos_token_id=EOS, max_new_tokens=4, num_steps=4
        )


def test_eager_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="load it with attn_implementation='sdpa'"):
        generate_reference(
            tiny_model("eager"),
            [1],
            mask_token_id=MASK,
            eos_token_id=EOS,
            max_new_tokens=1,
            num_steps=1,
        )
