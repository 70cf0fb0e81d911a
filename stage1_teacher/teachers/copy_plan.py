"""Which checkpoint tensor goes where in the model: planned from names and shapes alone.

A checkpoint may cut, stack and name its tensors differently from the class that runs it. A route
says for one tensor name where its parts go; the planner then checks, before a byte of weights is
read, that every part of every parameter is written exactly once, that no tensor is left over and
that all shapes agree. A model that is quietly short of one bias trains students for days.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from tide_cache.errors import CompatibilityError

Shape = tuple[int, ...]
Rows = tuple[int, int]

# Frequencies that old checkpoints carry along; every class computes them from its config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A piece of a target: rows `target_rows` of entry `entry` (of a stack), or all of it.

    `source_rows` are the rows of the checkpoint tensor that fill it (None: the whole tensor).
    """

    target: str
    source_rows: Rows | None = None
    entry: int | None = None
    target_rows: Rows | None = None

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Index the target with this to get the piece."""
        index: tuple[int | slice, ...] = () if self.entry is None else (self.entry,)
        return index if self.target_rows is None else (*index, slice(*self.target_rows))

    def target_shape(self, whole: Shape) -> Shape:
        """Return the shape of the piece within a target of shape `whole`."""
        shape = whole if self.entry is None else whole[1:]
        if self.target_rows is None:
            return shape
        start, stop = self.target_rows
        return (min(stop, shape[0]) - start, *shape[1:])

    def source_shape(self, whole: Shape) -> Shape:
        """Return the shape of the rows taken from a checkpoint tensor of shape `whole`."""
        if self.source_rows is None:
            return whole
        start, stop = self.source_rows
        return (min(stop, whole[0]) - start, *whole[1:])


Route = Callable[[str], Sequence[Part]]


def same_names(config: object) -> Route:
    """Route every tensor to the parameter of its own name."""
    del config

    def route(name: str) -> Sequence[Part]:
        return [Part(target=name)]

    return route


def plan_copies(
    sources: Mapping[str, Shape], targets: Mapping[str, Shape], route: Route, *, where: str
) -> dict[str, list[Part]]:
    """Plan which parts of the model each checkpoint tensor fills.

    `sources` and `targets` map names to shapes; tensors for a target outside `targets` are
    unexpected. Raises CompatibilityError that lists what is unexpected, doubled, of another shape
    or missing; `where` names the checkpoint in it.
    """
    plan: dict[str, list[Part]] = {}
    problems: list[str] = []
    num_written: Counter[str] = Counter()
    for source, shape in sorted(sources.items()):
        if source.endswith(_IGNORED_SUFFIX):
            continue
        parts = list(route(source))
        if any(part.target not in targets for part in parts):
            problems.append(f"unexpected tensor {source}")
            continue
        plan[source] = parts
        problems += _shape_problems(source, shape, parts, targets)
        for part in parts:
            num_written[part.target] += math.prod(part.source_shape(shape))
    problems += _doubled(plan)
    for target, shape in targets.items():
        if num_written[target] < math.prod(shape):
            problems.append(f"nothing, or too little, for {target} of shape {shape}")
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CompatibilityError(f"{where}: the weights do not fit the config: {shown}{more}")
    return plan


def _shape_problems(
    source: str, shape: Shape, parts: Sequence[Part], targets: Mapping[str, Shape]
) -> list[str]:
    """Say where a tensor has rows that nothing takes, or parts that do not fit their place."""
    problems = []
    for part in parts:
        whole = targets[part.target]
        if part.entry is not None and part.entry >= whole[0]:
            problems.append(f"{source}: {part.target} has only {whole[0]} entries")
        elif (got := part.source_shape(shape)) != (expected := part.target_shape(whole)):
            problems.append(f"{source}: expected shape {expected} for {part.target}, got {got}")
    num_taken = sum(math.prod(part.source_shape(shape)) for part in parts)
    if not problems and num_taken != math.prod(shape):
        problems.append(f"{source}: of its shape {shape} only {num_taken} values have a place")
    return problems


def _doubled(plan: Mapping[str, Sequence[Part]]) -> list[str]:
    places: Counter[tuple[str, int | None, Rows | None]] = Counter(
        (part.target, part.entry, part.target_rows) for parts in plan.values() for part in parts
    )
    return [f"several tensors for {place[0]}" for place, times in places.items() if times > 1]
