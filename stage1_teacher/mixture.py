"""Which conversations a premasked set is made of: its sources, and the plan of its rows.

A mixture is a line of text (`stage1_teacher.mixture_grammar`) or a YAML list of `SourceConfig`s:

    sources: data/chat.jsonl + openai/gsm8k[name:main] + code[lang:python,cap:20000,weight:2]
    sources: [{path: code, filters: {lang: python}, cap: 20000, weight: 2}, data/chat.jsonl]

`plan_mixture` decides from the sizes alone. A row is its content: its masks are drawn from a hash
of its text, so a second copy would be the same row again. Hence weights only ever leave rows out
and never repeat one, and everything left out is counted in the plan.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, model_validator

from stage1_teacher.mixture_grammar import format_term, format_word, scan_mixture
from tide_cache.config import StrictModel, parse_config
from tide_cache.draws import generator
from tide_cache.errors import ConfigError, DataError

_FILE_KINDS = {
    "jsonl": "json",
    "ndjson": "json",
    "json": "json",
    "parquet": "parquet",
    "csv": "csv",
    "tsv": "tsv",
    "arrow": "arrow",
}
_FILE_NAME = re.compile(rf"\.({'|'.join(_FILE_KINDS)})(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _as_filter_text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else value


Name = Annotated[str, Field(min_length=1)]
# YAML reads `level: 3` as a number; the column's own type decides what the text means.
FilterText = Annotated[
    str, BeforeValidator(_as_filter_text, json_schema_input_type=str | bool | int | float)
]


class SourceConfig(StrictModel):
    """One source of conversations.

    `path` is a local file (JSONL, JSON, Parquet, CSV, TSV, Arrow), a folder of such, a
    `save_to_disk` folder, or the name of a dataset on the Hugging Face hub; whatever exists locally
    wins. `name` and `revision` are the hub's. `filters` keeps the rows whose columns equal the
    values given. `cap` takes at most so many rows, drawn with the seed; a larger cap keeps those of
    a smaller one. `weight` sets the shares of the mixture (see `plan_mixture`). Without column
    names the usual ones are looked for. `label` names the source in rows and manifest.
    """

    path: Name
    name: Name | None = None
    split: Name | None = None
    revision: Name | None = None
    filters: dict[Name, FilterText] = Field(default_factory=dict)
    cap: int | None = Field(default=None, ge=1)
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    license: Name | None = None
    label: Name | None = None
    messages_column: Name | None = None
    prompt_column: Name | None = None
    input_column: Name | None = None
    response_column: Name | None = None
    system_column: Name | None = None

    @model_validator(mode="after")
    def _columns_agree(self) -> "SourceConfig":
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column: expected both or neither")
        if self.prompt_column is None and (self.input_column or self.system_column):
            raise ValueError(
                "input_column and system_column: expected with prompt_column and response_column"
            )
        if self.messages_column is not None and self.prompt_column is not None:
            raise ValueError("columns: expected messages_column or prompt_column, not both")
        return self


OPTION_KEYS = tuple(key for key in SourceConfig.model_fields if key not in ("path", "filters"))


def read_terms(value: Any) -> Any:
    """Turn a mixture as written (a line, or a list of lines and mappings) into plain mappings.

    Raises ValueError, which pydantic reports with the name of the field.
    """
    if isinstance(value, str):
        return scan_mixture(value, OPTION_KEYS)
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError("expected at least one source")
    return tuple(_read_entry(entry) for entry in value)


def _read_entry(entry: Any) -> Any:
    if not isinstance(entry, str):
        return entry
    terms = scan_mixture(entry, OPTION_KEYS)
    if len(terms) > 1:
        raise ValueError(f"expected one source per list entry, got {len(terms)} in {entry!r}")
    return terms[0]


Sources = Annotated[
    tuple[SourceConfig, ...],
    BeforeValidator(read_terms, json_schema_input_type=str | tuple[str | SourceConfig, ...]),
]


class Mixture(StrictModel):
    """A mixture of sources; the field type `Sources` serves configs that have one."""

    sources: Sources


def parse_mixture(text: str) -> tuple[SourceConfig, ...]:
    """Parse a mixture written as one line. Raises ConfigError that names the column and the key."""
    return parse_config({"sources": text}, Mixture, where="mixture").sources


def format_source(config: SourceConfig) -> str:
    """Write a source as a term of the grammar; `parse_mixture` reads the same source from it."""
    values = config.model_dump(exclude_none=True, exclude={"path", "filters"})
    options = [f"{key}:{format_word(str(value))}" for key, value in values.items()]
    return format_term(config.path, options + _format_filters(config))


def _format_filters(config: SourceConfig) -> list[str]:
    return [
        f"{format_word(key, reserved=OPTION_KEYS)}:{format_word(value)}"
        for key, value in config.filters.items()
    ]


def file_kind(path: str) -> str | None:
    """Return json, parquet, csv, tsv or arrow for the name of a data file, None for other names."""
    match = _FILE_NAME.search(path)
    return _FILE_KINDS[match[1].lower()] if match else None


def is_hub_name(path: str) -> bool:
    """Return whether `path` could be the name of a dataset on the hub: `name` or `owner/name`."""
    return _HUB_NAME.fullmatch(path) is not None and file_kind(path) is None


def source_labels(configs: Sequence[SourceConfig]) -> tuple[str, ...]:
    """Name every source once: its `label`, or its hub or file name with what selects its rows.

    The folder of a local path is left out, so that moving the data changes neither bytes nor draws.
    A name that is taken already gets `#2`, `#3` and so on.
    """
    labels: list[str] = []
    for config in configs:
        label = config.label or _default_label(config)
        copies = 1
        while (name := label if copies == 1 else f"{label}#{copies}") in labels:
            copies += 1
        labels.append(name)
    return tuple(labels)


def _default_label(config: SourceConfig) -> str:
    path = config.path if is_hub_name(config.path) else PurePosixPath(config.path).name
    chosen = {"name": config.name, "split": config.split}
    options = [f"{key}:{format_word(value)}" for key, value in chosen.items() if value]
    return format_term(path or config.path, options + _format_filters(config))


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceShare:
    """What a mixture takes of one source, and how many rows it leaves out for which reason."""

    label: str
    num_rows: int
    num_over_cap: int
    num_over_weight: int

    @property
    def num_taken(self) -> int:
        """Rows of this source in the mixture."""
        return self.num_rows - self.num_over_cap - self.num_over_weight

    def describe(self) -> str:
        """Return a line for the log: `chat.jsonl: 100 of 250 rows (cap leaves out 150)`."""
        counts = {"cap": self.num_over_cap, "weight": self.num_over_weight}
        left_out = [f"{reason} leaves out {count}" for reason, count in counts.items() if count]
        suffix = f" ({', '.join(left_out)})" if left_out else ""
        return f"{self.label}: {self.num_taken} of {self.num_rows} rows{suffix}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixturePlan:
    """The rows of a mixture in order.

    Row r of the mixture is row `row_index_R[r]` (int64) of source `source_index_R[r]` (int32).
    """

    source_index_R: npt.NDArray[np.int32]
    row_index_R: npt.NDArray[np.int64]
    shares: tuple[SourceShare, ...]


def plan_mixture(sizes: Sequence[int], configs: Sequence[SourceConfig], seed: int) -> MixturePlan:
    """Choose and order the rows of a mixture, as a pure function of sizes, configs and seed.

    `sizes` are the rows that each source has to offer. Caps come first: `min(size, cap)` rows
    remain. If any source has a weight, sources without one have weight 1, and the counts become
    proportional to the weights: the source that its weight uses up first gives all it has, and
    every other gives floor(weight * that source's rows / that source's weight). Rows are drawn per
    source, so adding a source leaves the choice among the others alone unless weights change it;
    then one seeded permutation mixes them. Raises DataError for a source without rows and
    ConfigError for a weight too small for a single row.
    """
    shares = plan_shares(sizes, configs)
    chosen = [_choose_rows(share.label, share.num_rows, share.num_taken, seed) for share in shares]
    source_index_R = np.repeat(np.arange(len(shares)), [len(rows) for rows in chosen])
    row_index_R = np.concatenate(chosen)
    order_R = _permutation(seed, "", "mixture-order", len(row_index_R))
    return MixturePlan(
        source_index_R=source_index_R[order_R].astype(np.int32),
        row_index_R=row_index_R[order_R],
        shares=shares,
    )


def plan_shares(sizes: Sequence[int], configs: Sequence[SourceConfig]) -> tuple[SourceShare, ...]:
    """Count what `plan_mixture` takes of every source, with the same rules and errors."""
    labels = source_labels(configs)
    for label, size in zip(labels, sizes, strict=True):
        if size == 0:
            raise DataError(f"{label}: empty source", reason="empty_source")
    capped = [min(size, config.cap or size) for size, config in zip(sizes, configs, strict=True)]
    weighted = _weighted_counts(capped, configs)
    for label, config, count in zip(labels, configs, weighted, strict=True):
        if count == 0:
            raise ConfigError(
                f"{label}: weight {config.weight or 1:g} leaves no row of this source"
                f" beside the other weights and sizes",
                hint="raise its weight, or cap the others with cap:N instead",
            )
    return tuple(
        SourceShare(
            label=label, num_rows=size, num_over_cap=size - kept, num_over_weight=kept - count
        )
        for label, size, kept, count in zip(labels, sizes, capped, weighted, strict=True)
    )


def _weighted_counts(sizes: Sequence[int], configs: Sequence[SourceConfig]) -> list[int]:
    if all(config.weight is None for config in configs):
        return list(sizes)
    # Decimal fractions, as written: in floating point 0.3 / 0.1 of 100 rows would be 299.
    weights = [Fraction(str(config.weight or 1)) for config in configs]
    rows_per_weight = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [math.floor(weight * rows_per_weight) for weight in weights]


def _choose_rows(label: str, num_rows: int, num_taken: int, seed: int) -> npt.NDArray[np.int64]:
    if num_taken == num_rows:
        return np.arange(num_rows, dtype=np.int64)
    # A prefix of one permutation: a larger cap adds rows and replaces none.
    return np.sort(_permutation(seed, label, "mixture-rows", num_rows)[:num_taken])


def _permutation(seed: int, label: str, purpose: str, num_rows: int) -> npt.NDArray[np.int64]:
    # Sorted raw counter output, not Generator.permutation, whose stream numpy may change.
    keys_R = generator(seed, label, -1, purpose).bit_generator.random_raw(num_rows)
    return np.argsort(keys_R, kind="stable")
