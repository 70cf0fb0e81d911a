"""Fused losses are the plain ones: values, and gradients of hidden states and head.

Shapes: P masked positions, Q those with candidates, D hidden, V student's ids, W the teacher's.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stage2_student import fused
from stage2_student.batches import Batch
from stage2_student.fused import TableGradient, fused_losses, plan_slices
from stage2_student.losses import (
    LOSS_NAMES,
    HiddenRows,
    LossName,
    ReplayHead,
    TeacherCandidates,
)
from stage2_student.objective import Objective
from stage2_student.objective_config import PAYLOAD_OF, ObjectiveConfig
from stage2_student.plain import plain_losses
from stage2_student.teacher_rows import ChunkTargets, TeacherRows
from tide_cache.errors import CompatibilityError

P, D, V, W, K = 37, 12, 61, 53, 9
DISTILLED = [name for name in LOSS_NAMES if PAYLOAD_OF[name] == "candidates"]
CHUNKED = [name for name in LOSS_NAMES if PAYLOAD_OF[name] == "chunks"]
TAILS = ("uniform", "mean", "student", "mean_student", "bucket", "none", "hidden", "exact")
every_slice = pytest.mark.parametrize("rows", [1, 3, 10, 1000])


def draw(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


HIDDEN_PD, HEAD_VD = draw(1, P, D, scale=0.4), draw(2, V, D, scale=1.0)
LONE = (0, 5, 6, 20, 36)  # positions without a teacher


def make_teacher(tail: str, num_positions: int) -> TeacherCandidates:
    """A teacher with the tail asked for, which never saw position 2, unless it replays all."""
    # Near enough to the student's that some likeliest ids agree.
    logits_QW = draw(3, num_positions, W) + 4.0 * (HIDDEN_PD @ HEAD_VD.T)[-num_positions:, :W]
    if tail != "hidden":
        logits_QW[2] = -torch.inf
    exact = tail == "exact"
    teacher = TeacherCandidates.from_logits(
        logits_QW, k=W if exact else K, temperatures=(1.0, 2.0), mean_logits_V=draw(4, W)
    )
    hidden = None
    if tail == "hidden":
        head = ReplayHead(
            weight_VD=draw(5, W, 7),
            bias_V=None,
            synthesis_DR=draw(6, 7, 4, scale=0.5),
            mean_D=draw(7, 7),
            step=0.3,
        )
        code_QR = draw(8, num_positions, 4, scale=5.0).to(torch.int16)
        hidden = HiddenRows(code_PR=code_QR, head=head)
    tail_logmass_PT = torch.stack([teacher.tail_logmass_P(t) for t in (1.0, 2.0)], dim=1)
    return replace(
        teacher,
        hidden=hidden,
        tail="mean" if exact else tail,  # type: ignore[arg-type]
        tail_logshare_PT=tail_logmass_PT - teacher.logsumexp_PT if tail == "hidden" else None,
    )


def make_batch(*, tail: str | None = None, has_chunks: bool = False, lone: bool = True) -> Batch:
    random = np.random.default_rng(0)
    index_Q = torch.tensor([p for p in range(P) if not lone or p not in LONE])
    chunks = None
    if has_chunks:
        # Chunks of 1 to 4 positions; some positions lie in none.
        index_E, chunk_E, position, chunk = [], [], 0, 0
        while position < P:
            size = min(int(random.integers(1, 5)), P - position)
            if random.random() < 0.8:
                index_E += range(position, position + size)
                chunk_E += [chunk] * size
                chunk += 1
            position += size
        chunks = ChunkTargets(
            index_E=torch.tensor(index_E),
            chunk_E=torch.tensor(chunk_E),
            logprob_C=-draw(9, chunk).abs(),
            timestep_C=torch.rand(chunk, generator=torch.Generator().manual_seed(1)),
        )
    return Batch(
        input_ids_1N=torch.zeros(1, P, dtype=torch.int64),
        position_ids_1N=torch.zeros(1, P, dtype=torch.int64),
        attention_mask=torch.ones(1, 1, P, P, dtype=torch.bool),
        masked_index_P=torch.arange(P),
        labels_P=torch.from_numpy(random.integers(0, V, P)),
        timestep_P=torch.linspace(0.05, 1.0, P),
        row_P=torch.arange(P) // 10,
        labelled_per_row_B=torch.tensor([12, 13, 11, 9]),
        teacher=TeacherRows(
            index_Q=index_Q if tail is not None else index_Q[:0],
            candidates=None if tail is None else make_teacher(tail, len(index_Q)),
            chunks=chunks,
            num_draws_P=torch.from_numpy(random.integers(1, 4, P)),
        ),
        num_tokens=P,
        num_filled=0,
    )


def config_of(losses: Any, **changes: Any) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"losses": losses, **changes})


def plain(
    batch: Batch, config: ObjectiveConfig, hidden_PD: Tensor = HIDDEN_PD, head_VD: Tensor = HEAD_VD
) -> tuple[Tensor, dict[LossName, Tensor], Tensor, Tensor]:
    hidden_PD, head_VD = hidden_PD.clone().requires_grad_(), head_VD.clone().requires_grad_()
    denominators = Objective(config).denominators(batch)
    total, terms = plain_losses(hidden_PD, head_VD, batch, config, denominators, progress=0.4)
    return total.detach(), terms, *torch.autograd.grad(total, (hidden_PD, head_VD))


def assert_fused_is_plain(
    batch: Batch, config: ObjectiveConfig, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rows` of a slice; an inner round takes about half of them."""
    monkeypatch.setattr(fused, "_ROUND_FLOATS_CPU", max(1, rows // 2) * V)
    total, terms, grad_PD, grad_VD = plain(batch, config)
    hidden_PD, head_VD = HIDDEN_PD.clone().requires_grad_(), HEAD_VD.clone().requires_grad_()
    objective = Objective(config)
    losses = objective(
        hidden_PD,
        head_VD,
        batch,
        objective.denominators(batch),
        progress=0.4,
        slices=plan_slices(batch, V, rows * V),
    )
    found_PD, found_VD = torch.autograd.grad(losses.total, (hidden_PD, head_VD))
    torch.testing.assert_close(losses.total.detach(), total, rtol=1e-5, atol=0)
    for name, term in terms.items():
        assert float(term.detach().abs()) > 1e-3
        torch.testing.assert_close(losses.terms[name], term.detach(), rtol=1e-5, atol=0)
    for found, expected in ((found_PD, grad_PD), (found_VD, grad_VD)):
        scale = float(expected.abs().max())
        assert scale > 1e-4
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


@every_slice
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("lone", [True, False])
@pytest.mark.parametrize("loss", DISTILLED)
def test_each_distribution_loss_from_each_payload(
    loss: str, tail: str, lone: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(tail=tail, lone=lone)
    assert_fused_is_plain(batch, config_of({loss: 0.7}), rows, monkeypatch)


@every_slice
@pytest.mark.parametrize("loss", CHUNKED)
def test_each_chunk_loss(loss: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(has_chunks=True)
    assert_fused_is_plain(batch, config_of({loss: 1.3}), rows, monkeypatch)


@every_slice
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("mask_weight", ["published", "unbiased"])
def test_cross_entropy(
    norm: str, mask_weight: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(["ce"], loss_norm=norm, mask_weight=mask_weight)
    assert_fused_is_plain(make_batch(), config, rows, monkeypatch)


@every_slice
@pytest.mark.parametrize(
    "settings",
    [
        {"losses": {"ce": 1.0, **dict.fromkeys(DISTILLED, 0.5)}, "temperature": 1.0},
        {"losses": {"ce": 1.0, "tidal": 4.0}, "axis": "timestep_only"},
        {"losses": {"ce": 0.3, "tidal": 1.0}, "timestep_weight": "midrange", "schedule": "linear"},
    ],
)
def test_several_losses_at_once(
    settings: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(tail="mean")
    assert_fused_is_plain(batch, ObjectiveConfig.model_validate(settings), rows, monkeypatch)


@every_slice
def test_chunk_losses_beside_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {"ce": 1.0, **dict.fromkeys(CHUNKED, 0.5)}
    assert_fused_is_plain(make_batch(has_chunks=True), config_of(losses), rows, monkeypatch)


@pytest.mark.parametrize("loss", ["ce", *DISTILLED, *CHUNKED])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_in_bfloat16_within_two_per_cent(loss: str, weights: str) -> None:
    """Against float32. The head's two products and its logits are rounded to 8 bits."""
    batch = make_batch(
        tail="mean" if loss in DISTILLED else None, has_chunks=loss in CHUNKED, lone=False
    )
    config = config_of([loss])
    total, _, grad_PD, grad_VD = plain(batch, config)
    dtype = getattr(torch, weights)
    hidden_PD = HIDDEN_PD.to(dtype, copy=True).requires_grad_()
    head_VD = HEAD_VD.to(dtype, copy=True).requires_grad_()
    objective = Objective(config)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "float32"):
        losses = objective(hidden_PD, head_VD, batch, objective.denominators(batch), progress=0.4)
    found_PD, found_VD = torch.autograd.grad(losses.total, (hidden_PD, head_VD))
    assert losses.total.dtype == torch.float32
    assert found_PD.dtype == found_VD.dtype == dtype
    assert abs(float(losses.total - total)) < 0.02 * float(total)
    for found, expected in ((found_PD, grad_PD), (found_VD, grad_VD)):
        error = float((found.float() - expected).norm() / expected.norm())
        assert error < 0.02, error


@pytest.mark.parametrize("slice_floats", [1, V, 3 * V, 5 * V + V - 1, 1 << 25])
def test_slices_follow_each_other_and_cut_no_chunk(slice_floats: int) -> None:
    batch = make_batch(tail="mean", has_chunks=True)
    slices = plan_slices(batch, V, slice_floats)
    chunks = batch.teacher.chunks
    assert chunks is not None
    sizes = {
        "positions": P,
        "candidates": len(batch.teacher.index_Q),
        "entries": len(chunks.index_E),
        "chunks": len(chunks.logprob_C),
    }
    for name, size in sizes.items():
        edges = [(getattr(s, name).start, getattr(s, name).stop) for s in slices]
        assert edges[0][0] == 0
        assert edges[-1][1] == size
        assert all(a[1] == b[0] for a, b in pairwise(edges))
    longest_chunk = int(torch.bincount(chunks.chunk_E).max())
    for part in slices:
        length = part.positions.stop - part.positions.start
        assert length < max(1, slice_floats // V) + longest_chunk
        of_chunks = chunks.chunk_E[part.entries]
        if len(of_chunks):
            assert int(of_chunks[0]) == part.chunks.start
            assert int(of_chunks[-1]) == part.chunks.stop - 1
        inside = (chunks.index_E >= part.positions.start) & (chunks.index_E < part.positions.stop)
        assert torch.equal(chunks.index_E[part.entries], chunks.index_E[inside])


def test_the_gradient_that_comes_from_above_scales_it_once() -> None:
    batch, config = make_batch(tail="mean"), config_of({"ce": 1.0, "tidal": 1.0})
    _, _, grad_PD, grad_VD = plain(batch, config)
    objective = Objective(config)
    hidden_PD, head_VD = HIDDEN_PD.clone().requires_grad_(), HEAD_VD.clone().requires_grad_()
    losses = objective(hidden_PD, head_VD, batch, objective.denominators(batch), progress=0.4)
    total = losses.total * -3.0
    total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert hidden_PD.grad is not None
    assert head_VD.grad is not None
    torch.testing.assert_close(hidden_PD.grad, -3.0 * grad_PD, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head_VD.grad, -3.0 * grad_VD, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="a second backward"):
        total.backward()  # type: ignore[no-untyped-call]


def test_a_tied_head_leaves_its_gradient_for_the_embedding() -> None:
    batch, config = make_batch(), config_of(["ce"])
    _, _, grad_PD, grad_VD = plain(batch, config)
    objective, table = Objective(config), TableGradient()
    hidden_PD, head_VD = HIDDEN_PD.clone().requires_grad_(), HEAD_VD.clone().requires_grad_()
    losses = objective(
        hidden_PD, head_VD, batch, objective.denominators(batch), progress=0.4, table=table
    )
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert head_VD.grad is None
    assert table.value_VD is not None
    torch.testing.assert_close(table.value_VD, grad_VD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden_PD.grad, grad_PD, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_there_are_the_values_and_no_graph() -> None:
    batch, config = make_batch(tail="mean"), config_of(["ce", "tidal", "kl", "reverse_kl"])
    objective = Objective(config)
    denominators = objective.denominators(batch)
    with torch.no_grad():
        quiet = objective(
            HIDDEN_PD.clone().requires_grad_(), HEAD_VD, batch, denominators, progress=0.4
        )
    loud = objective(HIDDEN_PD.clone().requires_grad_(), HEAD_VD, batch, denominators, progress=0.4)
    assert not quiet.total.requires_grad
    assert loud.total.requires_grad
    assert torch.equal(quiet.total, loud.total)
    for name in config.weights:
        assert torch.equal(quiet.values.terms[name], loud.values.terms[name])


def test_a_frozen_head_gets_no_gradient() -> None:
    batch, config = make_batch(), config_of(["ce"])
    _, _, grad_PD, _ = plain(batch, config)
    objective, hidden_PD = Objective(config), HIDDEN_PD.clone().requires_grad_()
    losses = objective(hidden_PD, HEAD_VD, batch, objective.denominators(batch), progress=0.4)
    losses.total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(hidden_PD.grad, grad_PD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_no_position_gives_zero_with_a_graph(loss: str) -> None:
    batch = make_batch(tail="mean", has_chunks=True).without_targets()
    objective = Objective(config_of([loss]))
    hidden_PD, head_VD = HIDDEN_PD[:0].clone().requires_grad_(), HEAD_VD.clone().requires_grad_()
    losses = objective(hidden_PD, head_VD, batch, objective.denominators(batch), progress=0.4)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert float(losses.total) == 0
    assert hidden_PD.grad is not None
    assert head_VD.grad is not None
    assert hidden_PD.grad.shape == (0, D)
    assert not head_VD.grad.any()


@every_slice
def test_values_of_single_positions_by_hand(rows: int) -> None:
    batch = make_batch(tail="exact", has_chunks=True)
    objective = Objective(config_of(["ce", "kl", "calm"], temperature=1.0))
    losses = objective(
        HIDDEN_PD,
        HEAD_VD,
        batch,
        objective.denominators(batch),
        progress=0.4,
        slices=plan_slices(batch, V, rows * V),
        wants_agreement=True,
    )
    values, chunks, teacher = losses.values, batch.teacher.chunks, batch.teacher.candidates
    assert chunks is not None
    assert teacher is not None
    assert values.agrees_Q is not None
    assert values.logprob_C is not None
    logits_PV = HIDDEN_PD @ HEAD_VD.T
    teacher_QW = teacher.dense(1.0)
    for p in range(P):
        nll = -logits_PV[p].log_softmax(0)[batch.labels_P[p]]
        assert float(values.nll_P[p]) == pytest.approx(float(nll), rel=1e-5)
    agreed = 0
    for q, p in enumerate(batch.teacher.index_Q.tolist()):
        same = bool(teacher_QW[q].isfinite().any()) and int(teacher_QW[q].argmax()) == int(
            logits_PV[p, :W].argmax()
        )
        if teacher_QW[q].isfinite().any():
            assert bool(values.agrees_Q[q]) == same
            agreed += same
    assert 0 < agreed < len(batch.teacher.index_Q)
    for c in range(len(chunks.logprob_C)):
        logprob = -values.nll_P[chunks.index_E[chunks.chunk_E == c]].sum()
        assert float(values.logprob_C[c]) == pytest.approx(float(logprob), rel=1e-5)


def test_a_teacher_wider_than_the_student_is_refused() -> None:
    batch = make_batch(tail="mean")
    batch = replace(batch, labels_P=batch.labels_P.clamp_max(49))
    objective = Objective(config_of(["kl"]))
    with pytest.raises(CompatibilityError, match="53 ids, but the student has 50"):
        objective(HIDDEN_PD, HEAD_VD[:50], batch, objective.denominators(batch), progress=0.4)


def test_only_one_slice_of_logits_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the size of logits that is made is a slice, never (P, V)."""
    batch, config = make_batch(tail="mean", lone=False), config_of({"ce": 1.0, "tidal": 1.0})
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.shape[-1:] in ((V,), (W,), (W + 1,)):
                    largest = max(largest, tensor.numel())
            return out

    objective = Objective(config)
    hidden_PD, head_VD = HIDDEN_PD.clone().requires_grad_(), HEAD_VD.clone().requires_grad_()
    with Watch():
        losses = objective(
            hidden_PD,
            head_VD,
            batch,
            objective.denominators(batch),
            progress=0.4,
            slices=plan_slices(batch, V, 5 * V),
        )
        losses.total.backward()  # type: ignore[no-untyped-call]
    assert 0 < largest <= max(5 * V, V * D)


def test_fused_losses_can_be_called_alone() -> None:
    batch, config = make_batch(), config_of(["ce"])
    work = fused.Work(
        batch=batch,
        config=config,
        shares={"ce": 1.0},
        slices=tuple(plan_slices(batch, V)),
        progress=0.0,
    )
    total, values = fused_losses(HIDDEN_PD, HEAD_VD, work)
    assert float(total) == pytest.approx(float(values.terms["ce"].sum()), rel=1e-6)
