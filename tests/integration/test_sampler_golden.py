"""Both samplers, plain and fast, give the published sampler's greedy tokens, all of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from stage2_student.sampler import Sampler
from stage2_student.sampling.graphs import Capture, call_again
from stage2_student.sampling.reference import generate_reference
from stage2_student.sampling.settings import GenerationSettings
from tests.support import find_golden

MASK, EOS = 500, 511


def _golden_prompts() -> list[int]:
    """The numbers of the prompts in the vectors at hand, none where there are no vectors."""
    golden = find_golden()
    if golden is None or not (golden / "models/student_tiny/expected.safetensors").is_file():
        return []
    expected = load_file(golden / "models/student_tiny/expected.safetensors")
    return sorted(int(name.removeprefix("prompt_")) for name in expected if "prompt_" in name)


@pytest.fixture(scope="module")
def folder(golden_dir: Path) -> Path:
    folder = golden_dir / "models" / "student_tiny"
    if not folder.is_dir():
        pytest.skip(f"no models/student_tiny among the golden vectors in {golden_dir}")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "expected.safetensors")
    return tensors


@pytest.fixture(scope="module")
def student(folder: Path) -> Qwen3ForCausalLM:
    """The tiny student under the stock class, read by hand: only the sampler is on trial."""
    published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    skipped = ("model_type", "architectures", "torch_dtype", "rope_theta")
    fields = {name: value for name, value in published.items() if name not in skipped}
    rope = {"rope_type": "default", "rope_theta": published["rope_theta"]}
    config = Qwen3Config(**fields, rope_parameters=rope, attn_implementation="sdpa")
    model = Qwen3ForCausalLM(config)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


@pytest.mark.parametrize("index", _golden_prompts())
def test_every_prompt_gives_the_published_tokens(
    student: Qwen3ForCausalLM, expected: dict[str, torch.Tensor], index: int
) -> None:
    prompts, settings = [expected[f"prompt_{index}"].tolist()], _settings(expected, str(index))
    published = expected[f"output_{index}"].tolist()
    assert _plain(student, prompts, settings) == [published]
    assert _fast(student, prompts, settings) == [published]
    assert _fast(student, prompts, settings, capture=call_again) == [published]


def test_a_batch_of_all_prompts_gives_the_published_tokens(
    student: Qwen3ForCausalLM, expected: dict[str, torch.Tensor]
) -> None:
    names = [str(index) for index in _golden_prompts()]
    assert len(names) == 12
    for settings in {_settings(expected, name): None for name in names}:
        alike = [name for name in names if _settings(expected, name) == settings]
        prompts = [expected[f"prompt_{name}"].tolist() for name in alike]
        published = [expected[f"output_{name}"].tolist() for name in alike]
        assert _plain(student, prompts, settings) == published
        assert _fast(student, prompts, settings) == published
        assert _fast(student, prompts, settings, capture=call_again) == published


def _settings(expected: dict[str, torch.Tensor], name: str) -> GenerationSettings:
    num_steps, max_new_tokens = expected[f"steps_new_{name}"].tolist()
    return GenerationSettings(max_new_tokens=max_new_tokens, num_steps=num_steps)


def _plain(
    student: Qwen3ForCausalLM, prompts: list[list[int]], settings: GenerationSettings
) -> list[list[int]]:
    return generate_reference(
        student, prompts, mask_token_id=MASK, eos_token_id=EOS, settings=settings
    )


def _fast(
    student: Qwen3ForCausalLM,
    prompts: list[list[int]],
    settings: GenerationSettings,
    capture: Capture | None = None,
) -> list[list[int]]:
    sampler = Sampler(
        student, mask_token_id=MASK, eos_token_id=EOS, settings=settings, capture=capture
    )
    return [answer.ids for answer in sampler.generate(prompts)]
