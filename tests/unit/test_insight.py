"""What a step says by timestep is the mean over its positions, one at a time."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from stage2_student.insight import StepInsight, bucket_name, bucket_of
from stage2_student.objective import Objective
from tests.unit.test_fused import HEAD_VD, HIDDEN_PD, V, W, config_of, make_batch


def test_buckets_are_quarters_and_hold_their_edges() -> None:
    timesteps = torch.tensor([0.0, 0.001, 0.2499, 0.25, 0.5, 0.75, 0.9999, 1.0])
    assert bucket_of(timesteps).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert [bucket_name(i) for i in range(4)] == [
        "t0.00-0.25",
        "t0.25-0.50",
        "t0.50-0.75",
        "t0.75-1.00",
    ]


@pytest.mark.parametrize(
    ("losses", "options"),
    [
        (["ce", "tidal", "kl"], {"tail": "exact"}),
        (["ce", "reverse_calm"], {"has_chunks": True}),
        (["ce"], {}),
    ],
)
def test_means_by_hand(losses: list[str], options: dict[str, Any]) -> None:
    batch = make_batch(**options)
    # No position falls into the third quarter.
    moved_P = torch.where((batch.timestep_P - 0.6).abs() < 0.16, 0.1, batch.timestep_P)
    chunks = batch.teacher.chunks
    batch = replace(batch, timestep_P=moved_P)
    objective = Objective(config_of(losses, temperature=1.0))
    values = objective(
        HIDDEN_PD,
        HEAD_VD,
        batch,
        objective.denominators(batch),
        progress=0.4,
        wants_agreement=True,
    ).values
    insight = StepInsight(torch.device("cpu"))
    insight.add(batch, values)
    insight.add(batch, values)  # a second micro-batch of the same leaves the means
    means = insight.means(Accelerator(cpu=True))
    logprob_PV = (HIDDEN_PD @ HEAD_VD.T).log_softmax(dim=1)
    assert logprob_PV.shape[1] == V
    nll: dict[str, list[float]] = {}
    for p, timestep in enumerate(moved_P.tolist()):
        name = bucket_name(min(int(timestep * 4), 3))
        nll.setdefault(name, []).append(-float(logprob_PV[p, batch.labels_P[p]]))
    assert set(nll) == {"t0.00-0.25", "t0.25-0.50", "t0.75-1.00"}
    assert {name for name in means if name.endswith("/nll")} == {f"{name}/nll" for name in nll}
    for name, found in nll.items():
        assert means[f"{name}/nll"] == pytest.approx(sum(found) / len(found), rel=1e-5)
    if batch.teacher.candidates is not None:
        teacher_QW = batch.teacher.candidates.dense(1.0)
        agrees: list[bool] = []
        divergence: dict[str, list[float]] = {}
        for q, p in enumerate(batch.teacher.index_Q.tolist()):
            seen = bool(teacher_QW[q].isfinite().any())
            student_W = (HIDDEN_PD[p] @ HEAD_VD.T)[:W]
            if seen:
                agrees.append(int(student_W.argmax()) == int(teacher_QW[q].argmax()))
            kl = 0.0
            if seen:
                p_W = teacher_QW[q].softmax(0)
                kl = float((p_W * (p_W.log() - student_W.log_softmax(0))).sum())
            name = bucket_name(min(int(float(moved_P[p]) * 4), 3))
            divergence.setdefault(name, []).append(kl)
        for name, found in divergence.items():
            assert means[f"{name}/kl"] == pytest.approx(sum(found) / len(found), rel=1e-4)
        # The position that the teacher never saw agrees or not, by the ids it was given.
        number = len(batch.teacher.index_Q)
        assert abs(means["agreement"] * number - sum(agrees)) <= 1.001
        assert sum(agrees) > 0
    if chunks is not None and "reverse_calm" in losses:
        assert values.logprob_C is not None
        overlaps = [
            1 - abs(math.exp(float(s)) - math.exp(float(t)))
            for s, t in zip(values.logprob_C, chunks.logprob_C, strict=True)
        ]
        assert means["chunk_overlap"] == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-5)
    if losses == ["ce"]:
        assert all(name.endswith(("/nll",)) for name in means)
