"""What outside programs call: names, arguments and defaults stay as they are."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import tide_cache
from stage1_teacher import align
from stage2_student import losses
from tests.set_builders import write_premasked

_LAMBDA = "lambda_init=0.1, lambda_max=0.9"


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (
            tide_cache.geometry.block_diffusion_mask,
            "num_positions, block_size, concat_order='xt_x0'",
        ),
        (align.align_bytes, "lengths_a, lengths_b"),
        (align.align_messages, "messages, tokenizer_a, tokenizer_b"),
        (
            losses.TeacherCandidates.from_logits,
            "logits_PV, *, k, temperatures, mean_logits_V=None",
        ),
        (
            losses.tidal_loss,
            f"student_logits_PV, teacher, timestep_P, *, progress, {_LAMBDA}, schedule='cosine', "
            "axis='both', timestep_weight='uniform', temperature=2.0",
        ),
        (losses.kl_loss, "student_logits_PV, teacher, *, temperature=2.0, direction='forward'"),
        (
            losses.calm_loss,
            "student_logprob_C, teacher_logprob_C, *, temperature=2.0, direction='reverse', "
            f"timestep_C=None, progress=None, {_LAMBDA}, axis='both', timestep_weight='uniform', "
            "interpolate=False",
        ),
    ],
)
def test_signatures(function: Callable[..., Any], signature: str) -> None:
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    assert str(inspect.Signature(parameters)) == f"({signature})"


def test_a_cache_has_what_readers_use(tmp_path: Path) -> None:
    write_premasked(tmp_path)
    cache = tide_cache.open_cache(str(tmp_path))
    assert (cache.num_samples, cache.num_views, cache.manifest.kind) == (10, 2, "premasked")
    table = cache.read_rows(1, [3, 0])
    assert isinstance(table, pa.Table)
    assert table.num_rows == 2


def test_aligned_bytes_are_quadruples() -> None:
    chunks = align.align_bytes(np.array([1, 2, 1]), np.array([3, 1]))
    assert chunks.tolist() == [[0, 2, 0, 1], [2, 3, 1, 2]]


def test_importing_the_ground_floor_needs_no_heavy_package() -> None:
    code = (
        "import sys, tide_cache\n"
        "tide_cache.geometry.block_diffusion_mask(4, 2)\n"
        "import tide_cache.cli, tide_cache.verify, tide_cache.commands\n"
        "heavy = {'torch', 'transformers', 'datasets', 'ray', 'vllm'} & set(sys.modules)\n"
        "stages = [m for m in sys.modules if m.startswith(('stage1', 'stage2'))]\n"
        "sys.exit(f'{heavy} {stages}' if heavy or stages else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
