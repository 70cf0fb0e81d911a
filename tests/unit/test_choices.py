"""Names of losses: the published ones mean ours, and a wrong one is refused with the nearest."""

import pytest

from stage2_student.losses import canonical_loss_name
from tide_cache.errors import ConfigError


@pytest.mark.parametrize(
    ("published", "canonical"),
    [
        ("taid", "tidal"),
        ("taid_aligned", "tidal"),
        ("kl", "kl"),
        ("kl_aligned", "kl"),
        ("reverse_kl_aligned", "reverse_kl"),
        ("alm", "calm"),
        ("reverse_alm", "reverse_calm"),
        ("alm_taid", "calm_tidal"),
        ("reverse_alm_taid", "reverse_calm_tidal"),
        ("reverse_calm_tidal", "reverse_calm_tidal"),
        ("ce", "ce"),
    ],
)
def test_published_names_mean_the_same(published: str, canonical: str) -> None:
    assert canonical_loss_name(published) == canonical


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'tidel' \(did you mean 'tidal'\?\)"):
        canonical_loss_name("tidel")
