"""A training step from a cache, as the product computes it, for `benchmarks.step`.

The batch holds the rows of a `published_step.RowBatch` and a payload for each masked position:
`candidates` with the mean tail (random ids and logits: what a step costs does not depend on what
they say), `hidden` (codes, and an output head to replay them through) or `chunks` of one to three
tokens. Student, optimiser, rows and masks are those of the published variants.

Shapes: B rows, L positions, P masked positions, K candidates, R components, D hidden, V ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.published_step import Material, RowBatch
from stage2_student.aligned_rows import NoisedRows
from stage2_student.attention import attention_implementation
from stage2_student.batches import Batch, InputForm, assemble
from stage2_student.forward import batch_losses
from stage2_student.losses import HiddenRows, ReplayHead, TeacherCandidates
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.student import Student
from stage2_student.teacher_rows import ChunkTargets, TeacherRows

_TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSizes:
    """What payloads are made of: K candidates, hidden size and components kept, shared ids."""

    k: int
    hidden_size: int
    components: int
    vocab_size: int


class CachedStep:
    """Losses from a payload, fused with the output head, on packed rows."""

    def __init__(
        self,
        name: str,
        losses: Mapping[str, float],
        material: Material,
        teacher: TeacherRows,
        **objective: Any,
    ) -> None:
        self.name = name
        self.material = material
        self._objective = Objective(ObjectiveConfig(losses=dict(losses), **objective))
        self._student = Student(material.student)
        self._attention = attention_implementation("auto", material.device)
        self.batch = _assemble(material.batch, teacher, self._attention, material.device)

    def forward_backward(self) -> Tensor:
        """Do the forward and backward of one step, from a batch on the host."""
        material, model = self.material, self._student.model
        before = model.config._attn_implementation
        model.set_attn_implementation(self._attention)
        try:
            with torch.autocast(material.device.type, torch.bfloat16, enabled=material.autocast):
                losses, _ = batch_losses(
                    self._student,
                    self.batch,
                    self._objective,
                    num_ids=len(self._student.head_VD),
                    device=material.device,
                    progress=0.5,
                )
            losses.total.backward()  # type: ignore[no-untyped-call]
        finally:
            model.set_attn_implementation(before)
        return losses.total.detach()

    def update(self) -> None:
        """Do the optimiser's part."""
        self.material.update()


def cached_steps(material: Material, sizes: TeacherSizes) -> list[CachedStep]:
    """Return a variant for each kind of loss and payload."""
    device = material.device
    num_masked = int(material.batch.masked_BL.sum())
    candidates = draw_candidates(num_masked, sizes, device)
    hidden = draw_hidden(candidates, sizes, material.autocast, device)
    both = {"ce": 1.0, "tidal": 1.0}
    with_calm = {"ce": 1.0, "reverse_calm": 1.0}
    kinds: list[tuple[str, dict[str, float], TeacherRows]] = [
        ("ours: cross entropy", {"ce": 1.0}, TeacherRows.none()),
        (f"ours: TIDAL, candidates of {sizes.k}", both, _at_all(candidates)),
        ("ours: forward KL, the same", {"ce": 1.0, "kl": 1.0}, _at_all(candidates)),
        ("ours: reverse KL, the same", {"ce": 1.0, "reverse_kl": 1.0}, _at_all(candidates)),
        (f"ours: TIDAL, hidden of {sizes.hidden_size}", both, _at_all(hidden)),
        ("ours: reverse CALM, chunks", with_calm, draw_chunks(material.batch)),
    ]
    return [CachedStep(name, losses, material, teacher) for name, losses, teacher in kinds]


