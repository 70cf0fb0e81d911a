"""The words by which a config selects a behaviour, and the published names of the losses.

Every word that is not known is refused with the nearest known one. Cache users come from the
published trainer, whose scripts say `taid` or `reverse_alm`; those names mean the same here, and
`canonical_loss_name` turns them into the one name that logs, checkpoints and errors use.
"""

from typing import Any, Literal, get_args

from tide_cache.errors import ConfigError, did_you_mean

LossName = Literal[
    "ce",
    "tidal",
    "kl",
    "reverse_kl",
    "calm",
    "reverse_calm",
    "calm_tidal",
    "reverse_calm_tidal",
]
LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)
PUBLISHED_LOSS_NAMES: dict[str, LossName] = {
    "taid": "tidal",
    "taid_aligned": "tidal",
    "kl_aligned": "kl",
    "reverse_kl_aligned": "reverse_kl",
    "alm": "calm",
    "reverse_alm": "reverse_calm",
    "alm_taid": "calm_tidal",
    "reverse_alm_taid": "reverse_calm_tidal",
}


def check_choice(field: str, value: str, literal: Any) -> None:
    """Raise ConfigError unless `value` is one of the words of the Literal type `literal`."""
    known = get_args(literal)
    if value not in known:
        raise ConfigError(
            f"{field}: expected one of {', '.join(known)}, got {value!r}"
            f"{did_you_mean(str(value), known)}"
        )


def canonical_loss_name(name: str) -> LossName:
    """Return the project's name of a loss given by that name or by the published one.

    `"ce"` stands for no distillation term. Raises ConfigError with the nearest known name.
    """
    for canonical in LOSS_NAMES:
        if name == canonical:
            return canonical
    if name in PUBLISHED_LOSS_NAMES:
        return PUBLISHED_LOSS_NAMES[name]
    raise ConfigError(
        f"loss: expected one of {', '.join(LOSS_NAMES)}, got {name!r}"
        f"{did_you_mean(str(name), (*LOSS_NAMES, *PUBLISHED_LOSS_NAMES))}"
    )
