"""Loading teachers: types, devices, what is refused and how it is said, identity, memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage1_teacher.teachers import load_teacher
from stage1_teacher.teachers.base import TeacherConfig
from stage1_teacher.teachers.hf import HfTeacher, load_hf_teacher
from stage1_teacher.teachers.identity import identify_teacher
from stage1_teacher.teachers.llada2 import read_config
from stage1_teacher.teachers.loading import build_without_storage
from tests.support import PROJECT_ROOT
from tests.teacher_checkpoints import MASK_ID, edit_config, make_model, write_checkpoint
from tide_cache.errors import CompatibilityError, ConfigError, FormatError, TideError


def load(folder: Path, **changes: Any) -> HfTeacher:
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "block_size": 4,
        "mask_token_id": MASK_ID,
    }
    return load_hf_teacher(TeacherConfig(**settings | changes))


def test_types_are_what_was_asked_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2_moe", make_model("llada2_moe"))
    model = load(folder, dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    bias = buffers["model.layers.1.mlp.gate.e_score_correction_bias"]
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, stored)
    # Half of head_dim 8 rotates: two frequencies, in float32 whatever the weights are.
    torch.testing.assert_close(
        buffers["model.rotary_emb.inv_freq"], 6e5 ** -torch.tensor([0.0, 0.5]), rtol=1e-6, atol=0
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_the_real_config_gives_the_real_model() -> None:
    # LLaDA2.0-mini as published: 16.26 billion parameters, of which nothing is allocated here.
    raw = {
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
        "num_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "rope_theta": 600000,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    }
    config = read_config(raw, Path("config.json"))
    model = build_without_storage("Glm4MoeForCausalLM", config, "sdpa")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(num_parameters / 1e9, 2) == 16.26
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_explicit_device_map_is_followed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2_moe", make_model("llada2_moe"), num_files=2)
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    mapped = load(folder, device="auto", device_map=dict.fromkeys(parts, "cpu"))
    ids = torch.arange(8)[None]
    assert torch.equal(mapped.model(ids).logits, load(folder).model(ids).logits)
    with pytest.raises(ConfigError, match=r"device_map: no entry covers lm_head\.weight"):
        load(folder, device="auto", device_map={"model": "cpu"})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda:0 is not there: this process sees 0 GPUs"):
            load(folder, device="auto", device_map={"": "cuda:0"})
        with pytest.raises(ConfigError, match="auto spreads over GPUs"):
            load(folder, device="auto", device_map="auto")


# --- checkpoints that must be refused, each with its own message


Breakage = Callable[[Path], None]


def drop_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, path)


def add_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.attention.extra.bias": torch.zeros(3)}, path)


def add_expert(folder: Path) -> None:
    path = folder / "model.safetensors"
    name = "model.layers.1.mlp.experts.8.down_proj.weight"
    save_file(load_file(path) | {name: torch.zeros(32, 16)}, path)


def widen_projection(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.attention.query_key_value.weight"
    weights[name] = torch.cat([weights[name], torch.zeros(8, 32)])
    save_file(weights, path)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def set_fields(**fields: Any) -> Breakage:
    return lambda folder: edit_config(folder, **fields)


@pytest.mark.parametrize(
    ("breakage", "error", "message"),
    [
        (drop_tensor, CompatibilityError, "nothing, or too little, for .*gate_up_proj of shape"),
        (add_tensor, CompatibilityError, "unexpected tensor model.layers.0.attention.extra.bias"),
        (add_expert, CompatibilityError, "experts.down_proj has only 8 entries"),
        (widen_projection, CompatibilityError, "of its shape .72, 32. only 2048 values have"),
        (truncate, FormatError, "model.safetensors: not a whole safetensors file.*download it"),
        (pickle_instead, FormatError, "found only pytorch_model.bin; pickled weights are never"),
        (set_fields(hidden_size=64), CompatibilityError, "expected shape .*64.*, got .*32"),
        (set_fields(num_experts=None), CompatibilityError, "config.json: num_experts: expected"),
        (set_fields(score_function="softmax"), CompatibilityError, "score_function: expected 'sig"),
        (set_fields(rope_scaling={"type": "yarn"}), CompatibilityError, "rope_scaling: expected n"),
        (set_fields(use_bias=True), CompatibilityError, "use_bias: expected False, got True"),
        (set_fields(model_type="gemma2"), CompatibilityError, "model_type: expected one of wedlm"),
        (set_fields(model_type="llada2"), CompatibilityError, "did you mean 'llada2_moe'"),
        (set_fields(quantization_config={}), CompatibilityError, "use the unquantised checkpoint"),
        (set_fields(final_logit_softcapping=30.0), CompatibilityError, "expected a plain output"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, breakage: Breakage, error: type[TideError], message: str
) -> None:
    folder = write_checkpoint(tmp_path, "llada2_moe", make_model("llada2_moe"))
    load(folder)
    breakage(folder)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
            | {"max_window_layers": 0},
            "layer_types: expected full_attention in every layer, got sliding_attention",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type: expected one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        ("wedlm", {"qk_norm": False}, "qk_norm: expected true, got False; only the Qwen3-based"),
        ("wedlm", {"head_dim": None}, "config.json: head_dim: expected a value, got none"),
    ],
)
def test_attention_that_cannot_be_posed_is_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path, family, make_model(family))
    edit_config(folder, **fields)
    with pytest.raises(CompatibilityError, match=message):
        load(folder)


def test_only_diffusion_models_have_a_native_attention(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen3", make_model("qwen3"))
    with pytest.raises(ConfigError, match="attention: native: qwen3 checkpoints have no diffusion"):
        load(folder, attention="native")
    published = {"wedlm": "block_diffusion", "llada2_moe": "bidirectional", "llama": None}
    for family, layout in published.items():
        folder = write_checkpoint(tmp_path / family, family, make_model(family))
        assert load(folder).identity.attention == (layout or "block_diffusion")


def test_a_second_head_beside_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    model = make_model("qwen3", tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path, "qwen3", model)
    path = folder / "model.safetensors"
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, path)
    load(folder)
    save_file(weights | {"lm_head.weight": head + 1}, path)
    with pytest.raises(CompatibilityError, match=r"tie_word_embeddings is true, but model\.safet"):
        load(folder)


def test_index_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a", "qwen3", make_model("qwen3"), num_files=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../b/model.safetensors"}}))
    with pytest.raises(FormatError, match="is not a file of this folder"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"x": "model-00009-of-00009.safetensors"}}))
    with pytest.raises(FormatError, match=r"00009\.safetensors is missing"):
        load(folder)


def test_a_model_that_is_nowhere_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: \./missing is not a folder"):
        load_teacher(TeacherConfig(model="./missing"))
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_teacher(TeacherConfig(model=str(tmp_path)))
    folder = write_checkpoint(tmp_path / "here", "qwen3", make_model("qwen3"))
    with pytest.raises(ConfigError, match=r"revision: .* is a folder, which has none"):
        load(folder, revision="main")


def test_no_code_of_the_checkpoint_is_run(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "wedlm", make_model("wedlm"))
    (folder / "modeling_wedlm.py").write_text("raise SystemExit('remote code was run')\n")
    (folder / "configuration_wedlm.py").write_text("raise SystemExit('remote code was run')\n")
    edit_config(folder, auto_map={"AutoConfig": "configuration_wedlm.WeDLMConfig"})
    load(folder)


# --- mask token and identity


def test_mask_token_comes_from_config_checkpoint_or_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path, "qwen3", make_model("qwen3"))
    with pytest.raises(ConfigError, match=r"mask_token_id: neither .* names a mask token; give"):
        load(folder, mask_token_id=None)
    added = [{"id": 91, "content": "<|mask|>"}, {"id": 92, "content": "[MASK]"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert load(folder, mask_token_id=None).mask_token_id == 91
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"}))
    assert load(folder, mask_token_id=None).mask_token_id == 92
    edit_config(folder, mask_token_id=93)
    assert load(folder, mask_token_id=None).mask_token_id == 93
    caplog.clear()
    assert load(folder, mask_token_id=94).mask_token_id == 94
    assert "94 from the config replaces 93" in caplog.text
    with pytest.raises(ConfigError, match=r"mask_token_id: .* has 96 rows of embedding, got 96"):
        load(folder, mask_token_id=96)


def test_identity_follows_weights_config_and_query(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "teacher", "wedlm", make_model("wedlm"), num_files=2)
    config = TeacherConfig(model=str(folder), block_size=4, dtype="float32")
    first = identify_teacher(config)
    assert first == load_teacher(config).identity
    assert (first.name, first.revision) == ("teacher", None)  # never a path of this machine
    assert first.mask_token_id == MASK_ID
    files = sorted(folder.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    assert first.weights_sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()

    other = identify_teacher(config.model_copy(update={"attention": "native"}))
    assert (other.attention, other.weights_sha256) == ("observed_first", first.weights_sha256)
    changed = load_file(files[1])
    next(iter(changed.values())).view(-1)[0] += 1
    save_file(changed, files[1])
    second = identify_teacher(config)
    assert second.weights_sha256 != first.weights_sha256
    assert second.config_sha256 == first.config_sha256


# --- memory


LOAD_AND_MEASURE = """
import resource, sys
import psutil, transformers
from transformers import Glm4MoeForCausalLM
from stage1_teacher.teachers.hf import TeacherConfig, load_hf_teacher
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew here
before = psutil.Process().memory_info().rss
config = TeacherConfig(model=sys.argv[1], dtype="float32", device="cpu", mask_token_id=90)
teacher = load_hf_teacher(config)
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
weights = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
print(weights, peak * 1024 - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peaks from /proc")
def test_loading_llada2_does_not_hold_the_weights_twice(tmp_path: Path) -> None:
    model = make_model(
        "llada2_moe",
        num_layers=7,
        hidden_size=256,
        moe_intermediate_size=256,
        n_routed_experts=32,
    )
    folder = write_checkpoint(tmp_path, "llada2_moe", model, num_files=8)
    del model
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, str(folder)],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    weights, growth = map(int, done.stdout.split()[-2:])
    assert weights > 140e6
    assert growth < 1.5 * weights, f"{growth / weights:.2f} times the weights"
