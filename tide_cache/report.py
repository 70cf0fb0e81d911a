"""`inspect --html`: read a sample of a set, make its page, write the file whole."""

import os
from pathlib import Path
from typing import Any

from tide_cache.cache import Cache, open_cache
from tide_cache.errors import CompatibilityError, ConfigError, StorageError
from tide_cache.manifest import TokenizerFacts
from tide_cache.report_data import ReportData, gather, token_names
from tide_cache.report_page import page
from tide_cache.tokenizer_hash import tokenizer_sha256


def write_report(
    url: str, path: Path, tokenizer: Path | None, *, beside: str | None = None
) -> None:
    """Write the page of the set at `url` to `path`.

    `tokenizer`: the student's tokenizer.json, or a folder with one. `beside`: a cache of the same
    premasked set whose teacher is drawn beside this one's. Raises CompatibilityError when either is
    of another set, FormatError or DataError for rows that are not sound.
    """
    cache = open_cache(url)
    try:
        known = None if tokenizer is None else _open_tokenizer(tokenizer, cache.manifest.student)
        data = gather(cache)
        names = None if known is None else token_names(known, _ids(data))
        other = None if beside is None else _gather_beside(beside, cache)
        text = page(cache, data, names=names, beside=other)
    finally:
        cache.close()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _gather_beside(url: str, cache: Cache) -> ReportData:
    other = open_cache(url)
    try:
        ours, theirs = (getattr(each.manifest, "premasked_sha256", None) for each in (cache, other))
        if ours is None or ours != theirs:
            raise CompatibilityError(
                f"{url}: not a cache of the premasked set of {cache.url}",
                hint="build it from the same premasked set, for instance with comp_demo=false",
            )
        return gather(other)
    finally:
        other.close()


def _ids(data: ReportData) -> set[int]:
    found: set[int] = set()
    for shown in data.shown:
        found.update(shown.row.student_ids_L.tolist())
        for guess in shown.guesses.values():
            found.update(number for number, _ in guess.candidates)
    return found


def _open_tokenizer(path: Path, facts: TokenizerFacts) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "--tokenizer needs tokenizers, which is not installed",
            hint="pip install tokenizers",
        ) from error
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        known = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file}: not a tokenizer.json: {error}") from error
    mask = None if facts.mask_token_id is None else known.id_to_token(facts.mask_token_id)
    sha256 = tokenizer_sha256(known.to_str(), mask_token=mask)
    if sha256 != facts.sha256:
        raise CompatibilityError(
            f"{file}: not the student's tokenizer {facts.name} (expected {facts.sha256[:12]}…, got "
            f"{sha256[:12]}…)"
        )
    return known
