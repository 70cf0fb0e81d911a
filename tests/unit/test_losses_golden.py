"""The losses against vectors that the published online trainer computed.

Every vector of the folder's `index.json` runs through the public functions, over dense logits and
over `TeacherCandidates` with k = V. Loss to 1e-5 relative, gradient with respect to the student's
logits to 1e-5 of its largest entry. The step vectors also pin the masks, the CompDemo halves and
the two inputs of the teacher. Other folders of the same kinds: set `TIDE_GOLDEN`.

Legend: B rows, L student and M teacher positions, P masked ones, C chunks, V vocabulary.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stage2_student.losses import (
    TeacherCandidates,
    calm_loss,
    ce_loss,
    chunk_logprobs,
    kl_loss,
    tidal_loss,
)
from stage2_student.losses.targets import Teacher
from stage2_student.schedules import lambda_train
from tests.support import find_golden
from tide_cache.geometry import block_diffusion_mask

TOLERANCE = 1e-5
KINDS = {"tidal", "kl", "reverse_kl", "calm", "step_shared", "step_cross", "attention"}
GOLDEN = find_golden()


class Vector:
    """One file of reference figures: tensors by attribute, settings by item."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors: dict[str, Tensor] = {
                name: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
            }
            self.settings = {key: json.loads(text) for key, text in file.metadata().items()}

    def __getattr__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def leaf(self) -> Tensor:
        return self.student_logits.clone().requires_grad_()

    @property
    def progress(self) -> float:
        return float(self["global_step"] / self["max_steps"])


def index() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "index.json").read_text()) if GOLDEN else []


def vectors(*kinds: str) -> list[Any]:
    if GOLDEN is None:
        reason = "no golden vectors: set TIDE_GOLDEN to a folder with index.json"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")]
    return [
        pytest.param(GOLDEN / f"{entry['name']}.safetensors", id=entry["name"])
        for entry in index()
        if entry["kind"] in kinds
    ]


def dense(logits_PV: Tensor, temperature: float) -> Teacher:
    return logits_PV


def all_candidates(logits_PV: Tensor, temperature: float) -> Teacher:
    vocab_size = logits_PV.shape[1]
    return TeacherCandidates.from_logits(logits_PV, k=vocab_size, temperatures=(temperature,))


both_teachers = pytest.mark.parametrize("as_teacher", [dense, all_candidates])
AsTeacher = Callable[[Tensor, float], Teacher]


def assert_matches(loss: Tensor, leaf: Tensor, vector: Vector) -> None:
    expected = vector.student_logits_grad
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.detach(), vector.loss, rtol=TOLERANCE, atol=0)
    difference = (gradient - expected).abs().max().item()
    assert difference <= TOLERANCE * expected.abs().max().item()


def test_every_kind_of_vector_is_tested(golden_dir: Path) -> None:
    assert {entry["kind"] for entry in index()} <= KINDS


@both_teachers
@pytest.mark.parametrize("path", vectors("tidal"))
def test_tidal(path: Path, as_teacher: AsTeacher) -> None:
    vector = Vector(path)
    leaf = vector.leaf()
    masked_BL = vector.masked
    teacher_PV = vector.teacher_logits[masked_BL][:, : vector["shared_vocab_size"]]
    loss = tidal_loss(
        leaf[masked_BL],
        as_teacher(teacher_PV, vector["temperature"]),
        vector.timestep[:, None].expand_as(masked_BL)[masked_BL],
        progress=vector.progress,
        lambda_init=vector["lambda_init"],
        lambda_max=vector["lambda_max"],
        schedule=vector["lambda_decay"],
        axis=vector["axis_mode"],
        timestep_weight=vector["timestep_weight"],
        temperature=vector["temperature"],
    )
    assert_matches(loss, leaf, vector)


@both_teachers
@pytest.mark.parametrize("path", vectors("kl", "reverse_kl"))
def test_kl(path: Path, as_teacher: AsTeacher) -> None:
    vector = Vector(path)
    leaf = vector.leaf()
    teacher_PV = vector.teacher_logits[vector.masked][:, : vector["shared_vocab_size"]]
    loss = kl_loss(
        leaf[vector.masked],
        as_teacher(teacher_PV, vector["temperature"]),
        temperature=vector["temperature"],
        direction="forward" if vector["kind"] == "kl" else "reverse",
    )
    assert_matches(loss, leaf, vector)


