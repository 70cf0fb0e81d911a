"""The launch configs in examples/accelerate are understood by accelerate, down to its plugins."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.cache_builders import SetShape, make_workshop
from tests.support import PROJECT_ROOT

FOLDER = PROJECT_ROOT / "examples/accelerate"
EXPECTED = {
    "one_gpu": (DistributedType.NO, 1, 1),
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "two_nodes_ddp": (DistributedType.MULTI_GPU, 2, 16),
}


def launch_arguments(name: str, *options: str) -> Any:
    """What `accelerate launch` makes of a file and the rest of its command line."""
    path = str(FOLDER / f"{name}.yaml")
    words = ["--config_file", path, *options, "-m", "stage2_student", "config.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return args


def test_all_files_are_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_is_loaded(name: str) -> None:
    # accelerate refuses keys that it does not know.
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    found = (config.distributed_type, config.num_machines, config.num_processes)
    assert found == EXPECTED[name]
    assert config.mixed_precision == "no"


def test_the_second_machine_overrides_its_rank() -> None:
    args = launch_arguments(
        "two_nodes_ddp", "--machine_rank", "1", "--main_process_ip", "192.0.2.7"
    )
    assert (args.multi_gpu, args.machine_rank, args.main_process_ip) == (True, 1, "192.0.2.7")
    assert (args.num_machines, args.num_processes, args.main_process_port) == (2, 16, 29500)
    prepare_multi_gpu_env(args)
    assert (args.nproc_per_node, args.nnodes) == ("8", "2")


def test_fsdp2_wraps_the_students_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    args = launch_arguments("fsdp2")
    assert args.use_fsdp
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=40,
    )
    model = Qwen3ForCausalLM(config)
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert wrapped == {type(model.model.layers[0])}


@pytest.mark.slow
def test_one_process_trains_under_the_launcher(tmp_path: Path) -> None:
    workshop = make_workshop(tmp_path, SetShape(num_samples=8))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(workshop.config(max_steps=2)))
    subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(FOLDER / "one_gpu.yaml")),
            *("-m", "stage2_student", str(config), "--cache", str(workshop.cache)),
        ],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    assert (workshop.folder / "run/final/model.safetensors").is_file()
