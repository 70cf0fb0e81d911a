"""The student computes what the published one does, and is loaded strictly or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, Qwen3Config, Qwen3ForCausalLM

from stage2_student.attention import BY_ROWS
from stage2_student.release.released_format import save_released
from stage2_student.student import Student, load_model, load_student
from stage2_student.student_source import StudentConfig, open_student, read_model_config
from tests.cache_builders import MASK_ID, NUM_IDS, save_tokenizer, tokenizer_facts
from tests.support import PROJECT_ROOT
from tide_cache.errors import CompatibilityError, ConfigError, FormatError
from tide_cache.geometry import block_diffusion_mask

BLOCK = 4


def tiny_config(**changes: Any) -> Qwen3Config:
    values = {
        "vocab_size": NUM_IDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # far from uniform, so that a wrong mask shows
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen3Config(**{**values, **changes})


def tiny_model(**changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    return Qwen3ForCausalLM(tiny_config(**changes)).eval()


@torch.no_grad()
def plain_logits(
    model: Qwen3ForCausalLM, input_ids_1S: torch.Tensor, block_size: int = BLOCK
) -> torch.Tensor:
    """Logits of the first half of one [xt, x0], (L, V): every position, every pair."""
    num_positions = input_ids_1S.shape[1] // 2
    visible_SS = torch.from_numpy(block_diffusion_mask(num_positions, block_size))
    student = Student(model)
    hidden_LD = student(
        input_ids_1S,
        torch.arange(num_positions).repeat(2)[None],
        visible_SS[None, None],
        torch.arange(num_positions),
    )
    logits_LV: torch.Tensor = hidden_LD @ student.head_VD.T
    return logits_LV


def test_the_published_student_on_its_own_input(golden_dir: Path) -> None:
    folder = golden_dir / "models/student_tiny"
    config = read_model_config(json.loads((folder / "config.json").read_text()), where="golden")
    model = load_model(folder, config, dtype=torch.float32, attention_implementation=BY_ROWS)
    expected = load_file(folder / "expected.safetensors")
    for input_ids_S, logits_LV in zip(
        expected["train_input"], expected["train_logits"], strict=True
    ):
        found_LV = plain_logits(model, input_ids_S[None], block_size=32)
        assert torch.allclose(found_LV, logits_LV, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("half", "position", "seen_by"),
    [
        ("xt", 5, {1}),  # noise of block 1 reaches block 1 alone
        ("x0", 5, {2, 3}),  # its clean tokens reach the blocks behind it, never itself
        ("x0", 13, set()),
        ("xt", 0, {0}),
    ],
)
def test_who_sees_what(half: str, position: int, seen_by: set[int]) -> None:
    model = tiny_model()
    ids_1L = torch.randint(2, 38, (1, 16), generator=torch.Generator().manual_seed(1))
    xt_1L = torch.where(torch.arange(16) % 3 == 0, MASK_ID, ids_1L)
    before_LV = plain_logits(model, torch.cat([xt_1L, ids_1L], dim=1))
    changed = {"xt": xt_1L.clone(), "x0": ids_1L.clone()}
    changed[half][0, position] = (changed[half][0, position] + 7) % 30 + 2
    after_LV = plain_logits(model, torch.cat([changed["xt"], changed["x0"]], dim=1))
    moved_L = (after_LV - before_LV).abs().amax(dim=1) > 1e-4
    assert set((moved_L.nonzero()[:, 0] // BLOCK).tolist()) == seen_by


FLEX_AGAINST_SDPA = """
import torch
from transformers import Qwen3ForCausalLM
from stage2_student.attention import BY_ROWS, FLEX, make_mask, tile_size
from stage2_student.packing import pack_rows
from stage2_student.student import Student
from tests.unit.test_packing import draw_rows
from tests.unit.test_student import tiny_config