def active_logprobs(
    logits_BLV: Tensor, ids_BL: Tensor, align_BLC: Tensor, active_BC: Tensor
) -> Tensor:
    """Sum the true tokens' log-probabilities per active chunk, as a trainer would."""
    chunk_BC = torch.cumsum(active_BC.flatten(), 0).view_as(active_BC) - 1
    row, position, chunk = torch.nonzero(align_BLC & active_BC[:, None], as_tuple=True)
    return chunk_logprobs(
        logits_BLV[row, position],
        ids_BL[row, position],
        chunk_BC[row, chunk],
        int(active_BC.sum()),
    )


@pytest.mark.parametrize("path", vectors("calm"))
def test_calm(path: Path) -> None:
    vector = Vector(path)
    leaf = vector.leaf()
    active_BC = vector.chunk_active
    loss = calm_loss(
        active_logprobs(leaf, vector.student_ids, vector.align_student, active_BC),
        active_logprobs(vector.teacher_logits, vector.teacher_ids, vector.align_teacher, active_BC),
        temperature=vector["temperature"],
        direction="reverse" if vector["reverse"] else "forward",
    )
    assert_matches(loss, leaf, vector)


def step_ce(vector: Vector, leaf: Tensor, masked_BL: Tensor) -> Tensor:
    return ce_loss(
        leaf[masked_BL],
        vector.student_ids[masked_BL],
        vector.timestep[:, None].expand_as(masked_BL)[masked_BL],
        labelled_per_row_B=(vector.labels != -100).sum(dim=1),
        row_P=torch.nonzero(masked_BL)[:, 0],
        normalization=vector["loss_norm"],
    )


def assert_step(ce: Tensor, distillation: Tensor, leaf: Tensor, vector: Vector) -> None:
    logged = vector["losses"]
    assert ce.item() == pytest.approx(logged["ce_loss"], rel=TOLERANCE)
    name = f"{vector['mode']}_loss"
    assert distillation.item() == pytest.approx(logged[name], rel=TOLERANCE)
    assert_matches(ce + distillation, leaf, vector)


@both_teachers
@pytest.mark.parametrize("path", vectors("step_shared"))
def test_step_shared(path: Path, as_teacher: AsTeacher) -> None:
    vector = Vector(path)
    leaf = vector.leaf()
    masked_BL, temperature = vector.student_masked, vector["temperature"]
    student_PV = leaf[masked_BL]
    teacher_PV = vector.teacher_logits_merged[masked_BL][:, : vector["shared_vocab_size"]]
    teacher = as_teacher(teacher_PV, temperature)
    if vector["mode"] == "taid":
        distillation = tidal_loss(
            student_PV,
            teacher,
            vector.timestep[:, None].expand_as(masked_BL)[masked_BL],
            progress=vector.progress,
            lambda_init=vector["lambda_init"],
            lambda_max=vector["lambda_max"],
            schedule=vector["lambda_decay"],
            axis=vector["axis_mode"],
            timestep_weight=vector["timestep_weight"],
            temperature=temperature,
        )
    else:
        distillation = kl_loss(
            student_PV,
            teacher,
            temperature=temperature,
            direction="forward" if vector["mode"] == "kl" else "reverse",
        )
    assert_step(step_ce(vector, leaf, masked_BL), distillation, leaf, vector)


@pytest.mark.parametrize("path", vectors("step_shared"))
def test_step_shared_teacher_inputs(path: Path) -> None:
    """Pass 1 reveals half A, pass 2 the rest of the masked set; the clean half is untouched."""
    vector = Vector(path)
    masked_BL, half_a_BL = vector.student_masked, vector.in_half_a
    assert not (masked_BL & (vector.labels == -100)).any()
    assert not (half_a_BL & ~masked_BL).any()
    hidden = {"teacher_input_pass1": masked_BL & ~half_a_BL, "teacher_input_pass2": half_a_BL}
    assert ("teacher_input_pass2" in vector.tensors) == vector["comp_demo"]
    assert vector["comp_demo"] or not half_a_BL.any()
    for name in hidden.keys() & vector.tensors.keys():
        noised_BL = vector.student_ids.masked_fill(hidden[name], vector["teacher_mask_id"])
        halves = {"xt": noised_BL, "x0": vector.student_ids}
        rebuilt = torch.cat([halves[half] for half in vector["concat_order"].split("_")], dim=1)
        assert torch.equal(rebuilt, vector.tensors[name]), name


