"""Real inputs in small: tokenizers and chat files on disk, and the commands that read them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.small_tokenizers import CHATML, byte_level
from tests.support import PROJECT_ROOT

_NOUNS = ["clips", "apples", "books", "coins", "stamps", "marbles", "pages", "shells"]
_NAMES = ["Ada", "Bo", "Chidi", "Dana", "Emre", "Fay", "Gus", "Hana"]


def make_tokenizer(
    folder: Path, *, template: str = CHATML, vocab_size: int = 420, name: str = "tokenizer"
) -> Path:
    """Save a small byte-level BPE tokenizer with EOS, pad and mask tokens; returns its folder."""
    tokenizer = byte_level(template, vocab_size)
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.mask_token = "<|mask|>"
    tokenizer.save_pretrained(folder / name)
    return folder / name


def chat_rows(num_rows: int, *, seed: int = 0, num_words: int = 12) -> list[dict[str, Any]]:
    """Make conversations that all differ, with replies of up to `num_words` words."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        name, noun = (str(random.choice(words)) for words in (_NAMES, _NOUNS))
        words = random.choice(
            [*_NAMES, *_NOUNS, "and", "so", "1", "22"], random.integers(1, num_words)
        )
        question = f"{name} has {number} {noun}. How many {noun}?"
        reply = f"{number} {noun}. {' '.join(words.tolist())}"
        rows.append({"messages": chat(question, reply)})
    return rows


def chat(*contents: str) -> list[dict[str, str]]:
    """Make a conversation of alternating user and assistant messages."""
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def write_chat_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a config; returns its path."""
    path.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return path


def command(*arguments: str | Path) -> list[str]:
    """Return the command line of `tide-cache` with these arguments."""
    return [sys.executable, "-m", "tide_cache", *map(str, arguments)]


def run_command(*arguments: str | Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `tide-cache` as a user does, in a process of its own."""
    return subprocess.run(
        command(*arguments),
        cwd=PROJECT_ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def command_environment() -> dict[str, str]:
    """The environment of a command: no hub, one thread, no colours."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def all_files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones included, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_files(a: Path, b: Path) -> None:
    """Assert that two folders hold the same files, byte for byte."""
    files_a, files_b = all_files(a), all_files(b)
    assert files_a.keys() == files_b.keys()
    if "manifest.json" in files_a:
        made_a, made_b = (json.loads(f["manifest.json"])["provenance"] for f in (files_a, files_b))
        # Commands of one test run one after another; a commit in between is no fault of theirs.
        assert made_a == made_b, "the checkout changed while the test ran: run it again"
    assert [name for name in files_a if files_a[name] != files_b[name]] == []
