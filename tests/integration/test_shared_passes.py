"""One forward for all views and halves of a sample gives what separate passes give.

Rows as prepare draws them, questions as a build asks them; lengths differ, so that batches are
padded, and the budget is small, so that some samples are split over several sequences.
"""

from pathlib import Path

import numpy as np
import pytest

from stage1_teacher.premask import Noising, PreparedSample, draw_rows
from stage1_teacher.questions import ask
from stage1_teacher.teachers.base import ScoreRequest, ScoreSpec, TeacherConfig
from stage1_teacher.teachers.batching import plan_batches
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from stage1_teacher.teachers.layouts import plan_sequences
from tests.teacher_checkpoints import MASK_ID, VOCAB_SIZE, make_model, write_checkpoint
from tide_cache.timesteps import timestep_grid

NUM_VIEWS = 4
SPEC = ScoreSpec(k=12, temperatures=(1.0, 2.0), vocab_size=VOCAB_SIZE)


def make_requests(lengths: list[int]) -> list[ScoreRequest]:
    noising = Noising(
        seed=0, num_views=NUM_VIEWS, grid_G=timestep_grid(32, 0.2, 1.0), demo_ratio=0.5
    )
    random = np.random.default_rng(0)
    requests = []
    for number, length in enumerate(lengths):
        ids_L = random.integers(0, MASK_ID, length).astype(np.int32)
        sample = PreparedSample(
            sample_id=f"{number:032x}",
            source="made",
            student_ids_L=ids_L,
            prompt_length=length // 3,
            teacher_ids_L=ids_L,
            alignment_RX=np.array([[0, 0, length]], dtype=np.int32),
        )
        requests.append(ask(draw_rows(sample, noising), comp_demo=True).request)
    return requests


def load(folder: Path, passes: str, attention: str, token_budget: int) -> HfTeacher:
    return load_hf_teacher(
        TeacherConfig.model_validate(
            {
                "model": str(folder),
                "dtype": "float32",
                "device": "cpu",
                "attention": attention,
                "block_size": 4,
                "mask_token_id": MASK_ID,
                "passes": passes,
                "token_budget": token_budget,
            }
        )
    )


@pytest.mark.parametrize("token_budget", [16384, 200])
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("qwen3", "block_diffusion"),
        ("wedlm", "native"),
        ("llada2_moe", "native"),
    ],
)
def test_shared_forwards_give_the_scores_of_separate_passes(
    tmp_path: Path, family: str, attention: str, token_budget: int
) -> None:
    folder = write_checkpoint(tmp_path, family, make_model(family))
    requests = make_requests([33, 40, 41, 38, 21, 39, 37, 36, 12, 40])
    shared = load(folder, "shared", attention, token_budget)
    separate = load(folder, "separate", attention, token_budget)

    sequences = plan_sequences(requests, shared.layout, max_tokens=token_budget)
    lengths = [len(sequence.tokens) for sequence in sequences]
    batches = plan_batches(lengths, token_budget)
    if shared.layout.layout.has_clean_half:
        assert max(len(sequence.readouts) for sequence in sequences) == 2 * NUM_VIEWS
        assert (len(sequences) > len(requests)) == (token_budget < 16384), "samples are split"
    if token_budget == 16384:
        assert any(len({lengths[i] for i in batch}) > 1 for batch in batches), "some are padded"
    plain = plan_sequences(requests, separate.layout, max_tokens=token_budget)
    assert sum(lengths) < sum(len(sequence.tokens) for sequence in plain)

    num_scored = 0
    for answer, expected in zip(
        shared.score(requests, SPEC), separate.score(requests, SPEC), strict=True
    ):
        for got, wanted in zip(answer, expected, strict=True):
            num_scored += len(got.label_logprob_P)
            for field in ("topk_logits_PK", "logsumexp_PT", "label_logprob_P"):
                np.testing.assert_allclose(
                    getattr(got, field), getattr(wanted, field), rtol=1e-5, atol=1e-5
                )
            np.testing.assert_array_equal(got.topk_ids_PK, wanted.topk_ids_PK)
    assert num_scored > 300
