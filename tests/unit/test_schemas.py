"""The generated part of schemas/ is what the code says today."""

import json

import pyarrow as pa

from schemas.generate import FOLDER, contents


def test_generated_files_are_in_step() -> None:
    for name, text in contents().items():
        path = FOLDER / name
        assert path.is_file(), f"schemas/{name} is missing: run 'make schemas'"
        assert path.read_text(encoding="utf-8") == text, f"schemas/{name}: run 'make schemas'"


def test_no_other_generated_file_is_left_behind() -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == set(contents())


def test_rows_are_listed_as_arrow_knows_them() -> None:
    fields = json.loads((FOLDER / "cache-rows.arrow.json").read_text(encoding="utf-8"))
    names = [field["name"] for field in fields["positions"]]
    assert names[:2] == ["sample_id", "source"]
    assert names[-4:] == ["cand_ids", "cand_logits", "cand_logsumexp", "cand_label_logprob"]
    assert {field["type"] for field in fields["positions"]} >= {"string", str(pa.int16()), "binary"}
    assert fields["chunks"][-1] == {"name": "chunk_logprob", "nullable": False, "type": "binary"}


def test_the_prose_names_every_column() -> None:
    prose = (FOLDER / "cache-v1.md").read_text(encoding="utf-8")
    fields = json.loads((FOLDER / "cache-rows.arrow.json").read_text(encoding="utf-8"))
    for field in fields["positions"] + fields["chunks"]:
        assert f"`{field['name']}`" in prose, field["name"]
