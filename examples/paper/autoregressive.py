"""The AR row in miniature: an autoregressive student of the same size, trained by transformers.

The same rows, architecture, seeds, steps, batch size and settings of the optimiser as the other
students, through `transformers.Trainer`. Two things cannot be the same. A step learns from every
token of its replies, where a masked student learns from the masked ones, so tokens per step differ.
And the NLL is of the next token given all before it: another quantity than that of masked tokens,
never to be put beside it. What can be compared is the share of right answers.

Shapes: B rows, L positions, V ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Qwen3ForCausalLM, Trainer, TrainingArguments

from examples.demo.config import PipelineConfig
from examples.demo.measure import asked_rows, prompt_ids, share_right
from stage1_teacher.tokenizers import load_tokenizer
from stage2_student.config import TrainConfig
from stage2_student.student import load_student
from stage2_student.student_source import open_student
from tide_cache.cache import open_cache

IGNORED = -100
_BATCH_ROWS = 256


class ReplyRows(Dataset[dict[str, list[int]]]):
    """Rows of a premasked set up to their first end token, prompts left out of the labels."""

    def __init__(self, premasked: str, eos_token_id: int) -> None:
        cache = open_cache(premasked)
        table = cache.read_rows(view=0, rows=list(range(cache.num_samples)))
        pairs = zip(
            table["student_ids"].to_pylist(), table["prompt_length"].to_pylist(), strict=True
        )
        self._rows = [_up_to_end(ids, start, eos_token_id) for ids, start in pairs]
        cache.close()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad rows on the right: ids (B, L) by 0, attention (B, L) by 0, labels (B, L) by -100."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "attention_mask": padded("attention_mask", 0),
    }


def train_autoregressive(config: TrainConfig, premasked: str) -> Path:
    """Train a causal student as `config` says, and return the folder of its weights."""
    source = open_student(config.student)
    model = load_student(
        source, dtype=torch.float32, attention_implementation="sdpa", seed=config.seed
    )
    rows = ReplyRows(premasked, int(source.tokenizer.eos_token_id))
    trainer = Trainer(
        model=model,
        args=_arguments(config, len(rows)),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trainer.train()
    final = Path(config.output) / "final"
    model.save_pretrained(final)
    source.tokenizer.save_pretrained(final)
    return final


def measure_autoregressive(
    final: Path, config: PipelineConfig, held_out: str, batch_size: int = 128
) -> dict[str, Any]:
    """Return the share of right greedy answers, and the NLL of the next reply token in nats."""
    model = Qwen3ForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(final))
    rows = asked_rows(config)
    answers: list[list[int]] = []
    for batch in _batches(prompt_ids(rows, tokenizer), batch_size):
        longest = max(map(len, batch))
        pad = [longest - len(ids) for ids in batch]
        ids_BL = torch.tensor([[0] * n + ids for n, ids in zip(pad, batch, strict=True)])
        mask_BL = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])
        out_BL = model.generate(
            ids_BL,
            attention_mask=mask_BL,
            max_new_tokens=config.new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        answers += out_BL[:, longest:].tolist()
    return {
        "exact_match": share_right(rows, answers, tokenizer),
        "next_token_nll": _next_token_nll(model, held_out, int(tokenizer.eos_token_id)),
    }


@torch.no_grad()
def _next_token_nll(model: Qwen3ForCausalLM, held_out: str, eos_token_id: int) -> float:
    rows = ReplyRows(held_out, eos_token_id)
    total, count = 0.0, 0
    for batch in _batches([rows[i] for i in range(len(rows))], _BATCH_ROWS):
        inputs = collate(batch)
        labels_BL = inputs.pop("labels")[:, 1:]
        logits_BLV = model(**inputs).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels_BL != IGNORED).sum())
    return total / count


def _up_to_end(ids: list[int], prompt_length: int, eos_token_id: int) -> dict[str, list[int]]:
    """Cut the fill behind the reply's first end token, which is the last thing learnt."""
    reply = ids[prompt_length:]
    end = reply.index(eos_token_id) + 1 if eos_token_id in reply else len(reply)
    kept = ids[: prompt_length + end]
    return {
        "input_ids": kept,
        "labels": [IGNORED] * prompt_length + kept[prompt_length:],
        "attention_mask": [1] * len(kept),
    }


def _arguments(config: TrainConfig, num_rows: int) -> TrainingArguments:
    optimizer, max_steps = config.optimizer, config.max_steps
    if max_steps is None:
        max_steps = (config.epochs or 1) * -(-num_rows // config.stream.batch_size)
    return TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.stream.batch_size,
        max_steps=max_steps,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=-(-int(optimizer.warmup_ratio * max_steps * 1000) // 1000),
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        max_grad_norm=optimizer.max_grad_norm or 0.0,
        seed=config.seed,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