config = tiny_config(head_dim=64, hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
for lengths in ([160, 128], [200, 37, 64]):
    noised = draw_rows(lengths, masked=0.2)
    outputs = []
    for implementation in (BY_ROWS, FLEX):
        tile = tile_size(implementation)
        packed = pack_rows(noised, block_size=32, mask_token_id=39, tile=tile)
        torch.manual_seed(0)
        config._attn_implementation = implementation
        student = Student(Qwen3ForCausalLM(config).eval())
        mask = make_mask(
            packed.places, implementation=implementation, device=torch.device("cpu")
        )
        with torch.no_grad():
            outputs.append(
                student(
                    torch.from_numpy(packed.ids_N)[None],
                    torch.from_numpy(packed.position_N)[None],
                    mask,
                    torch.from_numpy(packed.masked_index_P),
                )
            )
    print("difference", float((outputs[0] - outputs[1]).abs().max()), len(outputs[0]))
"""


@pytest.mark.slow
def test_flex_attention_agrees_with_sdpa() -> None:
    # In a process of its own: flex on a CPU can take the interpreter down.
    result = subprocess.run(
        [sys.executable, "-c", FLEX_AGAINST_SDPA],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if result.returncode < 0:
        pytest.skip(f"flex_attention took the process down (signal {-result.returncode})")
    assert result.returncode == 0, result.stderr
    found = [float(line.split()[1]) for line in result.stdout.splitlines() if "difference" in line]
    assert len(found) == 2
    assert max(found) < 1e-5


ARCHITECTURE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}


def random_student(tokenizer: Path, **changes: Any) -> StudentConfig:
    values = {"init": "random", "tokenizer": str(tokenizer), "architecture": ARCHITECTURE}
    return StudentConfig.model_validate({**values, **changes})


def load(config: StudentConfig, seed: int = 0) -> Qwen3ForCausalLM:
    return load_student(
        open_student(config), dtype=torch.float32, attention_implementation="sdpa", seed=seed
    )


def test_a_random_student_depends_on_the_seed_alone(tmp_path: Path) -> None:
    config = random_student(save_tokenizer(tmp_path))
    torch.manual_seed(1)
    one = load(config, seed=5)
    torch.manual_seed(2)
    same, other = load(config, seed=5), load(config, seed=6)
    assert torch.equal(one.model.embed_tokens.weight, same.model.embed_tokens.weight)
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert one.config.vocab_size == NUM_IDS
    assert one.lm_head.weight is one.model.embed_tokens.weight


@pytest.mark.parametrize(("num_rows", "tied"), [(39, True), (39, False), (64, True), (64, False)])
def test_an_autoregressive_qwen3_gains_a_mask_token(
    tmp_path: Path, num_rows: int, tied: bool
) -> None:
    model = tiny_model(vocab_size=num_rows, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, with_mask=False)
    source = open_student(StudentConfig(init=str(tmp_path)))
    assert source.mask_token_id == MASK_ID
    loaded = load(StudentConfig(init=str(tmp_path)))
    rows = loaded.model.embed_tokens.weight
    assert rows.shape[0] == max(num_rows, NUM_IDS) == source.num_embedding_rows
    for before, after in ((model.model.embed_tokens, rows), (model.lm_head, loaded.lm_head.weight)):
        trained = before.weight[:MASK_ID]
        assert torch.equal(after[:MASK_ID], trained)
        assert torch.allclose(after[MASK_ID], trained.mean(dim=0), atol=1e-6)
    # A set prepared with the tokenizer as it was is recognised, and so is one with the mask added.
    assert tokenizer_facts(tmp_path).sha256 in source.tokenizer_sha256s
    source.tokenizer.save_pretrained(tmp_path / "with-mask")
    assert tokenizer_facts(tmp_path / "with-mask").sha256 in source.tokenizer_sha256s


def released(folder: Path, **changes: Any) -> Qwen3ForCausalLM:
    folder.mkdir(exist_ok=True)
    save_tokenizer(folder)
    model = tiny_model(**changes)
    save_released(
        model,
        open_student(random_student(folder)).tokenizer,
        folder,
        block_size=BLOCK,
        mask_token_id=MASK_ID,
    )
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_student_loads_as_the_released_ones_do(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    model = released(tmp_path / "student", tie_word_embeddings=tied)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "student", trust_remote_code=True)
    assert type(theirs).__name__ == "A2DQwen3LMHeadModel"
    ids = torch.randint(2, 38, (2, 16), generator=torch.Generator().manual_seed(1))
    everything = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    blocks = torch.from_numpy(block_diffusion_mask(8, BLOCK))[None, None]
    padding = torch.ones(2, 16, dtype=torch.long)
    padding[1, 11:] = 0
    for given, ours in (
        (None, everything),
        (blocks, blocks),
        (padding, padding[:, None, None, :].bool().expand(2, 1, 16, 16)),
    ):
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask={"full_attention": ours}).logits
            assert torch.allclose(theirs(ids, given).logits, expected, atol=1e-5, rtol=0)
    theirs.set_attn_implementation("eager")  # adds masks to scores: a bool one would be wrong
    with torch.no_grad():
        assert torch.allclose(theirs(ids, padding).logits, expected, atol=1e-5, rtol=0)


def test_a_saved_student_starts_another_run_with_the_same_bits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = released(tmp_path / "student")
    config = StudentConfig(init=str(tmp_path / "student"))
    source = open_student(config)
    assert "model of type" not in capfd.readouterr().err  # no warning that means nothing
    assert (source.block_size, source.needs_mask_row) == (BLOCK, False)
    assert tokenizer_facts(tmp_path / "student").sha256 in source.tokenizer_sha256s
    loaded = load(config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_rotary_settings_survive_and_stand_where_4_57_reads_them(tmp_path: Path) -> None:
    released(tmp_path / "s", rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    values = json.loads((tmp_path / "s/config.json").read_text())
    assert values["rope_theta"] == 12345.0
    assert read_model_config(values, where="s").rope_parameters["rope_theta"] == 12345.0


def drop(weights: dict[str, torch.Tensor]) -> None:
    weights.pop("model.norm.weight")


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.extra"] = torch.zeros(1)


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "1 tensors do not fit config.json; first: model.norm.weight is missing"),
        (add, "first: model.extra is not part of the model"),
        (reshape, r"first: model.norm.weight: expected shape \(32,\), got \(5,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    released(tmp_path / "s")
    path = tmp_path / "s/model.safetensors"
    weights = load_file(path)
    spoil(weights)
    save_file(weights, path)
    with pytest.raises(CompatibilityError, match=message):
        load(StudentConfig(init=str(tmp_path / "s")))


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    released(tmp_path / "s")
    path = tmp_path / "s/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors: not a whole safetensors file"):
        load(StudentConfig(init=str(tmp_path / "s")))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    released(tmp_path / "s")
    (tmp_path / "s/model.safetensors").rename(tmp_path / "s/pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.safetensors: no such file; weights are read"):
        load(StudentConfig(init=str(tmp_path / "s")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected one of a2d-qwen3, qwen3, got 'llama'"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_other_architectures_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CompatibilityError, match=message):
        read_model_config(values, where="student")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "random"}, "needs the keys architecture and tokenizer"),
        ({"init": "x", "architecture": ARCHITECTURE}, "only goes with init: random"),
        (
            {"init": "random", "tokenizer": "x", "architecture": {**ARCHITECTURE, "num_heads": 3}},
            "hidden_size: expected a multiple of num_heads",
        ),
    ],
)
def test_half_a_student_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentConfig.model_validate(values)


def test_a_tokenizer_with_another_mask_token_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"student.mask_token: .*'<\|mask\|>', got '<mask>'"):
        open_student(random_student(tokenizer, mask_token="<mask>"))


def test_a_student_that_is_nowhere_is_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    config = StudentConfig(init=str(tmp_path / "none"), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ConfigError, match=r"student.init .*none': neither a folder nor"):
        open_student(config)
    with pytest.raises(ConfigError, match=r"student.tokenizer .*none': cannot load it"):
        open_student(StudentConfig(init=str(tmp_path / "none")))
