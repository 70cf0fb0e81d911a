"""Config files: YAML in, a frozen pydantic model out, every mistake named where it stands.

A config class sits beside the component it configures and derives from `StrictModel`; this module
only knows how to read one. A misspelt key is refused with the nearest known key, because a key
that is ignored in silence is a run with other settings than its author believes.

A file may begin from another: `base: FILE`, relative to its own folder. Its mappings are laid over
the base's key by key; everything else (a list, a number, null) replaces what stood there. So a
config that differs in one setting says that setting and nothing else.
"""

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tide_cache.errors import ConfigError, did_you_mean


class StrictModel(BaseModel):
    """Base of everything that is read from a file: frozen, and no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Config = TypeVar("Config", bound=StrictModel)
SECTIONS = frozenset({"prepare", "build", "train", "demo"})
BASE = "base"


def load_config(
    path: str | Path,
    model: type[Config],
    overrides: Sequence[str] = (),
    *,
    section: str | None = None,
) -> Config:
    """Read a YAML file into `model`, with `overrides` such as `"student.dtype=bfloat16"` on top.

    One file may hold a whole pipeline under the keys `prepare`, `build` and `train`: where it does,
    only `section` of it is read. The file's `base` is read first. Raises ConfigError that
    names file, key, expected and got; unknown keys come with the nearest known one.
    """
    path = Path(path)
    values = _read_values(path)
    where = str(path)
    if section is not None and values.keys() & SECTIONS:
        values, where = _take_section(values, section, where), f"{path}: {section}"
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, model, where=where)


def parse_config(values: dict[str, Any], model: type[Config], *, where: str) -> Config:
    """Validate `values` as `model`; `where` names their origin in errors."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A misspelt key is also a missing one: say first which word was wrong.
        problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
        lines = [_explain(problem, model) for problem in problems]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def _read_values(path: Path, begun: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file over its base; `begun` are the files that led here."""
    if path.resolve() in begun:
        raise ConfigError(f"{path}: base: leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror})") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    base = values.pop(BASE, None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of a file, got {base!r}")
    return _laid_over(_read_values(path.parent / base, (*begun, path.resolve())), values)


def _laid_over(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        present = merged.get(key)
        both = isinstance(present, dict) and isinstance(value, dict)
        merged[key] = _laid_over(present, value) if both else value  # type: ignore[arg-type]
    return merged


def _take_section(values: dict[str, Any], section: str, where: str) -> dict[str, Any]:
    unknown = sorted(values.keys() - SECTIONS)
    if unknown:
        raise ConfigError(
            f"{where}: unknown section {unknown[0]!r}{did_you_mean(unknown[0], SECTIONS)}"
        )
    if not isinstance(values.get(section), dict):
        raise ConfigError(f"{where}: expected a section {section!r}, got {', '.join(values)}")
    chosen: dict[str, Any] = values[section]
    return chosen


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected KEY=VALUE, such as seed=3")
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is not a group of keys")
    values[leaf] = yaml.safe_load(text)


def _explain(problem: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        known = _known_keys(model, problem["loc"][:-1])
        return f"unknown key {location!r}{did_you_mean(key, known)}"
    if problem["type"] == "missing":
        return f"missing key {location!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if isinstance(got, dict | list) else f", got {got!r}"
    return f"{location or 'config'}: {message}{shown}"


def _known_keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Return the keys of the (possibly nested) model that `location` leads to."""
    models = [model]
    for part in location:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [m for field in fields for m in _models_in(field.annotation)]
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list, tuple, dict, typing.Annotated):
        return [m for argument in typing.get_args(annotation) for m in _models_in(argument)]
    return []
