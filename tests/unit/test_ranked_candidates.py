"""The ranked codec: ids exact, logits within the bound it states, hostile bytes within all bounds.

Shapes: B rows, P positions, K candidates, V vocabulary, T temperatures.
"""

import dataclasses
import tracemalloc
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.payload_builders import (
    TEMPERATURES,
    assert_within_bounds,
    by_id,
    damaged,
    encode,
    forged,
    logsumexp,
    random_logits,
    resealed,
    sizes,
    to_cells,
    top_candidates,
)
from tide_cache.errors import FormatError
from tide_cache.payload_facts import RankedFacts
from tide_cache.payloads.candidates import NO_ID, Candidates, keep_top_p, tail_logshare
from tide_cache.payloads.candidates_ranked import (
    LABEL_BITS,
    TAIL_BITS,
    RankedCandidates,
    num_planes,
)
from tide_cache.shards import table_bytes

NO_RANGE = "cand_low, cand_range: expected a finite low and a range from 0"


def make_codec(
    k: int,
    vocab_size: int,
    *,
    bits: int = 6,
    min_k: int | None = None,
    temperatures: tuple[float, ...] = TEMPERATURES,
    seed: int | None = None,
) -> RankedCandidates:
    """`seed` shuffles the rank table; `min_k` makes the positions ragged."""
    facts = RankedFacts.model_validate(
        {
            "k": k,
            "vocab_size": vocab_size,
            "temperatures": temperatures,
            "mean_logits_positions": 0,
            "bits": bits,
            "top_p": None if min_k is None else 0.9,
            "min_k": min_k,
            "ranks": "corpus",
        }
    )
    ranks = np.arange(vocab_size, dtype=np.int32)
    if seed is not None:
        ranks = np.random.default_rng(seed).permutation(ranks)
    return RankedCandidates(facts, ranks)


