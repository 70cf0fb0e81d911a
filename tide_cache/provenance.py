"""Who made an artefact and with what: versions and git revision, nothing that changes per run."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import tide_cache


@cache
def git_revision() -> str | None:
    """Return the git revision of this program's checkout, `+dirty` if changed, or None."""
    root = Path(tide_cache.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        revision = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+dirty" if dirty else "")


def collect(command: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """Return the provenance of an artefact made by `command` with the named packages."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "tide_cache": tide_cache.__version__,
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
    }


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()
