"""A set as one file: a tar archive under zstd, written and read as a stream, front to back.

The manifest comes first, so that whoever unpacks knows of every file how large it is and what its
sha256 must be before its first byte. Nothing else is believed of an archive: each member must be
the next file that the manifest lists, a plain file of the listed size. The headers are read one
block at a time by the standard library's parser of a single header, because `tarfile` itself would
follow extension records of any size.

The same set gives the same bytes: fixed order and fields, no times, no owners, and zstd with
workers, whose output does not depend on how many there are. Shards are compressed already, so level
1 is as good as any.
"""

import fcntl
import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import zstandard

from tide_cache.copies_folder import is_at
from tide_cache.errors import ConfigError, FormatError, StorageError
from tide_cache.fetch import Listed, mismatch
from tide_cache.manifest import MANIFEST, Manifest, identity, parse_manifest
from tide_cache.set_files import MAX_UNLISTED_BYTES, SIGNATURE, SetFiles
from tide_cache.store import Store
from tide_cache.writer import read_manifest

_BLOCK = tarfile.BLOCKSIZE
_READ_BYTES = 1 << 22
_LEVEL = 1
_MAX_WINDOW_BYTES = 1 << 27
_MAX_TRAILING_BYTES = 1 << 20
OnBytes = Callable[[int], None]
OpenMember = Callable[[str], AbstractContextManager[BinaryIO]]


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def pack(
    store: Store,
    files: SetFiles,
    target: BinaryIO,
    *,
    num_threads: int | None = None,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write a set into an open file as `.tar.zst`, each file checked while it is read.

    Raises FormatError naming a file that is not as listed, StorageError where it cannot be read;
    what was written by then is no whole archive.
    """
    tell = on_bytes or _ignore
    compressor = zstandard.ZstdCompressor(
        level=_LEVEL, threads=max(1, num_threads or os.cpu_count() or 1), write_checksum=True
    )
    # Closed only at the end: an archive that broke off has no end to its frame.
    writer = compressor.stream_writer(target, closefd=False)
    for path, data in reversed(files.unlisted.items()):
        _write_member(writer, path, len(data), iter([data]), tell)
    for facts in files.listed:
        _write_member(writer, facts.path, facts.size_bytes, _checked_blocks(store, facts), tell)
    writer.write(bytes(2 * _BLOCK))
    writer.flush(zstandard.FLUSH_FRAME)


def pack_file(
    store: Store,
    files: SetFiles,
    path: Path,
    *,
    num_threads: int | None = None,
    on_bytes: OnBytes | None = None,
) -> int:
    """Write a set into a new file, which appears whole or not at all. Returns its size.

    Raises ConfigError when the file is there already, else as `pack`.
    """
    if path.exists():
        raise ConfigError(f"{path}: exists already", hint="remove it, or write to another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.packing"), path) as temporary:
            temporary.truncate(0)  # of a process that was killed
            pack(store, files, temporary, num_threads=num_threads, on_bytes=on_bytes)
            temporary.flush()
            os.fsync(temporary.fileno())
            Path(temporary.name).rename(path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write: {error.strerror or error}; nothing was kept"
        ) from error
    return path.stat().st_size


def unpack(
    source: BinaryIO,
    folder: Path | None,
    *,
    where: str,
    on_manifest: Callable[[Manifest], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> Manifest:
    """Read an archive into a new folder; with `folder` None only check it. Returns the manifest.

    Files go into a folder beside it, which takes its name when the last one was found sound, so a
    set is there whole or not at all; where it is there already, nothing is done. Raises FormatError
    naming the member that is not what the manifest lists, ConfigError when `folder` holds something
    else, StorageError when it cannot be written.
    """
    reader = _Archive(source, where)
    data = reader.unlisted(MANIFEST)
    manifest = parse_manifest(data, where=f"{where}: {MANIFEST}")
    if on_manifest is not None:
        on_manifest(manifest)
    if folder is None:
        _read_members(reader, manifest, _nowhere, on_bytes or _ignore)
        return manifest
    if _is_there(folder, manifest):
        return manifest
    try:
        with _unpacking(folder) as temporary:
            _read_members(reader, manifest, _writer_into(temporary), on_bytes or _ignore)
            _write(temporary / MANIFEST, data)
            temporary.replace(folder)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write: {error.strerror or error}; nothing was kept",
            hint="free some space or repair the disk, and run the same command again",
        ) from error
    return manifest


def _read_members(
    reader: "_Archive", manifest: Manifest, open_member: OpenMember, tell: OnBytes
) -> None:
    """Read everything behind the manifest; every file must be the next that it lists."""
    expected: list[Listed] = [*manifest.files, *manifest.shards]
    name, size_bytes = reader.header(expected[0].path if expected else "the end", or_signature=True)
    if name == SIGNATURE:
        with open_member(SIGNATURE) as file:
            file.write(reader.take(size_bytes, SIGNATURE))
        reader.skip_padding(size_bytes)
        name, size_bytes = reader.header(expected[0].path if expected else "the end")
    for number, facts in enumerate(expected):
        if name != facts.path:
            raise reader.refusal(f"expected {facts.path} next, got {_shown(name)}")
        if size_bytes != facts.size_bytes:
            raise reader.refusal(
                f"{facts.path}: expected {facts.size_bytes} bytes, got {size_bytes}"
            )
        with open_member(facts.path) as file:
            reader.copy(facts, file, tell)
        reader.skip_padding(size_bytes)
        following = expected[number + 1].path if number + 1 < len(expected) else "the end"
        name, size_bytes = reader.header(following)
    if name:
        raise reader.refusal(f"{_shown(name)}: not in the manifest")
    reader.require_end()


class _Archive:
    """The stream of an archive: one header or one file after another."""

    def __init__(self, source: BinaryIO, where: str) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._stream: _Readable = decompressor.stream_reader(
            source, read_size=_READ_BYTES, closefd=False
        )
        self._where = where

    def refusal(self, told: str) -> FormatError:
        return FormatError(f"{self._where}: {told}", hint="nothing of it was kept; fetch it anew")

    def header(self, expected: str, *, or_signature: bool = False) -> tuple[str, int]:
        """Return name and size of the next member; an empty name at the end of the archive."""
        block = self.take(_BLOCK, f"the header of {expected}")
        if not any(block):
            return "", 0
        try:
            member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError) as error:
            raise self.refusal(f"expected {expected} next, got no tar header ({error})") from error
        if member.type != tarfile.REGTYPE:
            raise self.refusal(f"{_shown(member.name)}: expected a plain file, got another kind")
        if or_signature and member.name == SIGNATURE and member.size > MAX_UNLISTED_BYTES:
            raise self.refusal(f"{SIGNATURE}: more than {MAX_UNLISTED_BYTES >> 20} MiB")
        return member.name, member.size

    def unlisted(self, path: str) -> bytes:
        """Return the next member, which must be `path`."""
        name, size_bytes = self.header(path)
        if name != path:
            raise self.refusal(f"expected {path} first, got {_shown(name)}")
        if not 0 <= size_bytes <= MAX_UNLISTED_BYTES:
            raise self.refusal(f"{path}: more than {MAX_UNLISTED_BYTES >> 20} MiB")
        data = self.take(size_bytes, path)
        self.skip_padding(size_bytes)
        return data

    def copy(self, facts: Listed, target: BinaryIO, tell: OnBytes) -> None:
        """Move the bytes of a listed file to `target`; raises unless they are the listed ones."""
        digest, left = hashlib.sha256(), facts.size_bytes
        while left:
            block = self.take(min(left, _READ_BYTES), facts.path)
            digest.update(block)
            target.write(block)
            left -= len(block)
            tell(len(block))
        if digest.hexdigest() != facts.sha256:
            raise self.refusal(
                f"{facts.path}: sha256 mismatch (expected {facts.sha256[:12]}…, got "
                f"{digest.hexdigest()[:12]}…)"
            )

    def skip_padding(self, size_bytes: int) -> None:
        """Read what fills up the last block of a member, which is zero."""
        padding = self.take(-size_bytes % _BLOCK, "padding")
        if any(padding):
            raise self.refusal("bytes between two files")

    def require_end(self) -> None:
        """Read what is left, which may be zeros alone, and few of them."""
        rest = self._read(_MAX_TRAILING_BYTES)
        if len(rest) < _BLOCK or any(rest) or self._read(1):
            raise self.refusal("bytes behind its end")

    def take(self, size_bytes: int, what: str) -> bytes:
        data = self._read(size_bytes)
        if len(data) < size_bytes:
            raise self.refusal(f"cut off in {what}")
        return data

    def _read(self, size_bytes: int) -> bytes:
        parts = []
        try:
            while size_bytes and (part := self._stream.read(min(size_bytes, _READ_BYTES))):
                parts.append(part)
                size_bytes -= len(part)
        except zstandard.ZstdError as error:
            raise self.refusal(f"not a sound zstd stream ({error})") from error
        return b"".join(parts)


def _write_member(
    writer: BinaryIO, path: str, size_bytes: int, blocks: Iterator[bytes], tell: OnBytes
) -> None:
    member = tarfile.TarInfo(path)
    member.size, member.mode = size_bytes, 0o644
    writer.write(member.tobuf(tarfile.GNU_FORMAT, "ascii", "strict"))
    for block in blocks:
        writer.write(block)
        tell(len(block))
    writer.write(bytes(-size_bytes % _BLOCK))


def _checked_blocks(store: Store, facts: Listed) -> Iterator[bytes]:
    """Yield the bytes of a file; raises at their end unless they were the listed ones."""
    digest, size_bytes = hashlib.sha256(), 0
    for block in store.blocks(facts.path, facts.size_bytes):
        size_bytes += len(block)
        if size_bytes > facts.size_bytes:
            break  # a member longer than its header says would be read as another header
        digest.update(block)
        yield block
    if size_bytes != facts.size_bytes or digest.hexdigest() != facts.sha256:
        where = f"{store.url}/{facts.path}"
        raise mismatch(where, store.url, facts, size_bytes, digest.hexdigest())


@contextmanager
def _nowhere(path: str) -> Iterator[BinaryIO]:
    with Path(os.devnull).open("wb") as file:
        yield file


def _writer_into(folder: Path) -> OpenMember:
    @contextmanager
    def opened(path: str) -> Iterator[BinaryIO]:
        target = folder / path  # of a shape that the manifest's check allows, or a constant
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    return opened


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _is_there(folder: Path, manifest: Manifest) -> bool:
    """Say whether the folder holds that set already. Raises ConfigError for anything else in it."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    store = Store(folder)
    if store.exists(MANIFEST) and identity(read_manifest(store)) == identity(manifest):
        return True
    raise ConfigError(f"{folder}: is not empty", hint="name a folder that is not there yet")


@contextmanager
def _unpacking(folder: Path) -> Iterator[Path]:
    """Lend an empty folder beside `folder`, to one process at a time; it is gone afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.unpacking")
    with _locked(folder.with_name(f".{folder.name}.unpacking.lock"), folder):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(path: Path, what: Path) -> Iterator[BinaryIO]:
    """Lend a file to one process at a time; it is gone afterwards, unless it was moved."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{what}: another process is writing it") from error
        if not is_at(file, path):
            raise ConfigError(f"{what}: another process has just written it")
        try:
            yield file
        finally:
            if is_at(file, path):
                path.unlink()


def _shown(name: str) -> str:
    return repr(name) if name else "the end"


def _ignore(num_bytes: int) -> None:
    pass
