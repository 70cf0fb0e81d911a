"""The model card: what a run recorded, licences never invented, nothing of the machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from stage2_student.config import TrainConfig
from stage2_student.release.benchmark_results import read_results
from stage2_student.release.model_card import model_card
from stage2_student.release.training_record import (
    RECORD_FILE,
    TrainingRecord,
    public_name,
    read_record,
)
from stage2_student.trainer import train
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.unit.test_score_table import make_results, make_score
from tide_cache.cache import open_cache
from tide_cache.errors import ConfigError, FormatError, TideError

EVIL = "</code><script>x</script> [a](http://evil) `b` ---\n# Title"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("machine-path-that-nobody-should-read")
    workshop = make_workshop(folder, SetShape(num_samples=20))
    evaluation = {"cache": str(workshop.premasked), "max_samples": 5}
    config = workshop.config(evaluation=evaluation, max_steps=7)
    train(TrainConfig.model_validate(config), workshop.cache)
    return workshop


@pytest.fixture(scope="module")
def record(workshop: Workshop) -> TrainingRecord:
    found = read_record(workshop.folder / "run/final")
    assert found is not None
    return found


def card_of(record: TrainingRecord | None, **options: Any) -> tuple[dict[str, Any], str]:
    values = {"load_from": "lab/student", "dtype": "float32", "block_size": 4, "mask_token_id": 39}
    card = model_card(record, **{**values, **options})
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), body


def changed(record: TrainingRecord, **changes: Any) -> TrainingRecord:
    """The record with fields of its student, its first cache or its teacher replaced."""
    values = record.model_dump(mode="json")
    for place, fields in changes.items():
        target = {
            "student": values["student"],
            "cache": values["caches"][0],
            "teacher": values["caches"][0]["teacher"],
            "source": values["caches"][0]["sources"][0],
        }[place]
        target |= fields
    return TrainingRecord.model_validate(values)


def test_a_run_writes_its_card(workshop: Workshop, record: TrainingRecord) -> None:
    final = workshop.folder / "run/final"
    card = (final / "README.md").read_text(encoding="utf-8")
    identity = open_cache(workshop.cache).identity
    told = (
        f"teacher cache `cache`, identity (sha256 of its manifest) `{identity}`, format 2: 20 "
        "samples, 2 views each",
        "teacher `random` (revision not given, weights `bbbbbbbbbbbb`, float32",
        "data `made`: 9 of 9 rows, fingerprint `f`",
        "data made: CC0-1.0",
        "payload candidates: k = 39 of 39 ids, temperatures 1, 2, codec raw 2",
        "losses: 1 x ce, 1 x tidal; cross entropy per token, mask weight published",
        "distillation at temperature 2",
        "lambda from 0.1 to 0.9, cosine",
        "learning rate 0.001, cosine, warm-up 0.05 of the steps",
        "7 steps of 8 rows, 2.3333 epochs, ranks: 1, seed: 0",
        "precision float32, weights float32",
        "block size: 4 tokens; mask token id: 39",
        "tide-train config.yaml --cache cache",
        "answers to any benchmark",
        f"git {record.provenance.git_revision or 'unknown'}",
        f"transformers {record.provenance.packages['transformers']}",
    )
    for words in told:
        assert words in card
    lines = (workshop.folder / "run/metrics.jsonl").read_text().splitlines()
    last = next(line for line in map(json.loads, reversed(lines)) if "loss" in line)
    assert f"| loss/tidal | {last['loss/tidal']:.4g} |" in card
    summary = json.loads((workshop.folder / "run/summary.json").read_text())
    assert f"| all | {summary['evaluation']['nll']:.4f} | - |" in card
    # What training again takes is in it: the same deciding config.
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert TrainConfig.model_validate(config).objective.weights == {"ce": 1.0, "tidal": 1.0}


def test_nothing_of_the_machine_is_in_what_is_handed_on(workshop: Workshop) -> None:
    checkpoint = workshop.folder / "run/checkpoints/step-00000005"
    for path in [*(workshop.folder / "run/final").iterdir(), checkpoint / RECORD_FILE]:
        assert workshop.folder.name.encode() not in path.read_bytes(), path
        assert b"tokens_per_s" not in path.read_bytes(), path


def test_a_checkpoint_says_how_far_it_is(workshop: Workshop) -> None:
    record = read_record(workshop.folder / "run/checkpoints/step-00000005")
    assert record is not None
    assert record.last_metrics["step"] == record.steps_done == 5
    assert record.evaluation is None  # measured at the end alone
    _, body = card_of(record)
    assert "step 5 of 7 (a checkpoint, not the end of the run)" in body
    assert "the likelihood of held-out text" in body.split("## What was not measured")[1]


@pytest.mark.parametrize(
    ("changes", "license"),
    [
        ({"teacher": {"licence": "CC0-1.0"}}, "cc0-1.0"),
        ({"teacher": {"licence": "mit"}}, "other"),  # two of them
        ({"teacher": {"licence": "CC0-1.0"}, "student": {"init": "lab/old"}}, "other"),  # unknown
        (
            {
                "teacher": {"licence": "CC0-1.0"},
                "student": {"init": "lab/old", "licence": "cc0-1.0"},
            },
            "cc0-1.0",
        ),
        (
            {"teacher": {"licence": "my own"}, "source": {"licence": "my own"}},
            "other",  # the hub knows no such identifier
        ),
        ({"teacher": {"licence": "CC0-1.0"}, "source": {"licence": None}}, "other"),
    ],
)
def test_the_licence_is_what_all_of_it_has_or_other(
    record: TrainingRecord, changes: dict[str, Any], license: str
) -> None:
    front, body = card_of(changed(record, **changes))
    assert front["license"] == license
    assert ("license_name" in front) == (license == "other")
    for licence in changes.get("teacher", {}).values():
        assert f"- teacher random: {licence}" in body
    if "student" in changes:
        licence = changes["student"].get("licence", "unknown")
        assert f"- initial weights lab/old: {licence}" in body


def test_hub_names_are_linked_and_no_others(record: TrainingRecord) -> None:
    front, _ = card_of(record)
    assert "base_model" not in front
    assert "datasets" not in front
    cache = {"name": "hf://datasets/lab/cache@main/sub"}
    student = {"init": "lab/old", "is_hub_name": True, "revision": "abc"}
    front, body = card_of(changed(record, cache=cache, student=student))
    assert front["base_model"] == "lab/old"
    assert front["datasets"] == ["lab/cache"]
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert "from `lab/old` at revision `abc`" in body
    assert 'name = "lab/student"' in body


def test_benchmarks_of_a_results_file(record: TrainingRecord, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results = {
        "gsm8k_cot": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.01,
        },
        "bbh": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
    }
    path.write_text(json.dumps({"results": results, "n-shot": {"bbh": 3}}))
    scores = read_results(path)
    _, body = card_of(record, scores=scores)
    assert "| bbh | 3 | acc | 0.5000 |" in body
    assert "| gsm8k_cot | - | exact_match (strict-match) | 0.2500 ± 0.0100 |" in body
    assert "answers to any benchmark" not in body


def test_benchmarks_of_our_own_results_file(record: TrainingRecord, tmp_path: Path) -> None:
    results = make_results(make_score("gsm8k_cot", 48.25), make_score("bbh", 26.5, num_samples=7))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results.as_json()))
    _, body = card_of(record, scores=read_results(path))
    gsm8k = "exact_match,flexible-extract, percent"
    assert f"| gsm8k_cot | 0 | {gsm8k} | 48.2500 ± 1.2500 |" in body
    limited = "exact_match,get-answer, percent, 7 of 100 questions"
    assert f"| bbh | 3 | {limited} | 26.5000 ± 1.2500 |" in body
    broken = results.as_json()
    broken["benchmarks"][0]["task"] = "surprise"
    path.write_text(json.dumps(broken))
    with pytest.raises(FormatError, match="benchmarks: not as 'tide-eval run' writes them"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("{", FormatError, "not JSON"),
        ("[]", FormatError, "expected a JSON object, got list"),
        ("{}", FormatError, "results: expected an object of tasks"),
        ('{"results": {"bbh": {"acc": "high"}}}', FormatError, "expected at least one number"),
        (None, ConfigError, "cannot read it"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, text: str | None, error: type[TideError], told: str
) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=told):
        read_results(path)


def test_a_strangers_words_are_no_markup(record: TrainingRecord) -> None:
    front, body = card_of(
        changed(
            record,
            cache={"name": EVIL, "payloads": [EVIL], "fidelity": [EVIL]},
            teacher={"name": EVIL, "licence": EVIL, "revision": EVIL},
            source={"name": EVIL, "licence": EVIL},
            student={"init": EVIL},
        ),
        load_from=EVIL,
    )
    assert front["license"] == "other"
    assert "\n# Title" not in body
    outside = "".join(body.split("`")[::2])  # what is not code
    assert "<script" not in outside.replace("\\<", "")
    assert "[a](" not in outside.replace("\\[", "")


def test_a_student_without_a_record_has_a_card_that_says_so() -> None:
    front, body = card_of(None, block_size=None, mask_token_id=None, has_tokenizer=False)
    assert "license" not in front
    assert "Nothing was recorded of how this student was trained" in body
    assert "AutoTokenizer" not in body


def test_a_damaged_record_is_named(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copy(workshop.folder / "run/final" / RECORD_FILE, tmp_path)
    values = json.loads((tmp_path / RECORD_FILE).read_text())
    del values["caches"][0]["identity"]
    (tmp_path / RECORD_FILE).write_text(json.dumps(values))
    with pytest.raises(FormatError, match=r"training\.json: caches\.0\.identity: .*missing|requi"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/someone/runs/cache", "cache"),
        ("~/runs/cache/", "cache"),
        ("../runs/cache", "cache"),
        ("file:///home/someone/cache", "cache"),
        ("C:\\Users\\someone\\cache", "cache"),
        ("runs/cache", "runs/cache"),
        ("random", "random"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("hf://datasets/lab/cache@v1", "hf://datasets/lab/cache@v1"),
        ("s3://lab/cache", "s3://lab/cache"),
        ("https://me:secret@host/cache?X-Signature=secret", "https://host/cache"),
    ],
)
def test_names_that_others_may_read(place: str, name: str) -> None:
    assert public_name(place) == name
