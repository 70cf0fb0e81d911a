"""The hash by which two tokenizers are the same: it covers what decides ids, and only that.

Both stages compute it from the JSON of a fast tokenizer (`tokenizer.backend_tokenizer.to_str()`).
It covers model, normalizer, pre-tokenizer and added tokens. It leaves out the chat template (two
sides may render differently and still share ids), padding, truncation and post-processing (rows are
tokenised without them), and the mask token, which a student gains after the cache was made and
which never stands in text.
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
    parts = {name: content.get(name) for name in _DECIDES_IDS}
    parts["added_tokens"] = [
        {key: token.get(key) for key in _ADDED_TOKEN_KEYS}
        for token in sorted(content.get("added_tokens", []), key=lambda token: int(token["id"]))
        if token["content"] != mask_token
    ]
    return fingerprint(parts)
