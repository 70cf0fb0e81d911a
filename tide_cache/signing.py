"""Signing a set and checking its signature, with OpenSSF model signing (extra `sign`).

A set is signed as a whole: the signature, `cache.sig` beside the manifest, lists the sha256 of
every file of the folder but itself and what belongs to git. Checking refuses one extra, one missing
and one changed file by name. Keys are elliptic curve keys of one's own in PEM files, and nothing is
asked of a network; whoever wants signatures without keys takes the library's own command, which
reads and writes the same files.
"""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from tide_cache.errors import ConfigError, FormatError, StorageError, TideError
from tide_cache.manifest import SIGNATURE
from tide_cache.store import Store
from tide_cache.writer import read_manifest

# A file takes 200 bytes in a signature: sets of a million files.
_MAX_SIGNATURE_BYTES = 256 << 20


def sign_set(store: Store, private_key: Path) -> Path:
    """Sign every file of a finished local set; returns the path of the signature.

    An older signature is replaced. Raises ConfigError for a remote set or a key that is none,
    StorageError when the set is not finished or cannot be written to.
    """
    folder = _folder(store)
    read_manifest(store)
    library = _library()
    with _explained(f"{private_key}: not a private key of an elliptic curve", ConfigError):
        signer = library.signing.Config().use_elliptic_key_signer(private_key=private_key)
    temporary = folder / f".{SIGNATURE}.tmp"
    temporary.unlink(missing_ok=True)  # of a killed run; it would be signed, too
    hashing = library.hashing.Config().set_ignored_paths(paths=[SIGNATURE])
    with tempfile.TemporaryDirectory() as apart:  # a file within the set would be signed with it
        signature = Path(apart) / SIGNATURE
        with _explained(f"{store.url}: cannot be signed", StorageError):
            signer.set_hashing_config(hashing).sign(folder, signature)
        data = signature.read_bytes()
    try:
        temporary.write_bytes(data)
        temporary.replace(folder / SIGNATURE)
    except OSError as error:
        raise StorageError(
            f"{folder / SIGNATURE}: cannot write: {error.strerror or error}"
        ) from error
    return folder / SIGNATURE


def check_signature(store: Store, public_key: Path) -> None:
    """Raise FormatError, naming the files, unless the set is as the key's owner signed it.

    Raises ConfigError for a remote set or a key that is none, StorageError without a signature.
    """
    folder = _folder(store)
    library = _library()
    with _explained(f"{public_key}: not a public key of an elliptic curve", ConfigError):
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    size_bytes = store.size_bytes(SIGNATURE)
    if size_bytes > _MAX_SIGNATURE_BYTES:
        raise FormatError(
            f"{store.url}/{SIGNATURE}: expected at most {_MAX_SIGNATURE_BYTES} bytes, got "
            f"{size_bytes}"
        )
    with _explained(f"{store.url}/{SIGNATURE}: not signed by this key as it is", FormatError):
        verifier.verify(folder, folder / SIGNATURE)


def find_signature(store: Store, public_key: Path) -> str:
    """Return `good`, or in words what is wrong with a set's signature. Raises ConfigError."""
    try:
        check_signature(store, public_key)
    except (FormatError, StorageError) as error:
        return error.message
    return "good"


def _folder(store: Store) -> Path:
    if not store.is_local:
        raise ConfigError(
            f"{store.url}: signatures are made and checked on a local disk",
            hint=f"run 'tide-cache pull {store.url} FOLDER' first",
        )
    return Path(store.path("")).resolve()


def _library() -> Any:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise TideError(
            f"signatures need {error.name}, which is not installed",
            hint="pip install 'tide-cache[sign]'",
        ) from error
    return model_signing


@contextlib.contextmanager
def _explained(what: str, kind: type[TideError]) -> Any:
    """Turn whatever the library raises into an error of ours, and keep what it prints apart."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    # A stranger's signature goes through four parsers; none may do more than refuse it.
    except Exception as error:
        told = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise kind(f"{what}: {told}") from error
