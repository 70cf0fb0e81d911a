"""Writing a student as the released ones are: a folder that `AutoModelForMaskedLM` loads.

`config.json` names our modeling file through `auto_map`, so the folder is self-contained on
transformers 4.57 and 5.x; rotary settings stand there twice, because 4.57 reads only `rope_theta`.
Weights are one safetensors file without the tied head. Everything is written by hand instead of by
`save_pretrained`, which writes neither `auto_map` nor the released model type.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from stage2_student.release import modeling_a2d_qwen3
from stage2_student.sharded import whole
from tide_cache.canonical import pretty_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

RELEASED_MODEL_TYPE = "a2d-qwen3"
WEIGHTS_FILE = "model.safetensors"
MODELING_FILE = "modeling_a2d_qwen3.py"
_AUTO_MAP = {
    "AutoConfig": "A2DQwen3Config",
    "AutoModel": "A2DQwen3Model",
    "AutoModelForMaskedLM": "A2DQwen3LMHeadModel",
}
_HEAD = "lm_head.weight"


def save_released(
    model: "Qwen3ForCausalLM",
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: Path,
    *,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, config, modeling code and tokenizer into an existing folder.

    `block_size` and `mask_token_id` are what the student was trained with; they are recorded in
    the config. Weights keep their dtype, so that loading them gives the same bits; `tensors` are
    what `weights` returned, where that was asked before.
    """
    config = released_config(model.config, dtype=model.dtype)
    config |= {"block_size": block_size, "mask_token_id": mask_token_id}
    (folder / "config.json").write_bytes(pretty_json(config))
    shutil.copyfile(str(modeling_a2d_qwen3.__file__), folder / MODELING_FILE)
    save_file(tensors or weights(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors makes files that only their owner may read; folders are handed on.
    shutil.copymode(folder / "config.json", folder / WEIGHTS_FILE)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)


def released_config(config: "Qwen3Config", *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the released `config.json` of a stock Qwen3 config."""
    values: dict[str, Any] = config.to_dict()
    values.pop("_name_or_path", None)  # a path of this machine
    module = Path(MODELING_FILE).stem
    theta = (values.get("rope_parameters") or {}).get("rope_theta", 1e6)
    # `dtype` is read by 5.x, `torch_dtype` by older releases.
    dtype_name = str(dtype).removeprefix("torch.")
    return values | {
        "model_type": RELEASED_MODEL_TYPE,
        "architectures": [_AUTO_MAP["AutoModelForMaskedLM"]],
        "auto_map": {auto: f"{module}.{name}" for auto, name in _AUTO_MAP.items()},
        "rope_theta": theta,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def _save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder)


def make_tokenizer_portable(folder: Path) -> None:
    """Rewrite `tokenizer_config.json` as 5.x wrote it into what 4.57 reads as well.

    5.x writes class names of its own, and special tokens without a role as a list under a key for
    which 4.57 expects a mapping and breaks.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # as tokenizer.json says, in both
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    path.write_bytes(pretty_json(settings))


def weights(model: "Qwen3ForCausalLM") -> dict[str, torch.Tensor]:
    """Return the model's weights by name, on the CPU, without a head that is the embedding.

    Of a model that is spread over ranks every rank must ask.
    """
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop(_HEAD, None)
    return {name: whole(tensor) for name, tensor in tensors.items()}
