"""The dataset card: sources, licences, teacher and makers, also of what was merged or cut out."""

import json
from pathlib import Path

import pytest
import yaml

from tests.cache_builders import (
    SetShape,
    Workshop,
    make_workshop,
    numbered_from,
    write_cache,
    write_premasked,
)
from tide_cache.cache import open_cache
from tide_cache.card import dataset_card
from tide_cache.manifest import SourceFacts, parse_manifest
from tide_cache.merge import merge, plan_merge
from tide_cache.part import plan_part, pull_part
from tide_cache.store import Store


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), SetShape(num_samples=6))


def source(name: str, licence: str | None) -> SourceFacts:
    return SourceFacts(
        name=name, fingerprint="f" * 64, licence=licence, num_rows=9, num_rows_taken=6
    )


def test_what_a_card_says(workshop: Workshop) -> None:
    card = (workshop.cache / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "CC0-1.0"
    assert "- teacher: `random` (revision not given, weights `bbbbbbbbbbbb`, float32" in card
    assert "- `made`: licence CC0-1.0, 9 of 9 rows taken, fingerprint `f`" in card
    assert "- `tests`, tide-cache 0, git unknown" in card
    assert "Token ids are text: whoever holds this folder can read the conversations" in card


def test_merging_and_cutting_keep_licences_and_makers(workshop: Workshop, tmp_path: Path) -> None:
    more = tmp_path / "more-premasked"
    write_premasked(
        more,
        workshop.tokenizer,
        SetShape(num_samples=6),
        change=numbered_from(1000),
        sources=(source("other", "CC-BY-SA-4.0"), source("nameless", None)),
        provenance={"command": "other lab", "tide_cache": "9", "git_revision": "a" * 40},
    )
    write_cache(tmp_path / "more", more)
    merge(plan_merge([str(workshop.cache), str(tmp_path / "more")]), Store(tmp_path / "both"))
    whole = open_cache(tmp_path / "both").manifest
    plan = plan_part(whole, views=[1], payloads=None)
    pull_part(plan, Store(tmp_path / "both"), Store(tmp_path / "part"))
    for name in ("both", "part"):
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert yaml.safe_load(card.split("---")[1])["license"] == "other"
        for licence in ("`made`: licence CC0-1.0", "`other`: licence CC-BY-SA-4.0"):
            assert licence in card
        assert "`nameless`: licence unknown, 6 of 9 rows taken" in card
        assert "- `other lab`, tide-cache 9, git aaaaaaaaaaaa" in card
        assert "- `tide-cache merge`, tide-cache 0.1.0, git " in card
        assert f"- `{open_cache(workshop.cache).identity[:12]}`: 6 samples" in card
    assert "this is a part of it: views 1, payloads all" in card
    assert open_cache(tmp_path / "part").manifest.num_views == 1


def test_a_strangers_words_are_no_markup(workshop: Workshop) -> None:
    values = open_cache(workshop.cache).manifest.model_dump(mode="json")
    evil = "</code><script>x</script> [a](http://evil) `b` ---\n# Title"
    values["teacher_model"]["name"] = values["student"]["name"] = evil
    values["teacher_model"]["revision"] = values["teacher_model"]["dtype"] = evil
    values["sources"][0] |= {"name": evil, "licence": evil}
    values["provenance"] = {"command": evil, "packages": {evil: evil}, "git_revision": evil}
    card = dataset_card(parse_manifest(json.dumps(values).encode(), where="here"))
    front, body = card.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---"))["license"] == evil
    assert "\n# Title" not in body
    outside = "".join(body.split("`")[::2])  # what is not code
    assert "<script" not in outside.replace("\\<", "")
    assert "[a](" not in outside.replace("\\[", "")
