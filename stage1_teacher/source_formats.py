"""The forms in which a chat data set may lie around, each opened as one `datasets.Dataset`.

A path that exists is read locally: a file by its suffix, a `save_to_disk` folder by the marker
files in it, any other folder the way `load_dataset` resolves it (splits by name, configurations
from its README). A name that does not exist but could be one is asked of the hub. No form runs code
that comes with the data.
"""

import glob
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from huggingface_hub import hf_hub_download

from stage1_teacher.conversations import text_columns
from stage1_teacher.mixture import SourceConfig, file_kind, is_hub_name
from stage1_teacher.source_errors import empty_source, explained, missing_path, summary
from tide_cache.card_license import card_license
from tide_cache.errors import ConfigError, DataError, did_you_mean

logger = logging.getLogger(__name__)

_SAVED_DATASET = "state.json"
_SAVED_DICT = "dataset_dict.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedDataset:
    """A data set as `datasets` reads it, with what is known of its origin."""

    dataset: datasets.Dataset
    license: str | None = None
    revision: str | None = None


def open_dataset(config: SourceConfig, cache_dir: Path | None = None) -> OpenedDataset:
    """Open the data set of a source, without filters.

    `cache_dir` holds the copies that `datasets` makes (default: its own, `HF_DATASETS_CACHE`).
    Raises DataError for data that is missing, empty or broken, ConfigError for a split that does
    not exist or an option that the form does not have, StorageError for a full disk.
    """
    path = Path(config.path).expanduser()
    if config.revision is not None and path.exists():
        raise ConfigError(f"{config.path}: revision is for datasets of the hub, got a local path")
    cache_dir = cache_dir or Path(datasets.config.HF_DATASETS_CACHE)
    with _no_progress_bars():
        if path.is_file():
            return _open_file(config, path, cache_dir)
        if path.is_dir():
            is_saved = (path / _SAVED_DATASET).is_file() or (path / _SAVED_DICT).is_file()
            return (_open_saved if is_saved else _open_folder)(config, path, cache_dir)
        if is_hub_name(config.path):
            return _open_hub(config, path, cache_dir)
    raise missing_path(path)


def _open_file(config: SourceConfig, path: Path, cache_dir: Path) -> OpenedDataset:
    if config.name is not None or config.split not in (None, "train"):
        raise ConfigError(
            f"{config.path}: a single file has no configurations (name) and no splits",
            hint="take them out; cap:N limits the rows",
        )
    kind = file_kind(path.name)
    if kind is None:
        raise DataError(
            f"{config.path}: unknown kind of file {''.join(path.suffixes)!r}, expected .jsonl,"
            f" .json, .parquet, .csv, .tsv (each also .gz, .bz2, .xz, .zst) or .arrow"
        )
    with explained(config.path, [path], cache_dir):
        if kind == "arrow":
            return OpenedDataset(dataset=datasets.Dataset.from_file(str(path)))
        read: Callable[..., datasets.Dataset] = {
            "json": datasets.Dataset.from_json,
            "parquet": datasets.Dataset.from_parquet,
        }.get(kind, datasets.Dataset.from_csv)
        # `datasets` takes a path for a pattern.
        pattern = glob.escape(str(path.absolute()))
        options = _reader_options(config, kind)
        return OpenedDataset(dataset=read(pattern, cache_dir=str(cache_dir), **options))


def _reader_options(config: SourceConfig, kind: str) -> dict[str, Any]:
    if kind == "json":
        # Some chat rows look like an agent's trace, for which `datasets` wants another package.
        known = "parse_agent_traces" in JsonConfig.__dataclass_fields__
        return {"parse_agent_traces": False} if known else {}
    if kind not in ("csv", "tsv"):
        return {}
    # Texts as they stand: "007" is no number and "NA" not a missing value.
    as_text = dict.fromkeys(text_columns(config), str)
    options: dict[str, Any] = {"converters": as_text, "keep_default_na": False}
    return options | ({"sep": "\t"} if kind == "tsv" else {})


def _open_saved(config: SourceConfig, path: Path, cache_dir: Path) -> OpenedDataset:
    if config.name is not None:
        raise ConfigError(f"{config.path}: a save_to_disk folder has no configurations (name)")
    folder = path
    if (path / _SAVED_DICT).is_file():
        with explained(config.path, [], cache_dir):
            known = json.loads((path / _SAVED_DICT).read_text())["splits"]
        folder = path / _choose_split(config, known, slices=False)
    elif config.split is not None:
        raise ConfigError(f"{config.path}: this save_to_disk folder has no splits")
    if (folder / _SAVED_DATASET).is_file() and not any(folder.glob("*.arrow")):
        raise empty_source(config.path)  # `load_from_disk` cannot load what it saved here
    with explained(config.path, [], cache_dir):
        dataset = datasets.load_from_disk(str(folder))
    return OpenedDataset(dataset=dataset, license=dataset.info.license or card_license(path))


