"""Two builds of the default payload over different samples become one set: codecs are borrowed."""

from pathlib import Path

import pytest

from tests.builders import run_command
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import make_model
from tide_cache.cache import open_cache
from tide_cache.manifest import CacheManifest
from tide_cache.store import Store
from tide_cache.verify import verify_set


def command(*arguments: object) -> str:
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two premasked sets, and a cache of the first."""
    folder = tmp_path_factory.mktemp("borrowed")
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512)
    build = {
        "fidelity_positions": 60,
        "candidates": {"mean_logits_positions": 60},
        "hidden": {"fit_positions": 256},
        "samples_per_batch": 1,  # the company in a batch moves last bits of logits
    }
    config = write_pipeline(folder, model, num_rows=32, prepare={}, build=build)
    lines = (folder / "chat.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:18]), ("b", lines[18:]), ("whole", lines)):
        source = folder / f"source-{name}" / "chat.jsonl"  # rows carry the name of their file
        source.parent.mkdir()
        source.write_text("".join(part))
        command(
            *("prepare", config, "-o", folder / f"premasked-{name}", "--workers", "1"),
            *("--set", f"sources={source}"),
        )
    command("build", config, "-p", folder / "premasked-a", "-o", folder / "a", "--workers", "1")
    return folder


def build_b(ground: Path, output: Path, *settings: str, part: str = "b") -> list[object]:
    words = [word for setting in settings for word in ("--set", setting)]
    inputs = [ground / "pipeline.yaml", "-p", ground / f"premasked-{part}"]
    return ["build", *inputs, "-o", output, "--workers", "1", *words]


def test_caches_with_codecs_of_one_become_one(ground: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    command(*build_b(ground, apart))
    done = run_command("merge", ground / "a", apart, "-o", tmp_path / "no")
    assert done.returncode != 0
    assert "codec files" in done.stderr or "payloads" in done.stderr

    together = tmp_path / "together"
    arguments = build_b(ground, together, f"codec_from={ground / 'a'}")
    command(*arguments)
    first, second = (open_cache(url).manifest for url in (ground / "a", together))
    assert isinstance(first, CacheManifest)
    assert isinstance(second, CacheManifest)
    assert second.payloads == first.payloads
    assert [p.name for p in second.payloads] == ["candidates", "hidden"]
    assert [f for f in second.files if f.path.startswith("codec/")] == [
        f for f in first.files if f.path.startswith("codec/")
    ]
    assert first.fidelity
    assert not second.fidelity  # nothing was measured on its rows
    command(*arguments)  # again: finished

    command("merge", ground / "a", together, "-o", tmp_path / "both")
    report = verify_set(Store(tmp_path / "both"))
    assert report.ok, report.problems
    both = open_cache(tmp_path / "both")
    parts = [open_cache(ground / "a"), open_cache(together)]
    assert both.num_samples == sum(part.num_samples for part in parts)
    for view in range(both.num_views):
        start = 0
        for part in parts:
            rows = range(start, start + part.num_samples)
            expected = part.read_rows(view, range(part.num_samples))
            assert both.read_rows(view, rows).equals(expected)
            start += part.num_samples


def test_halves_are_the_whole_row_for_row_in_the_default_payloads(
    ground: Path, tmp_path: Path
) -> None:
    """One codec for all three: then quantised rows too are equal to the bit."""
    borrowed = f"codec_from={ground / 'a'}"
    command(*build_b(ground, tmp_path / "b", borrowed))
    command(*build_b(ground, tmp_path / "whole", borrowed, part="whole"))
    command("merge", ground / "a", tmp_path / "b", "-o", tmp_path / "both")
    both, whole = open_cache(tmp_path / "both"), open_cache(tmp_path / "whole")
    assert {"hidden_0", "cand_codes"} <= set(whole.read_rows(0, [0]).column_names)
    for view in range(whole.num_views):
        ours, theirs = (
            cache.read_rows(view, range(cache.num_samples)).sort_by("sample_id")
            for cache in (both, whole)
        )
        assert ours.num_rows == 32
        assert ours.equals(theirs)


def test_codecs_that_do_not_fit_are_refused(ground: Path, tmp_path: Path) -> None:
    other = make_model("qwen3", vocab_size=448, max_position_embeddings=512, seed=5)
    folder = tmp_path / "other"
    folder.mkdir()
    config = write_pipeline(folder, other, num_rows=8, prepare={}, build={})
    command("prepare", config, "-o", folder / "premasked", "--workers", "1")
    done = run_command(
        *("build", config, "-p", folder / "premasked", "-o", folder / "cache"),
        *("--workers", "1", "--set", f"codec_from={ground / 'a'}"),
    )
    assert done.returncode != 0
    assert "teacher_model.weights_sha256: this build's is" in done.stderr
    wrong = build_b(ground, tmp_path / "c", f"codec_from={ground / 'a'}", "payloads=[candidates]")
    wrong_payloads = run_command(*wrong)
    assert wrong_payloads.returncode != 0
    assert "payloads: this build's are candidates, that cache's candidates, hidden" in (
        wrong_payloads.stderr
    )
    missing = run_command(*build_b(ground, tmp_path / "d", f"codec_from={tmp_path / 'none'}"))
    assert missing.returncode != 0
    assert "no set here" in missing.stderr or "manifest.json" in missing.stderr
    premasked = run_command(
        *build_b(ground, tmp_path / "e", f"codec_from={ground / 'premasked-a'}")
    )
    assert premasked.returncode != 0
    assert "kind: expected a cache, got a premasked" in premasked.stderr
