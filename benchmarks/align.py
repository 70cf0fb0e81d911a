"""Speed of byte alignment: the vectorised path beside the two-pointer walk, in one process.

Generated samples of a few hundred tokens, four of five boundaries shared, as Qwen3 and o200k share
them on GSM8K; or with `--data` the strings of a JSONL file under two tokenizers. Repeats of both
are interleaved and the best of each is reported, so that a busy machine slows both.

    python benchmarks/align.py
    python benchmarks/align.py --data rows.jsonl --tokenizer-a DIR --tokenizer-b DIR --json
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stage1_teacher.align import align_bytes, align_bytes_reference

IntArray = npt.NDArray[np.integer]
Sample = tuple[IntArray, IntArray]
_MEAN_BYTES_PER_TOKEN = 4
_SHARED_BOUNDARIES = 0.8


def generated_samples(num_samples: int, seed: int) -> list[Sample]:
    """Make pairs of token lengths with known statistics: 100 to 400 tokens, 80% shared bounds."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(num_samples):
        num_bounds = int(rng.integers(100, 400))
        num_bytes = num_bounds * _MEAN_BYTES_PER_TOKEN
        bounds_a = rng.choice(np.arange(1, num_bytes), num_bounds, replace=False)
        num_shared = int(_SHARED_BOUNDARIES * num_bounds)
        own_b = rng.choice(np.arange(1, num_bytes), num_bounds - num_shared, replace=False)
        bounds_b = np.concatenate([bounds_a[:num_shared], own_b])
        samples.append((_lengths(bounds_a, num_bytes), _lengths(bounds_b, num_bytes)))
    return samples


def read_samples(path: Path, folder_a: str, folder_b: str, num_samples: int) -> list[Sample]:
    """Tokenise the strings of a JSONL file, leaving out those that a tokenizer rewrites."""
    from transformers import AutoTokenizer

    from stage1_teacher.token_bytes import token_byte_lengths
    from tide_cache.errors import DataError

    sides = [AutoTokenizer.from_pretrained(folder) for folder in (folder_a, folder_b)]
    tables = [token_byte_lengths(tokenizer) for tokenizer in sides]
    samples: list[Sample] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        for text in _strings(json.loads(line)):
            a, b = (
                table[tokenizer(text, add_special_tokens=False)["input_ids"]]
                for tokenizer, table in zip(sides, tables, strict=True)
            )
            try:
                align_bytes(a, b)
            except DataError:
                continue
            samples.append((a, b))
            if len(samples) == num_samples:
                return samples
    return samples


def measure(samples: list[Sample], num_repeats: int) -> dict[str, float]:
    """Return the best chunks/s of both paths over all samples, and their ratio."""
    best_s = {"fast": float("inf"), "reference": float("inf")}
    paths: dict[str, Callable[..., IntArray]] = {
        "fast": align_bytes,
        "reference": align_bytes_reference,
    }
    num_chunks = sum(len(align_bytes(a, b)) for a, b in samples)
    for _ in range(num_repeats):
        for name, align in paths.items():
            started = time.perf_counter()
            for lengths_a, lengths_b in samples:
                align(lengths_a, lengths_b)
            best_s[name] = min(best_s[name], time.perf_counter() - started)
    return {
        "num_samples": len(samples),
        "num_chunks": num_chunks,
        "fast_chunks_per_s": num_chunks / best_s["fast"],
        "reference_chunks_per_s": num_chunks / best_s["reference"],
        "speedup": best_s["reference"] / best_s["fast"],
    }


def _lengths(bounds: IntArray, num_bytes: int) -> IntArray:
    return np.diff(np.unique(np.concatenate([[0], bounds, [num_bytes]])))


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        if node:
            yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _strings(child)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000, help="samples at most (2000)")
    parser.add_argument("--repeats", type=int, default=5, help="best of so many repeats (5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated samples (0)")
    parser.add_argument("--data", type=Path, help="JSONL file whose strings are aligned")
    parser.add_argument("--tokenizer-a", help="tokenizer folder, with --data")
    parser.add_argument("--tokenizer-b", help="tokenizer folder, with --data")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.data is None:
        samples = generated_samples(options.samples, options.seed)
    elif options.tokenizer_a and options.tokenizer_b:
        samples = read_samples(
            options.data, options.tokenizer_a, options.tokenizer_b, options.samples
        )
    else:
        parser.error("--data needs --tokenizer-a and --tokenizer-b")
    figures = measure(samples, options.repeats)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"{figures['num_chunks']:,.0f} chunks in {figures['num_samples']:,.0f} samples, one core")
    print(f"  vectorised   {figures['fast_chunks_per_s']:>12,.0f} chunks/s")
    print(f"  two-pointer  {figures['reference_chunks_per_s']:>12,.0f} chunks/s")
    print(f"  ratio        {figures['speedup']:>12.1f}")


if __name__ == "__main__":
    main()
