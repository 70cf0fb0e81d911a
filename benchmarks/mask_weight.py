"""How much the cross entropy counts a token on average, by `objective.mask_weight`.

A token's share of the loss is mask x weight x NLL, so E[mask x weight] should be 1 for every token.
The published weight 1/t gives (1 - (1 - t)^n) / t for a token of a chunk with n labelled tokens;
`unbiased` gives 1. Means over real draws stand beside those exact figures: of generated chunks (by
default with the lengths of Qwen3's chunks against gpt2's on GSM8K) or of a premasked set, through
the product's own noising, reading and weights. On the generated set the whole cross entropy counts
a token 1.29 times as published, and 1.64 times at t below 0.1.

    python benchmarks/mask_weight.py
    python benchmarks/mask_weight.py --premasked DIR --json

Shapes: B rows, L positions, N labelled positions of all rows.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from stage1_teacher.premask import Noising, PreparedSample, draw_rows
from stage2_student.aligned_rows import count_draws, decode_chunks
from stage2_student.batches import ROW_COLUMNS, decode_rows
from stage2_student.losses.ce import TIMESTEP_EPSILON, mask_probability
from tide_cache.cache import open_cache
from tide_cache.errors import ConfigError
from tide_cache.rows import rows_to_table
from tide_cache.timesteps import timestep_grid

FloatArray = npt.NDArray[np.float64]
# Of Qwen3's tokens in its chunks with gpt2's, on the answers of GSM8K.
CHUNK_LENGTH_SHARES = (0.78, 0.13, 0.07, 0.02)
NUM_TIMESTEP_GROUPS = 10
LONGEST = 6  # longer chunks are counted with these
_NUM_IDS = 1 << 31
_ROWS_PER_READ = 512


def generated_tables(num_samples: int, seed: int) -> Iterator[pa.Table]:
    """Draw masks for samples of 150 chunks behind a prompt, 8 views over the default grid."""
    random = np.random.default_rng(seed)
    noising = Noising(seed=seed, num_views=8, grid_G=timestep_grid(), demo_ratio=0.5)
    for number in range(num_samples):
        size_C = 1 + random.choice(len(CHUNK_LENGTH_SHARES), 150, p=CHUNK_LENGTH_SHARES)
        end_C = 20 + np.cumsum(size_C)
        teacher_C = np.arange(150)
        chunks_C4 = np.stack([end_C - size_C, end_C, teacher_C, teacher_C + 1], axis=1)
        sample = PreparedSample(
            sample_id=f"generated-{number}",
            source="generated",
            student_ids_L=np.zeros(int(end_C[-1]), dtype=np.int32),
            prompt_length=20,
            teacher_ids_L=np.zeros(150, dtype=np.int32),
            alignment_RX=chunks_C4.astype(np.int32),
        )
        yield rows_to_table(draw_rows(sample, noising), "chunks")


def premasked_tables(url: str) -> Iterator[pa.Table]:
    """Read the masks and chunks of every row of a set.

    Raises ConfigError for a set of one vocabulary, whose masks are single draws.
    """
    cache = open_cache(url)
    if cache.manifest.alignment != "chunks":
        raise ConfigError(
            f"{url}: alignment: expected 'chunks', got {cache.manifest.alignment!r}, where each "
            "mask is a draw of its own and both weights are 1/t",
            hint="name a set prepared for two tokenizers",
        )
    for view in range(cache.num_views):
        for start in range(0, cache.num_samples, _ROWS_PER_READ):
            rows = np.arange(start, min(start + _ROWS_PER_READ, cache.num_samples))
            yield cache.read_rows(view, rows, (*ROW_COLUMNS, "chunks"))


class Shares:
    """Sums of mask x weight over labelled tokens, by timestep group and draws behind the mask."""

    def __init__(self) -> None:
        shape = (NUM_TIMESTEP_GROUPS, LONGEST)
        self.count = np.zeros(shape)
        self.sums = {name: np.zeros(shape) for name in ("published", "unbiased", "exact")}

    def add(self, table: pa.Table) -> None:
        """Add the labelled positions of some rows."""
        noised = decode_rows(table, num_ids=_NUM_IDS)
        num_draws_BL = count_draws(decode_chunks(table, noised), noised)
        position_L = np.arange(num_draws_BL.shape[1])
        prompt_B = noised.length_B - noised.labelled_B
        labelled_BL = (position_L >= prompt_B[:, None]) & (position_L < noised.length_B[:, None])
        num_draws_N = num_draws_BL[labelled_BL]
        timestep_N = np.broadcast_to(noised.timestep_B[:, None], labelled_BL.shape)[labelled_BL]
        masked_N = noised.masked_BL[labelled_BL]
        probability_N = _probability(timestep_N, num_draws_N)
        published_N = 1 / (_probability(timestep_N, None) + TIMESTEP_EPSILON)
        group_N = np.minimum((timestep_N * NUM_TIMESTEP_GROUPS).astype(int), len(self.count) - 1)
        at_N = (group_N, np.minimum(num_draws_N, LONGEST) - 1)
        np.add.at(self.count, at_N, 1)
        np.add.at(self.sums["published"], at_N, masked_N * published_N)
        np.add.at(self.sums["unbiased"], at_N, masked_N / (probability_N + TIMESTEP_EPSILON))
        np.add.at(self.sums["exact"], at_N, probability_N * published_N)

    def figures(self) -> dict[str, Any]:
        """Return E[mask x weight] over all labelled tokens, by timestep and by chunk length."""
        groups = [
            {"timesteps": [at / NUM_TIMESTEP_GROUPS, (at + 1) / NUM_TIMESTEP_GROUPS]}
            for at in range(NUM_TIMESTEP_GROUPS)
        ]
        lengths = [{"chunk_tokens": length + 1} for length in range(LONGEST)]
        return {
            "whole": self._means(np.s_[:, :]),
            "by_timestep": [g | self._means(np.s_[at, :]) for at, g in enumerate(groups)],
            "by_chunk_tokens": [n | self._means(np.s_[:, at]) for at, n in enumerate(lengths)],
        }

    def _means(self, part: Any) -> dict[str, float | None]:
        count = int(self.count[part].sum())
        names = {"published": "published", "published_exact": "exact", "unbiased": "unbiased"}
        means = {
            name: float(self.sums[key][part].sum()) / count if count else None
            for name, key in names.items()
        }
        return {"num_tokens": count, **means}


def _probability(timestep_N: npt.NDArray[Any], num_draws_N: npt.NDArray[Any] | None) -> FloatArray:
    draws_N = None if num_draws_N is None else torch.from_numpy(num_draws_N)
    probability_N = mask_probability(torch.from_numpy(timestep_N), draws_N)
    return probability_N.numpy().astype(np.float64)


def formula(timesteps: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.9)) -> list[dict[str, Any]]:
    """Return (1 - (1 - t)^n) / t, the published weight's over-count, for a few t and n."""
    return [
        {
            "timestep": t,
            "published": [(1 - (1 - t) ** length) / t for length in range(1, LONGEST + 1)],
        }
        for t in timesteps
    ]


