"""Small premasked sets written through the product's own writer, for tests of the ground floor."""

from pathlib import Path

import numpy as np

from tide_cache.manifest import Header, NoisingFacts, PremaskedManifest, SourceFacts, TokenizerFacts
from tide_cache.rows import PremaskedRow, rows_to_table
from tide_cache.store import Store
from tide_cache.writer import SetWriter

VOCAB = 40


def tokenizer_facts(name: str = "tiny") -> TokenizerFacts:
    return TokenizerFacts(
        name=name,
        sha256="a" * 64,
        vocab_size=VOCAB,
        mask_token_id=39,
        eos_token_id=1,
        pad_token_id=0,
    )


def premasked_header(num_views: int = 2, block_size: int = 4, **changes: object) -> Header:
    values: dict[str, object] = {
        "alignment": "positions",
        "num_views": num_views,
        "block_size": block_size,
        "student": tokenizer_facts(),
        "teacher": tokenizer_facts(),
        "shared_vocab_size": VOCAB - 1,
        "noising": NoisingFacts(
            drawn=True, seed=0, num_timesteps=8, t_min=0.001, t_max=1.0, demo_ratio=0.5
        ),
        "sources": (
            SourceFacts(
                name="made", fingerprint="f", licence="CC0-1.0", num_rows=9, num_rows_taken=9
            ),
        ),
        "config": {"seed": 0},
        "provenance": {"command": "tests", "tide_cache": "0", "git_revision": None},
    }
    return Header(**{**values, **changes})  # type: ignore[arg-type]


def random_row(number: int, view: int, *, length: int = 12, prompt_length: int = 4) -> PremaskedRow:
    """A row whose ids depend on the sample only and whose masks on the view as well."""
    ids = np.random.default_rng(number).integers(2, VOCAB - 2, length).astype(np.int32)
    random = np.random.default_rng([number, view])
    mask = (random.random(length) < 0.5) & (np.arange(length) >= prompt_length)
    return PremaskedRow(
        sample_id=f"{number:032x}",
        source="made",
        view=view,
        timestep=0.25 + 0.5 * view / 8,
        student_ids_L=ids,
        prompt_length=prompt_length,
        student_mask_L=mask,
        half_a_L=mask & (random.random(length) < 0.5),
        teacher_ids_L=ids,
        alignment_RX=np.array([[0, 0, length]], dtype=np.int32),
    )


def write_premasked(
    folder: Path, *, num_tasks: int = 2, samples_per_task: int = 5, header: Header | None = None
) -> PremaskedManifest:
    header = header or premasked_header()
    writer = SetWriter(Store(folder), header)
    writer.begin()
    for task in range(num_tasks):
        numbers = range(task * samples_per_task, (task + 1) * samples_per_task)
        rows_V = [[random_row(n, v) for n in numbers] for v in range(header.num_views)]
        writer.publish_task(
            task,
            [rows_to_table(rows, "positions") for rows in rows_V],
            counts={
                "num_samples": samples_per_task,
                "num_rows": samples_per_task * header.num_views,
            },
            dropped={"empty_reply": task},
        )
    manifest = writer.finish(range(num_tasks))
    assert isinstance(manifest, PremaskedManifest)
    return manifest
