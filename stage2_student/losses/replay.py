"""The teacher's output head, replayed on the hidden states that a cache holds.

Codes travel to the device as they are stored (two bytes a component); there they become hidden
states and, a slice of positions at a time, full logits: the tail of the teacher's distribution as
it was, for one matrix product of the head's size per slice and no teacher. The head lies once per
device, in the teacher's own type (151,646 x 4,096 in bfloat16: 1.24 GB).

Shapes: P masked positions, R components kept, D the teacher's hidden size, V shared vocabulary.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from tide_cache.errors import DataError

_HALF_MAX = torch.finfo(torch.float16).max
_CODE_DTYPES = (torch.int16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReplayHead:
    """What turns codes into logits: `hidden = codes * step @ synthesis' + mean`, then the head.

    `weight_VD` in the teacher's type, `bias_V` or None; `synthesis_DR` and `mean_D` float32.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    synthesis_DR: Tensor
    mean_D: Tensor
    step: float
    _copies: dict[torch.device, "ReplayHead"] = field(default_factory=dict)

    def on(self, device: torch.device | str) -> "ReplayHead":
        """Return the head on a device; it is copied there once."""
        device = torch.device(device)
        if self.weight_VD.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = ReplayHead(
                weight_VD=self.weight_VD.to(device),
                bias_V=None if self.bias_V is None else self.bias_V.to(device),
                synthesis_DR=self.synthesis_DR.to(device),
                mean_D=self.mean_D.to(device),
                step=self.step,
            )
        return self._copies[device]

    @torch.no_grad()
    def logits(self, code_PR: Tensor) -> Tensor:
        """Return float32 logits (P, V). The whole (P, V) is made: hand over slices."""
        with torch.autocast(code_PR.device.type, enabled=False):
            component_PR = code_PR.float() * self.step
            hidden_PD = torch.addmm(self.mean_D, component_PR, self.synthesis_DR.T)
            if self.weight_VD.dtype == torch.float16:  # the one type that a cache can overflow
                hidden_PD = hidden_PD.clamp(-_HALF_MAX, _HALF_MAX)
            hidden_PD = hidden_PD.to(self.weight_VD.dtype)
            logits_PV = functional.linear(hidden_PD, self.weight_VD, self.bias_V).float()
            if self.weight_VD.dtype == torch.float16:
                logits_PV.nan_to_num_(nan=0.0, posinf=_HALF_MAX, neginf=-_HALF_MAX)
            return logits_PV


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HiddenRows:
    """Hidden states at P positions as codes, and the head that reads them.

    `code_PR` int16 as caches hold them; float32 where nothing was rounded.
    """

    code_PR: Tensor
    head: ReplayHead

    def slice(self, start: int, stop: int) -> "HiddenRows":
        """Return the positions [start, stop) as views."""
        return replace(self, code_PR=self.code_PR[start:stop])

    def to(self, device: torch.device | str) -> "HiddenRows":
        """Return the same rows on `device`."""
        return HiddenRows(
            code_PR=self.code_PR.to(device, non_blocking=True), head=self.head.on(device)
        )

    def logits(self) -> Tensor:
        """Return the replayed logits, float32 (P, V)."""
        return self.head.logits(self.code_PR)

    def check(self, num_positions: int, vocab_size: int) -> None:
        """Raise DataError unless codes and head fit positions and vocabulary."""
        expected = (num_positions, self.head.synthesis_DR.shape[1])
        if tuple(self.code_PR.shape) != expected or self.code_PR.dtype not in _CODE_DTYPES:
            raise DataError(
                f"code_PR: expected torch.int16 of shape {expected}, got {self.code_PR.dtype} of "
                f"shape {tuple(self.code_PR.shape)}"
            )
        if self.head.weight_VD.shape[0] != vocab_size:
            raise DataError(
                f"weight_VD: expected {vocab_size} rows, got {self.head.weight_VD.shape[0]}"
            )
