"""Grid, strata, generators and bit masks: pure functions of their keys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_cache.bits import pack_bits, unpack_bits
from tide_cache.draws import generator
from tide_cache.errors import ConfigError, FormatError
from tide_cache.timesteps import draw_timesteps, timestep_grid


def test_grid_is_the_midpoints_of_equal_cells() -> None:
    grid = timestep_grid(4, 0.0, 1.0)
    np.testing.assert_allclose(grid, [0.125, 0.375, 0.625, 0.875])
    assert timestep_grid().dtype == np.float32
    assert timestep_grid()[0] == pytest.approx(0.001 + 0.999 / 64)


def test_a_sample_meets_every_stratum_and_a_view_the_whole_grid() -> None:
    grid = timestep_grid(32)
    drawn = np.stack([draw_timesteps(7, f"s{i}", 4, grid) for i in range(800)])
    stratum = np.searchsorted(grid, drawn) // 8
    assert (np.sort(stratum, axis=1) == np.arange(4)).all()
    for view in range(4):
        counts = np.bincount(np.searchsorted(grid, drawn[:, view]), minlength=32)
        assert counts.min() > 0
        assert counts.max() < 3 * 800 / 32


def test_draws_depend_on_each_part_of_the_key_and_on_nothing_else() -> None:
    first = generator(1, "a", 0, "mask").random(4)
    np.testing.assert_array_equal(first, generator(1, "a", 0, "mask").random(4))
    others = [(2, "a", 0, "mask"), (1, "b", 0, "mask"), (1, "a", 1, "mask"), (1, "a", 0, "half")]
    for key in others:
        assert not np.array_equal(first, generator(*key).random(4))


def test_views_must_divide_the_grid() -> None:
    with pytest.raises(ConfigError, match="multiple of num_views = 3, got 32"):
        draw_timesteps(0, "a", 3, timestep_grid(32))
    with pytest.raises(ConfigError, match="t_min < t_max"):
        timestep_grid(8, 0.9, 0.1)


@given(st.lists(st.booleans(), max_size=70))
def test_bits_round_trip(values: list[bool]) -> None:
    mask = np.array(values, dtype=bool)
    np.testing.assert_array_equal(unpack_bits(pack_bits(mask), len(mask)), mask)


def test_bits_of_a_wrong_length_or_with_a_tail_are_refused() -> None:
    with pytest.raises(FormatError, match="expected 2 bytes, got 1"):
        unpack_bits(b"\x00", 9)
    with pytest.raises(FormatError, match="bits set behind the last one"):
        unpack_bits(b"\xff", 5)
