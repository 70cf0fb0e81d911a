"""Where a student comes from, learnt before any weight is read: config, tokenizer, mask token.

Three origins: a released block-diffusion student (`a2d-qwen3`, read as plain Qwen3: the only
difference is the causal mask, which we replace anyway), an autoregressive Qwen3 (gains a mask
token), or nothing but an architecture (`init: random`). Config and tokenizer are a few megabytes,
so everything that can be refused is refused before gigabytes are fetched. Remote code never runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from stage2_student.attention import Attention
from stage2_student.json_files import read_json_object
from stage2_student.release.released_format import RELEASED_MODEL_TYPE
from tide_cache.card_license import card_license
from tide_cache.config import StrictModel
from tide_cache.errors import CompatibilityError, ConfigError
from tide_cache.tokenizer_hash import tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Config

RANDOM = "random"
_MODEL_TYPES = (RELEASED_MODEL_TYPE, "qwen3")
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "README.md")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


class Architecture(StrictModel):
    """The shape of a student that is trained from nothing."""

    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int | None = Field(None, ge=1, description="default: num_heads")
    head_dim: int | None = Field(None, ge=2, description="default: hidden_size / num_heads")
    intermediate_size: int | None = Field(None, ge=1, description="default: 3 hidden_size")
    tie_word_embeddings: bool = True
    rope_theta: float = Field(1e6, gt=0)
    max_position_embeddings: int = Field(4096, ge=1)
    initializer_range: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError("hidden_size: expected a multiple of num_heads, or give head_dim")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError("num_heads: expected a multiple of num_kv_heads")
        return self


class StudentConfig(StrictModel):
    """Which student is trained, and in which numbers."""

    init: str = Field(description="folder or hub name of a student or a Qwen3, or 'random'")
    revision: str | None = None
    tokenizer: str | None = Field(None, description="folder or hub name; default: that of init")
    mask_token: str = "<|mask|>"
    architecture: Architecture | None = Field(None, description="for init: random")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the weights and their gradients: 8 or 4 bytes a parameter. bfloat16 is "
        "updated in float32 and rounded stochastically (needs torchao)",
    )
    attention: Attention = Field("auto", description="auto: flex on a GPU, sdpa elsewhere")
    activation_checkpointing: bool = Field(
        False, description="keep one hidden state per layer, compute the rest again: same numbers"
    )
    compile: bool = Field(
        False,
        description="torch.compile each layer, once per run (14 to 28 s on 2 CPU cores, where it "
        "then saved 0 to 8 % of a step; not measured on a GPU)",
    )
    block_size: int | None = Field(None, ge=1, description="default: what the cache says")
    license: str | None = Field(
        None, description="of the weights of init, for the model card; default: what its card says"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.init == RANDOM and (self.architecture is None or self.tokenizer is None):
            raise ValueError("init: random needs the keys architecture and tokenizer")
        if self.init != RANDOM and self.architecture is not None:
            raise ValueError("architecture: only goes with init: random")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentSource:
    """A student before its weights. `folder` is None for `init: random`.

    `needs_mask_row`: its embedding of the mask token was never trained. `block_size` and `license`
    are what the checkpoint says of itself, if anything.
    """

    name: str
    revision: str | None
    folder: Path | None
    model_config: "Qwen3Config"
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_sha256s: frozenset[str]
    mask_token_id: int
    needs_mask_row: bool
    block_size: int | None
    license: str | None

    @property
    def num_embedding_rows(self) -> int:
        """Number of ids that the model can embed once the mask token has its row."""
        return max(int(self.model_config.vocab_size), self.mask_token_id + 1)


def open_student(config: StudentConfig) -> StudentSource:
    """Read the config and tokenizer of a student. Reads no weights.

    Raises ConfigError when something cannot be found, CompatibilityError for another architecture.
    """
    tokenizer = _load_tokenizer(config)
    # Before the mask token is added: a set made with this very tokenizer must be recognised.
    text = tokenizer.backend_tokenizer.to_str()
    hashes = {tokenizer_sha256(text, mask_token=token) for token in (None, config.mask_token)}
    mask_token_id = _ensure_mask_token(tokenizer, config.mask_token)
    folder, values = (None, {}) if config.init == RANDOM else _read_config(config)
    model_config = (
        _new_config(config.architecture, tokenizer)
        if config.architecture is not None
        else read_model_config(values, where=f"student {config.init!r}")
    )
    return StudentSource(
        name=config.init,
        revision=config.revision,
        folder=folder,
        model_config=model_config,
        tokenizer=tokenizer,
        tokenizer_sha256s=frozenset(hashes),
        mask_token_id=mask_token_id,
        needs_mask_row=folder is not None and values["model_type"] != RELEASED_MODEL_TYPE,
        block_size=config.block_size or values.get("block_size"),
        license=config.license or (None if folder is None else card_license(folder)),
    )


def read_model_config(values: dict[str, Any], *, where: str) -> "Qwen3Config":
    """Turn the `config.json` of a released student or a Qwen3 into a stock Qwen3 config."""
    from transformers import Qwen3Config

    model_type = values.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise CompatibilityError(
            f"{where}: model_type: expected one of {', '.join(_MODEL_TYPES)}, got {model_type!r}",
            hint="start from a released BD3LM student, a Qwen3 checkpoint or init: random",
        )
    if values.get("use_sliding_window"):
        raise CompatibilityError(f"{where}: use_sliding_window: expected false, got true")
    ours = ("model_type", "architectures", "auto_map", "block_size", "mask_token_id")
    return Qwen3Config.from_dict({k: v for k, v in values.items() if k not in ours})


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint. Raises ConfigError when there is none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ConfigError(
                f"{file}: no such file",
                hint="weights are read from safetensors only; convert others, or download it again",
            )
    return files


def fetch_weights(source: StudentSource) -> Path:
    """Return a local folder that holds the weights, downloading them if need be."""
    assert source.folder is not None
    if Path(source.name).is_dir():
        return source.folder
    return _download(source.name, source.revision, (*_SMALL_FILES, *_WEIGHT_FILES))


def _load_tokenizer(config: StudentConfig) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    name = config.tokenizer or config.init
    revision = config.revision if config.tokenizer is None else None
    verbosity = transformers_logging.get_verbosity()
    # It looks at config.json too, and would warn that it does not know the released model type.
    transformers_logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"student.tokenizer {name!r}: cannot load it: {_first_line(error)}",
            hint="name a folder with tokenizer.json and tokenizer_config.json, or a hub repository "
            "that you can reach",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"student.tokenizer {name!r}: expected a fast tokenizer (tokenizer.json), got "
            f"{type(tokenizer).__name__}"
        )
    return tokenizer


def _ensure_mask_token(tokenizer: "PreTrainedTokenizerBase", mask_token: str) -> int:
    """Return the id of the mask token, adding it behind all others when it is missing."""
    if tokenizer.mask_token is not None and tokenizer.mask_token != mask_token:
        raise ConfigError(
            f"student.mask_token: expected the tokenizer's own {tokenizer.mask_token!r}, got "
            f"{mask_token!r}"
        )
    tokenizer.add_special_tokens({"mask_token": mask_token})
    mask_token_id = tokenizer.convert_tokens_to_ids(mask_token)
    assert isinstance(mask_token_id, int)
    return mask_token_id


def _read_config(config: StudentConfig) -> tuple[Path, dict[str, Any]]:
    folder = Path(config.init)
    if not folder.is_dir():
        folder = _download(config.init, config.revision, _SMALL_FILES)
    return folder, read_json_object(folder / "config.json")


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"student.init {name!r}: neither a folder nor a hub repository in reach: "
            f"{_first_line(error)}",
            hint="check the spelling, or download it and name the folder",
        ) from error


def _new_config(architecture: Architecture, tokenizer: "PreTrainedTokenizerBase") -> "Qwen3Config":
    from transformers import Qwen3Config

    a = architecture
    return Qwen3Config(
        vocab_size=_num_ids(tokenizer),
        hidden_size=a.hidden_size,
        intermediate_size=a.intermediate_size or 3 * a.hidden_size,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_heads,
        num_key_value_heads=a.num_kv_heads or a.num_heads,
        head_dim=a.head_dim or a.hidden_size // a.num_heads,
        max_position_embeddings=a.max_position_embeddings,
        tie_word_embeddings=a.tie_word_embeddings,
        initializer_range=a.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": a.rope_theta},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _num_ids(tokenizer: "PreTrainedTokenizerBase") -> int:
    # Ids may have gaps: the table must reach the last of them.
    largest: int = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), largest + 1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
