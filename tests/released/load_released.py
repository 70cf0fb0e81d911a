"""Loads students as an outsider does and answers what it is asked: a program of its own.

    python load_released.py REQUEST.json OUT_FOLDER

It imports torch, transformers and safetensors, and nothing of this project, so that it runs in an
environment which has nothing of it. The request lists students (folder, prompts, settings); the
answers are one safetensors file of logits for each, and `answers.json`.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    Qwen3ForCausalLM,
)


def staircase(num_positions: int, block_size: int) -> Tensor:
    """Every position sees its own block and those before, bool (1, 1, L, L)."""
    block_L = torch.arange(num_positions) // block_size
    return (block_L[None, :] <= block_L[:, None])[None, None]


def all_logits(model: Any, folder: str, ids_BL: Tensor, block_size: int) -> dict[str, Tensor]:
    """The logits under each way of calling the model."""
    num_rows, num_positions = ids_BL.shape
    padding_BL = torch.ones(num_rows, num_positions, dtype=torch.long)
    padding_BL[1, num_positions - 5 :] = 0
    blocks = staircase(num_positions, block_size)
    added = torch.zeros(blocks.shape, dtype=model.dtype)
    added.masked_fill_(~blocks, torch.finfo(model.dtype).min)
    everything = torch.ones_like(blocks)
    half = num_positions // (2 * block_size) * block_size
    prefix = model(ids_BL[:, :half], use_cache=True)
    logits = {
        "none": model(ids_BL).logits,
        "padding": model(ids_BL, attention_mask=padding_BL).logits,
        "blocks": model(ids_BL, attention_mask=blocks).logits,
        "blocks_added": model(ids_BL, attention_mask=added).logits,
        "prefix": prefix.logits,
        "behind_a_cached_prefix": model(
            ids_BL[:, half:], past_key_values=prefix.past_key_values
        ).logits,
    }
    model.set_attn_implementation("eager")
    logits["eager_blocks"] = model(ids_BL, attention_mask=blocks).logits
    model.set_attn_implementation("sdpa")
    layers = AutoModel.from_pretrained(folder, dtype=model.dtype, trust_remote_code=True).eval()
    logits["layers"] = model.lm_head(layers(ids_BL).last_hidden_state)
    stock = Qwen3ForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
    logits["stock"] = stock(ids_BL, attention_mask={"full_attention": everything}).logits
    return logits


def num_to_reveal(num_masked: int, steps_left: int, num_steps: int) -> int:
    """The share 1 / steps_left, formed in float32 as the published sampler forms it."""
    now, after = (
        1 - (1 - torch.tensor(left / num_steps, dtype=torch.float32))
        for left in (steps_left, steps_left - 1)
    )
    return min(round(num_masked * (1 - float(after / now))), num_masked)


def sample(model: Any, prompt: list[int], settings: dict[str, int]) -> list[int]:
    """Greedy block diffusion after one prompt, the whole prefix computed at every step."""
    block_size, mask_id = settings["block_size"], settings["mask_token_id"]
    num_new, ids = settings["max_new_tokens"], list(prompt)
    steps = math.ceil(settings["num_steps"] / math.ceil(num_new / block_size))
    end = len(prompt) + num_new
    missing = -len(prompt) % block_size  # the prompt's first block is the short one
    while len(ids) < end:
        start = len(ids)
        ids += [mask_id] * min(block_size, end - start)
        mask = staircase(len(ids) + missing, block_size)[..., missing:, missing:]
        for steps_left in range(steps, 0, -1):
            masked = [place for place in range(start, len(ids)) if ids[place] == mask_id]
            logits_LV = model(torch.tensor([ids]), attention_mask=mask).logits[0].float()
            probability_L, token_L = logits_LV.softmax(-1).max(-1)
            masked.sort(key=lambda place: -float(probability_L[place]))
            for place in masked[: num_to_reveal(len(masked), steps_left, steps)]:
                ids[place] = int(token_L[place])
        if settings["eos_token_id"] in ids[start:]:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def answer(student: dict[str, Any], logits_file: Path) -> dict[str, Any]:
    """Load one student, write its logits, and return tokens and facts."""
    folder = student["folder"]
    model, loading = AutoModelForMaskedLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=True, output_loading_info=True
    )
    model.eval()
    ids_BL = torch.tensor(student["ids"])
    logits = all_logits(model, folder, ids_BL, student["sampler"]["block_size"])
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, logits_file)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    facts = {
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "problems": sum(len(found) for found in loading.values()),
        "rope_theta": rope["rope_theta"],
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "tokens": [sample(model, prompt, student["sampler"]) for prompt in student["prompts"]],
    }
    if student["text"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        facts["text_ids"] = tokenizer(student["text"]).input_ids
        facts["chat_ids"] = tokenizer.apply_chat_template(
            [{"role": "user", "content": student["text"]}], return_dict=False
        )
        facts["tokenizer_mask_id"] = tokenizer.mask_token_id
        facts["special_tokens"] = sorted(tokenizer.all_special_tokens)
    return facts


def main() -> None:
    """Answer the request named on the command line."""
    request, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    answers = {
        name: answer(student, out / f"{name}.safetensors")
        for name, student in request["students"].items()
    }
    projects = ("stage2_student", "stage1_teacher", "tide_cache")
    facts = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "imported": [name for name in projects if name in sys.modules],
        "importable": [name for name in projects if importlib.util.find_spec(name)],
        "students": answers,
    }
    (out / "answers.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
