"""A checkpoint on disk: its folder, its config, the safetensors files that hold its weights.

Only JSON and safetensors are read: a pickle runs code, and so would `trust_remote_code`, so
neither is ever opened. Names on the hub are downloaded first (weights, configs and tokenizer files
of the top folder) and are then folders like any other.
"""

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

from stage1_teacher.teachers.base import TeacherConfig
from tide_cache.errors import CompatibilityError, ConfigError, FormatError

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_DESCRIBING = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
_DOWNLOADED = ["*.safetensors", *_DESCRIBING]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A folder in the Hugging Face layout, with `config.json` already read.

    `name` is the hub name, or the folder's own name for a local one (never its path, which means
    nothing elsewhere); `revision` the hub commit.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    weight_files: tuple[Path, ...]

    @property
    def config_path(self) -> Path:
        """The file that `config` was read from, for error texts."""
        return self.folder / "config.json"


def open_checkpoint(
    model: str, revision: str | None = None, *, need_weights: bool = True
) -> Checkpoint:
    """Find a checkpoint by folder or hub name and read its config.

    Without `need_weights` they may be absent and are not downloaded (`weight_files` is empty).
    Raises ConfigError where there is none, FormatError where its files are broken.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision: {model} is a folder, which has none; remove the key")
        name, commit = folder.resolve().name, None
    else:
        folder = _download(model, revision, _DOWNLOADED if need_weights else _DESCRIBING)
        name, commit = model, _commit_of(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: expected a checkpoint, but it holds no config.json")
    return Checkpoint(
        folder=folder,
        name=name,
        revision=commit,
        config=read_json(folder / "config.json"),
        weight_files=find_weight_files(folder) if need_weights else (),
    )


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """List the safetensors files that hold the model, in name order.

    That is what the index names, else `model.safetensors`; other safetensors files in the folder
    are not the model's. Raises FormatError.
    """
    if (folder / INDEX_NAME).is_file():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{folder / INDEX_NAME}: weight_map: expected tensor names and files")
        names = sorted({str(name) for name in weight_map.values()})
    elif (folder / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f", found only {pickles[0]}" if pickles else ""
        raise FormatError(
            f"{folder}: expected {SINGLE_NAME} or {INDEX_NAME}{found}",
            hint="pickled weights are never opened: save them with safe_serialization",
        )
    for name in names:
        if Path(name).name != name:
            raise FormatError(f"{folder / INDEX_NAME}: {name!r} is not a file of this folder")
        if not (folder / name).is_file():
            raise FormatError(
                f"{folder / INDEX_NAME}: {name} is missing", hint="download the checkpoint again"
            )
    return tuple(folder / name for name in names)


def find_mask_token_id(checkpoint: Checkpoint, config: TeacherConfig) -> int:
    """Decide which id the teacher sees at masked positions.

    In order: the config, the checkpoint's `config.json`, the tokenizer's mask token, an added
    token spelt `<|mask|>`. Raises ConfigError where there is none.
    """
    declared = checkpoint.config.get("mask_token_id")
    if declared is None:
        declared = _tokenizer_mask_id(checkpoint.folder)
    if config.mask_token_id is None:
        if declared is None:
            raise ConfigError(
                f"mask_token_id: neither {checkpoint.config_path} nor a tokenizer beside it names "
                "a mask token",
                hint="give mask_token_id in the config",
            )
        return int(declared)
    if declared is not None and int(declared) != config.mask_token_id:
        logger.warning(
            "mask_token_id: %d from the config replaces %d, which %s declares",
            config.mask_token_id,
            int(declared),
            checkpoint.name,
        )
    return config.mask_token_id


def require_field(config: dict[str, Any], field: str, where: Path) -> Any:
    """Return a field of a checkpoint's config, or raise CompatibilityError that names it."""
    if config.get(field) is None:
        raise CompatibilityError(f"{where}: {field}: expected a value, got none")
    return config[field]


def plain_rope(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the rotary settings of a checkpoint that knows no rescaling.

    Takes them from `rope_parameters` or from the top level, where older configs keep them. Raises
    CompatibilityError where frequencies are rescaled.
    """
    nested = config.get("rope_parameters") or {}
    rescaled = config.get("rope_scaling") or nested.get("rope_type", "default") != "default"
    if rescaled:
        raise CompatibilityError(
            f"{where}: rope_scaling: expected none, got {config.get('rope_scaling') or nested!r}"
        )
    merged = {**config, **nested}
    return {
        "rope_type": "default",
        "rope_theta": float(require_field(merged, "rope_theta", where)),
        "partial_rotary_factor": float(merged.get("partial_rotary_factor") or 1.0),
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FormatError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _tokenizer_mask_id(folder: Path) -> int | None:
    """Look the mask token up among the added tokens, without building a tokenizer."""
    mask_token: str = "<|mask|>"
    added: dict[str, int] = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
        token = settings.get("mask_token")
        mask_token = (token.get("content") if isinstance(token, dict) else token) or mask_token
        for token_id, token in (settings.get("added_tokens_decoder") or {}).items():
            added[token["content"]] = int(token_id)
    if (folder / "tokenizer.json").is_file():
        for token in read_json(folder / "tokenizer.json").get("added_tokens") or []:
            added[token["content"]] = int(token["id"])
    return added.get(mask_token)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: {model} is not a folder")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except Exception as error:  # the hub client's errors share no base class
        raise ConfigError(
            f"model: {model} is neither a folder nor a checkpoint the hub gives "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})"
        ) from error
    return Path(folder)


def _commit_of(folder: Path) -> str | None:
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
