"""Rows survive Arrow, and every field out of its bounds is refused by name."""

import dataclasses

import numpy as np
import pytest

from tests.set_builders import VOCAB, random_row
from tide_cache.alignment import payload_positions, teacher_partners
from tide_cache.errors import DataError, FormatError
from tide_cache.rows import check_row, row_schema, rows_to_table, table_to_rows

ROW = random_row(3, 1)


def check(**changes: object) -> None:
    check_row(
        dataclasses.replace(ROW, **changes),  # type: ignore[arg-type]
        alignment="positions",
        student_vocab_size=VOCAB,
        teacher_vocab_size=VOCAB,
        num_views=2,
    )


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def flags(*positions: int) -> np.ndarray:
    mask = np.zeros(len(ROW.student_ids_L), dtype=bool)
    mask[list(positions)] = True
    return mask


def test_rows_survive_arrow() -> None:
    rows = [random_row(n, 0) for n in range(4)]
    table = rows_to_table(rows, "positions")
    assert table.schema.equals(row_schema("positions"))
    for back, row in zip(table_to_rows(table.slice(1), "positions"), rows[1:], strict=True):
        for field in dataclasses.fields(row):
            np.testing.assert_array_equal(getattr(back, field.name), getattr(row, field.name))


def test_a_sound_row_passes() -> None:
    check()


def test_nothing_masked_and_no_partner_are_sound() -> None:
    check(student_mask_L=flags(), half_a_L=flags(), alignment_RX=ints().reshape(0, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view": 2}, r"view: expected 0\.\.1, got 2"),
        ({"timestep": 0.0}, "timestep: expected in"),
        ({"timestep": float("nan")}, "timestep: expected in"),
        ({"prompt_length": 13}, r"prompt_length: expected 0\.\.12, got 13"),
        ({"student_ids_L": ints(*[2] * 11, VOCAB)}, f"position 11: student_ids.*got {VOCAB}"),
        ({"teacher_ids_L": ints(-1, *[2] * 11)}, "position 0: teacher_ids.*got -1"),
        ({"student_mask_L": flags(3), "half_a_L": flags()}, "student_mask: .*from 4 on, got 3"),
        ({"student_mask_L": flags(5), "half_a_L": flags(6)}, "half_a: expected only masked"),
        ({"alignment_RX": ints(0, 1, 11).reshape(1, 3)}, "pairs different tokens"),
        ({"alignment_RX": ints(0, 0, 13).reshape(1, 3)}, r"outside \[0, 12\)"),
        ({"alignment_RX": ints(-1, 0, 2).reshape(1, 3)}, "outside"),
        ({"alignment_RX": ints(0, 0, 0).reshape(1, 3)}, "empty"),
        ({"alignment_RX": ints(0, 0, 4, 2, 4, 4).reshape(2, 3)}, "entry 1 .* out of order"),
        ({"alignment_RX": ints(2**31 - 1, 0, 2**31 - 1).reshape(1, 3)}, "outside"),
    ],
)
def test_bounds(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        check(**changes)
    assert f"sample {ROW.sample_id}" in str(caught.value)


def test_an_alignment_of_a_wrong_width_is_refused() -> None:
    table = rows_to_table([dataclasses.replace(ROW, alignment_RX=ints(0, 0, 3, 5))], "positions")
    with pytest.raises(FormatError, match="align_runs: expected groups of 3"):
        table_to_rows(table, "positions")


def test_payload_positions_are_masked_and_have_a_partner() -> None:
    runs = ints(1, 0, 3, 6, 5, 2).reshape(2, 3)
    assert teacher_partners(runs, 9).tolist() == [-1, 0, 1, 2, -1, -1, 5, 6, -1]
    mask = np.array([1, 0, 1, 1, 1, 0, 0, 1, 1], dtype=bool)
    assert payload_positions(mask, runs).tolist() == [2, 3, 7]
