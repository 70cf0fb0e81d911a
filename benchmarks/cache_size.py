"""What a cache weighs: bytes per sample and view, by column, and projected to millions of samples.

Runs the real prepare and build with a tiny random teacher: the size depends on rows and payload,
not on what the teacher knows. Default data are docstrings of the standard library and two BPE
tokenizers trained on them here; `--data` and the tokenizers' folders take real ones. Baseline for
the payload: the same log-probs as float32 in memory, 4 bytes a chunk.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.texts import docstring_chats, train_tokenizer
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
from tide_cache.shards import column_bytes


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


def sum_column_bytes(cache: Path) -> dict[str, int]:
    """Return the compressed size of every column over all shards."""
    sizes: dict[str, int] = defaultdict(int)
    for path in sorted(cache.glob("data/*/*.parquet")):
        for name, size in column_bytes(pq.ParquetFile(path).metadata).items():
            sizes[name] += size
    return dict(sizes)


def figures_of(manifest: Manifest, cache: Path) -> dict[str, Any]:
    """Return the figures that are printed."""
    counts = manifest.counts
    num_rows, num_chunks = counts["num_rows"], entries_count(manifest)
    columns = sum_column_bytes(cache)
    per_row = counts["size_bytes"] / num_rows
    return {
        "num_samples": counts["num_samples"],
        "num_views": manifest.num_views,
        "bytes_per_sample_and_view": round(per_row, 1),
        "bytes_per_active_chunk": round(counts["size_bytes"] / num_chunks, 2),
        "payload_bytes_per_chunk": round(
            (columns["chunk_logprob"] + columns["chunk_crc32"]) / num_chunks, 3
        ),
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
