"""A repository on the Hugging Face hub to push to: one commit of files, then one of the last file.

A commit on the hub is whole or not at all, so the last file's own commit (a set's manifest, a
student's config) is what makes the whole finished. Uploads go through the library's own client,
which finds the token where it always does (`hf auth login`, HF_TOKEN) and sends of a changed file
the changed parts. What is not there yet is made private unless asked otherwise: token ids are text,
and who may read them is a decision.
"""

import hashlib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tide_cache.errors import ConfigError, MissingFileError, StorageError
from tide_cache.fetch import Listed, mismatch
from tide_cache.store import Store
from tide_cache.transfer import OnBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class RepositoryKind:
    """What is pushed: where such repositories are, and what its commits are called."""

    name: Literal["dataset", "model"]
    prefix: str
    files_message: str
    last_file: str
    last_message: str


DATASET = RepositoryKind(
    name="dataset",
    prefix="hf://datasets/",
    files_message="files of a tide-cache set",
    last_file="manifest.json",
    last_message="Manifest: the set is complete",
)
MODEL = RepositoryKind(
    name="model",
    prefix="hf://",
    files_message="files of a student",
    last_file="config.json",
    last_message="Config: the student is complete",
)


class HubTarget:
    """A repository, for a dataset `hf://datasets/USER/NAME[@REVISION][/FOLDER]`.

    `private` is how it is made where it is not there yet.
    """

    def __init__(self, url: str, *, kind: RepositoryKind = DATASET, private: bool = True) -> None:
        try:
            import huggingface_hub
        except ImportError as error:
            raise StorageError(
                f"{url}: hf:// needs a package that is not installed ({error})",
                hint="pip install 'tide-cache[hub]'",
            ) from error
        self.url = url
        self._kind, self._private = kind, private
        self._hub: Any = huggingface_hub
        self._api: Any = huggingface_hub.HfApi(library_name="tide-cache")
        parts = url.removeprefix(kind.prefix).strip("/").split("/")
        if not url.startswith(kind.prefix) or len(parts) < 2 or not all(parts):
            raise ConfigError(f"{url}: expected {kind.prefix}USER/NAME")
        name, _, revision = parts[1].partition("@")
        self._where = {
            "repo_id": f"{parts[0]}/{name}",
            "repo_type": kind.name,
            "revision": revision or "main",
        }
        self._folder = "/".join(parts[2:])

    def paths(self) -> list[str]:
        """Return the files of the newest commit."""
        return sorted(self._present)

    def read(self, path: str) -> bytes:
        """Return a file of the newest commit."""
        if path not in self._present:
            raise MissingFileError(f"{self.url}/{path}: no such file")
        with self._explained(path):
            copy = self._api.hf_hub_download(filename=self._inside(path), **self._where)
        return Path(copy).read_bytes()

    def has(self, facts: Listed, listed_sha256: str | None) -> bool | None:
        """Compare with the hub's listing, which knows the sha256 of large files."""
        found = self._present.get(facts.path)
        if found is None:
            return None
        if found.size != facts.size_bytes:
            return False
        told = found.lfs.sha256 if found.lfs is not None else listed_sha256
        # Of a small file that is not in its large store the hub knows git's hash alone.
        return (told or hashlib.sha256(self.read(facts.path)).hexdigest()) == facts.sha256

    def send(self, source: Store, files: Sequence[Listed], on_bytes: OnBytes) -> None:
        """Check files on the disk, then upload them in one commit."""
        if not files:
            return
        root = Path(source.path(""))
        for facts in files:
            _check(source, facts)
        with self._explained(files[0].path):
            self._api.create_repo(
                repo_id=self._where["repo_id"],
                repo_type=self._kind.name,
                private=self._private,
                exist_ok=True,
            )
            self._api.upload_folder(
                folder_path=str(root),
                path_in_repo=self._folder or None,
                allow_patterns=[facts.path for facts in files],
                commit_message=f"{len(files)} {self._kind.files_message}",
                **self._where,
            )
        self._forget()
        on_bytes(sum(facts.size_bytes for facts in files))

    def publish(self, small: dict[str, bytes]) -> None:
        """Upload small files in one commit."""
        operations = [
            self._hub.CommitOperationAdd(path_in_repo=self._inside(path), path_or_fileobj=data)
            for path, data in small.items()
        ]
        with self._explained(self._kind.last_file):
            self._api.create_commit(
                operations=operations, commit_message=self._kind.last_message, **self._where
            )
        self._forget()

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files in one commit, those that are there."""
        operations = [
            self._hub.CommitOperationDelete(path_in_repo=self._inside(path))
            for path in paths
            if path in self._present
        ]
        if not operations:
            return
        with self._explained(paths[0]):
            self._api.create_commit(
                operations=operations, commit_message="Files of another one", **self._where
            )
        self._forget()

    def close(self) -> None:
        """Nothing lies about: an upload that breaks off leaves no commit."""

    @cached_property
    def _present(self) -> dict[str, Any]:
        """The files of the newest commit by path; none where the repository is not there yet."""
        errors = self._hub.errors
        try:
            with self._explained(""):
                tree = self._api.list_repo_tree(
                    path_in_repo=self._folder or None, recursive=True, **self._where
                )
                files = [item for item in tree if isinstance(item, self._hub.RepoFile)]
        except StorageError as error:
            missing = (
                errors.RepositoryNotFoundError,
                errors.RevisionNotFoundError,
                errors.EntryNotFoundError,
            )
            if isinstance(error.__cause__, missing):
                return {}
            raise
        start = f"{self._folder}/" if self._folder else ""
        return {item.path.removeprefix(start): item for item in files}

    def _forget(self) -> None:
        self.__dict__.pop("_present", None)

    def _inside(self, path: str) -> str:
        return posixpath.join(self._folder, path)

    def _explained(self, path: str) -> "_Explained":
        return _Explained(f"{self.url}/{path}".rstrip("/"))


class _Explained:
    """Turns what the client raises into errors that name the place."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, StorageError) or not isinstance(error, Exception):
            return
        told = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise StorageError(
            f"{self._where}: the hub refuses or does not answer: {told}",
            hint="log in with 'hf auth login' if it says so, and run the same command again",
        ) from error


def _check(source: Store, facts: Listed) -> None:
    size_bytes = source.size_bytes(facts.path)
    sha256 = source.sha256(facts.path) if size_bytes == facts.size_bytes else ""
    if sha256 != facts.sha256:
        raise mismatch(f"{source.url}/{facts.path}", source.url, facts, size_bytes, sha256)