@pytest.mark.parametrize("path", vectors("step_cross"))
def test_step_cross(path: Path) -> None:
    vector = Vector(path)
    leaf = vector.leaf()
    active_BC = vector.chunk_active
    interpolated = "taid" in vector["mode"]
    distillation = calm_loss(
        active_logprobs(leaf, vector.student_ids, vector.align_student, active_BC),
        active_logprobs(
            vector.teacher_logits_merged, vector.teacher_ids, vector.align_teacher, active_BC
        ),
        temperature=vector["temperature"],
        direction="reverse" if vector["mode"].startswith("reverse") else "forward",
        timestep_C=vector.timestep[:, None].expand_as(active_BC)[active_BC],
        progress=vector.progress,
        lambda_init=vector["lambda_init"],
        lambda_max=vector["lambda_max"],
        axis=vector["axis_mode"],
        timestep_weight=vector["timestep_weight"],
        interpolate=interpolated,
    )
    assert_step(step_ce(vector, leaf, vector.student_masked), distillation, leaf, vector)
    if "lambda_train" in vector["losses"]:
        reached = lambda_train(
            vector.progress,
            vector["lambda_init"],
            vector["lambda_max"],
            vector["lambda_decay"],
        )
        assert reached == pytest.approx(vector["losses"]["lambda_train"], rel=1e-9)


def touches(of_BL: Tensor, align_BLC: Tensor) -> Tensor:
    """Say which chunks hold one of the positions. Returns bool (B, C)."""
    return (align_BLC & of_BL[:, :, None]).any(dim=1)


def covered(chunks_BC: Tensor, align_BLC: Tensor) -> Tensor:
    """Say which positions lie in one of the chunks. Returns bool (B, L)."""
    return (align_BLC & chunks_BC[:, None]).any(dim=2)


@pytest.mark.parametrize("path", vectors("step_cross"))
def test_step_cross_masks_follow_the_chunks(path: Path) -> None:
    """One masked token masks its chunk on both sides; a chunk with a prompt token is not scored."""
    vector = Vector(path)
    labelled_BL = vector.labels != -100
    chunk_masked_BC = touches(vector.drawn_mask, vector.align_student)
    assert not (vector.drawn_mask & ~labelled_BL).any()
    assert torch.equal(chunk_masked_BC, vector.chunk_masked)
    student_masked_BL = covered(chunk_masked_BC, vector.align_student) & labelled_BL
    assert torch.equal(student_masked_BL | vector.drawn_mask, vector.student_masked)
    assert torch.equal(covered(chunk_masked_BC, vector.align_teacher), vector.teacher_masked)
    in_prompt_BC = touches(~labelled_BL, vector.align_student)
    assert torch.equal(chunk_masked_BC & ~in_prompt_BC, vector.chunk_active)


@pytest.mark.parametrize("path", vectors("step_cross"))
def test_step_cross_teacher_inputs(path: Path) -> None:
    """Whole chunks change sides between the passes, and each is hidden in exactly one."""
    vector = Vector(path)
    half_a_BC = vector.chunk_in_half_a
    assert not (half_a_BC & ~vector.chunk_masked).any()
    assert vector["comp_demo"] or not half_a_BC.any()
    assert ("teacher_input_pass2" in vector.tensors) == vector["comp_demo"]
    hidden = {
        "teacher_input_pass1": vector.chunk_masked & ~half_a_BC,
        "teacher_input_pass2": half_a_BC,
    }
    for name in hidden.keys() & vector.tensors.keys():
        hidden_BM = covered(hidden[name], vector.align_teacher)
        rebuilt = vector.teacher_ids.masked_fill(hidden_BM, vector["teacher_mask_id"])
        assert torch.equal(rebuilt, vector.tensors[name]), name


@pytest.mark.parametrize("path", vectors("attention"))
def test_attention(path: Path) -> None:
    vector = Vector(path)
    mask = block_diffusion_mask(vector["n"], vector["block_size"], vector["concat_order"])
    np.testing.assert_array_equal(mask, vector.mask.numpy())
