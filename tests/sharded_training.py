"""`tide-train` on CPU ranks under FSDP2: accelerate's own code, which asks for GPUs otherwise.

python -m torch.distributed.run --nproc_per_node 2 -m tests.sharded_training CONFIG --cache URL
"""

from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from stage2_student import trainer
from stage2_student.cli import main
from stage2_student.config import TrainConfig
from stage2_student.update import make_accelerator


def make_sharded(config: TrainConfig) -> Any:
    """The accelerator as `examples/accelerate/fsdp2.yaml` makes it on GPUs."""
    accelerator = make_accelerator(config)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    return accelerator


trainer.make_accelerator = make_sharded

if __name__ == "__main__":
    main()
