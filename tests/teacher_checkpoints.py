"""Tiny teacher checkpoints in the published layouts, made from random stock models.

Anything that needs a teacher on disk can write one here: the model is returned by `make_model`, so
that what a loader makes of the checkpoint can be compared with where its weights came from.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VOCAB_SIZE, MASK_ID = 96, 90
FAMILIES = ("qwen3", "qwen2", "llama", "wedlm", "llada2_moe")


def make_model(family: str, *, num_layers: int = 2, seed: int = 0, **overrides: Any) -> Any:
    """A random stock model that computes what a checkpoint of `family` should."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    if family == "llada2_moe":
        common |= {
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1 if num_layers > 1 else 0,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "num_mtp_layers": 0,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 6e5,
                "partial_rotary_factor": 0.5,
            },
        }
        model = transformers.Glm4MoeForCausalLM(
            transformers.Glm4MoeConfig(**common | overrides, attn_implementation="eager")
        )
    elif family == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**common | overrides, attn_implementation="eager")
        )
    elif family == "qwen2":
        model = transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**common | overrides, attn_implementation="eager")
        )
    else:
        common["head_dim"] = 16
        model = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**common | overrides, attn_implementation="eager")
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Norms and biases start at 1 and 0, where a swap or an omission would not show.
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(tensor.data, 0.5, 1.5)
    if family == "llada2_moe":
        model.set_experts_implementation("eager")
    return model.eval()


def write_checkpoint(folder: Path, family: str, model: Any, *, num_files: int = 1) -> Path:
    """Write `model` in the published layout of `family`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config = json.loads(model.config.to_json_string())
    if family == "llada2_moe":
        weights, config = llada2_weights(weights, model.config), llada2_config(model.config)
    elif family == "wedlm":
        config = wedlm_config(model.config)
    elif family == "a2d-qwen3":
        config |= {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    write_weights(folder, weights, num_files)
    write_config(folder, config)
    return folder


def write_weights(folder: Path, weights: dict[str, torch.Tensor], num_files: int) -> None:
    weights = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    if num_files == 1:
        save_file(weights, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file_name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::num_files]}
        save_file(part, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, config | changes)


def wedlm_config(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim max_position_embeddings rms_norm_eps hidden_act "
        "tie_word_embeddings"
    )
    return {name: getattr(config, name) for name in names.split()} | {
        "model_type": "wedlm",
        "architectures": ["WeDLMForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM"},
        "attention_bias": False,
        "qk_norm": True,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "mask_token_id": MASK_ID,
    }


def llada2_config(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim max_position_embeddings rms_norm_eps hidden_act "
        "tie_word_embeddings moe_intermediate_size num_experts_per_tok n_group topk_group "
        "routed_scaling_factor first_k_dense_replace norm_topk_prob use_qk_norm"
    )
    return {name: getattr(config, name) for name in names.split()} | {
        "model_type": "llada2_moe",
        "architectures": ["LLaDA2MoeModelLM"],
        "num_experts": config.n_routed_experts,
        "num_shared_experts": config.n_shared_experts,
        "rope_theta": config.rope_parameters["rope_theta"],
        "partial_rotary_factor": 0.5,
        "score_function": "sigmoid",
        "use_qkv_bias": False,
        "use_bias": False,
    }


def llada2_weights(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Rename and cut a Glm4Moe's weights into LLaDA2's: the loader's mapping, backwards."""
    renamed: dict[str, torch.Tensor] = {}
    fused: dict[str, list[torch.Tensor]] = {}
    for name, tensor in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            fused.setdefault(name.split(".self_attn")[0], []).append(tensor)
        elif name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.split(config.moe_intermediate_size)
                prefix = name.replace("gate_up_proj", str(expert))
                renamed |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                renamed[name.replace("down_proj", f"{expert}.down_proj.weight")] = down
        else:
            for ours, theirs in (
                ("embed_tokens", "word_embeddings"),
                ("self_attn.o_proj", "attention.dense"),
                ("self_attn.q_norm", "attention.query_layernorm"),
                ("self_attn.k_norm", "attention.key_layernorm"),
                ("e_score_correction_bias", "expert_bias"),
            ):
                name = name.replace(ours, theirs)
            renamed[name] = tensor
    for layer, parts in fused.items():
        assert len(parts) == 3
        renamed[f"{layer}.attention.query_key_value.weight"] = torch.cat(parts)
    return renamed
