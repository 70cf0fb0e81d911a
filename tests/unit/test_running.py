"""Checkpointing keeps less and gives the same gradients; compiled layers compute the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from stage2_student.running import set_up_layers
from stage2_student.student_source import StudentConfig
from tests.unit.test_student import BLOCK, tiny_config
from tide_cache.geometry import block_diffusion_mask


def make(**choices: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny_config(num_hidden_layers=4)).train()
    return set_up_layers(model, StudentConfig(init="somewhere", **choices))


def loss_of(model: Qwen3ForCausalLM) -> tuple[Tensor, int]:
    """Return a loss and the bytes that its graph keeps beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_BS = torch.arange(4 * 32).reshape(4, 32) % 37
    visible = torch.from_numpy(block_diffusion_mask(16, BLOCK))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(
            input_ids=ids_BS,
            attention_mask={"full_attention": visible[None, None]},
            position_ids=torch.arange(16).repeat(2)[None],
            use_cache=False,
        ).last_hidden_state
        loss = (hidden * torch.linspace(-1, 1, 32)).square().sum()
    return loss, sum(kept.values())


def test_checkpointing_keeps_less_and_changes_no_bit() -> None:
    plain, kept_plain = loss_of(model := make())
    less, kept_less = loss_of(other := make(activation_checkpointing=True))
    assert kept_less < kept_plain / 3
    assert torch.equal(plain, less)
    plain.backward()  # type: ignore[no-untyped-call]
    less.backward()  # type: ignore[no-untyped-call]
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, two.grad)


@pytest.mark.slow
def test_compiled_layers_compute_the_same() -> None:
    torch._dynamo.reset()
    plain, _ = loss_of(make())
    model = make(compile=True)
    compiled, _ = loss_of(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
    assert set(model.state_dict()) == set(make().state_dict())
