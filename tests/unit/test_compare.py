"""`diff`: what stands between two sets, in words, and what does not matter."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders import run_command
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.set_builders import premasked_header
from tests.support import PROJECT_ROOT
from tide_cache.cache import open_cache
from tide_cache.compare import Comparison, compare, lines, require_mergeable
from tide_cache.errors import CompatibilityError, ConfigError
from tide_cache.manifest import Manifest, parse_manifest
from tide_cache.merge import plan_merge
from tide_cache.store import Store
from tide_cache.writer import SetWriter

FORMAT_1 = PROJECT_ROOT / "tests/data/format-1"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shape = SetShape(num_samples=6)
    return make_workshop(tmp_path_factory.mktemp("workshop"), shape, mean_logits=True)


def other(manifest: Manifest, field: str, value: Any) -> Manifest:
    """The same manifest with one value changed, as a stranger may send it."""
    values = manifest.model_dump(mode="json")
    *parents, leaf = field.split("/")
    at: Any = values
    for parent in parents:
        at = at[int(parent)] if isinstance(at, list) else at[parent]
    at[int(leaf) if isinstance(at, list) else leaf] = value
    return parse_manifest(json.dumps(values).encode(), where="other")


HARD = [
    ("student/sha256", "c" * 64, "student.sha256", "merge and train", "mean other tokens"),
    ("student/mask_token_id", 38, "student.mask_token_id", "merge and train", "one mask token"),
    ("block_size", 8, "block_size", "merge and train", "one size of blocks"),
    ("teacher/sha256", "c" * 64, "teacher.sha256", "merge", "ids of the teacher would mean other"),
    ("noising/seed", 7, "noising.seed", "merge", "drawn by two rules"),
    ("noising/num_timesteps", 16, "noising.num_timesteps", "merge", "drawn by two rules"),
    ("comp_demo", False, "comp_demo", "merge", "asked in one pass, the other in two"),
    ("teacher_model/weights_sha256", "d" * 64, "teacher_model.weights_sha256", "merge", "another"),
    ("teacher_model/dtype", "bfloat16", "teacher_model.dtype", "merge", "asked otherwise"),
    ("teacher_model/attention", "native", "teacher_model.attention", "merge", "asked otherwise"),
    ("payloads/0/k", 5, "payloads", "merge", "its codec, must be the same"),
    ("files/0/sha256", "e" * 64, "codec files", "merge", "cannot be decoded with the other's"),
]


@pytest.mark.parametrize(("path", "value", "field", "matters_for", "why"), HARD)
def test_hard_facts_are_refused_with_the_reason(
    workshop: Workshop, path: str, value: object, field: str, matters_for: str, why: str
) -> None:
    ours = open_cache(workshop.cache).manifest
    theirs = other(ours, path, value)
    found = compare(ours, theirs)
    (difference,) = found.differences
    assert (difference.field, difference.matters_for) == (field, matters_for)
    assert why in difference.why
    assert bool(found.against_training) == (matters_for == "merge and train")
    with pytest.raises(CompatibilityError) as caught:
        require_mergeable([ours, theirs], ["one", "two"])
    assert caught.value.message.startswith(f"one and two cannot become one set: {field}: ")
    assert why in caught.value.message
    assert caught.value.hint == "see 'tide-cache diff one two'"
    told = lines(found, ("one", "two"))
    assert told[0] == f"cannot be merged: {field}"
    assert f"{field}: {difference.why} [{matters_for}]" in told
    assert f"  two: {difference.second}" in told


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("student/name", "renamed", "student.name"),
        ("teacher_model/name", "elsewhere/teacher", "teacher_model.name"),
        ("teacher_model/device", "another card", "teacher_model.device"),
        ("premasked_sha256", "a" * 64, "premasked_sha256"),
        ("sources/0/fingerprint", "g", "sources"),
        ("provenance/tide_cache", "7", "provenance.tide_cache"),
        ("config/samples_per_shard", 7, "config.samples_per_shard"),
        ("dropped/empty_reply", 3, "dropped"),
    ],
)
def test_what_does_not_matter_is_told_and_not_refused(
    workshop: Workshop, path: str, value: object, field: str
) -> None:
    ours = open_cache(workshop.cache).manifest
    theirs = other(ours, path, value)
    found = compare(ours, theirs)
    assert [d.field for d in found.immaterial] == [field]
    assert not found.against_merging
    require_mergeable([ours, theirs], ["one", "two"])
    told = lines(found, ("one", "two"))
    assert told[:2] == ["can be merged", "can train one student together"]
    assert told[3] == "differs, and does not matter:"
    assert told[4].startswith(f"  {field}: ")


def test_two_cuts_of_conversations_are_two_recipes(workshop: Workshop) -> None:
    """A key that an older program did not know stands against nothing."""
    plain = open_cache(workshop.premasked).manifest
    short, long = (
        other(plain, "config", {"student": {"max_length": length}}) for length in (128, 256)
    )
    (difference,) = compare(short, long).against_merging
    assert difference.field == "config.student.max_length"
    assert (difference.first, difference.second) == ("128", "256")
    assert not compare(plain, long).against_merging


def test_caches_of_two_teachers_train_together_and_do_not_merge(workshop: Workshop) -> None:
    ours = open_cache(workshop.cache).manifest
    found = compare(ours, other(ours, "teacher_model/weights_sha256", "d" * 64))
    assert found.as_json()["can_train_together"]
    assert not found.as_json()["can_merge"]


def test_caches_without_a_common_payload_do_not_train_together() -> None:
    ours = open_cache(FORMAT_1 / "positions/cache").manifest
    values = ours.model_dump(mode="json")
    first, second = (
        parse_manifest(json.dumps({**values, "payloads": [p]}).encode(), where="x")
        for p in values["payloads"]
    )
    found = compare(first, second)
    assert [d.field for d in found.against_training] == ["payloads"]


def test_a_premasked_set_and_a_cache(workshop: Workshop) -> None:
    found = compare(open_cache(workshop.premasked).manifest, open_cache(workshop.cache).manifest)
    assert "kind" in {d.field for d in found.against_merging}
    assert "cannot be merged: " in lines(found, ("a", "b"))[0]


def test_the_command(workshop: Workshop, tmp_path: Path) -> None:
    done = run_command("diff", workshop.cache, workshop.cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"the same set: {open_cache(workshop.cache).identity}\n"
    done = run_command("diff", FORMAT_1 / "positions/cache", FORMAT_1 / "chunks/cache")
    assert done.returncode == 1
    assert done.stdout.startswith("cannot be merged: alignment, ")
    assert "alignment: losses over positions and over chunks do not mix" in done.stdout
    told = json.loads(run_command("diff", workshop.premasked, workshop.cache, "--json").stdout)
    assert (told["can_merge"], told["same"]) == (False, False)
    fields = {d["field"]: d["matters_for"] for d in told["differences"]}
    assert fields["kind"] == "merge"
    assert fields["teacher_model.dtype"] == "merge"


def test_sets_without_rows_and_the_same_set_twice(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the same set as"):
        plan_merge([str(workshop.cache)] * 2)
    with pytest.raises(ConfigError, match="expected at least two sets"):
        plan_merge([str(workshop.cache)])
    urls = []
    for name in ("a", "b"):
        header = premasked_header(config={"seed": name})
        SetWriter(Store(tmp_path / name), header).begin()
        SetWriter(Store(tmp_path / name), header).finish([])
        urls.append(str(tmp_path / name))
    with pytest.raises(ConfigError, match="merge: none of the sets has rows"):
        plan_merge(urls)


def test_nothing_is_lost_between_the_two_lists(workshop: Workshop) -> None:
    found: Comparison = compare(
        open_cache(FORMAT_1 / "positions/cache").manifest, open_cache(workshop.cache).manifest
    )
    assert len(found.against_merging) + len(found.immaterial) == len(found.differences)