def _open_folder(config: SourceConfig, path: Path, cache_dir: Path) -> OpenedDataset:
    arguments: dict[str, Any] = {"name": config.name, "cache_dir": str(cache_dir)}
    with explained(config.path, _data_files_in(path), cache_dir):
        builder = datasets.load_dataset_builder(str(path), **arguments)
        kind = {JsonConfig: "json", CsvConfig: "csv"}.get(type(builder.config))
        if kind is not None:
            # Only now is it known which files the folder holds, and so which options they take.
            options = _reader_options(config, kind)
            builder = datasets.load_dataset_builder(str(path), **arguments, **options)
    _warn_of_unread(config, path, builder)
    dataset = _prepared(config, builder, _files_of(builder), cache_dir)
    return OpenedDataset(dataset=dataset, license=builder.info.license or card_license(path))


def _open_hub(config: SourceConfig, path: Path, cache_dir: Path) -> OpenedDataset:
    if config.path.isidentifier() and find_spec(f"datasets.packaged_modules.{config.path}"):
        # "json" is a reader of `datasets`: it would read the working directory.
        raise missing_path(path)
    try:
        builder = datasets.load_dataset_builder(
            config.path, config.name, revision=config.revision, cache_dir=str(cache_dir)
        )
    except Exception as error:
        local = missing_path(path).message
        hint = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else None
        raise DataError(f"{local}; the hub says: {summary(error)}", hint=hint) from error
    logger.info("%s: dataset of the hub at revision %s", config.path, builder.hash)
    dataset = _prepared(config, builder, [], cache_dir)
    card_license = builder.info.license or _hub_license(config)
    return OpenedDataset(dataset=dataset, license=card_license, revision=builder.hash)


def _prepared(
    config: SourceConfig, builder: Any, files: Sequence[str], cache_dir: Path
) -> datasets.Dataset:
    with explained(config.path, files, cache_dir):
        builder.download_and_prepare()
    splits = builder.info.splits or {}
    split = _choose_split(config, list(splits))
    if split in splits and splits[split].num_examples == 0:
        raise empty_source(config.path)
    with explained(config.path, files, cache_dir):
        return builder.as_dataset(split=split)


def _choose_split(config: SourceConfig, known: Sequence[str], *, slices: bool = True) -> str:
    if config.split is None:
        if "train" in known or len(known) == 1:
            return "train" if "train" in known else known[0]
        raise ConfigError(
            f"{config.path}: which split? It has {', '.join(known)}", hint="choose with split:NAME"
        )
    # `train[:10%]` and `train+test` are for `datasets` to understand.
    is_slice = slices and not set("[+").isdisjoint(config.split)
    if config.split not in known and not is_slice:
        close = did_you_mean(config.split, known)
        raise ConfigError(
            f"{config.path}: no split {config.split!r}{close}", hint=f"splits: {', '.join(known)}"
        )
    return config.split


def _files_of(builder: Any) -> list[str]:
    return [str(file) for files in (builder.config.data_files or {}).values() for file in files]


def _data_files_in(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file_kind(file.name) and file.is_file())
    return sorted(file for file in files if file.name != "dataset_infos.json")


def _warn_of_unread(config: SourceConfig, folder: Path, builder: Any) -> None:
    """Say which data files `load_dataset` leaves out: it reads one kind and one configuration."""
    read = {Path(file).resolve() for file in _files_of(builder)}
    unread = [str(f.relative_to(folder)) for f in _data_files_in(folder) if f.resolve() not in read]
    if unread and config.name is None:
        shown = ", ".join(unread[:5]) + (", …" if len(unread) > 5 else "")
        logger.warning("%s: %d data files are not read: %s", config.path, len(unread), shown)


def _hub_license(config: SourceConfig) -> str | None:
    try:
        card = hf_hub_download(
            config.path, "README.md", repo_type="dataset", revision=config.revision
        )
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        logger.debug("%s: no dataset card (%s)", config.path, summary(error))
        return None
    return card_license(Path(card).parent)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the bars of `datasets` off the terminal, where ours are."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
