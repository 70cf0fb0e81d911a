"""Tokenizers of both sides: loading them, and what a manifest says of them.

A set names its tokenizers by the hash of what decides ids (`tide_cache.tokenizer_hash`), never by
their folder alone: two checkpoints with one vocabulary and two chat templates share ids, and their
hash; the template is in the set's config instead. Only fast tokenizers serve, because byte-exact
alignment reads their vocabulary from the backend, and remote code is never run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tide_cache.errors import ConfigError
from tide_cache.manifest import TokenizerFacts
from tide_cache.tokenizer_hash import tokenizer_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name_or_path: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load a fast tokenizer from a folder or the hub.

    Raises ConfigError when there is none, when it is a slow one, or when it needs remote code.
    """
    # Imported here: transformers takes seconds, and reading configs must not wait for it.
    from transformers import AutoTokenizer

    try:
        with _without_warnings():
            tokenizer = AutoTokenizer.from_pretrained(
                name_or_path, revision=revision, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"tokenizer {name_or_path!r}: cannot load it: {problem}",
            hint="name a folder with tokenizer.json and tokenizer_config.json, or a hub repository "
            "that you can reach; a tokenizer that needs remote code must be saved as a fast one",
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {name_or_path!r}: expected a fast tokenizer (tokenizer.json), got the slow "
            f"{type(tokenizer).__name__}",
            hint="convert it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            ".save_pretrained(FOLDER) and name FOLDER",
        )
    return tokenizer


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep transformers from warning of a model type (a released student's) that it does not know.

    Only the tokenizer beside the model is wanted.
    """
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase", name: str) -> TokenizerFacts:
    """Describe a tokenizer for a manifest. Its chat template has no part in the hash."""
    mask_token_id = tokenizer.mask_token_id
    return TokenizerFacts(
        name=name,
        sha256=tokenizer_sha256(
            tokenizer.backend_tokenizer.to_str(),
            mask_token=None if mask_token_id is None else tokenizer.mask_token,
        ),
        vocab_size=num_ids(tokenizer),
        mask_token_id=mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def num_ids(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Count the ids that may occur: `len(tokenizer)`, or more where ids are left out between."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def shared_vocab_size(a: "PreTrainedTokenizerBase", b: "PreTrainedTokenizerBase") -> int:
    """Count the leading ids that stand for the same token in both, 151646 for WeDLM and Qwen3."""
    tokens_a, tokens_b = _tokens_by_id(a), _tokens_by_id(b)
    shared = 0
    while shared in tokens_a and tokens_a[shared] == tokens_b.get(shared):
        shared += 1
    return shared


def read_chat_template(value: str) -> str:
    """Return the chat template that a config names: a file, or the Jinja text itself.

    Raises ConfigError when it is neither.
    """
    if "{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template: expected a file or the text of a Jinja template, got {value!r} "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error


def _tokens_by_id(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return {token_id: token for token, token_id in vocabulary.items()}
