"""The licence that a folder's own card names, of a data set or of a model."""

import logging
from pathlib import Path

from huggingface_hub import RepoCard

from stage1_teacher.source_errors import summary

logger = logging.getLogger(__name__)


def card_license(folder: Path) -> str | None:
    """Return what the YAML block of `folder`'s README.md calls its licence, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        licenses = RepoCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (ValueError, TypeError) as error:
        logger.warning("%s: the YAML block cannot be read: %s", card, summary(error))
        return None
    if isinstance(licenses, list):
        return ", ".join(str(entry) for entry in licenses) or None
    return str(licenses) if licenses else None
