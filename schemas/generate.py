"""Write the machine-readable part of schemas/ from the code: `python schemas/generate.py`.

JSON Schemas of both manifests and of every config file, and the Arrow schemas of the shards as
JSON: rows by alignment (a cache's with the payloads that a build makes by default) and the columns
of every codec. A test compares the files with what this module would write.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from stage1_teacher.build_plan import BuildConfig
from stage1_teacher.prepare_config import PrepareConfig
from stage2_student.config import TrainConfig
from tide_cache.manifest import CacheManifest, PremaskedManifest
from tide_cache.payload_facts import (
    CandidatesFacts,
    ChunksFacts,
    HiddenFacts,
    PayloadFacts,
    RankedFacts,
)
from tide_cache.payloads.candidates_ranked import ranked_fields
from tide_cache.payloads.candidates_raw import RawCandidates
from tide_cache.payloads.chunks import RawChunks
from tide_cache.payloads.hidden import HiddenCodec
from tide_cache.rows import AlignmentKind, row_fields, row_schema

FOLDER = Path(__file__).resolve().parent


def contents() -> dict[str, str]:
    """Return the text of every generated file, by name."""
    models = {
        "premasked-manifest.schema.json": PremaskedManifest,
        "cache-manifest.schema.json": CacheManifest,
        "prepare-config.schema.json": PrepareConfig,
        "build-config.schema.json": BuildConfig,
        "train-config.schema.json": TrainConfig,
    }
    files = {name: _text(model.model_json_schema()) for name, model in models.items()}
    kinds: tuple[AlignmentKind, ...] = ("positions", "chunks")
    premasked = {kind: _arrow(row_schema(kind)) for kind in kinds}
    files["payload-columns.arrow.json"] = _text(
        {
            name: {"facts": facts.model_dump(mode="json"), "columns": _arrow(pa.schema(fields))}
            for name, (facts, fields) in payload_examples().items()
        }
    )
    # By alignment, with the payloads that a default build makes there.
    examples = payload_examples()
    default = {
        "positions": [*examples["candidates ranked 1"][1], *examples["hidden transform 1"][1]],
        "chunks": examples["chunks raw 2"][1],
    }
    cache = {kind: _arrow(pa.schema([*row_fields(kind), *default[kind]])) for kind in kinds}
    files["premasked-rows.arrow.json"] = _text(premasked)
    files["cache-rows.arrow.json"] = _text(cache)
    return files


def payload_examples() -> dict[str, tuple[PayloadFacts, list[pa.Field]]]:
    """Return the columns of every codec, under facts that show all its optional columns."""
    common: dict[str, Any] = {
        "k": 64, "vocab_size": 151646, "temperatures": (1.0, 2.0), "mean_logits_positions": 4096
    }  # fmt: skip
    hidden = HiddenFacts(
        hidden_size=4096,
        vocab_size=151646,
        bands=(64, 512, 1024),
        num_wide=16,
        step=0.1,
        fit_positions=16384,
    )
    raw = [CandidatesFacts(**common, codec_version=1), CandidatesFacts(**common)]
    fixed = RankedFacts(**common, bits=6, ranks="answers")
    ragged = RankedFacts(**common, bits=6, ranks="answers", top_p=0.99, min_k=8)
    chunks = [ChunksFacts(codec_version=1), ChunksFacts()]
    found: dict[str, tuple[PayloadFacts, list[pa.Field]]] = {
        **{f"candidates raw {f.codec_version}": (f, RawCandidates(f).fields()) for f in raw},
        "candidates ranked 1": (fixed, ranked_fields(fixed)),
        "candidates ranked 1 with top_p": (ragged, ranked_fields(ragged)),
        **{f"chunks raw {f.codec_version}": (f, RawChunks(f).fields()) for f in chunks},
        "hidden transform 1": (hidden, HiddenCodec(hidden).fields()),
    }
    return found


def main() -> None:
    """Write all files and name those that changed."""
    for name, text in contents().items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote {path.name}\n")


def _arrow(schema: pa.Schema) -> list[dict[str, Any]]:
    return [
        {"name": field.name, "type": str(field.type), "nullable": field.nullable}
        for field in schema
    ]


def _in_fixed_order(value: Any) -> Any:
    """Sort alternatives: typing caches unions, so their order depends on the order of imports."""
    if isinstance(value, dict):
        fixed = {key: _in_fixed_order(item) for key, item in value.items()}
        if "anyOf" in fixed:
            fixed["anyOf"] = sorted(fixed["anyOf"], key=lambda item: json.dumps(item))
        return fixed
    if isinstance(value, list):
        return [_in_fixed_order(item) for item in value]
    return value


def _text(value: Any) -> str:
    return json.dumps(_in_fixed_order(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
