"""The ground floor of TIDE cache: format, codecs, storage and order. Needs no torch.

Importing this package is cheap (no pyarrow yet); the names below are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Cache", "__version__", "geometry", "open_cache"]

if TYPE_CHECKING:
    from tide_cache import geometry
    from tide_cache.cache import Cache, open_cache


def __getattr__(name: str) -> Any:
    if name in ("Cache", "open_cache"):
        from tide_cache import cache

        return getattr(cache, name)
    if name == "geometry":
        return import_module("tide_cache.geometry")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
