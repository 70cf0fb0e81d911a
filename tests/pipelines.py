"""All that `prepare` and `build` read, in one folder: chats, a tokenizer, a teacher, a config."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.builders import chat_rows, make_tokenizer, write_chat_jsonl, write_yaml
from tests.teacher_checkpoints import write_checkpoint


def write_pipeline(
    folder: Path,
    model: Any,
    *,
    num_rows: int,
    prepare: Mapping[str, Any],
    build: Mapping[str, Any],
) -> Path:
    """Write `pipeline.yaml` and what it names, the teacher in `teacher`; returns the config's path.

    `prepare` and `build` are added to sections that know where things are.
    """
    tokenizer = make_tokenizer(folder)
    write_checkpoint(folder / "teacher", "qwen3", model)
    shutil.copytree(tokenizer, folder / "teacher", dirs_exist_ok=True)
    write_chat_jsonl(folder / "chat.jsonl", chat_rows(num_rows))
    teacher = {
        "model": str(folder / "teacher"),
        "dtype": "float32",
        "block_size": 8,
        "token_budget": 512,
    }
    return write_yaml(
        folder / "pipeline.yaml",
        {
            "prepare": {
                "sources": str(folder / "chat.jsonl"),
                "student": {"tokenizer": str(tokenizer), "max_length": 128},
                "block_size": 8,
                "num_views": 2,
                "samples_per_shard": 8,
                **prepare,
            },
            "build": {"teacher": teacher, **build},
        },
    )
