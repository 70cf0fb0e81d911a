"""Fetching one listed file: streamed, hashed on the way, tried again, then named.

What arrives is believed only when its size and sha256 are the manifest's, and never more than one
byte beyond that size is read. A server that goes away in the middle, and bytes that are not the
right ones, are worth another try, with longer and longer waits between; a file that the server does
not have is not.
"""

import hashlib
import io
import logging
import threading
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from tide_cache.errors import FormatError, MissingFileError, StorageError, TideError
from tide_cache.store import Store

logger = logging.getLogger(__name__)
RETRIES = 4
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0


class Listed(Protocol):
    """A file as a manifest lists it."""

    @property
    def path(self) -> str:
        """Relative path."""

    @property
    def size_bytes(self) -> int:
        """Size."""

    @property
    def sha256(self) -> str:
        """Lower-case hex sha256."""


class Stopped(Exception):
    """Nobody waits for the file any more."""


def fetch(
    source: Store, facts: Listed, target: BinaryIO, *, retries: int, stopped: threading.Event
) -> None:
    """Write a listed file of `source` into `target`, at most `1 + retries` times.

    Raises MissingFileError, StorageError (nobody answers), FormatError (not the listed bytes), each
    naming the file; OSError of the target as it comes; Stopped once `stopped` is set.
    """
    for attempt in range(retries + 1):
        problem = _attempt(source, facts, target, stopped)
        if problem is None:
            return
        if isinstance(problem, MissingFileError):
            raise problem
        if attempt < retries:
            delay_s = _delay_s(attempt)
            logger.warning("%s; trying again in %g s", problem.message, delay_s)
            if stopped.wait(delay_s):
                raise Stopped
    assert problem is not None
    tries = f" ({retries + 1} tries)" if retries else ""
    raise type(problem)(problem.message + tries, hint=problem.hint) from problem


def patience_s(retries: int) -> float:
    """Return for how long a fetch bears with a server that does not answer."""
    return sum(_delay_s(attempt) for attempt in range(retries))


def fetch_bytes(source: Store, facts: Listed, *, retries: int = RETRIES) -> bytes:
    """Return the bytes of a listed file, found to be the listed ones. Raises as `fetch`."""
    target = io.BytesIO()
    fetch(source, facts, target, retries=retries, stopped=threading.Event())
    # An attempt that failed may have left bytes behind those of the one that did not.
    return target.getvalue()[: facts.size_bytes]


def mismatch(where: str, url: str, facts: Listed, size_bytes: int, sha256: str) -> FormatError:
    """Return the error for a file that is not as the manifest lists it."""
    told = f"expected {facts.size_bytes} bytes, got {size_bytes}"
    if size_bytes > facts.size_bytes:
        told = f"expected {facts.size_bytes} bytes, got more"
    elif size_bytes == facts.size_bytes:
        told = f"sha256 mismatch (expected {facts.sha256[:12]}…, got {sha256[:12]}…)"
    return FormatError(f"{where}: {told}", hint=f"run 'tide-cache verify {url}'")


def _delay_s(attempt: int) -> float:
    return min(_FIRST_DELAY_S * 2.0**attempt, _LONGEST_DELAY_S)


def _attempt(
    source: Store, facts: Listed, target: BinaryIO, stopped: threading.Event
) -> TideError | None:
    """Return what is wrong with what came, or None."""
    target.seek(0)
    digest, size_bytes = hashlib.sha256(), 0
    blocks = source.blocks(facts.path, facts.size_bytes)
    try:
        while (block := _next(blocks)) is not None:
            if isinstance(block, TideError):
                return block
            if stopped.is_set():
                raise Stopped
            digest.update(block)
            size_bytes += len(block)
            if size_bytes <= facts.size_bytes:
                target.write(block)
    finally:
        blocks.close()
    if size_bytes == facts.size_bytes and digest.hexdigest() == facts.sha256:
        target.flush()
        return None
    where = f"{source.url}/{facts.path}"
    return mismatch(where, source.url, facts, size_bytes, digest.hexdigest())


def _next(blocks: Iterator[bytes]) -> bytes | StorageError | None:
    """Return the next block, the error in its place, or None at the end."""
    try:
        return next(blocks, None)
    except StorageError as error:
        return error
