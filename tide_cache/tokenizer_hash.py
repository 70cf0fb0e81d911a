"""The hash by which two tokenizers are the same: it covers what decides ids, and only that.

Both stages compute it from the JSON of a fast tokenizer (`tokenizer.backend_tokenizer.to_str()`).
It covers model, normalizer, pre-tokenizer and added tokens. It leaves out the chat template (two
sides may render differently and still share ids), padding, truncation and post-processing (rows are
tokenised without them), `trim_offsets` (it moves character offsets, and loading one checkpoint
through two classes sets it differently), and the mask token, which a student gains after the cache
was made and which never stands in text.
"""

import json
from typing import Any

from tide_cache.canonical import fingerprint

_DECIDES_IDS = ("model", "normalizer", "pre_tokenizer")
_ADDED_TOKEN_KEYS = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_sha256(tokenizer_json: str, *, mask_token: str | None) -> str:
    """Return the hex sha256 of a fast tokenizer, given as the JSON of its backend.

    `mask_token` is the text of the tokenizer's mask token, if it has one.
    """
    content: dict[str, Any] = json.loads(tokenizer_json)
    parts = {name: _without_offsets(content.get(name)) for name in _DECIDES_IDS}
    parts["added_tokens"] = [
        {key: token.get(key) for key in _ADDED_TOKEN_KEYS}
        for token in sorted(content.get("added_tokens", []), key=lambda token: int(token["id"]))
        if token["content"] != mask_token
    ]
    return fingerprint(parts)


def _without_offsets(part: Any) -> Any:
    """Drop `trim_offsets` from a part of the JSON. Vocabulary and merges are left as they are."""
    if not isinstance(part, dict):
        return part
    kept = {key: value for key, value in part.items() if key != "trim_offsets"}
    if "pretokenizers" in kept:
        kept["pretokenizers"] = [_without_offsets(inner) for inner in kept["pretokenizers"]]
    return kept