def any_logits(random: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Logits of every sort that a position may have, each position with a finite one."""
    logits_PK = random.normal(size=shape) * 3
    if kind == "ties":
        logits_PK = random.integers(-2, 2, shape).astype(float)
    elif kind == "equal":
        logits_PK = np.broadcast_to(logits_PK[:, :1], shape).copy()
    elif kind == "one-hot":
        logits_PK[:, 1:] = -np.inf
    elif kind == "holes":
        holes_PK = random.random(shape) < 0.5
        holes_PK[:, 0] = False
        logits_PK[holes_PK] = -np.inf
    elif kind == "tiny":
        logits_PK *= 1e-30
    elif kind == "huge":
        logits_PK = np.clip(logits_PK * 1e29, -1e30, 1e30)
    elif kind == "far":
        logits_PK += 1e4
    elif kind == "mixed":
        sign_PK = random.choice([-1, 1], shape)
        logits_PK = sign_PK * 10.0 ** random.uniform(-30, 29, shape)
    return random.permuted(logits_PK, axis=1).astype(np.float32)


def any_candidates(
    seed: int, num_positions: int, k: int, vocab_size: int, *, kind: str = "normal"
) -> Candidates:
    """Any ids in any order: not the likeliest, whatever the mass of the others."""
    random = np.random.default_rng(seed)
    ids = [random.choice(vocab_size, k, replace=False) for _ in range(num_positions)]
    logits_PK = any_logits(random, kind, (num_positions, k))
    total_PT = np.stack([logsumexp(logits_PK / t) for t in TEMPERATURES], axis=1)
    if k < vocab_size:
        total_PT = total_PT + random.exponential(size=total_PT.shape)
    return Candidates(
        ids_PK=np.array(ids, dtype=np.int32).reshape(num_positions, k),
        logits_PK=logits_PK,
        logsumexp_PT=total_PT.astype(np.float32),
        label_logprob_P=-random.exponential(size=num_positions).astype(np.float32),
    )


def cut(made: Candidates, counts_P: np.ndarray) -> Candidates:
    """Keep the first so many candidates of each position, and one finite logit among them."""
    logits_PK = made.logits_PK.copy()
    logits_PK[:, 0] = logits_PK.max(axis=1, initial=-np.inf)
    kept_PK = np.arange(made.ids_PK.shape[1]) < counts_P[:, None]
    return dataclasses.replace(
        made,
        ids_PK=np.where(kept_PK, made.ids_PK, NO_ID).astype(np.int32),
        logits_PK=np.where(kept_PK, logits_PK, -np.inf).astype(np.float32),
    )


def assert_close(found: Candidates, made: Candidates, codec: RankedCandidates) -> None:
    """Everything that the codec promises."""
    facts = codec.facts
    num_positions = made.num_positions
    assert_within_bounds(found, k=facts.k, vocab_size=facts.vocab_size, num_positions=num_positions)
    ids_PK, logits_PK = by_id(found)
    true_ids_PK, true_logits_PK = by_id(made)
    np.testing.assert_array_equal(ids_PK, true_ids_PK)
    finite_PK = np.isfinite(true_logits_PK)
    np.testing.assert_array_equal(np.isfinite(logits_PK), finite_PK)
    true_PK = np.where(finite_PK, true_logits_PK, 0).astype(np.float64)
    assert found.error_P is not None
    error_PK = np.abs(np.where(finite_PK, logits_PK, 0) - true_PK)
    assert (error_PK <= found.error_P[:, None]).all()
    low_P = true_PK.min(axis=1, where=finite_PK, initial=np.inf)
    high_P = true_PK.max(axis=1, where=finite_PK, initial=-np.inf)
    range_P = (high_P - low_P + 2**-7 * np.abs(low_P)) * (1 + 2**-7)
    half_step_P = 0.5 * range_P / ((1 << facts.bits) - 2)
    # The bound itself is no larger than half a step and float32's rounding.
    assert (found.error_P <= 1.001 * half_step_P + 2**-20 * (np.abs(low_P) + range_P)).all()
    np.testing.assert_array_equal(found.logsumexp_PT, made.logsumexp_PT)
    np.testing.assert_allclose(found.label_logprob_P, made.label_logprob_P, rtol=2.0**-LABEL_BITS)
    share_PT = tail_logshare(made, facts.temperatures, facts.vocab_size)
    assert found.tail_logshare_PT is not None
    np.testing.assert_allclose(found.tail_logshare_PT, share_PT, rtol=2.0**-TAIL_BITS)


KINDS = ("normal", "ties", "equal", "one-hot", "holes", "tiny", "huge", "far", "mixed")
VOCABS = (1, 2, 9, 50, 256, 257, 65_536, 65_537)


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 9999),
    num=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    k=st.integers(1, 50),
    vocab_size=st.sampled_from(VOCABS),
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from([6, 8]),
    is_ragged=st.booleans(),
    is_shuffled=st.booleans(),
)
# The largest logit stands at the writer's bound and comes back a step beyond it.
@example(
    seed=820,
    num=[1, 3],
    k=9,
    vocab_size=50,
    kind="huge",
    bits=6,
    is_ragged=False,
    is_shuffled=False,
)
def test_round_trip(
    seed: int,
    num: list[int],
    k: int,
    vocab_size: int,
    kind: str,
    bits: int,
    is_ragged: bool,
    is_shuffled: bool,
) -> None:
    k = min(k, vocab_size)
    random = np.random.default_rng(seed)
    min_k = int(random.integers(1, k + 1)) if is_ragged else None
    made = any_candidates(seed, sum(num), k, vocab_size, kind=kind)
    if min_k is not None:
        made = cut(made, random.integers(min_k, k + 1, sum(num)))
    codec = make_codec(
        k,
        vocab_size,
        bits=bits,
        min_k=min_k,
        seed=seed if is_shuffled and vocab_size < 300 else None,
    )
    table = encode(codec, made, sizes(*num))
    assert_close(codec.decode(table, sizes(*num)), made, codec)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    num=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    min_k=st.sampled_from([None, 2]),
)
def test_bytes_follow_from_the_answer_alone(seed: int, num: list[int], min_k: int | None) -> None:
    """Not from the order of candidates, nor from the rows encoded or decoded together."""
    made, codec = any_candidates(seed, sum(num), 5, 50), make_codec(5, 50, min_k=min_k, seed=1)
    table = encode(codec, made, sizes(*num))
    order_PK = np.random.default_rng(seed).permuted(np.tile(np.arange(5), (sum(num), 1)), axis=1)
    shuffled = dataclasses.replace(
        made,
        ids_PK=np.take_along_axis(made.ids_PK, order_PK, axis=1),
        logits_PK=np.take_along_axis(made.logits_PK, order_PK, axis=1),
    )
    assert encode(codec, shuffled, sizes(*num)).equals(table)
    assert table_bytes(encode(codec, made, sizes(*num))) == table_bytes(table)
    stops = np.cumsum(num)
    rows = [
        encode(codec, made.rows(stop - size, stop), sizes(size))
        for size, stop in zip(num, stops, strict=True)
    ]
    assert pa.concat_tables(rows).combine_chunks().equals(table)
    whole = codec.decode(table, sizes(*num))
    for row, (size, stop) in enumerate(zip(num, stops, strict=True)):
        part = codec.decode(table.slice(row, 1), sizes(size))
        for field in dataclasses.fields(Candidates):
            expected = getattr(whole.rows(stop - size, stop), field.name)
            np.testing.assert_array_equal(getattr(part, field.name), expected)


@pytest.mark.parametrize("min_k", [None, 2])
def test_candidates_come_by_rank_and_what_was_decoded_encodes_to_the_same(
    min_k: int | None,
) -> None:
    made, codec = any_candidates(3, 6, 5, 50), make_codec(5, 50, min_k=min_k, seed=1)
    table = encode(codec, made, sizes(2, 4))
    found = codec.decode(table, sizes(2, 4))
    rank_of_id_V = np.argsort(np.random.default_rng(1).permutation(50))
    assert (np.diff(rank_of_id_V[found.ids_PK], axis=1) > 0).all()
    again = encode(codec, found, sizes(2, 4))
    for name in ("cand_gaps_0", "cand_codes", "cand_logsumexp", "cand_tail", "cand_label_logprob"):
        assert again[name].equals(table[name]), name


def test_the_bytes_of_version_1() -> None:
    """By hand: what a version means never changes."""
    codec = make_codec(3, 300, temperatures=(1.0,))
    codec = RankedCandidates(codec.facts, np.arange(299, -1, -1, dtype=np.int32))
    # Ranks 0, 260, 2 and 299, 298, 297.
    made = Candidates(
        ids_PK=np.array([[299, 39, 297], [0, 1, 2]], np.int32),
        logits_PK=np.array([[2.0, -np.inf, 4.0], [1.0, 1.5, 7.2]], np.float32),
        logsumexp_PT=np.array([[4.5], [8.0]], np.float32),
        label_logprob_P=np.array([-0.5, -1.003], np.float32),
        tail_logshare_PT=np.array([[-1.0], [-np.inf]], np.float32),
    )
    cells = to_cells(encode(codec, made, sizes(2)))
    assert cells["cand_gaps_0"] == [bytes([0, 1, 1, 297 - 256, 0, 0])]  # 257 = 1 + 1 * 256
    assert cells["cand_gaps_1"] == [bytes([0, 0, 1, 1, 0, 0])]
    # Codes of 0..62 from low to low + range; 63 is -inf. 6.2 is rounded up to 6.21875.
    assert cells["cand_codes"] == [bytes([0, 62, 63, 62, 5, 0])]
    assert cells["cand_low"] == [np.array([2, 1], "<f4").tobytes()]
    assert cells["cand_range"] == [np.array([2, 6.21875], "<f4").tobytes()]
    assert cells["cand_logsumexp"] == [np.array([4.5, 8], "<f4").tobytes()]
    assert cells["cand_tail"] == [np.array([-1, -np.inf], "<f4").tobytes()]
    assert cells["cand_label_logprob"] == [np.array([-0.5, -1], "<f4").tobytes()]
    (crc,) = cells.pop("cand_crc32")
    assert int.from_bytes(crc, "little") == zlib.crc32(b"".join(row for (row,) in cells.values()))


@pytest.mark.parametrize(
    ("vocab_size", "planes"),
    [(1, 1), (2, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 3), (1 << 24, 3)],
)
def test_planes(vocab_size: int, planes: int) -> None:
    assert num_planes(vocab_size) == planes


def test_top_p_answers_round_trip() -> None:
    logits_PV = random_logits(0, 20, 50, scale=4.0)
    made = keep_top_p(top_candidates(logits_PV, 8), top_p=0.9, min_k=2)
    assert 2 <= made.counts_P.min() < made.counts_P.max() <= 8
    codec = make_codec(8, 50, min_k=2, seed=0)
    table = encode(codec, made, sizes(13, 7))
    assert_close(codec.decode(table, sizes(13, 7)), made, codec)
    assert len(to_cells(table)["cand_codes"][0]) == made.counts_P[:13].sum()


MADE = any_candidates(5, 3, 4, 300)


def with_value(made: Candidates, field: str, at: tuple[int, ...], value: float) -> Candidates:
    values = getattr(made, field).copy()
    values[at] = value
    return dataclasses.replace(made, **{field: values})


@pytest.mark.parametrize("min_k", [None, 2])
@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("ids_PK", (0, 1), -2, r"cand_ids: expected ids in 0\.\.299"),
        ("ids_PK", (0, 1), 300, r"cand_ids: expected ids in 0\.\.299"),
        ("ids_PK", (0, 1), MADE.ids_PK[0, 3], "cand_ids: expected distinct ids in each position"),
        ("logits_PK", (1, 2), np.nan, "cand_logits: expected numbers or -inf"),
        ("logits_PK", (1, 2), np.inf, "cand_logits: expected numbers or -inf"),
        ("logits_PK", (1, 2), -2e30, r"cand_logits: expected logits within 1e\+30"),
        ("logits_PK", (1,), -np.inf, "cand_logits: a position without a finite logit"),
        ("logsumexp_PT", (2, 1), np.nan, "cand_logsumexp: expected finite numbers"),
        ("logsumexp_PT", (2, 1), -50, "cand_logsumexp: below the largest stored logit"),
        ("label_logprob_P", (2,), np.nan, "cand_label_logprob: expected log-probabilities"),
        ("label_logprob_P", (2,), 0.1, "cand_label_logprob: expected log-probabilities"),
    ],
)
def test_what_is_out_of_bounds_is_not_written(
    min_k: int | None, field: str, at: tuple[int, ...], value: float, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        encode(make_codec(4, 300, min_k=min_k), with_value(MADE, field, at, value), sizes(3))


def test_missing_candidates_are_written_only_where_they_may_be() -> None:
    one_less = with_value(MADE, "ids_PK", (1, 3), NO_ID)
    one_less = with_value(one_less, "logits_PK", (1, 3), -np.inf)
    encode(make_codec(4, 300, min_k=3), one_less, sizes(3))
    with pytest.raises(FormatError, match="expected at least 4 candidates in each position"):
        encode(make_codec(4, 300), one_less, sizes(3))
    with pytest.raises(FormatError, match="expected at least 4 candidates in each position"):
        encode(make_codec(4, 300, min_k=4), one_less, sizes(3))
    hole = with_value(MADE, "ids_PK", (1, 2), NO_ID)
    with pytest.raises(FormatError, match="expected missing candidates behind the others"):
        encode(make_codec(4, 300, min_k=3), hole, sizes(3))
    with pytest.raises(FormatError, match=r"expected k = 5, got \(4,\)"):
        encode(make_codec(5, 300), MADE, sizes(3))


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (np.arange(299, dtype=np.int32), r"expected int32 \(300,\), got int32 \(299,\)"),
        (np.arange(300), r"expected int32 \(300,\), got int64 \(300,\)"),
        (np.arange(300, dtype=np.int32)[:, None], r"expected int32 \(300,\), got int32 \(300, 1\)"),
        (np.arange(1, 301, dtype=np.int32), r"expected ids in 0\.\.299"),
        (np.arange(-1, 299, dtype=np.int32), r"expected ids in 0\.\.299"),
        (np.arange(300, dtype=np.int32) // 2, "expected each id once"),
    ],
)
def test_a_bad_rank_table_is_refused(ranks: np.ndarray, message: str) -> None:
    with pytest.raises(FormatError, match=f"id_of_rank: {message}"):
        RankedCandidates(make_codec(4, 300).facts, ranks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 1 << 16}, "k: expected at most 65535, got 65536"),
        ({"min_k": 2}, "expected top_p and min_k together"),
        ({"top_p": 0.9, "min_k": 5}, "min_k: expected at most k = 4, got 5"),
        ({"bits": 7}, "6 or 8"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(
    changes: dict[str, object], message: str
) -> None:
    facts = make_codec(4, 300).facts.model_dump()
    with pytest.raises(ValueError, match=message):
        RankedFacts.model_validate({**facts, **changes})


def f4(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("column", "start", "data", "message"),
    [
        ("cand_gaps_1", 0, b"\2", r"cand_gaps: expected ranks in 0\.\.299"),
        ("cand_gaps_1", 0, bytes([255] * 4), r"cand_gaps: expected ranks in 0\.\.299"),
        ("cand_codes", 3, b"\x40", r"cand_codes: expected codes in 0\.\.63"),
        ("cand_codes", 4, bytes([63] * 4), "cand_codes: a position without a finite logit"),
        ("cand_low", 0, f4(np.nan), NO_RANGE),
        ("cand_low", 0, f4(np.inf), NO_RANGE),
        ("cand_range", 0, f4(-1), NO_RANGE),
        ("cand_range", 0, f4(np.nan), NO_RANGE),
        ("cand_range", 0, f4(4e30), NO_RANGE),
        ("cand_logsumexp", 4, f4(np.nan), "cand_logsumexp: expected finite numbers"),
        ("cand_logsumexp", 4, f4(-99), "cand_logsumexp: below the largest stored logit"),
        ("cand_tail", 4, f4(0.1), "cand_tail: expected logarithms of shares"),
        ("cand_tail", 4, f4(np.nan), "cand_tail: expected logarithms of shares"),
        ("cand_label_logprob", 0, f4(0.1), "cand_label_logprob: expected log-probabilities"),
        ("cand_label_logprob", 0, f4(np.nan), "cand_label_logprob: expected log-probabilities"),
    ],
)
@pytest.mark.parametrize("min_k", [None, 4])
def test_a_forged_value_is_refused(
    min_k: int | None, column: str, start: int, data: bytes, message: str
) -> None:
    codec = make_codec(4, 300, min_k=min_k)
    table = encode(codec, MADE, sizes(3))
    cells = to_cells(table)
    cell = cells[column][0]
    cells[column] = [cell[:start] + data + cell[start + len(data) :]]
    with pytest.raises(FormatError, match=message):
        codec.decode(resealed(cells, table.schema), sizes(3))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((4, 5, 3), "cand_counts: expected 2 to 4 candidates"),
        ((4, 1, 4), "cand_counts: expected 2 to 4 candidates"),
        ((4, 0, 4), "cand_counts: expected 2 to 4 candidates"),
        ((4, 65_535, 4), "cand_counts: expected 2 to 4 candidates"),
        ((4, 3, 4), "cand_gaps_0: expected 11 bytes, got 12"),
        ((4, 4), "cand_counts: expected 6 bytes, got 4"),
    ],
)
def test_forged_counts_are_refused(counts: tuple[int, ...], message: str) -> None:
    codec = make_codec(4, 300, min_k=2)
    table = encode(codec, MADE, sizes(3))
    cells = to_cells(table) | {"cand_counts": [np.array(counts, "<u2").tobytes()]}
    with pytest.raises(FormatError, match=message):
        codec.decode(resealed(cells, table.schema), sizes(3))


@pytest.mark.parametrize("min_k", [None, 1])
@pytest.mark.parametrize("bits", [6, 8])
def test_any_damaged_byte_is_noticed(min_k: int | None, bits: int) -> None:
    made = any_candidates(6, 3, 3, 70_000, kind="holes")
    if min_k is not None:
        made = cut(made, np.array([3, 1, 2]))
    codec = make_codec(3, 70_000, min_k=min_k, bits=bits)
    num_B = sizes(2, 0, 1)
    for what, spoilt in damaged(encode(codec, made, num_B)):
        with pytest.raises(FormatError):
            codec.decode(spoilt, num_B)
            pytest.fail(what)


@settings(deadline=None, max_examples=500)
@given(
    seed=st.integers(0, 1 << 32),
    min_k=st.sampled_from([None, 1]),
    bits=st.sampled_from([6, 8]),
    vocab_size=st.sampled_from([5, 256, 300, 70_000]),
)
def test_forged_bytes_are_refused_or_within_bounds(
    seed: int, min_k: int | None, bits: int, vocab_size: int
) -> None:
    made = any_candidates(seed % 5, 4, 3, vocab_size)
    if min_k is not None:
        made = cut(made, np.array([3, 1, 2, 3]))
    codec = make_codec(3, vocab_size, min_k=min_k, bits=bits)
    num_B = sizes(2, 0, 2)
    try:
        found = codec.decode(forged(encode(codec, made, num_B), seed), num_B)
    except FormatError:
        return
    assert_within_bounds(found, k=3, vocab_size=vocab_size, num_positions=4)
    assert np.isfinite(found.logits_PK).any(axis=1).all()


@pytest.mark.parametrize("column", ["cand_counts", "cand_gaps_0", "cand_codes", "cand_tail"])
def test_what_rows_do_not_ask_for_is_not_allocated(column: str) -> None:
    """A column of 4 MB for three positions is refused before anything takes its size."""
    codec = make_codec(4, 300, min_k=2)
    table = encode(codec, MADE, sizes(3))
    cells = to_cells(table) | {column: [b"\2\0" * (1 << 21)]}
    hostile = resealed(cells, table.schema)
    tracemalloc.start()
    with pytest.raises(FormatError, match=column):
        codec.decode(hostile, sizes(3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
