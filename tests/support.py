"""Where the tests find reference figures and real tokenizers, and what they say when absent."""

import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def find_shared() -> Path | None:
    """The folder of shared data beside the checkout (or `TIDE_SHARED`), if it is there."""
    folder = Path(os.environ.get("TIDE_SHARED", PROJECT_ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


def find_golden() -> Path | None:
    """The folder of golden vectors (`TIDE_GOLDEN`, or `golden` in the shared folder), if there."""
    if "TIDE_GOLDEN" in os.environ:
        folder = Path(os.environ["TIDE_GOLDEN"])
    elif (shared := find_shared()) is not None:
        folder = shared / "golden"
    else:
        return None
    return folder if (folder / "index.json").is_file() else None
