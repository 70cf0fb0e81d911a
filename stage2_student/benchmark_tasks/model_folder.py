"""Where a student lies on this machine, and which bytes it is."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from stage2_student.student_source import (
    StudentConfig,
    fetch_weights,
    open_student,
    weight_files,
)
from tide_cache.canonical import fingerprint
from tide_cache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_BLOCK_BYTES = 2**22


def find_model_folder(name: str, revision: str | None = None) -> Path:
    """Return a student's folder, downloading a hub repository if `name` is none on this machine.

    Raises ConfigError where it cannot be found, CompatibilityError for another architecture.
    """
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ConfigError(
            f"model {name!r}: no such folder",
            hint="name the folder final/ of a run, or a hub repository (OWNER/NAME)",
        )
    return fetch_weights(open_student(StudentConfig(init=name, revision=revision)))


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a student's tokenizer. Raises ConfigError if it has no chat template."""
    tokenizer = open_student(StudentConfig(init=str(folder))).tokenizer
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{folder}: the tokenizer has no chat template, and the benchmarks are asked in chats",
            hint="copy tokenizer_config.json (or chat_template.jinja) of the student it began as",
        )
    return tokenizer


def model_sha256(folder: Path) -> str:
    """Hash the files that decide what a student answers: weights, config, tokenizer, template."""
    small = [folder / name for name in _SMALL_FILES if (folder / name).is_file()]
    files = sorted([*small, *weight_files(folder)])
    return fingerprint({path.name: _file_sha256(path) for path in files})


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
