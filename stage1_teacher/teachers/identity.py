"""Which teacher this is: hashes of its weights, config and tokenizer, and how it is queried.

A hash of files is the sha256 over the lines `<sha256 of the file>  <file name>` in name order,
so that it can be checked with `sha256sum` and files are hashed side by side: 33 GB take about 40 s
on one core. It is of files, not of tensors: the same weights cut into other shards differ. (What
decides token ids is hashed by `tide_cache.tokenizer_hash` instead.) Nothing is loaded; a build
compares identities before it asks for a GPU.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stage1_teacher.teachers.base import TeacherConfig, TeacherIdentity
from stage1_teacher.teachers.checkpoint import (
    TOKENIZER_NAMES,
    Checkpoint,
    find_mask_token_id,
    open_checkpoint,
)
from stage1_teacher.teachers.families import find_family, resolve_layout


def identify_teacher(
    config: TeacherConfig, checkpoint: Checkpoint | None = None
) -> TeacherIdentity:
    """Describe the teacher that `config` names, without loading it.

    Reads every byte of its weights. Raises ConfigError, CompatibilityError, FormatError.
    """
    checkpoint = checkpoint or open_checkpoint(config.model, config.revision)
    family = find_family(checkpoint)
    layout = resolve_layout(config.attention, family)
    tokenizer_files = [checkpoint.folder / name for name in TOKENIZER_NAMES]
    found = [path for path in tokenizer_files if path.is_file()]
    return TeacherIdentity(
        name=checkpoint.name,
        revision=checkpoint.revision,
        family=family.name,
        backend=config.backend,
        weights_sha256=hash_files(checkpoint.weight_files),
        config_sha256=_file_sha256(checkpoint.config_path),
        tokenizer_files_sha256=hash_files(found) if found else None,
        dtype=config.dtype,
        attention=str(layout),
        block_size=config.block_size if layout.has_blocks else None,
        mask_token_id=find_mask_token_id(checkpoint, config),
    )


def hash_files(paths: Sequence[Path]) -> str:
    """Return one sha256 for the names and bytes of `paths`, whatever order they come in."""
    ordered = sorted(paths, key=lambda path: path.name)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_file_sha256, ordered))
    lines = [f"{digest}  {path.name}\n" for digest, path in zip(digests, ordered, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