def measure(tables: Iterator[pa.Table]) -> dict[str, Any]:
    """Return all figures of some rows."""
    shares = Shares()
    for table in tables:
        shares.add(table)
    return {**shares.figures(), "formula": formula()}


def show(figures: dict[str, Any]) -> None:
    """Print the figures as three tables."""
    print("E[mask x weight] of labelled tokens (1 is right)")
    print(f"  {'':16}{'tokens':>10}{'published':>11}{'(exact)':>9}{'unbiased':>10}")
    _show_row("all", figures["whole"])
    for group in figures["by_timestep"]:
        low, high = group["timesteps"]
        _show_row(f"t in [{low:.1f}, {high:.1f})", group)
    for group in figures["by_chunk_tokens"]:
        more = "+" if group["chunk_tokens"] == LONGEST else ""
        _show_row(f"chunk of {group['chunk_tokens']}{more}", group)
    print("published, exactly, by t and tokens of the chunk")
    print(f"  {'t':16}" + "".join(f"{length:>8}" for length in range(1, LONGEST + 1)))
    for line in figures["formula"]:
        print(f"  {line['timestep']:<16}" + "".join(f"{x:>8.2f}" for x in line["published"]))


def _show_row(name: str, means: dict[str, Any]) -> None:
    if not means["num_tokens"]:
        return
    print(
        f"  {name:16}{means['num_tokens']:>10,.0f}{means['published']:>11.3f}"
        f"{means['published_exact']:>9.3f}{means['unbiased']:>10.3f}"
    )


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--premasked", help="a premasked set or cache of two tokenizers")
    parser.add_argument("--samples", type=int, default=300, help="generated samples (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated samples (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    tables = (
        premasked_tables(options.premasked)
        if options.premasked
        else generated_tables(options.samples, options.seed)
    )
    figures = measure(tables)
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures)


if __name__ == "__main__":
    main()
