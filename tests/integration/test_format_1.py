"""Sets of format 1, as the program before format 2 wrote them: read, checked, trained from, kept.

`tests/data/format-1` holds a premasked set, a cache and a tokenizer for either alignment. Losses
and identities below are those that the older program printed for them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stage1_teacher.calibration_record import record_of
from stage2_student import cli
from tests.builders import all_files, assert_same_files, run_command, write_yaml
from tests.support import PROJECT_ROOT
from tide_cache.cache import open_cache
from tide_cache.canonical import canonical_json, sha256_hex
from tide_cache.errors import CompatibilityError, FormatError
from tide_cache.manifest import (
    FORMAT_VERSION,
    CacheHeader,
    CacheManifest,
    Header,
    Manifest,
    manifest_bytes,
    parse_manifest,
)
from tide_cache.payload_facts import CandidatesFacts, ChunksFacts
from tide_cache.store import Store
from tide_cache.verify import verify_set
from tide_cache.writer import HEADER, SetWriter

DATA = PROJECT_ROOT / "tests/data/format-1"
IDENTITIES = {
    "positions/premasked": "e6c7d96bb48092980d0384c7aca7d697e451da841f0f38645f3815de482d2cec",
    "positions/cache": "42d87dc4d13954ed34afd565293969317a5d834d59beba31075fefb35a55ea45",
    "chunks/premasked": "4855c45ff44c4abaf114e80ec9907fcd6aabe0ac9e89a7a8c979641116548ae5",
    "chunks/cache": "3d1ccb83f528bcf14d1d59634a4fc19516b0da5601447ba7f0bfff0828285c79",
}
every_set = pytest.mark.parametrize("name", IDENTITIES)
every_cache = pytest.mark.parametrize("name", [n for n in IDENTITIES if n.endswith("cache")])

# Two steps of the older program at seed 0: each term of the objective at either step.
LOSSES: dict[str, dict[str, list[float]]] = {
    "positions": {
        "ce": [4.287187576, 4.293246746],
        "tidal": [0.006788892, 0.153396457],
        "kl": [2.766385078, 3.020923376],
        "reverse_kl": [2.156669855, 2.285346270],
        "calm": [1.030582190, 0.617483854],
    },
    "chunks": {
        "ce": [7.154015541, 6.663421631],
        "calm": [1.694581389, 0.805515647],
        "reverse_calm_tidal": [0.253625453, 0.258318484],
    },
}


@every_set
def test_a_set_keeps_its_identity(name: str) -> None:
    """Which is the hash of the manifest as it stands on disk; caches name their set by it."""
    stored = (DATA / name / "manifest.json").read_bytes()
    values = json.loads(stored)
    assert values["format_version"] == 1
    assert sha256_hex(canonical_json(values)) == IDENTITIES[name]
    cache = open_cache(DATA / name)
    assert cache.identity == IDENTITIES[name]
    assert manifest_bytes(cache.manifest) == stored
    if isinstance(cache.manifest, CacheManifest):
        assert cache.manifest.premasked_sha256 == IDENTITIES[name.replace("cache", "premasked")]


@every_set
def test_a_set_is_sound(name: str) -> None:
    report = verify_set(Store(DATA / name))
    assert report.ok, report.problems
    assert report.identity == IDENTITIES[name]
    counts = open_cache(DATA / name).manifest.counts
    assert report.num_rows == counts["num_rows"] == 12
    entries = counts.get("num_payload_positions", counts.get("num_active_chunks", 0))
    assert report.num_payload_entries == entries
    assert (entries > 0) == name.endswith("cache")


@every_cache
def test_a_damaged_shard_is_noticed(name: str, tmp_path: Path) -> None:
    """As version 1 has no checksums of its own, the file's hash has to."""
    shutil.copytree(DATA / name, tmp_path / "cache")
    shard = tmp_path / "cache/data/view-01/00000.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    report = verify_set(Store(tmp_path / "cache"))
    (problem,) = report.problems
    assert problem.startswith("shard data/view-01/00000.parquet: sha256 mismatch (expected")


def test_the_payloads_are_those_of_version_1() -> None:
    manifest = open_cache(DATA / "positions/cache").manifest
    assert isinstance(manifest, CacheManifest)
    assert manifest.payloads == (
        CandidatesFacts(
            codec_version=1,
            k=5,
            vocab_size=39,
            temperatures=(1.0, 2.0),
            mean_logits_positions=10,
        ),
        ChunksFacts(codec_version=1),
    )
    assert (manifest.hidden, manifest.fidelity) == (None, ())


def test_inspect_and_verify_show_them() -> None:
    shown = run_command("inspect", DATA / "positions/cache")
    assert shown.returncode == 0, shown.stderr
    assert "cache (format 1), positions" in shown.stdout
    facts = json.loads(run_command("inspect", DATA / "positions/cache", "--json").stdout)
    assert facts["identity"] == IDENTITIES["positions/cache"]
    assert facts["fidelity_texts"] == []
    assert facts["payload_texts"] == [
        "candidates: k = 5 of 39 ids, temperatures 1, 2, codec raw 1",
        "chunks: one log-prob each, codec raw 1",
    ]
    verified = run_command("verify", DATA / "chunks/cache")
    assert verified.returncode == 0, verified.stderr
    assert "sound (cache 3d1ccb83f528" in verified.stdout


