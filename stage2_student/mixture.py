"""Several caches in one run: each step reads one of them, in proportion to their weights.

The j-th step of cache k falls at the time (j + 1/2) / weight k, and steps are in the order of their
times: a pure function of the weights, as evenly spread as can be. Within its own steps a cache has
the order that it has alone, epochs and views included, so one number is still the whole state. A
step's rows are of one cache, because payloads of two caches need not have the same shape.

Shapes: K caches, S steps.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stage2_student.stream import FetchAhead, GlobalOrder, StepRows

Int64Array = npt.NDArray[np.int64]


def caches_of_steps(weights: Sequence[float], num_steps: int) -> Int64Array:
    """Return which cache each of the first `num_steps` steps reads, int64 (S,).

    After any number of steps each cache has had its share of them, up to K / 2 + 1 steps, and after
    a number of steps that gives each cache a whole share, exactly that.
    """
    weight_K = np.asarray(weights, dtype=np.float64)
    most_K = np.ceil(num_steps * weight_K / weight_K.sum()).astype(np.int64) + len(weight_K)
    times = np.concatenate(
        [(np.arange(number) + 0.5) / w for number, w in zip(most_K, weight_K, strict=True)]
    )
    caches = np.repeat(np.arange(len(weight_K)), most_K)
    return caches[np.lexsort((caches, times))][:num_steps].astype(np.int64)


class MixedOrder:
    """The rows of every step of a run over several caches."""

    def __init__(
        self, orders: Sequence[GlobalOrder], weights: Sequence[float], *, max_steps: int
    ) -> None:
        self.orders = tuple(orders)
        self._cache_S = caches_of_steps(weights, max_steps)
        is_of_KS = self._cache_S == np.arange(len(orders))[:, None]
        self._before_KS = np.pad(np.cumsum(is_of_KS, axis=1), ((0, 0), (1, 0)))

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in which every cache could be read once."""
        return sum(order.steps_per_epoch for order in self.orders)

    def num_steps_of(self, cache: int) -> int:
        """Return how many steps of the run read a cache."""
        return int(self._before_KS[cache, -1])

    def steps_before(self, step: int) -> list[int]:
        """Return for each cache how many steps before `step` read it."""
        return [int(number) for number in self._before_KS[:, step]]

    def at(self, step: int) -> StepRows:
        """Return the rows of step `step` (from 0), of one cache."""
        cache = int(self._cache_S[step])
        own_step = int(self._before_KS[cache, step])
        return replace(self.orders[cache].at(own_step), step=step, cache=cache)


class MixedFetcher:
    """Tells those who fetch for the caches of a run where training stands in each."""

    def __init__(self, order: MixedOrder, fetchers: Sequence[FetchAhead | None]) -> None:
        self._order = order
        self._fetchers = tuple(fetchers)

    def at(self, step: int) -> None:
        """Pass on that training is at `step`."""
        for fetcher, own_step in zip(self._fetchers, self._order.steps_before(step), strict=True):
            if fetcher is not None:
                fetcher.at(own_step)

    def stop(self) -> None:
        """Pass on that no step follows."""
        for fetcher in self._fetchers:
            if fetcher is not None:
                fetcher.stop()
