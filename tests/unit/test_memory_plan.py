"""What a step is said to need is what real models and optimisers keep."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from stage2_student.attention import BY_ROWS, row_mask
from stage2_student.cli import main
from stage2_student.config import TrainConfig
from stage2_student.memory_plan import (
    RESERVED_BYTES,
    Load,
    Setting,
    ladder,
    memory_use,
    model_size,
    plan_memory,
    saved_bytes,
)
from stage2_student.memory_table import memory_plan_of, positions_per_row, teacher_head_bytes
from stage2_student.optimizer import OptimizerConfig, make_optimizer
from stage2_student.packing import PackedRows, pack_rows
from stage2_student.plan import num_parameters, open_run
from stage2_student.running import set_up_layers
from stage2_student.student_source import StudentConfig
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.integration.test_train_refusals import weightless_student
from tests.unit.test_packing import draw_rows
from tide_cache.cache import open_cache
from tide_cache.config import load_config
from tide_cache.manifest import CacheManifest, FileFacts
from tide_cache.payload_facts import HiddenFacts
from tide_cache.payloads.candidates import CODEC_FILE
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = [
    Setting(),
    Setting(precision="bf16"),
    Setting(precision="bf16", weights="bfloat16"),
]


def config_of(**changes: Any) -> Qwen3Config:
    values = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    return Qwen3Config(**{**values, **changes})


def kept_bytes(config: Qwen3Config, setting: Setting, packed: PackedRows) -> int:
    """The bytes of all storages that autograd keeps after a forward, beside the parameters."""
    config._attn_implementation = BY_ROWS
    model = Qwen3ForCausalLM._from_config(config, dtype=DTYPES[setting.weights]).train()
    again = setting.activation_checkpointing
    set_up_layers(model, StudentConfig(init="x", activation_checkpointing=again))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    mask = row_mask(packed.places, torch.device("cpu"))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=setting.is_autocast),
    ):
        model.model(
            input_ids=torch.from_numpy(packed.ids_N)[None],
            attention_mask={"full_attention": mask},
            position_ids=torch.from_numpy(packed.position_N)[None],
            use_cache=False,
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("setting", FORMATS, ids=["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("changes", "length"),
    [({}, 192), ({"num_key_value_heads": 4, "head_dim": 32}, 224), ({"hidden_size": 128}, 256)],
)
def test_activations_are_what_autograd_keeps(
    setting: Setting, again: bool, changes: dict[str, Any], length: int
) -> None:
    config = config_of(**changes)
    setting = setting.checkpointed if again else setting
    size = model_size(config)
    noised = draw_rows([length, length - 32], masked=0.9)
    packed = pack_rows(noised, block_size=32, mask_token_id=39)
    places = packed.places
    clean_B, noised_B = places.num_clean_B, places.num_noised_B
    num_pairs = int((clean_B**2 + noised_B * (clean_B + noised_B)).sum())
    num_tokens = len(packed.ids_N)
    said = saved_bytes(size, setting, Load(num_tokens=num_tokens, num_pairs=num_pairs))
    if setting.is_autocast and not again:
        said += 2 * size.layer_matrices  # the casts that the graph holds; all count as `casts`
    found = kept_bytes(config, setting, packed)
    if again:  # a checkpoint hands the rotary table on without showing it to autograd
        said -= 2 * setting.weight_bytes * config.head_dim * num_tokens
    assert said == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_counted(tied: bool, bias: bool) -> None:
    config = config_of(tie_word_embeddings=tied, attention_bias=bias)
    model = Qwen3ForCausalLM(config)
    size = model_size(config)
    assert size.num_parameters == sum(p.numel() for p in model.parameters())
    assert size.vectors == sum(p.numel() for p in model.parameters() if p.ndim < 2)
    grown = model_size(config, num_embedding_rows=1001)
    assert grown.num_parameters == size.num_parameters + 256 * (1 if tied else 2)


@pytest.mark.parametrize("setting", ladder()[:2] + ladder()[4::2], ids=str)
def test_weights_gradients_and_moments_are_what_the_optimiser_holds(setting: Setting) -> None:
    config = config_of(vocab_size=1024)
    model = Qwen3ForCausalLM._from_config(config, dtype=DTYPES[setting.weights])
    optimizer = make_optimizer(model, OptimizerConfig(state=setting.state))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = 0
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            parts = [state[key]]
            if hasattr(parts[0], "codes"):
                parts = [parts[0].codes, parts[0].scale]
            held += sum(part.nbytes for part in parts)
    use = memory_use(model_size(config), setting, load=Load(num_tokens=64))
    assert use.state == held
    assert use.weights == sum(p.nbytes for p in model.parameters())
    assert use.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    parts_of_use = dataclasses.asdict(use).values()
    assert use.total == sum(parts_of_use) + RESERVED_BYTES


def test_what_fits_and_what_is_chosen() -> None:
    size = model_size(config_of(hidden_size=1024, num_hidden_layers=12, vocab_size=50_000))
    own = Setting(precision="bf16")
    at: dict[str, Any] = {"positions_per_row": 512, "micro_batch": 6}
    need = memory_use(size, own, load=Load(num_tokens=6 * 1024)).total
    plan = plan_memory(size, own, gpu_bytes=need, **at)
    assert plan.chosen is plan.own
    assert plan.own.largest == 6
    tight = plan_memory(size, own, gpu_bytes=need - 1, **at)
    assert tight.own.largest == 4
    assert tight.chosen is not None
    fitting = [each for each in tight.settings if each.uses[6].total < need]
    assert tight.chosen == fitting[0]
    for each in tight.settings:
        totals = [each.uses[rows].total for rows in (1, 2, 4, 6, 8, 16)]
        assert totals == sorted(set(totals))
        fits = [rows for rows, use in each.uses.items() if use.total <= need - 1]
        assert each.largest == (max(fits) if fits else None)
    nothing = plan_memory(size, own, gpu_bytes=RESERVED_BYTES, **at)
    assert nothing.chosen is None
    assert all(each.largest is None for each in nothing.settings)


@pytest.mark.parametrize("setting", ladder(), ids=str)
def test_the_keys_of_a_setting_are_keys_of_a_config(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(Workshop(folder=tmp_path).config()))
    words = [f"{key}={value}" for key, value in setting.overrides.items()]
    config = load_config(path, TrainConfig, words, section="train")
    assert (
        Setting(
            weights=config.student.dtype,
            precision=config.precision,
            state=config.optimizer.state,
            activation_checkpointing=config.student.activation_checkpointing,
        )
        == setting
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), SetShape(num_samples=8))


def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["tide-train", *words])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        main()
    shown = capsys.readouterr()
    assert stop.value.code in (0, None), shown.err
    return shown.out


def test_the_command_needs_no_weights(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = weightless_student(tmp_path / "student")
    assert not list(student.glob("*.safetensors"))
    values = workshop.config(student={"init": str(student)}, output=str(tmp_path / "run"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    words = (str(path), "--cache", str(workshop.cache), "--plan", "--gpu-memory")
    found = json.loads(show(capsys, monkeypatch, *words, "2", "--json"))
    run = open_run(TrainConfig.model_validate(values), str(workshop.cache))
    assert found == memory_plan_of(run, gpu_memory_gib=2).as_json()
    assert found["num_parameters"] == num_parameters(run.source)
    assert found["micro_batch"] == 8
    assert len(found["settings"]) == 10
    text = show(capsys, monkeypatch, *words, "2")
    assert "GiB of a step on a GPU of 2 GiB" in text
    assert "this config, x8: 1.5 GiB, fits" in text
    text = show(capsys, monkeypatch, *words, "1")
    assert "nothing fits: take a smaller student, shorter rows or a larger GPU" in text
    assert not (tmp_path / "run").exists()


def test_rows_are_as_long_as_the_set_allows(workshop: Workshop) -> None:
    cache = open_cache(workshop.cache)
    manifest, num_samples = cache.manifest, cache.num_samples
    mean = manifest.counts["num_positions"] / (num_samples * manifest.num_views)
    assert mean <= positions_per_row(manifest, num_samples) < mean + 1

    def with_longest(longest: Any) -> int:
        changed = manifest.model_copy(update={"config": {"student": {"max_length": longest}}})
        return positions_per_row(changed, num_samples)

    assert with_longest(512) == 512
    for nonsense in (1, -3, "512", None, 1 << 40):
        assert with_longest(nonsense) == positions_per_row(manifest, num_samples)


def test_a_teachers_head_counts_where_it_is_replayed(workshop: Workshop) -> None:
    manifest = open_cache(workshop.cache).manifest
    assert isinstance(manifest, CacheManifest)
    hidden = HiddenFacts(
        hidden_size=8, vocab_size=39, bands=(4,), num_wide=0, step=0.1, fit_positions=9
    )
    files = [
        FileFacts(path=path, size_bytes=size, sha256="0" * 64)
        for path, size in ((HEAD_FILE, 7000), (TRANSFORM_FILE, 300), (CODEC_FILE, 1))
    ]
    replayed = manifest.model_copy(
        update={"payloads": (*manifest.payloads, hidden), "files": tuple(files)}
    )

    def count(found: CacheManifest, **objective: Any) -> int:
        values = workshop.config(objective=objective)
        return teacher_head_bytes(found, TrainConfig.model_validate(values))

    assert count(replayed, losses=["ce", "tidal"]) == 7300
    assert count(replayed, losses=["ce"]) == 0
    assert count(replayed, losses=["kl"], tail="uniform") == 0
    assert count(manifest, losses=["kl"]) == 0
