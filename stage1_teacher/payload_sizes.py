"""Bytes a position of each payload: as this project measured them, or as a calibration did.

What an answer takes depends on the teacher: how often its ids recur, how much its hidden states
say. Before it was asked only a range can be given, from `benchmarks.codec` and
`benchmarks.gradients`; `tide-cache calibrate --json` replaces it by figures of the real teacher.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stage1_teacher.payload_config import PIN_BITS, PIN_K, BuildConfig
from stage1_teacher.settings import Setting, configured_setting
from stage1_teacher.teachers.checkpoint import read_json
from tide_cache.errors import FormatError

# `ranked` at 6 bits, per position: ids that recur (a teacher of 8,192 ids) to ids scattered over
# 151,936. At k = 16: 33 and 50 bytes, at 64: 88 and 154; straight in between (at k = 32 the
# scattered ones take 86, here 85) and beyond (286 at k = 128, here 293).
_AT_K = (16, 64)
_LOW_BYTES, _HIGH_BYTES = (33.0, 88.0), (50.0, 154.0)
# Hidden states with the 16 candidates that pin them: 44 to 57 bytes at d = 256 (.17 to .22 d), 42
# to 53 at d = 512. They grew with what the text says and not with d; that larger teachers say no
# more is not shown, so the range is from the least seen to the largest seen, or its share of d.
_HIDDEN_LOW_BYTES, _HIDDEN_HIGH_BYTES, _HIDDEN_HIGH_PER_CHANNEL = 42.0, 57.0, 57 / 256
# float32 and a checksum a row, compressed: 3.2 on docstrings, incompressible at most 4 and a bit.
_CHUNK_BYTES = (3.2, 4.2)
_HEAD_BYTES = 2  # bfloat16
_HIDDEN_SHARE_OF_COMPONENTS = 0.2
_LISTED = (Setting(k=16, bits=6), Setting(k=32, bits=6), Setting(k=64, bits=6))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PayloadSize:
    """Bytes per payload position or chunk, lowest and highest; `once_bytes`: files of the cache.

    `is_configured`: what the build's config asks for (or, measured, what `payload: auto` takes).
    """

    name: str
    low_bytes: float
    high_bytes: float
    once_bytes: float
    is_configured: bool
    source: str


def expected_sizes(
    config: BuildConfig, alignment: str, *, hidden_size: int, vocab_size: int
) -> list[PayloadSize]:
    """Return what payloads took on the teachers measured so far, those asked for first."""
    sizes = []
    if "chunks" in config.wanted(alignment):
        low, high = _CHUNK_BYTES
        sizes.append(
            PayloadSize(
                name="chunks: one log-prob each",
                low_bytes=low,
                high_bytes=high,
                once_bytes=0,
                is_configured=True,
                source="benchmarks.cache_size",
            )
        )
    chosen = None if config.payload == "auto" else configured_setting(config, alignment)
    if alignment != "positions":
        return sizes
    listed = [*_LISTED, Setting(k=PIN_K, bits=PIN_BITS, nats=config.hidden.nats)]
    settings = list(dict.fromkeys([*([chosen] if chosen else []), *listed]))
    num_temperatures = len(config.candidates.temperatures)
    for setting in settings:
        low, high = _bytes_of(setting, hidden_size, num_temperatures)
        sizes.append(
            PayloadSize(
                name=setting.name,
                low_bytes=low,
                high_bytes=high,
                once_bytes=_once_bytes(setting, hidden_size, vocab_size),
                is_configured=setting == chosen,
                source="ranges over the teachers of benchmarks.codec and benchmarks.gradients",
            )
        )
    return sizes


def measured_sizes(path: Path, config: BuildConfig, alignment: str) -> list[PayloadSize]:
    """Read the settings of `tide-cache calibrate --json`, under their default tails.

    Raises FormatError where the file holds something else.
    """
    facts = read_json(path)
    chosen = facts.get("chosen") if config.payload == "auto" else None
    if config.payload != "auto":
        setting = configured_setting(config, alignment)
        chosen = None if setting is None else setting.name
    try:
        return [_measured(line, chosen, path) for line in facts["settings"] if _is_default(line)]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: expected the table of 'tide-cache calibrate --json', got other fields "
            f"({type(error).__name__}: {error})",
            hint="make it with 'tide-cache calibrate CONFIG -p PREMASKED --json > FILE'",
        ) from error


def _is_default(line: Mapping[str, Any]) -> bool:
    return bool(line["is_default_tail"])


def _measured(line: Mapping[str, Any], chosen: str | None, path: Path) -> PayloadSize:
    per_position = float(line["bytes_per_position"])
    return PayloadSize(
        name=str(line["setting"]),
        low_bytes=per_position,
        high_bytes=per_position,
        once_bytes=float(line["codec_files_bytes"]),
        is_configured=line["setting"] == chosen,
        source=f"measured: {path.name}",
    )


def _bytes_of(setting: Setting, hidden_size: int, num_temperatures: int) -> tuple[float, float]:
    if setting.nats is not None:
        return _HIDDEN_LOW_BYTES, max(_HIDDEN_HIGH_BYTES, _HIDDEN_HIGH_PER_CHANNEL * hidden_size)
    if setting.bits is None:
        exact = 8.0 * setting.k + 4 * num_temperatures + 4
        return exact, exact
    wider = (setting.bits - 6) / 8 * setting.k
    low, high = (_line(setting.k, at) + wider for at in (_LOW_BYTES, _HIGH_BYTES))
    fewest = low if setting.min_k is None else _line(setting.min_k, _LOW_BYTES)
    return fewest, high


def _line(k: int, at: tuple[float, float]) -> float:
    slope = (at[1] - at[0]) / (_AT_K[1] - _AT_K[0])
    return max(0.0, at[0] + slope * (k - _AT_K[0]))


def _once_bytes(setting: Setting, hidden_size: int, vocab_size: int) -> float:
    """Return the codec files: ranks and mean logits; the head and the basis of `hidden`."""
    files = 8.0 * vocab_size
    if setting.nats is not None:
        basis = 2 * 4 * _HIDDEN_SHARE_OF_COMPONENTS * hidden_size * hidden_size
        files += _HEAD_BYTES * hidden_size * vocab_size + basis
    return files
