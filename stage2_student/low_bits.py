"""AdamW for weights or moments of few bits: torchao's, with what it leaves to the caller.

torchao computes an update in float32 and rounds the new weights stochastically where they are
bfloat16: a step of 1e-5 relative to a weight lies far below its last bit (4e-3), and rounding to
the nearest would drop it every time. Two things are ours. Moments that are not kept in 8 bits are
float32 and never in the weights' type: a second moment in bfloat16 with beta2 = 0.999 cannot even
decay. And the rounding draws from a seed of its own, a function of the number of updates done: a
resumed run draws the same, and so does every rank that holds the same weights.

Chosen over bitsandbytes, which runs on a CPU as well and keeps float32 moments for bfloat16
weights, because that rounds to the nearest, wants 125 MB and knows no sharded (DTensor) parameters.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from tide_cache.draws import generator


class LowBitAdamW(AdamW8bit):
    """AdamW whose moments are 8 bits in blocks of 256 values, or all float32.

    In 8 bits are those of tensors of at least 4,096 values in whole blocks; the others stay
    float32. On a GPU torchao compiles the update once per shape; on a CPU it runs as it stands.
    """

    def __init__(self, parameters: Any, *, eight_bits: bool, **settings: Any) -> None:
        super().__init__(parameters, bf16_stochastic_round=True, **settings)
        self.eight_bits = eight_bits

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all weights. The global generators are as before afterwards."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        devices = {p.device for p in parameters if p.is_cuda}
        num_done = next((int(state["step"]) for state in self.state.values()), 0)
        with torch.random.fork_rng(devices=list(devices)), _eager(not devices):
            random = generator(0, f"update-{num_done}", -1, "round")
            torch.manual_seed(int(random.integers(1 << 62)))
            result: float | None = super().step(closure)
        return result

    def empty_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter before its first update."""
        return {
            "step": torch.tensor(0.0),
            "exp_avg": self._new_buffer(parameter, True),
            "exp_avg_sq": self._new_buffer(parameter, False),
        }

    # The two below replace where torchao makes a moment.

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if self.eight_bits:
            made: Tensor = super()._new_buffer(p, signed)
            local = made.to_local() if isinstance(made, DTensor) else made
            if isinstance(local, OptimState8bit):
                return made
        return torch.zeros_like(p, dtype=torch.float32)

    @staticmethod
    def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
        # Without a dtype it passes for float32: one that passes for bfloat16 fails if p is sharded.
        zeros: Tensor = OptimState8bit.zeros(p.shape, signed, block_size, p.device)
        return zeros


@contextlib.contextmanager
def _eager(wanted: bool) -> Iterator[None]:
    """Run torchao's update without compiling it, which takes seconds per shape."""
    if not wanted:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
