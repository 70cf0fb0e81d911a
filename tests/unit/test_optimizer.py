"""Weights and moments of few bits: what they hold, that they learn, and that they come back."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage2_student.config import TrainConfig
from stage2_student.optimizer import (
    OptimizerConfig,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    require_optimizer,
    save_optimizer,
    set_learning_rate,
)
from stage2_student.plan import open_run
from tests.cache_builders import SetShape, make_workshop
from tide_cache.errors import ConfigError, FormatError

KINDS = [
    (torch.float32, "float32"),
    (torch.float32, "8bit"),
    (torch.bfloat16, "float32"),
    (torch.bfloat16, "8bit"),
]


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # 4,096 values in whole blocks, a matrix that is too small for blocks, and vectors.
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10), nn.LayerNorm(10)).to(dtype)


def make(dtype: torch.dtype, state: str, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model(dtype)
    values = {"learning_rate": 1e-3, "state": state, **changes}
    return model, make_optimizer(model, OptimizerConfig.model_validate(values))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One update of which everything is a function of its number."""
    set_learning_rate(optimizer, 1e-3 / (1 + number))
    random = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def inner_tensors(value: Tensor) -> list[Tensor]:
    return [value.codes, value.scale] if hasattr(value, "codes") else [value]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("dtype", "state"), KINDS)
def test_saved_and_loaded_it_goes_on_to_the_same_bits(
    tmp_path: Path, dtype: torch.dtype, state: str
) -> None:
    straight, optimizer = make(dtype, state)
    for number in range(4):
        step(straight, optimizer, number)
    stopped, optimizer = make(dtype, state)
    for number in range(2):
        step(stopped, optimizer, number)
    save_optimizer(optimizer_tensors(optimizer, stopped), tmp_path / "o.safetensors")
    resumed, optimizer = make(dtype, state)
    resumed.load_state_dict(stopped.state_dict())
    load_optimizer(optimizer, resumed, tmp_path / "o.safetensors")
    torch.manual_seed(99)  # what the process drew before does not matter
    for number in range(2, 4):
        assert not same(resumed, straight)
        step(resumed, optimizer, number)
    assert same(resumed, straight)


@pytest.mark.parametrize(("dtype", "state"), KINDS)
def test_the_bytes_are_those_that_the_config_promises(dtype: torch.dtype, state: str) -> None:
    model, optimizer = make(dtype, state)
    step(model, optimizer, 0)
    matrix = next(model.parameters())
    for parameter, values in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            held = sum(tensor.nbytes for tensor in inner_tensors(values[key]))
            if state == "8bit" and parameter is matrix:
                assert held == parameter.numel() * (1 + 4 / 256)
            else:
                assert held == 4 * parameter.numel()
    assert len(optimizer.state) == len(list(model.parameters()))


def test_updates_far_below_the_last_bit_of_a_weight_add_up() -> None:
    """64 updates of 2^-12 of the weight: rounded to the nearest, bfloat16 would never move."""
    model, optimizer = make(torch.bfloat16, "float32", weight_decay=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for _ in range(64):
        set_learning_rate(optimizer, 2**-12)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)  # AdamW's step is then the rate itself
        optimizer.step()
    matrix = next(model.parameters()).detach().float()
    assert float(matrix.mean()) == pytest.approx(1 - 64 * 2**-12, abs=2e-4)
    assert matrix.std() > 0  # each weight was rounded by itself


def test_every_rank_rounds_alike() -> None:
    one, first = make(torch.bfloat16, "float32")
    other, second = make(torch.bfloat16, "float32")
    for number in range(3):
        torch.manual_seed(1)
        step(one, first, number)
        torch.manual_seed(2)
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(2))
        step(other, second, number)
        assert torch.rand(3).equal(drawn)  # the generator of the program was left alone
    assert same(one, other)


@pytest.mark.parametrize(("dtype", "state"), KINDS[1:])
def test_few_bits_follow_float32(dtype: torch.dtype, state: str) -> None:
    """On a problem with a minimum: to about the precision of the weights."""
    targets = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))

    def solve(dtype: torch.dtype, state: str) -> float:
        layer = nn.Linear(64, 64, bias=False).to(dtype)
        with torch.no_grad():
            layer.weight.zero_()
        config = OptimizerConfig(learning_rate=0.05, weight_decay=0.0, state=state)  # type: ignore[arg-type]
        optimizer = make_optimizer(layer, config)
        for number in range(300):
            set_learning_rate(optimizer, 0.05 * (1 - number / 300))
            (layer.weight.float() - targets).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return float((layer.weight.detach().float() - targets).abs().mean())

    assert solve(torch.float32, "float32") < 1e-4
    assert solve(dtype, state) < (1e-4 if dtype == torch.float32 else 4e-3)


def test_a_state_of_another_kind_is_named(tmp_path: Path) -> None:
    model, optimizer = make(torch.float32, "8bit")
    step(model, optimizer, 0)
    path = tmp_path / "o.safetensors"
    save_optimizer(optimizer_tensors(optimizer, model), path)
    model, optimizer = make(torch.float32, "float32")
    with pytest.raises(FormatError, match=r"o\.safetensors: exp_avg/0\.weight is missing"):
        load_optimizer(optimizer, model, path)
    tensors = load_file(path)
    model, optimizer = make(torch.float32, "8bit")
    save_file({**tensors, "exp_avg/extra": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="exp_avg/extra does not fit the model"):
        load_optimizer(optimizer, model, path)
    save_file({**tensors, "exp_avg.codes/0.weight": torch.zeros(64, 64)}, path)
    message = r"exp_avg\.codes/0\.weight: expected torch\.uint8 \(64, 64\), got torch\.float32"
    with pytest.raises(FormatError, match=message):
        load_optimizer(optimizer, model, path)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"state": "8bit"}}, "optimizer.state: 8bit: needs torchao"),
        ({"dtype": "bfloat16"}, "student.dtype: bfloat16: needs torchao"),
    ],
)
def test_without_torchao_it_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name)
    )
    workshop = make_workshop(tmp_path, SetShape(num_samples=4))
    values = workshop.config(optimizer=changes.get("optimizer", {}))
    values["student"] = {**values["student"], "dtype": changes.get("dtype", "float32")}
    with pytest.raises(ConfigError, match=message) as refusal:
        open_run(TrainConfig.model_validate(values), str(workshop.cache))
    assert refusal.value.hint == "pip install 'tide-cache[lowbit]'"
    require_optimizer(OptimizerConfig(), "float32")