def draw_candidates(
    num_positions: int, sizes: TeacherSizes, device: torch.device
) -> TeacherCandidates:
    """Draw K ids and logits for each position, and a total that leaves them a part of the mass."""
    random = torch.Generator().manual_seed(1)
    step = sizes.vocab_size // sizes.k
    ids_PK = torch.arange(sizes.k) * step + torch.randint(
        step, (num_positions, sizes.k), generator=random
    )
    logits_PK = 8 + 2 * torch.randn((num_positions, sizes.k), generator=random)
    head_PT = torch.stack([torch.logsumexp(logits_PK / t, dim=1) for t in _TEMPERATURES], dim=1)
    return TeacherCandidates(
        ids_PK=ids_PK,
        logits_PK=logits_PK,
        logsumexp_PT=head_PT + torch.tensor([0.2, 1.5]),
        temperatures=_TEMPERATURES,
        vocab_size=sizes.vocab_size,
        mean_logits_V=torch.randn(sizes.vocab_size, generator=random),
        tail="mean",
    )


def draw_hidden(
    candidates: TeacherCandidates, sizes: TeacherSizes, autocast: bool, device: torch.device
) -> TeacherCandidates:
    """Draw codes and a head of the teacher's size beside 16 of the candidates, as caches do."""
    random = torch.Generator().manual_seed(2)
    scale = sizes.hidden_size**-0.5
    weight_VD = torch.empty(
        (sizes.vocab_size, sizes.hidden_size),
        dtype=torch.bfloat16 if autocast else torch.float32,
        device=device,
    ).normal_(std=scale)
    head = ReplayHead(
        weight_VD=weight_VD,
        bias_V=None,
        synthesis_DR=torch.randn((sizes.hidden_size, sizes.components), generator=random).to(device)
        * scale,
        mean_D=torch.zeros(sizes.hidden_size, device=device),
        step=0.25,
    )
    codes = torch.randint(-20, 20, (candidates.num_positions, sizes.components), generator=random)
    pinned = min(16, candidates.num_candidates)
    return TeacherCandidates(
        ids_PK=candidates.ids_PK[:, :pinned].contiguous(),
        logits_PK=candidates.logits_PK[:, :pinned].contiguous(),
        logsumexp_PT=candidates.logsumexp_PT,
        temperatures=_TEMPERATURES,
        vocab_size=sizes.vocab_size,
        tail_logshare_PT=torch.full_like(candidates.logsumexp_PT, -0.7),
        hidden=HiddenRows(code_PR=codes.to(torch.int16), head=head),
        tail="hidden",
    )


def draw_chunks(batch: RowBatch) -> TeacherRows:
    """Make chunks of one to three masked positions of a row."""
    random = np.random.default_rng(3)
    row_P = torch.nonzero(batch.masked_BL.cpu())[:, 0].numpy()
    chunk_E, chunk, left = [], -1, 0
    for number, row in enumerate(row_P):
        if left == 0 or row != row_P[number - 1]:
            chunk, left = chunk + 1, int(random.integers(1, 4))
        chunk_E.append(chunk)
        left -= 1
    first_C = np.unique(chunk_E, return_index=True)[1]
    return TeacherRows(
        index_Q=torch.empty(0, dtype=torch.int64),
        candidates=None,
        chunks=ChunkTargets(
            index_E=torch.arange(len(row_P)),
            chunk_E=torch.tensor(chunk_E),
            logprob_C=-torch.from_numpy(random.exponential(3.0, chunk + 1)).float(),
            timestep_C=batch.timestep_P.cpu()[first_C],
        ),
    )


def _at_all(candidates: TeacherCandidates) -> TeacherRows:
    return TeacherRows(
        index_Q=torch.arange(candidates.num_positions), candidates=candidates, chunks=None
    )


def _assemble(rows: RowBatch, teacher: TeacherRows, attention: str, device: Any) -> Batch:
    num_rows, length = rows.ids_BL.shape
    noised = NoisedRows(
        ids_BL=rows.ids_BL.cpu().numpy(),
        length_B=np.full(num_rows, length),
        masked_BL=rows.masked_BL.cpu().numpy(),
        labelled_B=rows.labelled_BL.sum(dim=1).cpu().numpy(),
        timestep_B=rows.timestep_B.cpu().numpy(),
    )
    form = InputForm(
        block_size=rows.block_size,
        mask_token_id=rows.mask_token_id,
        attention=attention,
        device=device,
    )
    return assemble(noised, teacher, form)
