"""The generated part of schemas/ is what the code says today."""

import json

import pyarrow as pa

from schemas.generate import FOLDER, contents
from tide_cache.payload_facts import KNOWN_CODECS


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
    # What a build makes by default: candidates ranked, then hidden.
    assert [name for name in names if name.startswith(("cand_", "hidden_"))] == names[10:]
    assert names[10:] == [
        *("cand_gaps_0", "cand_gaps_1", "cand_gaps_2", "cand_codes", "cand_low"),
        *("cand_range", "cand_logsumexp", "cand_tail", "cand_label_logprob", "cand_crc32"),
        *("hidden_0", "hidden_1", "hidden_2", "hidden_high", "hidden_crc32"),
    ]
    assert {field["type"] for field in fields["positions"]} >= {"string", str(pa.int16()), "binary"}
    assert fields["chunks"][-2:] == [
        {"name": "chunk_logprob", "nullable": False, "type": "binary"},
        {"name": "chunk_crc32", "nullable": False, "type": "uint32"},
    ]


def test_every_codec_that_is_read_has_its_columns_listed() -> None:
    listed = json.loads((FOLDER / "payload-columns.arrow.json").read_text(encoding="utf-8"))
    facts = [example["facts"] for example in listed.values()]
    versions: dict[tuple[str, str], set[int]] = {(f["name"], f["codec"]): set() for f in facts}
    for f in facts:
        versions[f["name"], f["codec"]].add(f["codec_version"])
    assert versions == {codec: set(known) for codec, known in KNOWN_CODECS.items()}
    raw = ["cand_ids", "cand_logits", "cand_logsumexp", "cand_label_logprob"]
    columns = {
        name: [column["name"] for column in example["columns"]] for name, example in listed.items()
    }
    assert columns["candidates raw 1"] == raw
    assert columns["candidates raw 2"] == [*raw, "cand_crc32"]
    assert columns["chunks raw 1"] == ["chunk_logprob"]


def test_the_prose_names_every_column() -> None:
    prose = (FOLDER / "cache-v2.md").read_text(encoding="utf-8")
    fields = json.loads((FOLDER / "cache-rows.arrow.json").read_text(encoding="utf-8"))
    for field in fields["positions"] + fields["chunks"]:
        assert f"`{field['name']}`" in prose, field["name"]
