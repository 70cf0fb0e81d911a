"""Optimisers on two real ranks: sharded they do what they do whole, and replicas stay alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PROJECT_ROOT

TWO_RANKS = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from stage2_student.optimizer import OptimizerConfig, make_optimizer, set_learning_rate

dist.init_process_group("gloo")
rank = dist.get_rank()

def train(dtype, state, wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).to(dtype)
    model = wrap(model)
    optimizer = make_optimizer(model, OptimizerConfig(state=state))
    for step in range(5):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = (model(x) - 1).square().mean()
        loss.backward()
        torch.manual_seed(1000 * rank + step)  # as `update` seeds a step: another on each rank
        set_learning_rate(optimizer, 0.01 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.detach() for p in model.parameters()]
    weights = [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]
    return loss.item(), torch.cat([w.float().flatten() for w in weights])

mesh = init_device_mesh("cpu", (2,))
found = {}
for dtype in (torch.float32, torch.bfloat16):
    for state in ("float32", "8bit"):
        whole, _ = train(dtype, state, lambda model: model)
        sharded, _ = train(dtype, state, lambda model: fully_shard(model, mesh=mesh))
        _, mine = train(dtype, state, DistributedDataParallel)
        other = mine.clone()
        dist.broadcast(other, src=0)
        alike = torch.tensor(float(mine.equal(other)))
        dist.all_reduce(alike, op=dist.ReduceOp.MIN)
        found[f"{dtype} {state}"] = [whole, sharded, bool(alike)]
if rank == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", str(script), str(tmp_path / "found.json")),
        ],
        cwd=PROJECT_ROOT,
        env={"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4
    for kind, (whole, sharded, alike) in found.items():
        # Shards round by draws of their own, so bfloat16 agrees to its last bit.
        tolerance = 1e-5 if kind.startswith("torch.float32") else 1e-2
        assert sharded == pytest.approx(whole, rel=tolerance), kind
        assert alike, kind
