"""The raw codec is lossless, and nothing out of bounds gets through it in either direction."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.payload_builders import (
    assert_within_bounds,
    damaged,
    encode,
    forged,
    random_logits,
    resealed,
    sizes,
    to_cells,
    top_candidates,
)
from tide_cache.errors import FormatError
from tide_cache.payload_facts import CandidatesFacts
from tide_cache.payloads.candidates import Candidates, keep_top_p, sort_by_id
from tide_cache.payloads.candidates_raw import RawCandidates

VOCAB = 50
FIELDS = ("ids_PK", "logits_PK", "logsumexp_PT", "label_logprob_P")


def make_codec(k: int, version: int = 2) -> RawCandidates:
    return RawCandidates(
        CandidatesFacts.model_validate(
            {
                "codec_version": version,
                "temperatures": (1.0, 2.0),
                "k": k,
                "vocab_size": VOCAB,
                "mean_logits_positions": 0,
            }
        )
    )


def random_candidates(seed: int, num_positions: int, k: int) -> Candidates:
    return top_candidates(random_logits(seed, num_positions, VOCAB), k, seed=seed)


def assert_equal(found: Candidates, expected: Candidates) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.tail_logshare_PT is None
    assert found.error_P is None


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    num=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    k=st.integers(1, VOCAB),
    version=st.sampled_from([1, 2]),
)
def test_round_trip_is_exact(seed: int, num: list[int], k: int, version: int) -> None:
    made, codec = random_candidates(seed, sum(num), k), make_codec(k, version)
    table = encode(codec, made, sizes(*num))
    assert_equal(codec.decode(table, sizes(*num)), sort_by_id(made))
    start = sum(num[:-1])
    last = codec.decode(table.slice(len(num) - 1, 1), sizes(num[-1]))
    assert_equal(last, sort_by_id(made).rows(start, sum(num)))


def test_minus_infinity_and_ties_are_kept() -> None:
    made = sort_by_id(random_candidates(0, 2, 4))
    logits = made.logits_PK.copy()
    logits[0] = [-np.inf, 1, 1, -np.inf]
    logits[1] = -np.inf
    made = dataclasses.replace(made, logits_PK=logits)
    back = make_codec(4).decode(encode(make_codec(4), made, sizes(2)), sizes(2))
    np.testing.assert_array_equal(back.logits_PK, logits)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("column", "dtype", "position", "value", "message"),
    [
        ("cand_ids", "<i4", 0, -1, r"ids in 0\.\.49"),
        ("cand_ids", "<i4", 7, 50, r"ids in 0\.\.49"),
        ("cand_ids", "<i4", 1, 0, "ascending"),
        ("cand_logits", "<f4", 3, np.nan, "numbers or -inf"),
        ("cand_logits", "<f4", 3, np.inf, "numbers or -inf"),
        ("cand_logsumexp", "<f4", 1, np.inf, "finite"),
        ("cand_logsumexp", "<f4", 0, -1e6, "below the largest stored logit"),
        ("cand_label_logprob", "<f4", 0, 1.0, "log-probabilities"),
        ("cand_label_logprob", "<f4", 0, np.nan, "log-probabilities"),
    ],
)
def test_a_value_out_of_bounds_is_refused(
    version: int, column: str, dtype: str, position: int, value: float, message: str
) -> None:
    codec = make_codec(4, version)
    table = encode(codec, random_candidates(1, 2, 4), sizes(2))
    cells = to_cells(table)
    array = np.frombuffer(cells[column][0], dtype=dtype).copy()
    array[position] = value
    cells[column] = [array.tobytes()]
    with pytest.raises(FormatError, match=f"^{column}: .*{message}"):
        codec.decode(resealed(cells, table.schema), sizes(2))


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("ids_PK", (0, 1), -1, r"cand_ids: expected ids in 0\.\.49"),
        ("ids_PK", (0, 1), 50, r"cand_ids: expected ids in 0\.\.49"),
        ("logits_PK", (1, 0), np.nan, "cand_logits: expected numbers or -inf"),
        ("logsumexp_PT", (1, 0), -np.inf, "cand_logsumexp: expected finite numbers"),
        ("logsumexp_PT", (1, 1), -99, "cand_logsumexp: below the largest stored logit"),
        ("label_logprob_P", (0,), 0.5, "cand_label_logprob: expected log-probabilities"),
    ],
)
def test_what_is_out_of_bounds_is_not_written(
    field: str, at: tuple[int, ...], value: float, message: str
) -> None:
    made = random_candidates(1, 2, 4)
    values = getattr(made, field).copy()
    values[at] = value
    with pytest.raises(FormatError, match=message):
        encode(make_codec(4), dataclasses.replace(made, **{field: values}), sizes(2))


def test_an_id_twice_or_another_shape_is_not_written() -> None:
    made = random_candidates(1, 2, 4)
    twice = made.ids_PK.copy()
    twice[1, 2] = twice[1, 0]
    with pytest.raises(FormatError, match="expected ascending ids in each position"):
        encode(make_codec(4), dataclasses.replace(made, ids_PK=twice), sizes(2))
    with pytest.raises(FormatError, match=r"expected k = 5, got \(4,\)"):
        encode(make_codec(5), made, sizes(2))
    one_temperature = dataclasses.replace(made, logsumexp_PT=made.logsumexp_PT[:, :1])
    with pytest.raises(FormatError, match=r"cand_logsumexp: expected shape \(2, 2\), got \(2, 1\)"):
        encode(make_codec(4), one_temperature, sizes(2))


def test_a_wrong_length_is_refused() -> None:
    table = encode(make_codec(4), random_candidates(1, 3, 4), sizes(1, 2))
    with pytest.raises(FormatError, match="cand_ids: expected 48 bytes, got 32"):
        make_codec(4).decode(table, sizes(1, 3))
    with pytest.raises(FormatError, match="cand_ids: expected 32 bytes, got 16"):
        make_codec(4).decode(table, sizes(2, 1))
    with pytest.raises(FormatError, match="cand_ids: expected 20 bytes, got 16"):
        make_codec(5).decode(table, sizes(1, 2))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("cand_ids", pa.array([1, 2]), "cand_ids: expected a column of binary, got int64"),
        ("cand_ids", pa.array(["a", "b"]), "cand_ids: expected a column of binary, got string"),
        ("cand_crc32", pa.array([1, 2]), "cand_crc32: expected a column of uint32, got int64"),
        ("cand_logits", None, "cand_logits: expected a column of binary, got None"),
        (
            "cand_logits",
            pa.array([b"", None], pa.binary()),
            "cand_logits: expected a value in each row, got a missing one",
        ),
        (
            "cand_crc32",
            pa.array([1, None], pa.uint32()),
            "cand_crc32: expected a value in each row, got a missing one",
        ),
    ],
)
def test_a_column_of_another_type_is_refused(
    column: str, values: pa.Array | None, message: str
) -> None:
    table = encode(make_codec(4), random_candidates(1, 3, 4), sizes(1, 2))
    index = table.schema.get_field_index(column)
    table = table.remove_column(index)
    if values is not None:
        table = table.add_column(index, column, values)
    with pytest.raises(FormatError, match=message):
        make_codec(4).decode(table, sizes(1, 2))


def test_any_damaged_byte_is_noticed() -> None:
    table = encode(make_codec(3), random_candidates(2, 3, 3), sizes(2, 0, 1))
    for what, spoilt in damaged(table):
        with pytest.raises(FormatError):
            make_codec(3).decode(spoilt, sizes(2, 0, 1))
            pytest.fail(what)


def test_the_checksum_names_both_values() -> None:
    table = encode(make_codec(3), random_candidates(2, 3, 3), sizes(2, 1))
    cells = to_cells(table)
    crc = int.from_bytes(cells["cand_crc32"][1], "little")
    wrong = table.set_column(4, "cand_crc32", pa.array([table["cand_crc32"][0].as_py(), 1], "u4"))
    message = f"cand_crc32: expected 0x00000001, got {crc:#010x}: the payload was changed"
    with pytest.raises(FormatError, match=message):
        make_codec(3).decode(wrong, sizes(2, 1))


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 1 << 32))
def test_forged_bytes_are_refused_or_within_bounds(seed: int) -> None:
    table = forged(encode(make_codec(3), random_candidates(3, 4, 3), sizes(2, 0, 2)), seed)
    try:
        found = make_codec(3).decode(table, sizes(2, 0, 2))
    except FormatError:
        return
    assert_within_bounds(found, k=3, vocab_size=VOCAB, num_positions=4)
    assert (np.diff(found.ids_PK, axis=1) > 0).all()


@given(
    seed=st.integers(0, 999),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_k=st.integers(1, 6),
    column=st.integers(0, 1),
)
def test_top_p_keeps_the_fewest_that_hold_the_mass(
    seed: int, top_p: float, min_k: int, column: int
) -> None:
    made = random_candidates(seed, 3, 6)
    # The mass at T = 1 of logits / 2 is the mass at T = 2.
    made = dataclasses.replace(made, logits_PK=made.logits_PK / np.float32((1, 2)[column]))
    kept = keep_top_p(made, top_p=top_p, min_k=min_k, temperature_index=column)
    for position in range(3):
        share_K = np.exp(made.logits_PK[position] - made.logsumexp_PT[position, column])
        num = 1
        while num < 6 and (share_K[:num].sum() < top_p or num < min_k):
            num += 1
        assert kept.counts_P[position] == num
        np.testing.assert_array_equal(kept.ids_PK[position, :num], made.ids_PK[position, :num])
        assert (kept.ids_PK[position, num:] == -1).all()
        assert np.isneginf(kept.logits_PK[position, num:]).all()
