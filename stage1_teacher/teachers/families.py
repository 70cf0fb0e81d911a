"""The kinds of checkpoint that can teach, and what sets each apart.

A family says how its `config.json` becomes a transformers config of a stock class, how its tensor
names become that class's, and which attention its two words `published` and `native` mean. All run
through transformers' own code: WeDLM is a Qwen3 and LLaDA2 a Glm4Moe under other names (exact,
difference 0.0), so no checkpoint's remote code is ever needed. A config field that would change
the numbers in a way the stock class does not know is refused, not ignored.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stage1_teacher.teachers import llada2
from stage1_teacher.teachers.base import AttentionChoice
from stage1_teacher.teachers.checkpoint import Checkpoint, plain_rope, require_field
from stage1_teacher.teachers.copy_plan import Route, same_names
from stage1_teacher.teachers.layouts import Layout
from tide_cache.errors import CompatibilityError, ConfigError, did_you_mean

_QWEN3_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
)
# Heads and scores that are not a plain matrix product, under the names that models give them.
_UNKNOWN_HEADS = (
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
# Rotary types whose frequencies depend on the longest sequence met so far: not a function of the
# request. The default and the fixed rescalings are.
_FIXED_ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of checkpoint.

    `read_config` takes the raw config and where it stands and returns a transformers config;
    `route` maps a checkpoint tensor's name (see `copy_plan`). `mask_by_layer_type` says that the
    stock class takes its explicit mask in a dict by layer type, rather than as a tensor.
    """

    name: str
    class_name: str
    read_config: Callable[[dict[str, Any], Path], Any]
    make_route: Callable[[Any], Route]
    published: Layout
    native: Layout | None
    mask_by_layer_type: bool


def find_family(checkpoint: Checkpoint) -> Family:
    """Choose the family by `model_type` and refuse what its class would get wrong.

    Raises CompatibilityError that names the field.
    """
    raw, where = checkpoint.config, checkpoint.config_path
    model_type = str(require_field(raw, "model_type", where))
    if model_type not in FAMILIES:
        raise CompatibilityError(
            f"{where}: model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r}"
            f"{did_you_mean(model_type, FAMILIES)}"
        )
    for field in _UNKNOWN_HEADS:
        if raw.get(field) is not None:
            raise CompatibilityError(
                f"{where}: {field}: expected a plain output head without it, got {raw[field]}"
            )
    if raw.get("quantization_config") is not None:
        raise CompatibilityError(
            f"{where}: quantization_config: quantised weights cannot be loaded",
            hint="use the unquantised checkpoint",
        )
    return FAMILIES[model_type]


def resolve_layout(attention: AttentionChoice, family: Family) -> Layout:
    """Turn the config's word into a layout. Raises ConfigError where a family has no native one."""
    if attention == "published":
        return family.published
    if attention == "native":
        if family.native is None:
            raise ConfigError(
                f"attention: native: {family.name} checkpoints have no diffusion attention of "
                "their own; choose published, block_diffusion or bidirectional"
            )
        return family.native
    return Layout(attention)


def build_config(family: Family, checkpoint: Checkpoint) -> Any:
    """Read the checkpoint's config into the stock class's, and refuse attention we cannot pose.

    Raises CompatibilityError.
    """
    config = family.read_config(checkpoint.config, checkpoint.config_path)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        others = ", ".join(sorted(layer_types - {"full_attention"}))
        raise CompatibilityError(
            f"{checkpoint.config_path}: layer_types: expected full_attention in every layer, got "
            f"{others}; a windowed layer would not obey the diffusion mask"
        )
    rotary_type = config.rope_parameters["rope_type"]
    if rotary_type not in _FIXED_ROTARY_TYPES:
        raise CompatibilityError(
            f"{checkpoint.config_path}: rope type: expected one of "
            f"{', '.join(_FIXED_ROTARY_TYPES)}, got {rotary_type!r}"
        )
    return config


def _read_wedlm(raw: dict[str, Any], where: Path) -> Any:
    """Read WeDLM's fields: a Qwen3 with `qk_norm`, without attention biases."""
    from transformers import Qwen3Config

    for field, expected in (("qk_norm", True), ("attention_bias", False)):
        if raw.get(field) != expected:
            raise CompatibilityError(
                f"{where}: {field}: expected {str(expected).lower()}, got {raw.get(field)!r}; only "
                "the Qwen3-based WeDLM checkpoints (WeDLM-8B) are known"
            )
    if raw.get("use_sliding_window"):
        raise CompatibilityError(f"{where}: use_sliding_window: expected false, got true")
    fields = {field: require_field(raw, field, where) for field in _QWEN3_FIELDS}
    return Qwen3Config(
        **fields,
        attention_bias=False,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_parameters=plain_rope(raw, where),
    )


def _read_a2d_qwen3(raw: dict[str, Any], where: Path) -> Any:
    """Read a released student's config: Qwen3 under another model type, no other field differs."""
    from transformers import Qwen3Config

    plain_rope(raw, where)
    return Qwen3Config.from_dict({**raw, "model_type": "qwen3"})


def _read_stock(class_name: str) -> Callable[[dict[str, Any], Path], Any]:
    """Make the reader of a family whose config transformers knows."""

    def read(raw: dict[str, Any], where: Path) -> Any:
        import transformers

        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            require_field(raw, field, where)
        return getattr(transformers, class_name).from_dict(dict(raw))

    return read


def _stock(name: str, prefix: str, *, mask_by_layer_type: bool) -> Family:
    return Family(
        name=name,
        class_name=f"{prefix}ForCausalLM",
        read_config=_read_stock(f"{prefix}Config"),
        make_route=same_names,
        published=Layout.BLOCK_DIFFUSION,
        native=None,
        mask_by_layer_type=mask_by_layer_type,
    )


_QWEN3 = _stock("qwen3", "Qwen3", mask_by_layer_type=True)

FAMILIES: dict[str, Family] = {
    "wedlm": dataclasses.replace(
        _QWEN3, name="wedlm", read_config=_read_wedlm, native=Layout.OBSERVED_FIRST
    ),
    "llada2_moe": Family(
        name="llada2_moe",
        class_name="Glm4MoeForCausalLM",
        read_config=llada2.read_config,
        make_route=llada2.make_route,
        published=Layout.BIDIRECTIONAL,
        native=Layout.BLOCK_CAUSAL,
        mask_by_layer_type=False,
    ),
    "qwen3": _QWEN3,
    "a2d-qwen3": dataclasses.replace(_QWEN3, name="a2d-qwen3", read_config=_read_a2d_qwen3),
    "qwen2": _stock("qwen2", "Qwen2", mask_by_layer_type=True),
    "llama": _stock("llama", "Llama", mask_by_layer_type=False),
}
