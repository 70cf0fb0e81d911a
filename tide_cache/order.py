"""The order of training rows: a pure function of (seed, epoch, row groups).

Row groups are permuted, then cut into windows of `groups_per_window`; the rows of a window are
permuted together. So a reader touches each row group once per epoch and holds two windows at most,
and the order has no state but a position. A full permutation would mix better and read each group
up to 256 times.
"""

import numpy as np
import numpy.typing as npt

from tide_cache.draws import generator

Int64Array = npt.NDArray[np.int64]
DEFAULT_GROUPS_PER_WINDOW = 8


def epoch_order(
    seed: int,
    epoch: int,
    group_sizes: Int64Array,
    groups_per_window: int = DEFAULT_GROUPS_PER_WINDOW,
) -> Int64Array:
    """Return the row numbers of one epoch in training order: each row once, int64 (num_rows,)."""
    random = generator(seed, "order", epoch, "order")
    starts = np.concatenate([[0], np.cumsum(group_sizes)])[:-1]
    groups = random.permutation(len(group_sizes))
    windows = []
    for first in range(0, len(groups), groups_per_window):
        chosen = groups[first : first + groups_per_window]
        rows = np.concatenate([np.arange(starts[g], starts[g] + group_sizes[g]) for g in chosen])
        windows.append(random.permutation(rows))
    return np.concatenate(windows).astype(np.int64) if windows else np.empty(0, dtype=np.int64)
