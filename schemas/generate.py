"""Write the machine-readable part of schemas/ from the code: `python schemas/generate.py`.

JSON Schemas of both manifests and of every config file, and the Arrow schemas of the shards as
JSON, by alignment (a cache's with the payload that its alignment has by default). A test compares
the files with what this module would write.
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
from tide_cache.payloads import candidates, chunks
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
    payload_fields = {
        "positions": candidates.payload_fields(),
        "chunks": chunks.payload_fields(),
    }
    cache = {kind: _arrow(pa.schema([*row_fields(kind), *payload_fields[kind]])) for kind in kinds}
    files["premasked-rows.arrow.json"] = _text(premasked)
    files["cache-rows.arrow.json"] = _text(cache)
    return files


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
