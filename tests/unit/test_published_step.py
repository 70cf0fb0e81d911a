"""The baselines of the step benchmark compute the losses that training computes from a cache."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.cached_step import CachedStep, TeacherSizes, cached_steps
from benchmarks.published_step import (
    Material,
    PublishedCalm,
    PublishedCrossEntropy,
    PublishedTidal,
    RowBatch,
    Shape,
    Variant,
    draw_batch,
)
from stage2_student.losses import (
    TeacherCandidates,
    calm_per_chunk,
    ce_loss,
    tidal_loss,
    token_logprobs,
)
from stage2_student.optimizer import OptimizerConfig, make_optimizer
from stage2_student.teacher_rows import ChunkTargets, TeacherRows
from tide_cache.geometry import block_diffusion_mask

CPU = torch.device("cpu")
STUDENT = Shape(hidden_size=64, num_layers=2, vocab_size=200)
TEACHER = Shape(hidden_size=128, num_layers=1, vocab_size=200)


def make_material() -> Material:
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


@pytest.fixture
def material() -> Material:
    return make_material()


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


def gradients_of(variant: Variant, student: torch.nn.Module) -> dict[str, torch.Tensor]:
    student.zero_grad()
    variant.forward_backward()
    named = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in named.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["cross entropy", "tidal", "calm"])
def test_a_step_from_a_cache_has_loss_and_gradients_of_the_published_one(
    kind: str, tied: bool
) -> None:
    """Every parameter, with dead blocks dropped, the head on masked positions, losses fused."""
    torch.manual_seed(0)
    student = replace(STUDENT, tied=tied).build(dtype=torch.float32, device=CPU)
    material = Material(
        student=student,
        optimizer=make_optimizer(student, OptimizerConfig()),
        batch=draw_batch(
            num_rows=3,
            length=64,
            prompt_length=19,
            vocab_size=200,
            block_size=8,
            timesteps=[0.05, 0.65, 0.2],
            device=CPU,
        ),
        autocast=False,
    )
    batch = material.batch
    teacher = TEACHER.build(dtype=torch.float32, device=CPU).eval()
    logits_PV = teacher_logits(teacher, batch, blocks=kind == "tidal")
    num_masked = len(logits_PV)
    published: Variant = PublishedCrossEntropy(material)
    losses, answers = {"ce": 1.0}, TeacherRows.none()
    if kind == "tidal":
        published = PublishedTidal(material, teacher)
        candidates = TeacherCandidates.from_logits(logits_PV, k=200, temperatures=(2.0,))
        losses["tidal"] = 1.0
        answers = TeacherRows(index_Q=torch.arange(num_masked), candidates=candidates, chunks=None)
    if kind == "calm":
        published = PublishedCalm(material, teacher)
        losses["reverse_calm"] = 1.0
        chunks = ChunkTargets(
            index_E=torch.arange(num_masked),
            chunk_E=torch.arange(num_masked),
            logprob_C=token_logprobs(logits_PV, batch.ids_BL[batch.masked_BL]),
            timestep_C=batch.timestep_P,
        )
        answers = replace(TeacherRows.none(), chunks=chunks)
    ours = CachedStep("ours", losses, material, answers, lambda_init=0.5, lambda_max=0.5)
    assert ours.batch.input_ids_1N.shape[1] < 2 * batch.ids_BL.numel()
    expected = gradients_of(published, student)
    found = gradients_of(ours, student)
    assert float(ours.forward_backward()) == pytest.approx(
        float(published.forward_backward()), rel=1e-5
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


def test_every_kind_of_step_runs_and_learns() -> None:
    sizes = TeacherSizes(k=20, hidden_size=32, components=8, vocab_size=190)
    for step in cached_steps(make_material(), sizes):
        losses = []
        for _ in range(4):
            losses.append(float(step.forward_backward()))
            step.update()
        assert losses[-1] < losses[0], step.name
