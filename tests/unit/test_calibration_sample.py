"""Which rows calibration takes: disjoint groups, as many positions as asked for, spread evenly."""

from pathlib import Path

import numpy as np
import pytest

from stage1_teacher.calibrate import plan_calibration, wanted_positions
from stage1_teacher.calibration_sample import ChosenRows, choose_rows, corpus_counts, read_rows
from stage1_teacher.payload_config import BuildConfig
from tests.set_builders import premasked_header, random_row, write_premasked
from tide_cache.alignment import payload_positions
from tide_cache.cache import Cache, open_cache

NUM_ROWS = 200


@pytest.fixture(scope="module")
def premasked(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("set")
    write_premasked(folder, num_tasks=4, samples_per_task=NUM_ROWS // 4)
    return open_cache(folder)


def positions_of(row: int) -> int:
    """How many payload positions row `row` of view 0 of the made set has."""
    content = random_row(row, 0)
    return len(payload_positions(content.student_mask_L, content.alignment_RX))


TOTAL = sum(positions_of(row) for row in range(NUM_ROWS))


def assert_disjoint(groups: list[ChosenRows]) -> None:
    rows = [row for group in groups for row in group.rows]
    assert len(set(rows)) == len(rows)
    for group in groups:
        assert list(group.rows) == sorted(group.rows)
        assert set(group.rows) <= set(range(NUM_ROWS))
        assert group.num_positions == sum(map(positions_of, group.rows))


@pytest.mark.parametrize(
    "wanted", [[100], [1, 1], [100, 50, 50], [300, 150, 150], [10, 0, 10], [0, 0, 5]]
)
def test_groups_are_disjoint_and_hold_what_is_wanted(premasked: Cache, wanted: list[int]) -> None:
    """And no more than that by a row."""
    groups = choose_rows(premasked, wanted)
    assert_disjoint(groups)
    assert len(groups) == len(wanted)
    for group, num_wanted in zip(groups, wanted, strict=True):
        assert group.num_positions >= num_wanted
        most = max((positions_of(row) for row in group.rows), default=0)
        assert group.num_positions < num_wanted + most or not group.rows
        assert bool(group.rows) == (num_wanted > 0)


def test_the_choice_is_always_the_same(premasked: Cache) -> None:
    again = open_cache(premasked.store.url)
    assert choose_rows(premasked, [100, 50, 50]) == choose_rows(again, [100, 50, 50])


def test_a_first_group_is_chosen_whatever_comes_after_it(premasked: Cache) -> None:
    """What was fitted on stays so when less is measured, or nothing is checked."""
    fitted, measured, checked = choose_rows(premasked, [100, 50, 50])
    assert choose_rows(premasked, [100, 50])[:2] == [fitted, measured]
    assert choose_rows(premasked, [100])[0] == fitted
    assert checked.num_positions >= 50


@pytest.mark.parametrize("num_positions", [50, TOTAL // 3, 10 * TOTAL])
def test_a_finished_cache_is_checked_where_it_was_neither_fitted_nor_measured(
    premasked: Cache, num_positions: int
) -> None:
    """Also where the set has not the positions that are wanted: all three groups come short."""
    config = BuildConfig.model_validate(
        {
            "teacher": {"model": "made"},
            "payloads": ["candidates"],
            "candidates": {"k": 8, "mean_logits_positions": num_positions},
            "fidelity_positions": num_positions,
        }
    )
    plan = plan_calibration(config, premasked, vocab_size=39)
    *_, checked = choose_rows(premasked, wanted_positions(plan.config, plan.setting))
    assert checked.rows
    assert_disjoint([plan.fit_rows, plan.measure_rows, checked])


def test_however_few_rows_are_taken_they_are_spread_over_the_set(premasked: Cache) -> None:
    (chosen,) = choose_rows(premasked, [TOTAL // 8])
    rows = np.array([-1, *chosen.rows, NUM_ROWS])
    assert 15 <= len(chosen.rows) <= 40
    assert np.diff(rows).max() <= 2 * NUM_ROWS / len(chosen.rows)


def test_a_group_leaves_half_of_the_rows_to_those_after_it(premasked: Cache) -> None:
    groups = choose_rows(premasked, [10 * TOTAL, 10 * TOTAL, 10 * TOTAL])
    assert_disjoint(groups)
    assert [len(group.rows) for group in groups] == [NUM_ROWS // 2, NUM_ROWS // 4, NUM_ROWS // 4]
    assert sum(group.num_positions for group in groups) == TOTAL


def test_rows_that_are_skipped_are_in_no_group(premasked: Cache) -> None:
    first, second = choose_rows(premasked, [100, 50])
    skipped = choose_rows(premasked, [50], skip=len(first.rows))
    assert skipped == [second]


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [2, 1, 0]), (4, [2, 1, 1])]
)
def test_groups_of_a_small_set_stay_short_or_empty(
    tmp_path: Path, num_rows: int, expected: list[int]
) -> None:
    write_premasked(tmp_path, num_tasks=1, samples_per_task=num_rows)
    groups = choose_rows(open_cache(tmp_path), [1000, 1000, 1000])
    assert [len(group.rows) for group in groups] == expected
    assert_disjoint(groups)


def test_chosen_rows_are_read_as_they_are_in_the_set(premasked: Cache) -> None:
    (chosen,) = choose_rows(premasked, [60])
    found = read_rows(premasked, chosen)
    assert [row.sample_id for row in found] == [f"{row:032x}" for row in chosen.rows]
    assert {row.view for row in found} == {0}
    assert read_rows(premasked, ChosenRows(rows=(), num_positions=0)) == []


@pytest.mark.parametrize("vocab_size", [40, 20])
def test_the_corpus_is_counted_below_the_shared_ids(premasked: Cache, vocab_size: int) -> None:
    ids = np.concatenate([random_row(row, 0).student_ids_L for row in range(NUM_ROWS)])
    expected_V = np.bincount(ids, minlength=premasked_header().student.vocab_size)[:vocab_size]
    np.testing.assert_array_equal(corpus_counts(premasked, vocab_size), expected_V)
