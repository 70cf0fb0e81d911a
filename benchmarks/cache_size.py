"""What a cache weighs: bytes per sample and view, by column, and projected to millions of samples.

Runs the real prepare and build with a tiny random teacher: the size depends on rows and payload,
not on what the teacher knows. Default data are docstrings of the standard library and two BPE
tokenizers trained on them here; `--data` and the tokenizers' folders take real ones. Baseline for
the payload: the same log-probs as float32 in memory, 4 bytes a chunk.
"""

import argparse
import json
import pkgutil
import sys
import tempfile
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildConfig
from stage1_teacher.build_plan import make_plan as plan_build
from stage1_teacher.prepare import make_plan as plan_prepare
from stage1_teacher.prepare import run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.tokenizers import load_tokenizer, num_ids
from tide_cache.cache import open_cache
from tide_cache.card import entries_count
from tide_cache.manifest import Manifest

_MODULES = ("json", "email", "logging", "unittest", "xml", "http", "concurrent", "importlib")
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def docstring_chats() -> list[dict[str, str]]:
    """Collect (name, docstring) pairs of the standard library as prompts and replies."""
    rows = {}
    for package_name in _MODULES:
        package = import_module(package_name)
        names = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package_name}.")]
        for name in [package_name, *names]:
            if "__main__" in name or ".test" in name:
                continue
            try:
                module = import_module(name)
            except ImportError:
                continue
            for label, value in sorted(vars(module).items()):
                text = getattr(value, "__doc__", None)
                if callable(value) and isinstance(text, str) and len(text) > 80:
                    prompt = f"What does {name}.{label} do?"
                    rows[prompt] = {"prompt": prompt, "response": text.strip()}
    return list(rows.values())


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> Path:
    """Train a byte-level BPE tokenizer and save it with its template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>", "<|mask|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|start|>", mask_token="<|mask|>"
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def save_teacher(folder: Path, tokenizer: Path) -> None:
    """Save a tiny random teacher that reads the tokenizer's ids."""
    loaded = load_tokenizer(str(tokenizer))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=num_ids(loaded),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    loaded.save_pretrained(folder)


def build_cache(arguments: argparse.Namespace, folder: Path) -> tuple[Manifest, Path]:
    """Prepare and build; returns the cache's manifest and folder."""
    data = arguments.data
    student, teacher = arguments.student_tokenizer, arguments.teacher_tokenizer
    if data is None:
        rows = docstring_chats()
        data = folder / "chat.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        texts = [row["prompt"] + row["response"] for row in rows]
        student = student or train_tokenizer(texts, 8192, folder / "tokenizer-student")
        teacher = teacher or train_tokenizer(texts, 4096, folder / "tokenizer-teacher")
    save_teacher(folder / "teacher", teacher)
    prepare = PrepareConfig.model_validate(
        {
            "sources": [{"path": str(data), "cap": arguments.samples}],
            "student": {"tokenizer": str(student), "max_length": 512},
            "teacher": {"tokenizer": str(teacher), "max_length": 1024},
            "alignment": "chunks",
        }
    )
    plan, encoder = plan_prepare(prepare)
    run_prepare(plan, str(folder / "premasked"), encoder=encoder, num_workers=1)
    build = BuildConfig.model_validate(
        {
            "teacher": {
                "model": str(folder / "teacher"),
                "attention": "bidirectional",
                "dtype": "float32",
            }
        }
    )
    premasked = open_cache(folder / "premasked")
    manifest = run_build(plan_build(build, premasked, str(folder / "cache")), num_workers=1)
    return manifest, folder / "cache"


def column_bytes(cache: Path) -> dict[str, int]:
    """Return the compressed size of every column over all shards."""
    sizes: dict[str, int] = defaultdict(int)
    for path in sorted(cache.glob("data/*/*.parquet")):
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                sizes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
    return dict(sizes)


def figures_of(manifest: Manifest, cache: Path) -> dict[str, Any]:
    """Return the figures that are printed."""
    counts = manifest.counts
    num_rows, num_chunks = counts["num_rows"], entries_count(manifest)
    columns = column_bytes(cache)
    per_row = counts["size_bytes"] / num_rows
    return {
        "num_samples": counts["num_samples"],
        "num_views": manifest.num_views,
        "bytes_per_sample_and_view": round(per_row, 1),
        "bytes_per_active_chunk": round(counts["size_bytes"] / num_chunks, 2),
        "payload_bytes_per_chunk": round(columns["chunk_logprob"] / num_chunks, 3),
        "baseline_float32_bytes_per_chunk": 4.0,
        "positions_per_row": round(counts["num_positions"] / num_rows, 1),
        "active_chunks_per_row": round(num_chunks / num_rows, 1),
        "bytes_per_row_by_column": {k: round(v / num_rows, 1) for k, v in columns.items()},
        "gb_per_2_million_samples_x_4_views": round(per_row * 2e6 * 4 / 1e9, 2),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="JSONL of chats; default: docstrings")
    parser.add_argument("--student-tokenizer", type=Path, help="folder; needed with --data")
    parser.add_argument("--teacher-tokenizer", type=Path, help="folder; needed with --data")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.data and not (arguments.student_tokenizer and arguments.teacher_tokenizer):
        parser.error("--data needs --student-tokenizer and --teacher-tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        figures = figures_of(*build_cache(arguments, Path(folder)))
    if arguments.json:
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for name, value in figures.items():
        sys.stdout.write(f"{name:<40} {value}\n")


if __name__ == "__main__":
    main()
