"""`tide-train` for tests: killed (SIGKILL) behind a step, or with weights spread over CPU ranks.

    KILL_BEHIND=7 SHARDED=1 python -m tests.watched_training CONFIG --cache URL

SHARDED: FSDP2 by accelerate's own code, which asks for GPUs otherwise.
"""

import os
import signal
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from stage2_student import trainer
from stage2_student.cli import main
from stage2_student.config import TrainConfig
from stage2_student.trainer import Trainer
from stage2_student.update import make_accelerator

KILL_BEHIND = int(os.environ.get("KILL_BEHIND", "0"))


class Killed(Trainer):
    """Dies before it saves or evaluates what it has just reported."""

    def _after_step(self, done: int) -> None:
        if done == KILL_BEHIND:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._after_step(done)


def make_sharded(config: TrainConfig) -> Any:
    """The accelerator as `examples/accelerate/fsdp2.yaml` makes it on GPUs."""
    accelerator = make_accelerator(config)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    return accelerator


if __name__ == "__main__":
    trainer.Trainer = Killed  # type: ignore[misc]
    if "SHARDED" in os.environ:
        trainer.make_accelerator = make_sharded
    main()
