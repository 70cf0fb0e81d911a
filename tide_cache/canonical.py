"""Canonical JSON and hashes: the same value gives the same bytes on every machine.

Keys sorted, no spaces, UTF-8 unescaped, no NaN, floats as Python's shortest repr. Everything whose
hash is compared (manifests, configs, task records) is written through here.
"""

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Encode `value` as canonical JSON, ending in a newline."""
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return text.encode() + b"\n"


def pretty_json(value: Any) -> bytes:
    """Encode `value` as JSON for people: sorted keys and two-space indents, otherwise canonical."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=2)
    return text.encode() + b"\n"


def sha256_hex(data: bytes) -> str:
    """Return the lower-case hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`."""
    return sha256_hex(canonical_json(value))
