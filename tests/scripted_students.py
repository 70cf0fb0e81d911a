"""A student with known answers, and one with random weights: what benchmark tests run on."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from stage2_student.benchmark_tasks.engines import Batches, batches
from stage2_student.release.released_format import save_released
from stage2_student.sampling.settings import Generation, GenerationSettings
from tests.builders import make_tokenizer


def write_student(folder: Path, tokenizer_folder: Path | None = None, *, seed: int = 0) -> Path:
    """Save a block-diffusion student of two tiny layers with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or make_tokenizer(folder))
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
        # Tied, a random student would answer a mask with a mask.
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    student = folder / "student"
    student.mkdir(parents=True)
    mask_token_id = tokenizer.convert_tokens_to_ids("<|mask|>")
    save_released(
        Qwen3ForCausalLM(config), tokenizer, student, block_size=32, mask_token_id=mask_token_id
    )
    return student


class ScriptedEngine:
    """Answers each prompt with what `script` says of its text, then the EOS token and leftovers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Callable[[str], str]) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.prompts: list[str] = []
        self.settings: list[GenerationSettings] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, batch_size: int
    ) -> Batches:
        for indices in batches(prompts, batch_size):
            yield [(i, self._answer(prompts[i], settings)) for i in indices]

    def close(self) -> None:
        pass

    def _answer(self, prompt: Sequence[int], settings: GenerationSettings) -> Generation:
        text = self.tokenizer.decode(prompt)
        assert isinstance(text, str)
        self.prompts.append(text)
        self.settings.append(settings)
        eos = self.tokenizer.eos_token_id
        ids = self.tokenizer(self.script(text), add_special_tokens=False)["input_ids"]
        leftovers = self.tokenizer(" 12345 leftovers", add_special_tokens=False)["input_ids"]
        return Generation(
            ids=[*ids, eos, *leftovers], eos_token_id=eos, num_forwards=7, num_positions=9
        )
