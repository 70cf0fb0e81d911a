"""The fixed grid of timesteps and which of them a view of a sample takes.

G timesteps are the midpoints of G equal cells of [t_min, t_max). The grid is cut into V strata;
view v of a sample takes one timestep of stratum perm(v), with perm drawn per sample. So each
view-epoch covers the whole range evenly over the data set, and each sample meets every stratum
over V view-epochs, at the cost of G distinct values instead of a continuum.
"""

import numpy as np
import numpy.typing as npt

from tide_cache.draws import generator
from tide_cache.errors import ConfigError

FloatArray = npt.NDArray[np.float32]


def timestep_grid(num_timesteps: int = 32, t_min: float = 1e-3, t_max: float = 1.0) -> FloatArray:
    """Return the midpoints of `num_timesteps` equal cells of [t_min, t_max) as float32 (G,)."""
    if num_timesteps < 1:
        raise ConfigError(f"num_timesteps: expected at least 1, got {num_timesteps}")
    if not 0.0 <= t_min < t_max <= 1.0:
        raise ConfigError(f"timesteps: expected 0 <= t_min < t_max <= 1, got [{t_min}, {t_max})")
    midpoints = (np.arange(num_timesteps, dtype=np.float64) + 0.5) / num_timesteps
    return (t_min + (t_max - t_min) * midpoints).astype(np.float32)


def draw_timesteps(seed: int, sample_id: str, num_views: int, grid_G: FloatArray) -> FloatArray:
    """Draw the timestep of every view of one sample. Returns float32 (V,), each a grid value."""
    num_timesteps = len(grid_G)
    if num_views < 1 or num_timesteps % num_views:
        raise ConfigError(
            f"num_timesteps: expected a multiple of num_views = {num_views}, got {num_timesteps}"
        )
    stratum_size = num_timesteps // num_views
    random = generator(seed, sample_id, -1, "timestep")
    stratum_V = random.permutation(num_views)
    offset_V = random.integers(0, stratum_size, size=num_views)
    return np.asarray(grid_G[stratum_V * stratum_size + offset_V], dtype=np.float32)
