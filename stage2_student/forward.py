"""One forward of a student over one batch, losses included: training, evaluation, benchmarks."""

import torch
from torch import Tensor, nn

from stage2_student.batches import Batch
from stage2_student.fused import TableGradient, plan_slices
from stage2_student.objective import Denominators, Losses, Objective


def batch_losses(
    student: nn.Module,
    batch: Batch,
    objective: Objective,
    *,
    num_ids: int,
    device: torch.device,
    progress: float,
    denominators: Denominators | None = None,
    wants_agreement: bool = False,
) -> tuple[Losses, Batch]:
    """Return the losses of a batch that lies on the host, and the batch on the device.

    `student` is a Student or what wraps one; `num_ids` the rows of its head. `denominators`: of the
    whole step; default: the batch's own.
    """
    # While the batch is still on the host: on the device every look at an index would wait.
    slices = plan_slices(batch, num_ids)
    divisors = denominators or objective.denominators(batch)
    batch = batch.to(device)

    def losses(
        hidden_PD: Tensor, head_VD: Tensor, table: TableGradient | None
    ) -> tuple[Tensor, Losses]:
        found = objective(
            hidden_PD,
            head_VD,
            batch,
            divisors,
            progress=progress,
            slices=slices,
            wants_agreement=wants_agreement,
            table=table,
        )
        # Wrappers look for tensors among what a forward returns.
        return found.total, found

    _, found = student(
        batch.input_ids_1N,
        batch.position_ids_1N,
        batch.attention_mask,
        batch.masked_index_P,
        losses,
    )
    return found, batch
