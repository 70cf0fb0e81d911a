"""Push to and pull from the hub through its own client, against a small server on loopback."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders import all_files, assert_same_files, command
from tests.cache_builders import SetShape, Workshop, make_workshop
from tests.hub_servers import hub_server
from tests.support import PROJECT_ROOT

URL = "hf://datasets/lab/cache"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shape = SetShape(num_samples=20, samples_per_task=10)
    return make_workshop(tmp_path_factory.mktemp("workshop"), shape, mean_logits=True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    with hub_server(tmp_path / "hub") as environment:
        yield environment


def run(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def commits(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "commits.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_files_first_the_manifest_last_and_back(
    workshop: Workshop, hub: dict[str, str], tmp_path: Path
) -> None:
    done = run(hub, "push", workshop.cache, URL, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "hub/created.json").exists()
    done = run(hub, "push", workshop.cache, URL)
    assert done.returncode == 0, done.stderr
    assert all_files(tmp_path / "hub/files") == all_files(workshop.cache)
    made = commits(tmp_path / "hub")
    assert made[-1]["files"] == ["file manifest.json"]
    assert all("file manifest.json" not in str(commit["files"]) for commit in made[:-1])
    created = json.loads((tmp_path / "hub/created.json").read_text())
    is_private = created.get("private") or created.get("visibility") == "private"
    assert is_private, "who may read it is a decision"
    done = run(hub, "push", workshop.cache, URL)
    assert "nothing to do, the set is there" in done.stdout, done.stderr
    assert len(commits(tmp_path / "hub")) == len(made)
    done = run(hub, "pull", URL, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert_same_files(tmp_path / "cache", workshop.cache)


def test_a_push_that_the_hub_refuses_half_way_goes_on(
    workshop: Workshop, hub: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "hub/refuse").write_text("Manifest")
    done = run(hub, "push", workshop.cache, URL)
    assert done.returncode == 1
    assert f"{URL}/manifest.json: the hub refuses or does not answer" in done.stderr
    assert "hf_secret" not in done.stderr + done.stdout
    assert not (tmp_path / "hub/files/manifest.json").exists()
    num_before = len(commits(tmp_path / "hub"))
    done = run(hub, "push", workshop.cache, URL)
    assert done.returncode == 0, done.stderr
    assert all_files(tmp_path / "hub/files") == all_files(workshop.cache)
    assert len(commits(tmp_path / "hub")) == num_before + 1, "nothing is sent twice"


def test_another_set_is_replaced_when_asked(
    workshop: Workshop, hub: dict[str, str], tmp_path: Path
) -> None:
    assert run(hub, "push", workshop.cache, URL).returncode == 0
    done = run(hub, "push", workshop.premasked, URL)
    assert done.returncode == 1
    assert "holds another set" in done.stderr
    done = run(hub, "push", workshop.premasked, URL, "--replace")
    assert done.returncode == 0, done.stderr
    assert all_files(tmp_path / "hub/files") == all_files(workshop.premasked)
    assert run(hub, "push", workshop.cache, "hf://datasets/lab").returncode == 2
