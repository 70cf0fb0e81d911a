"""Moving a finished set from one place to another: only what is missing, checked, manifest last.

A transfer may be killed at any moment and run again: what is there already, with the size and the
sha256 that the manifest lists, is not sent again. Because shards never change, a set that grew
(by `merge`) is brought up to date by sending what was added. Files that stand in the way with other
bytes are another set's: replacing them is asked for by name, and takes the old manifest away first,
so that nobody reads half of each.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from tide_cache.errors import CompatibilityError, MissingFileError
from tide_cache.fetch import Listed
from tide_cache.manifest import MANIFEST, Manifest, identity, parse_manifest
from tide_cache.set_files import SIGNATURE, SetFiles
from tide_cache.store import Store
from tide_cache.writer import HEADER

logger = logging.getLogger(__name__)
_NUM_SENDERS = 4
CARD = "README.md"
OnBytes = Callable[[int], None]


class Target(Protocol):
    """Where a set is moved to. Every method may be called by several threads."""

    @property
    def url(self) -> str:
        """Where it is, without passwords."""

    def paths(self) -> list[str]:
        """Return the files that are there."""

    def read(self, path: str) -> bytes:
        """Return a small file. Raises MissingFileError."""

    def has(self, facts: Listed, listed_sha256: str | None) -> bool | None:
        """Say whether the file is there: True as listed, False with other bytes, None not at all.

        `listed_sha256`: what a manifest that stands there says of the file, which a store that is
        written by transfers alone may believe once the size is right.
        """

    def send(self, source: Store, files: Sequence[Listed], on_bytes: OnBytes) -> None:
        """Put files there, each checked while it is read; whole or not at all."""

    def publish(self, small: dict[str, bytes]) -> None:
        """Put small files there in order, replacing what is there."""

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, those that are there."""

    def close(self) -> None:
        """Tidy up after a transfer that came to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferPlan:
    """What has to be done: files there already, to send, to replace, and not listed (`stale`)."""

    files: SetFiles
    present: tuple[Listed, ...]
    absent: tuple[Listed, ...]
    different: tuple[Listed, ...]
    stale: tuple[str, ...]
    is_finished: bool
    old_identity: str | None

    @property
    def to_send(self) -> list[Listed]:
        """The files to send."""
        return [*self.absent, *self.different]

    @property
    def overwrites(self) -> list[str]:
        """Files of another set that stand in the way."""
        return [facts.path for facts in self.different if facts.path != CARD] + list(self.stale)

    @property
    def bytes_to_send(self) -> int:
        """How many bytes are to be sent, manifest and signature included."""
        if self.is_finished:
            return 0
        return sum(f.size_bytes for f in self.to_send) + sum(map(len, self.files.unlisted.values()))

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "identity": identity(self.files.manifest),
            "num_files": len(self.files.listed) + len(self.files.unlisted),
            "size_bytes": self.files.size_bytes,
            "num_present": len(self.present),
            "num_to_send": len(self.to_send),
            "bytes_to_send": self.bytes_to_send,
            "overwrites": self.overwrites,
            "is_finished": self.is_finished,
        }


def plan_transfer(files: SetFiles, target: Target) -> TransferPlan:
    """Compare what is wanted with what is there; nothing is written.

    Raises CompatibilityError where a set is being built.
    """
    if _read(target, HEADER) is not None:
        raise CompatibilityError(
            f"{target.url}: a set is being made there ({HEADER})",
            hint="name another place, or let the command that makes it come to its end",
        )
    old = _old_manifest(target)
    old_files = {} if old is None else {f.path: f for f in _listed(old)}
    found: dict[bool | None, list[Listed]] = {True: [], False: [], None: []}
    with ThreadPoolExecutor(_NUM_SENDERS) as pool:
        answers = pool.map(
            lambda f: target.has(f, old_files[f.path].sha256 if f.path in old_files else None),
            files.listed,
        )
        for facts, answer in zip(files.listed, answers, strict=True):
            found[answer].append(facts)
    wanted = {facts.path for facts in files.listed}
    is_whole = not found[False] and not found[None]
    return TransferPlan(
        files=files,
        present=tuple(found[True]),
        absent=tuple(found[None]),
        different=tuple(found[False]),
        stale=tuple(path for path in target.paths() if _is_ours(path) and path not in wanted),
        is_finished=is_whole and old is not None and _same_unlisted(files, target),
        old_identity=None if old is None else identity(old),
    )


def transfer(
    source: Store,
    target: Target,
    plan: TransferPlan,
    *,
    replace: bool = False,
    on_bytes: OnBytes | None = None,
) -> None:
    """Carry out a plan. Raises CompatibilityError unless what is overwritten may be (`replace`).

    Raises MissingFileError, StorageError or FormatError naming the file that could not be moved;
    what was moved by then stays for the next time.
    """
    if plan.is_finished:
        target.close()
        return
    if plan.overwrites and not replace:
        raise CompatibilityError(
            f"{target.url}: holds another set: {len(plan.overwrites)} files would be overwritten "
            f"or removed (first: {plan.overwrites[0]})",
            hint="name another place, or --replace to put this set in its stead",
        )
    if plan.overwrites:
        target.remove([MANIFEST, SIGNATURE])
    # The card, which every set that grows replaces, is sent when the rest is there.
    cards = [facts for facts in plan.to_send if facts.path == CARD]
    rest = [facts for facts in plan.to_send if facts.path != CARD]
    for batch in (rest, cards):
        target.send(source, batch, on_bytes or (lambda _: None))
    if plan.files.signature_data is None:
        target.remove([SIGNATURE])
    target.publish(plan.files.unlisted)
    target.remove(plan.stale)
    target.close()


def in_parallel(work: Callable[[Listed], None], files: Sequence[Listed]) -> None:
    """Do something with every file in a few threads; the first error ends it all."""
    stopped = threading.Event()

    def unless_stopped(facts: Listed) -> None:
        if not stopped.is_set():
            work(facts)

    with ThreadPoolExecutor(_NUM_SENDERS) as pool:
        jobs = [pool.submit(unless_stopped, facts) for facts in files]
        done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        stopped.set()
        for job in done:
            job.result()


def _listed(manifest: Manifest) -> list[Listed]:
    return [*manifest.files, *manifest.shards]


def _is_ours(path: str) -> bool:
    """Say whether a set may have put that file there, and would be read as having it."""
    name = path.rpartition("/")[2]
    return path.startswith(("data/", "codec/")) and not name.startswith(".")


def _old_manifest(target: Target) -> Manifest | None:
    data = _read(target, MANIFEST)
    return None if data is None else parse_manifest(data, where=f"{target.url}/{MANIFEST}")


def _same_unlisted(files: SetFiles, target: Target) -> bool:
    paths = (MANIFEST, SIGNATURE)
    return all(_read(target, path) == files.unlisted.get(path) for path in paths)


def _read(target: Target, path: str) -> bytes | None:
    try:
        return target.read(path)
    except MissingFileError:
        return None
