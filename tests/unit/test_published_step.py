"""The baselines of the step benchmark compute the losses that training computes from a cache."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.published_step import (
    Material,
    PublishedCalm,
    PublishedCrossEntropy,
    PublishedTidal,
    RowBatch,
    Shape,
    draw_batch,
)
from stage2_student.losses import calm_per_chunk, ce_loss, tidal_loss, token_logprobs
from stage2_student.optimizer import OptimizerConfig, make_optimizer
from tide_cache.geometry import block_diffusion_mask

CPU = torch.device("cpu")
STUDENT = Shape(hidden_size=64, num_layers=2, vocab_size=200)
TEACHER = Shape(hidden_size=128, num_layers=1, vocab_size=200)


@pytest.fixture
def material() -> Material:
    torch.manual_seed(0)
    student = STUDENT.build(dtype=torch.float32, device=CPU)
    batch = draw_batch(
        num_rows=3,
        length=32,
        prompt_length=9,
        vocab_size=200,
        block_size=8,
        timesteps=[0.35, 0.65],
        device=CPU,
    )
    optimizer = make_optimizer(student, OptimizerConfig())
    return Material(student=student, optimizer=optimizer, batch=batch, autocast=False)


def teacher_logits(teacher: torch.nn.Module, batch: RowBatch, *, blocks: bool) -> torch.Tensor:
    """Ask for each masked position by itself, from the half that hides it. Returns (P, V)."""
    length = batch.ids_BL.shape[1]
    found = torch.empty((*batch.ids_BL.shape, 200))
    for hidden_BL in (batch.half_a_BL, batch.masked_BL & ~batch.half_a_BL):
        noised_BL = torch.where(hidden_BL, batch.mask_token_id, batch.ids_BL)
        ids_BS = torch.cat([batch.ids_BL, noised_BL], dim=1) if blocks else noised_BL
        size = 8 if blocks else length
        mask = torch.from_numpy(block_diffusion_mask(length, size, "x0_xt"))[-len(ids_BS[0]) :]
        if not blocks:
            mask = torch.ones((length, length), dtype=torch.bool)
        with torch.no_grad():
            logits_BSV = teacher(
                input_ids=ids_BS,
                attention_mask={"full_attention": mask[None, None]},
                position_ids=(torch.arange(ids_BS.shape[1]) % length)[None],
            ).logits
        found[hidden_BL] = logits_BSV[:, -length:][hidden_BL]
    return found[batch.masked_BL]


@pytest.mark.parametrize("kind", ["cross entropy", "tidal", "calm"])
def test_a_baseline_has_the_loss_of_the_product(material: Material, kind: str) -> None:
    batch = material.batch
    teacher = TEACHER.build(dtype=torch.float32, device=CPU).eval()
    make: dict[str, Callable[[], PublishedCrossEntropy]] = {
        "cross entropy": lambda: PublishedCrossEntropy(material),
        "tidal": lambda: PublishedTidal(material, teacher),
        "calm": lambda: PublishedCalm(material, teacher),
    }
    variant = make[kind]()
    with torch.no_grad():
        student_PV = variant._student_logits()[batch.masked_BL]
    labels_P = batch.ids_BL[batch.masked_BL]
    row_P = torch.nonzero(batch.masked_BL)[:, 0]
    expected = ce_loss(
        student_PV,
        labels_P,
        batch.timestep_P,
        labelled_per_row_B=batch.labelled_BL.sum(dim=1),
        row_P=row_P,
        normalization="token",
    )
    if kind == "tidal":
        expected += tidal_loss(
            student_PV,
            teacher_logits(teacher, batch, blocks=True),
            batch.timestep_P,
            progress=0.0,
            lambda_init=0.5,
            lambda_max=0.5,
            temperature=2.0,
        )
    if kind == "calm":
        teacher_PV = teacher_logits(teacher, batch, blocks=False)
        expected += calm_per_chunk(
            token_logprobs(student_PV, labels_P),
            token_logprobs(teacher_PV, labels_P),
            temperature=2.0,
            direction="reverse",
            timestep_C=batch.timestep_P,
            progress=0.0,
            interpolation=None,
        ).mean()
    loss = variant.forward_backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    parameter = next(material.student.parameters())
    before = parameter.detach().clone()
    variant.update()
    assert not torch.equal(before, parameter)
    assert parameter.grad is None
