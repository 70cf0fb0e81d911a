"""All files of a finished set: those that its manifest lists, the manifest, and a signature.

The manifest's own bytes are kept as they are, because a signature is over them. A signature is the
one file that no manifest can list; it is carried along as it is and proves itself.
"""

from dataclasses import dataclass

from tide_cache.errors import FormatError, MissingFileError
from tide_cache.fetch import Listed
from tide_cache.manifest import MANIFEST, Manifest, parse_manifest
from tide_cache.store import Store
from tide_cache.writer import read_manifest

SIGNATURE = "cache.sig"
# A million shards take 200 MB in either; more than this is no manifest of ours.
MAX_UNLISTED_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SetFiles:
    """What a set consists of. `listed` in the manifest's order, files beside shards first."""

    manifest: Manifest
    manifest_data: bytes
    signature_data: bytes | None

    @property
    def listed(self) -> list[Listed]:
        """The files that the manifest lists."""
        return [*self.manifest.files, *self.manifest.shards]

    @property
    def unlisted(self) -> dict[str, bytes]:
        """The files that it does not list, the manifest last."""
        signature = {} if self.signature_data is None else {SIGNATURE: self.signature_data}
        return {**signature, MANIFEST: self.manifest_data}

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(f.size_bytes for f in self.listed) + sum(map(len, self.unlisted.values()))


def read_set_files(store: Store) -> SetFiles:
    """Read the manifest of a finished set, and its signature if it has one.

    Raises StorageError where there is no set, FormatError where the manifest is not sound.
    """
    read_manifest(store)  # says best what is wrong with a folder that is no finished set
    data = _read_bounded(store, MANIFEST)
    return SetFiles(
        manifest=parse_manifest(data, where=f"{store.url}/{MANIFEST}"),
        manifest_data=data,
        signature_data=_read_signature(store),
    )


def _read_signature(store: Store) -> bytes | None:
    try:
        return _read_bounded(store, SIGNATURE)
    except MissingFileError:
        return None


def _read_bounded(store: Store, path: str) -> bytes:
    if store.size_bytes(path) > MAX_UNLISTED_BYTES:
        raise FormatError(f"{store.url}/{path}: more than {MAX_UNLISTED_BYTES >> 20} MiB")
    return b"".join(store.blocks(path, MAX_UNLISTED_BYTES))