@pytest.mark.parametrize("alignment", LOSSES)
def test_a_student_learns_what_it_learnt_from_them(
    alignment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_yaml(
        tmp_path / "train.yaml",
        {
            "output": str(tmp_path / "run"),
            "student": {
                "init": "random",
                "tokenizer": str(DATA / alignment / "tokenizer"),
                "architecture": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
            },
            "objective": {"losses": list(LOSSES[alignment])},
            "stream": {"batch_size": 4},
            "optimizer": {"learning_rate": 1e-3},
            "metrics": {"every": 1},
            "max_steps": 2,
            "device": "cpu",
        },
    )
    cli.train(config, str(DATA / alignment / "cache"), json_output=True, resume="never")
    summary = json.loads(capsys.readouterr().out)
    assert summary["cache_identity"] == IDENTITIES[f"{alignment}/cache"]
    assert summary["steps"] == 2
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "loss" in line]
    for term, expected in LOSSES[alignment].items():
        assert [step[f"loss/{term}"] for step in steps] == pytest.approx(expected, rel=1e-4)


def todays_header(manifest: Manifest, **changes: Any) -> Header:
    """What today's program would write into that folder: its version, its provenance."""
    kind = CacheHeader if isinstance(manifest, CacheManifest) else Header
    values = {name: getattr(manifest, name) for name in kind.model_fields}
    values["format_version"] = FORMAT_VERSION
    mine = {"command": "today's", "tide_cache": "9", "git_revision": "f" * 40}
    values |= {name: mine for name in values if name.endswith("provenance")}
    return kind(**{**values, **changes})


@every_set
def test_what_is_finished_stays_finished(name: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / name, tmp_path / "set")
    writer = SetWriter(Store(tmp_path / "set"), todays_header(open_cache(DATA / name).manifest))
    complete = writer.begin()
    assert complete is not None
    assert complete.format_version == 1
    assert_same_files(tmp_path / "set", DATA / name)


@every_cache
def test_a_build_takes_the_payloads_of_a_finished_cache_as_they_are(
    name: str, tmp_path: Path
) -> None:
    """Keys of the config that the older program did not have do not make it another cache."""
    manifest = open_cache(DATA / name).manifest
    assert isinstance(manifest, CacheManifest)
    record = record_of(manifest)
    assert record.payloads == manifest.payloads
    assert [facts.path for facts in record.files] == [
        facts.path for facts in manifest.files if facts.path != "README.md"
    ]
    shutil.copytree(DATA / name, tmp_path / "cache")
    header = todays_header(
        manifest, payloads=record.payloads, build_config={"payload": None, "hidden": {"nats": 0.1}}
    )
    assert SetWriter(Store(tmp_path / "cache"), header).begin() is not None


@every_set
def test_another_set_is_refused_by_key(name: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / name, tmp_path / "set")
    manifest = open_cache(DATA / name).manifest
    header = todays_header(manifest, config={"seed": 1}, block_size=8)
    with pytest.raises(
        CompatibilityError, match=r"holds another set; differing: block_size, config\.seed; write"
    ):
        SetWriter(Store(tmp_path / "set"), header).begin()
    assert_same_files(tmp_path / "set", DATA / name)


def test_a_new_payload_does_not_go_into_an_old_cache(tmp_path: Path) -> None:
    shutil.copytree(DATA / "positions/cache", tmp_path / "cache")
    manifest = open_cache(DATA / "positions/cache").manifest
    header = todays_header(manifest, payloads=(ChunksFacts(),))
    with pytest.raises(CompatibilityError, match="holds another set; differing: payloads"):
        SetWriter(Store(tmp_path / "cache"), header).begin()


@every_set
def test_what_the_older_program_left_unfinished_is_refused(name: str, tmp_path: Path) -> None:
    """Half a set of each format would be neither."""
    header = todays_header(open_cache(DATA / name).manifest)
    store = Store(tmp_path)
    begun = {**header.model_dump(mode="json"), "format_version": 1}
    store.publish(HEADER, canonical_json(begun))
    before = all_files(tmp_path)
    with pytest.raises(CompatibilityError, match="holds another set; differing: format_version"):
        SetWriter(store, header).begin()
    assert all_files(tmp_path) == before


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_another_version_is_refused_with_those_that_can_be_read(version: object) -> None:
    values = json.loads((DATA / "positions/cache/manifest.json").read_bytes())
    with pytest.raises(
        FormatError,
        match=rf"^here: format_version: this program reads 1, 2 and 3, got {version!r};",
    ):
        parse_manifest(json.dumps({**values, "format_version": version}).encode(), where="here")
