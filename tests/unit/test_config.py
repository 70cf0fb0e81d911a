"""Config errors name file, key, expected, got and the nearest known key."""

from pathlib import Path

import pytest

from tide_cache.config import StrictModel, load_config
from tide_cache.errors import ConfigError


class Inner(StrictModel):
    temperature: float = 2.0
    tokens: tuple[int, ...] = ()


class Outer(StrictModel):
    seed: int
    inner: Inner = Inner()
    maybe: Inner | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_reads_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ninner: {temperature: 1.5}\n")
    config = load_config(path, Outer, ["inner.temperature=3", "maybe.tokens=[1, 2]"])
    assert config.inner.temperature == 3
    assert config.maybe == Inner(tokens=(1, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1\nseed: 1", r"unknown key 'sed' \(did you mean 'seed'\?\)"),
        ("seed: 1\ninner: {temperatur: 1}", r"'inner.temperatur' \(did you mean 'temperature'\?\)"),
        ("seed: 1\nmaybe: {token: []}", r"'maybe.token' \(did you mean 'tokens'\?\)"),
        ("inner: {}", "missing key 'seed'"),
        ("seed: soon", "seed: .*got 'soon'"),
        ("- a\n- b", "expected a mapping of keys, got list"),
        ("seed: [", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, Outer)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_bad_override(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml", Outer)
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_config(write(tmp_path, "seed: 1"), Outer, ["seed"])


def test_a_pipeline_file_holds_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "build: {seed: 1}\ntrain: {seed: 2, inner: {temperature: 4}}\n")
    config = load_config(path, Outer, ["seed=5"], section="train")
    assert (config.seed, config.inner.temperature) == (5, 4)
    with pytest.raises(ConfigError, match="expected a section 'prepare', got build, train"):
        load_config(path, Outer, section="prepare")
    path = write(tmp_path, "build: {seed: 1}\ntrian: {seed: 2}\n")
    with pytest.raises(ConfigError, match=r"unknown section 'trian' \(did you mean 'train'"):
        load_config(path, Outer, section="build")
    path = write(tmp_path, "train: {sed: 2}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: train: unknown key 'sed'"):
        load_config(path, Outer, section="train")
    assert load_config(write(tmp_path, "seed: 3\n"), Outer, section="train").seed == 3


def test_a_file_lies_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "first.yaml").write_text("seed: 1\ninner: {temperature: 1.5, tokens: [1, 2]}\n")
    (tmp_path / "sub/second.yaml").write_text("base: ../first.yaml\ninner: {tokens: [3]}\n")
    path = write(tmp_path, "base: sub/second.yaml\nseed: 2\nmaybe: null\n")
    config = load_config(path, Outer, ["inner.temperature=3"])
    assert config == Outer(seed=2, inner=Inner(temperature=3, tokens=(3,)))
    assert load_config(path, Outer).inner == Inner(temperature=1.5, tokens=(3,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: config.yaml", r"config.yaml: base: leads back to itself"),
        ("base: [a]", r"config.yaml: base: expected the name of a file, got \['a'\]"),
        ("base: none.yaml", r"none.yaml: cannot read the config \(No such file"),
    ],
)
def test_bases_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), Outer)
