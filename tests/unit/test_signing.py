"""Signatures of whole sets, with real keys: what was changed afterwards is refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders import run_command
from tests.payload_caches import make_cache
from tests.set_builders import write_premasked
from tide_cache.errors import ConfigError, FormatError, StorageError
from tide_cache.manifest import SIGNATURE
from tide_cache.signing import check_signature, sign_set
from tide_cache.store import Store
from tide_cache.verify import verify_set


def make_key(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """A key pair, made as the command's help says."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(curve, check=True, capture_output=True)
    out = ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)]
    subprocess.run(out, check=True, capture_output=True)
    return private, public


def test_a_signed_set_is_the_same_set_and_its_copies_are_signed(tmp_path: Path) -> None:
    private, public = make_key(tmp_path)
    make_cache(tmp_path / "cache", "hidden")
    before = verify_set(Store(tmp_path / "cache"))
    done = run_command("sign", tmp_path / "cache", "--private-key", private)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'cache' / SIGNATURE}" in done.stdout
    copy = shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    done = run_command("verify", copy, "--public-key", public, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["signature"] == "good"
    assert report["identity"] == before.identity
    assert "signature good" in run_command("verify", copy, "--public-key", public).stdout
    # Signing again, with the older signature in the folder, is signing anew.
    sign_set(Store(copy), make_key(tmp_path, "other")[0])
    with pytest.raises(FormatError, match="not signed by this key"):
        check_signature(Store(copy), public)


def extra(folder: Path) -> str:
    (folder / "notes.txt").write_text("x")
    return "notes.txt"


def extra_hidden(folder: Path) -> str:
    (folder / "data/view-00/.hidden").write_text("x")
    return "data/view-00/.hidden"


def missing(folder: Path) -> str:
    (folder / "data/view-01/00001.parquet").unlink()
    return "data/view-01/00001.parquet"


def changed(folder: Path) -> str:
    path = folder / "data/view-00/00000.parquet"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    return "data/view-00/00000.parquet"


def other_manifest(folder: Path) -> str:
    """Sound in itself: counts that no reader compares, in another order."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    return "manifest.json"


def a_link(folder: Path) -> str:
    (folder / "data/view-00/00009.parquet").symlink_to("/etc/hostname")
    return "data/view-00/00009.parquet"


CHANGES = [extra, extra_hidden, missing, changed, other_manifest, a_link]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_since_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], str]
) -> None:
    private, public = make_key(tmp_path)
    write_premasked(tmp_path / "set")
    store = Store(tmp_path / "set")
    sign_set(store, private)
    check_signature(store, public)
    name = change(tmp_path / "set")
    with pytest.raises(FormatError, match=f"not signed by this key as it is.*{name}"):
        check_signature(store, public)
    done = run_command("verify", tmp_path / "set", "--public-key", public, "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert name in report["signature"]
    assert report["signature"] == report["problems"][0]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 100_000, b'{"dsseEnvelope": 3}', b"\xff\xfe", b"null", b"1e999"]
)
def test_a_signature_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    _, public = make_key(tmp_path)
    write_premasked(tmp_path / "set")
    (tmp_path / "set" / SIGNATURE).write_bytes(data)
    with pytest.raises(FormatError, match=f"{SIGNATURE}: not signed by this key"):
        check_signature(Store(tmp_path / "set"), public)


def test_what_cannot_be_signed_or_checked_says_why(tmp_path: Path) -> None:
    private, public = make_key(tmp_path)
    write_premasked(tmp_path / "set")
    store = Store(tmp_path / "set")
    with pytest.raises(StorageError, match=f"{SIGNATURE}: no such file"):
        check_signature(store, public)
    with pytest.raises(ConfigError, match=r"key\.pub: not a private key"):
        sign_set(store, public)
    with pytest.raises(ConfigError, match=r"key\.pem: not a public key"):
        check_signature(store, private)
    with pytest.raises(ConfigError, match="on a local disk; run 'tide-cache pull memory://x"):
        sign_set(Store("memory://x"), private)
    with pytest.raises(StorageError, match=r"no manifest\.json"):
        sign_set(Store(tmp_path), private)


def test_without_the_library_one_line_says_what_to_install(tmp_path: Path) -> None:
    write_premasked(tmp_path / "set")
    code = (
        "import sys; sys.modules['model_signing'] = None\n"
        f"sys.argv = ['tide-cache', 'sign', {str(tmp_path / 'set')!r}, '--private-key', 'k.pem']\n"
        "from tide_cache.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'tide-cache[sign]'" in done.stderr
    assert "Traceback" not in done.stderr
