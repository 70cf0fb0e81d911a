"""From candidates to a full distribution: what the other V - K ids are taken to be.

The exact logsumexp says how much mass the ids have that were not kept; a tail says how it is spread
over them. All but `none` match the stored mass at the loss's temperature, so that a mixture of
logits (TIDAL) moves the right share of the student's mass to the candidates and away from them:

- `hidden`: the replayed output head (payload `hidden`), the teacher's own shape;
- `mean`: the teacher's mean logits over the cache; the default where there is no `hidden`;
- `student`: the student's own logits at the position, which leaves its order alone;
- `mean_student`: half of each, in logits;
- `bucket`: all other ids as one outcome. Its losses and gradients are those of `student`: within
  a group, the chain rule leaves a KL of zero where both sides have one shape;
- `uniform`: all alike;
- `none`: nothing, the candidates renormalised: what most tools do. A wrong gradient, to compare.

This is the slow, obvious form, in numpy; stage 2 has it in torch. Shapes: P masked positions, K
candidates, V vocabulary, T temperatures.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tide_cache.errors import ConfigError, did_you_mean
from tide_cache.payloads.candidates import NO_ID, Candidates, tail_logshare

FloatArray = npt.NDArray[np.floating]
Tail = Literal["mean", "student", "mean_student", "bucket", "uniform", "none", "hidden"]
TAILS: tuple[Tail, ...] = get_args(Tail)
NEEDS_STUDENT: tuple[Tail, ...] = ("student", "mean_student", "bucket")
NEEDS_MEAN: tuple[Tail, ...] = ("mean", "mean_student")


def check_tail(tail: str) -> None:
    """Raise ConfigError unless `tail` is known."""
    if tail not in TAILS:
        raise ConfigError(
            f"tail: expected one of {', '.join(TAILS)}, got {tail!r}{did_you_mean(tail, TAILS)}"
        )


def complete(
    candidates: Candidates,
    tail: Tail,
    *,
    temperatures: tuple[float, ...],
    column: int,
    vocab_size: int,
    mean_logits_V: FloatArray | None = None,
    student_logits_PV: FloatArray | None = None,
    replayed_logits_PV: FloatArray | None = None,
) -> npt.NDArray[np.float32]:
    """Rebuild full logits, float32 (P, V), that hold the stored mass at `temperatures[column]`.

    The three shapes are needed by the tails named after them. Rounded candidates are shifted
    together to the mass that the tail leaves them; exact ones (`raw`) stay as they are.
    """
    temperature = temperatures[column]
    num_positions = candidates.num_positions
    shape_PV = _shape(
        tail, num_positions, vocab_size, mean_logits_V, student_logits_PV, replayed_logits_PV
    )
    is_rounded = candidates.tail_logshare_PT is not None
    logshare_PT = candidates.tail_logshare_PT
    if logshare_PT is None:
        logshare_PT = tail_logshare(candidates, temperatures, vocab_size)
    total_P = candidates.logsumexp_PT[:, column].astype(np.float64)
    logshare_P = logshare_PT[:, column].astype(np.float64)
    is_id_PK = candidates.ids_PK != NO_ID
    row_PK = np.broadcast_to(np.arange(num_positions)[:, None], is_id_PK.shape)
    head_PK = candidates.logits_PK.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        if is_rounded or tail == "none":
            left_P = 0.0 if tail == "none" else np.log(-np.expm1(logshare_P))
            shift_P = temperature * (total_P + left_P - _logsumexp(head_PK / temperature))
            head_PK = head_PK + shift_P[:, None]
        full_PV = np.array(np.broadcast_to(shape_PV, (num_positions, vocab_size)), dtype=np.float64)
        full_PV[row_PK[is_id_PK], candidates.ids_PK[is_id_PK]] = -np.inf
        mass_P = _logsumexp(full_PV / temperature)
        shift_P = temperature * (total_P + logshare_P - mass_P)
        full_PV = np.where(np.isneginf(full_PV), -np.inf, full_PV + shift_P[:, None])
    full_PV[row_PK[is_id_PK], candidates.ids_PK[is_id_PK]] = head_PK[is_id_PK]
    return full_PV.astype(np.float32)


def _shape(
    tail: Tail,
    num_positions: int,
    vocab_size: int,
    mean_logits_V: FloatArray | None,
    student_logits_PV: FloatArray | None,
    replayed_logits_PV: FloatArray | None,
) -> FloatArray:
    """Return the logits that the tail follows up to a constant per position, (P or 1, V)."""
    check_tail(tail)
    wanted: dict[str, list[FloatArray | None]] = {
        "mean": [mean_logits_V],
        "student": [student_logits_PV],
        "bucket": [student_logits_PV],
        "mean_student": [mean_logits_V, student_logits_PV],
        "hidden": [replayed_logits_PV],
    }
    if tail == "uniform":
        return np.zeros((1, vocab_size))
    if tail == "none":
        return np.full((1, vocab_size), -np.inf)
    given = [shape for shape in wanted[tail] if shape is not None]
    if len(given) != len(wanted[tail]):
        raise ConfigError(f"tail: {tail!r} needs logits that were not given")
    shapes = [np.atleast_2d(shape)[:, :vocab_size].astype(np.float64) for shape in given]
    return np.asarray(sum(shapes) / len(shapes))


def _logsumexp(values_PX: FloatArray) -> FloatArray:
    peak_P1 = values_PX.max(axis=1, keepdims=True, initial=-np.inf)
    anchor_P1 = np.where(np.isfinite(peak_P1), peak_P1, 0.0)
    summed: FloatArray = anchor_P1[:, 0] + np.log(np.exp(values_PX - anchor_P1).sum(axis=1))
    return summed
