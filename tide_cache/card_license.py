"""The licence that a folder's own card names, of a data set or of a model."""

import logging
import re
from pathlib import Path

import yaml

logger = logging.getLogger(__name__)
# The YAML block with which a card begins, as the hub reads it.
_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def card_license(folder: Path) -> str | None:
    """Return what the YAML block of `folder`'s README.md calls its licence, or None.

    `other` stands for the `license_name` beside it, where there is one.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        block = _BLOCK.match(card.read_text(encoding="utf-8"))
        values = yaml.safe_load(block[1]) if block else None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        logger.warning("%s: the YAML block cannot be read: %s", card, told)
        return None
    values = values if isinstance(values, dict) else {}
    licenses = values.get("license")
    if licenses == "other":
        licenses = values.get("license_name") or licenses
    if isinstance(licenses, list):
        return ", ".join(str(entry) for entry in licenses) or None
    return str(licenses) if licenses else None
