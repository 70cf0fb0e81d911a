"""Parameters and operations from `config.json` alone: published sizes, and a flop counter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stage1_teacher.gpus import GPUS, find_gpu
from stage1_teacher.teachers.base import ScoreRequest, Stream, TeacherConfig
from stage1_teacher.teachers.batching import pad_batch
from stage1_teacher.teachers.checkpoint import open_checkpoint
from stage1_teacher.teachers.hf import load_hf_teacher
from stage1_teacher.teachers.layouts import plan_sequences
from stage1_teacher.teachers.model_cost import ModelCost, measure_model
from tests.teacher_checkpoints import MASK_ID, make_model, write_checkpoint
from tide_cache.errors import ConfigError, FormatError

LLADA2_MINI = {
    "model_type": "llada2_moe",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rope_theta": 6e5,
    "partial_rotary_factor": 0.5,
}
WEDLM_8B = {
    "model_type": "wedlm",
    "qk_norm": True,
    "attention_bias": False,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1e6,
}


def measure(folder: Path, config: dict[str, Any]) -> ModelCost:
    (folder / "config.json").write_text(json.dumps(config))
    return measure_model(open_checkpoint(str(folder), need_weights=False))


def test_llada2_mini_has_16_billion_parameters_and_a_billion_active(tmp_path: Path) -> None:
    cost = measure(tmp_path, LLADA2_MINI)
    assert cost.num_parameters / 1e9 == pytest.approx(16.26, abs=0.005)
    assert cost.num_active / 1e9 == pytest.approx(1.1, abs=0.02)
    per_token = cost.body_flops(1) + cost.head_flops(1)
    assert per_token / 1e9 == pytest.approx(2.2, abs=0.03)


def test_wedlm_8b_is_a_qwen3_8b(tmp_path: Path) -> None:
    """Qwen3-8B: 8.2e9 parameters, 6.95e9 of them outside the embeddings (its model card)."""
    cost = measure(tmp_path, WEDLM_8B)
    assert cost.num_parameters / 1e9 == pytest.approx(8.19, abs=0.005)
    assert cost.num_body_active / 1e9 == pytest.approx(6.95, abs=0.005)
    assert cost.attention_channels == 36 * 32 * 128


def test_weights_are_not_needed_for_counting_but_for_everything_else(tmp_path: Path) -> None:
    measure(tmp_path, WEDLM_8B)
    with pytest.raises(FormatError, match=r"expected model\.safetensors"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "llada2_moe"])
def test_operations_are_those_of_a_real_forward(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, family, make_model(family, num_layers=3))
    cost = measure_model(open_checkpoint(str(tmp_path)))
    teacher = load_hf_teacher(
        TeacherConfig(
            model=str(tmp_path),
            attention="block_diffusion",
            dtype="float32",
            device="cpu",
            block_size=4,
            mask_token_id=MASK_ID,
        )
    )
    masked = np.arange(20) % 3 > 0
    request = ScoreRequest(
        clean_ids_L=np.arange(20),
        streams=(Stream(masked_L=masked, wanted_P=np.flatnonzero(masked)),),
    )
    sequences = plan_sequences([request], teacher.layout, max_tokens=1000)
    num_tokens = len(sequences[0].tokens)
    batch = pad_batch([sequence.tokens for sequence in sequences])
    # The plain kernel: the others' operations are not known to the counter on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden_BNd = teacher.forward(batch)
    expected = cost.body_flops(num_tokens) + cost.attention_flops(num_tokens**2)
    # The counter also sees the rotary angles: one product of a position and a frequency each.
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        teacher.logits(hidden_BNd[0])
    assert counter.get_total_flops() == cost.head_flops(num_tokens)


def test_gpus_are_found_by_name_and_near_misses_are_named() -> None:
    assert find_gpu("H100") is GPUS["h100"]
    assert find_gpu("RTX 4090") is GPUS["rtx4090"]
    with pytest.raises(ConfigError, match=r"--gpu: expected one of a100, .* \(did you mean 'h200'"):
        find_gpu("h20")
    for gpu in GPUS.values():
        # Dense figures of float16 with float32 sums: between an A100's third and twice a B200's.
        assert 1e14 < gpu.peak_flops < 5e15
        assert 2e10 < gpu.memory_bytes < 5e11
