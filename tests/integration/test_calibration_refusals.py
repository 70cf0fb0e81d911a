"""What calibration refuses, and that it never takes what another build left for its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stage1_teacher import cli
from stage1_teacher.calibration_record import CLAIM
from tests.builders import (
    all_files,
    assert_same_files,
)
from tests.pipelines import write_pipeline
from tests.support import PROJECT_ROOT
from tests.teacher_checkpoints import make_model, write_checkpoint
from tide_cache.canonical import canonical_json
from tide_cache.errors import CompatibilityError, ConfigError, StorageError, TideError

CHUNKS = PROJECT_ROOT / "tests/data/format-1/chunks"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a teacher, a premasked set, and a cache of the default payload."""
    folder = tmp_path_factory.mktemp("refusals")
    model = make_model("qwen3", vocab_size=448, num_layers=1, max_position_embeddings=512)
    write_pipeline(
        folder,
        model,
        num_rows=40,
        prepare={"num_views": 1, "samples_per_shard": 40},
        build={
            "candidates": {"mean_logits_positions": 100},
            "hidden": {"fit_positions": 256},
            "fidelity_positions": 64,
        },
    )
    write_checkpoint(folder / "foreign", "qwen3", model)
    shutil.copytree(CHUNKS / "tokenizer", folder / "foreign", dirs_exist_ok=True)
    cli.prepare(folder / "pipeline.yaml", output=str(folder / "premasked"), workers=1)
    build(folder, folder / "cache")
    return folder


def build(ground: Path, output: Path, *overrides: str) -> None:
    """`tide-cache build` without a process of its own."""
    cli.build(
        ground / "pipeline.yaml",
        premasked=str(ground / "premasked"),
        output=str(output),
        workers=1,
        overrides=list(overrides),
    )


def calibrate(ground: Path, *overrides: str, **arguments: Any) -> None:
    """`tide-cache calibrate --json` without a process of its own."""
    named = {"premasked": str(ground / "premasked"), "json_output": True, **arguments}
    cli.calibrate(ground / "pipeline.yaml", overrides=list(overrides), **named)


def test_a_claim_goes_away_with_the_rest_of_the_state(ground: Path) -> None:
    assert not (ground / "cache/_build").exists()


def half_done(ground: Path, output: Path, *, claim: bytes | None) -> Path:
    """A folder as a build leaves it that was killed between its codec files and its record."""
    shutil.copytree(ground / "cache/codec", output / "codec")
    if claim is not None:
        (output / CLAIM).parent.mkdir()
        (output / CLAIM).write_bytes(claim)
    return output


def claim_of(ground: Path, **build_config: Any) -> bytes:
    manifest = json.loads((ground / "cache/manifest.json").read_bytes())
    names = ("premasked_sha256", "comp_demo", "teacher_model", "build_config")
    key = {name: manifest[name] for name in names}
    return canonical_json({**key, "build_config": {**key["build_config"], **build_config}})


@pytest.mark.parametrize("is_claimed", [True, False])
def test_a_build_goes_on_from_its_own_codec_files(
    ground: Path, tmp_path: Path, is_claimed: bool
) -> None:
    claim = claim_of(ground) if is_claimed else None
    output = half_done(ground, tmp_path / "cache", claim=claim)
    build(ground, output)
    assert_same_files(output, ground / "cache")


def test_codec_files_of_another_build_are_refused_by_key(ground: Path, tmp_path: Path) -> None:
    """Before the teacher is asked, whose weights are rubbish here."""
    teacher = shutil.copytree(ground / "teacher", tmp_path / "rubbish")
    (teacher / "model.safetensors").write_bytes(b"rubbish" * 100)
    claim = claim_of(ground, fidelity_positions=65)
    output = half_done(ground, tmp_path / "cache", claim=claim)
    before = all_files(output)
    with pytest.raises(CompatibilityError) as caught:
        build(ground, output, f"teacher.model={teacher}")
    differing = caught.value.message.partition("holds another set; differing: ")[2].split(", ")
    assert "build_config.fidelity_positions" in differing
    assert "teacher_model.weights_sha256" in differing
    assert all_files(output) == before


def test_codec_files_that_nobody_claims_are_not_adopted(ground: Path, tmp_path: Path) -> None:
    """Mean logits of other positions would fit in every way, and be wrong."""
    settings = ("payloads=[candidates]", "candidates.mean_logits_positions=256")
    output = half_done(ground, tmp_path / "cache", claim=None)
    before = all_files(output)
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            build(ground, output, *settings)
        path = f"{output}/codec/candidates.safetensors"
        message = f"{path}: exists with other content and belongs to no build"
        assert caught.value.message == message
        assert caught.value.hint is not None
        assert f"remove {output}/codec and run" in caught.value.hint
        assert all_files(output) == before
    shutil.rmtree(output / "codec")
    build(ground, output, *settings)


def test_a_set_of_two_vocabularies_has_nothing_to_calibrate(ground: Path) -> None:
    foreign = {"premasked": str(CHUNKS / "premasked")}
    named = f"teacher.model={ground / 'foreign'}"
    with pytest.raises(
        CompatibilityError, match="got chunks alone, which are exact: there is nothing to calibrate"
    ):
        calibrate(ground, named, **foreign)
    with pytest.raises(CompatibilityError, match=r"needs 'positions' \(a shared tokenizer\), got"):
        calibrate(ground, named, "payload=auto", **foreign)


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("payload=best", ConfigError, "payload"),
        ("fidelity=1", ConfigError, "fidelity"),
        ("student=/nowhere", TideError, "/nowhere"),
        ("candidates.k=1000", ConfigError, "candidates.k: expected at most the 418 ids"),
        ("hidden.fit_positions=255", ConfigError, "hidden.fit_positions"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    ground: Path, override: str, kind: type[TideError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        calibrate(ground, override)


def test_only_a_cache_can_be_checked(ground: Path) -> None:
    with pytest.raises(CompatibilityError, match="kind: expected a cache, got a premasked"):
        calibrate(ground, cache=str(ground / "premasked"))


def test_no_column_of_the_table_is_cut(
    ground: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However narrow the terminal is: figures may wrap, but they are there."""
    monkeypatch.setenv("COLUMNS", "80")
    calibrate(ground, "fidelity_positions=64", json_output=False)
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert "against a noised teacher" in title
    expected = "setting tail worst tidal 0.1 tidal 0.5 tidal 0.9 kl rkl rel. error B/pos GB us/pos"
    assert " ".join(header.split()) == expected
    assert lines[-1].startswith("payload: auto with fidelity 0.99 takes: ")
    assert not any("…" in line for line in lines)
