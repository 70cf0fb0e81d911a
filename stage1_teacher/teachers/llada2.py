"""LLaDA2 checkpoints as transformers' `Glm4MoeForCausalLM`: fields and tensor names.

LLaDA2 (arXiv 2512.15745) fuses q, k and v into one matrix, stores each expert on its own and names
things after Bailing; the computation is Glm4Moe's with grouped sigmoid routing, qk-norm and half
rotary. So the published modeling file, which transformers 5 breaks (once in silence: uninitialised
rotary frequencies), is not needed. What Glm4Moe could not express is refused by field name.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage1_teacher.teachers.checkpoint import plain_rope, require_field
from stage1_teacher.teachers.copy_plan import Part, Route
from tide_cache.errors import CompatibilityError

_FIXED_FIELDS = {
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
}
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "first_k_dense_replace",
)
_LAYER_NAMES = {
    "attention.dense.weight": "self_attn.o_proj.weight",
    "attention.query_layernorm.weight": "self_attn.q_norm.weight",
    "attention.key_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias",
}
_LAYER = re.compile(r"(model\.layers\.\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def read_config(raw: dict[str, Any], where: Path) -> Any:
    """Read LLaDA2's config into a Glm4MoeConfig. Raises CompatibilityError that names the field."""
    from transformers import Glm4MoeConfig

    for field, expected in _FIXED_FIELDS.items():
        if raw.get(field, expected) != expected:
            raise CompatibilityError(f"{where}: {field}: expected {expected!r}, got {raw[field]!r}")
    fields = {field: require_field(raw, field, where) for field in _SAME_FIELDS}
    return Glm4MoeConfig(
        **fields,
        head_dim=raw.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        n_routed_experts=require_field(raw, "num_experts", where),
        n_shared_experts=require_field(raw, "num_shared_experts", where),
        norm_topk_prob=True,
        use_qk_norm=True,
        attention_bias=False,
        num_mtp_layers=0,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_parameters=plain_rope(raw, where),
    )


def make_route(config: Any) -> Route:
    """Route LLaDA2 tensor names into a Glm4Moe built from `config`."""
    num_query_rows = config.num_attention_heads * config.head_dim
    num_key_rows = config.num_key_value_heads * config.head_dim
    width = config.moe_intermediate_size

    def route(name: str) -> Sequence[Part]:
        if name == "model.word_embeddings.weight":
            return [Part(target="model.embed_tokens.weight")]
        match = _LAYER.fullmatch(name)
        if match is None:
            return [Part(target=name)]
        layer, rest = match.groups()
        if rest == "attention.query_key_value.weight":
            return _split_qkv(layer, num_query_rows, num_key_rows)
        if expert := _EXPERT.fullmatch(rest):
            return [_expert_part(layer, int(expert[1]), expert[2], width)]
        return [Part(target=f"{layer}.{_LAYER_NAMES.get(rest, rest)}")]

    return route


def _split_qkv(layer: str, num_query_rows: int, num_key_rows: int) -> list[Part]:
    """Cut the fused projection into its rows of q, then k, then v."""
    starts = (0, num_query_rows, num_query_rows + num_key_rows)
    stops = (*starts[1:], num_query_rows + 2 * num_key_rows)
    return [
        Part(target=f"{layer}.self_attn.{kind}_proj.weight", source_rows=(start, stop))
        for kind, start, stop in zip("qkv", starts, stops, strict=True)
    ]


def _expert_part(layer: str, expert: int, kind: str, width: int) -> Part:
    """Place one expert's matrix in the stack; gate stands above up in the same entry."""
    if kind == "down":
        return Part(target=f"{layer}.mlp.experts.down_proj", entry=expert)
    rows = (0, width) if kind == "gate" else (width, 2 * width)
    return Part(target=f"{layer}.mlp.experts.gate_up_proj", entry=expert, target_rows=rows)


def split_tensor(name: str, tensor: Any, config: Any) -> list[tuple[str, Any]]:
    """Rename and cut one tensor for an engine that reads Glm4Moe's checkpoint names, experts apart.

    The same table as `make_route`, which stacks the experts instead.
    """
    match = _LAYER.fullmatch(name)
    if match is not None and _EXPERT.fullmatch(match[2]):
        return [(name, tensor)]
    return [
        (part.target, tensor if part.source_rows is None else tensor[slice(*part.source_rows)])
        for part in make_route(config)(name)
    ]
