"""Noising: the published rules, their statistics, and draws that depend on nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from stage1_teacher.premask import (
    Noising,
    PreparedSample,
    TeacherStream,
    alignment_kind,
    draw_half,
    draw_rows,
    spread_mask,
    teacher_mask,
    teacher_streams,
)
from tests.support import find_golden
from tide_cache.alignment import (
    check_whole_chunks,
    chunk_active,
    chunk_masked,
    payload_positions,
    teacher_partners,
)
from tide_cache.rows import PremaskedRow, check_row
from tide_cache.timesteps import timestep_grid

NUM_VIEWS = 4
GRID = timestep_grid(32)
NOISING = Noising(seed=3, num_views=NUM_VIEWS, grid_G=GRID, demo_ratio=0.5)


def golden_steps(kind: str) -> list[str]:
    folder = find_golden()
    if folder is None:
        return []
    index = json.loads((folder / "index.json").read_text())
    return [entry["name"] for entry in index if entry["kind"] == kind]


def load_golden(folder: Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    entry = next(e for e in json.loads((folder / "index.json").read_text()) if e["name"] == name)
    with safe_open(folder / f"{name}.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, entry  # noqa: SIM118


def shared_sample(
    number: int = 0, *, length: int = 64, prompt_length: int = 16, shift: int = 0
) -> PreparedSample:
    """One tokenizer; the teacher's prompt is `shift` tokens longer."""
    ids_L = np.random.default_rng(number).integers(0, 90, length).astype(np.int32)
    runs = (
        [[0, shift, length]]
        if shift == 0
        else [[prompt_length, prompt_length + shift, length - prompt_length]]
    )
    return PreparedSample(
        sample_id=f"sample-{number}",
        source="made",
        student_ids_L=ids_L,
        prompt_length=prompt_length,
        teacher_ids_L=np.concatenate([np.full(shift, 7, np.int32), ids_L]),
        alignment_RX=np.array(runs, dtype=np.int32),
    )


def chunk_sample(number: int = 0) -> PreparedSample:
    """Two tokenizers: chunks of 1 to 4 tokens a side, with tokens in no chunk around them."""
    random = np.random.default_rng([7, number])
    starts_ends, at_s, at_t = [], 10, 6
    for _ in range(12):
        size_s, size_t = random.integers(1, 5, 2)
        starts_ends.append([at_s, at_s + size_s, at_t, at_t + size_t])
        at_s, at_t = at_s + size_s, at_t + size_t
    return PreparedSample(
        sample_id=f"chunks-{number}",
        source="made",
        student_ids_L=random.integers(0, 90, at_s + 5).astype(np.int32),
        prompt_length=8,
        teacher_ids_L=random.integers(0, 90, at_t + 2).astype(np.int32),
        alignment_RX=np.array(starts_ends, dtype=np.int32),
    )


def row_of(sample: PreparedSample, mask_L: np.ndarray, half_a_L: np.ndarray) -> PremaskedRow:
    return PremaskedRow(
        sample_id=sample.sample_id,
        source=sample.source,
        view=0,
        timestep=0.5,
        student_ids_L=sample.student_ids_L,
        prompt_length=sample.prompt_length,
        student_mask_L=mask_L,
        half_a_L=half_a_L,
        teacher_ids_L=sample.teacher_ids_L,
        alignment_RX=sample.alignment_RX,
    )


def check_chunks_whole(row: PremaskedRow) -> None:
    check_whole_chunks(
        row.student_mask_L, row.half_a_L, row.alignment_RX, row.prompt_length, where="test"
    )


def assert_same_row(a: PremaskedRow, b: PremaskedRow) -> None:
    assert (a.sample_id, a.view, a.timestep) == (b.sample_id, b.view, b.timestep)
    np.testing.assert_array_equal(a.student_mask_L, b.student_mask_L)
    np.testing.assert_array_equal(a.half_a_L, b.half_a_L)


class TestGolden:
    """The published trainer's own masks, through our functions."""

    def golden_rows(self, tensors: dict[str, np.ndarray]) -> list[tuple[int, PremaskedRow]]:
        rows = []
        for b, labels_L in enumerate(tensors["labels"]):
            ids_L = tensors["student_ids"][b].astype(np.int32)
            mask_L = tensors["student_masked"][b]
            if "align_student" in tensors:
                alignment, half_L = self.golden_chunks(tensors, b)
                teacher_L = tensors["teacher_ids"][b].astype(np.int32)
            else:
                alignment = np.array([[0, 0, len(ids_L)]], dtype=np.int32)
                half_L, teacher_L = tensors["in_half_a"][b], ids_L
            sample = PreparedSample(
                sample_id="g",
                source="golden",
                student_ids_L=ids_L,
                prompt_length=int(np.argmax(labels_L != -100)),
                teacher_ids_L=teacher_L,
                alignment_RX=alignment,
            )
            rows.append((b, row_of(sample, mask_L, half_L)))
        return rows

    def golden_chunks(
        self, tensors: dict[str, np.ndarray], b: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read the alignment matrices as chunks, and chunk halves as halves of positions."""
        sides = []
        for name in ("align_student", "align_teacher"):
            matrix_LC = tensors[name][b]
            start_C = matrix_LC.argmax(axis=0)
            sides += [start_C, start_C + matrix_LC.sum(axis=0)]
        chunks_C4 = np.stack(sides, axis=1).astype(np.int32)
        half_L = (tensors["align_student"][b] & tensors["chunk_in_half_a"][b]).any(axis=1)
        return chunks_C4, half_L & tensors["student_masked"][b]

    @pytest.mark.parametrize("name", golden_steps("step_cross"))
    def test_cross_masks(self, name: str, golden_dir: Path) -> None:
        tensors, _ = load_golden(golden_dir, name)
        for b, row in self.golden_rows(tensors):
            drawn_L = tensors["drawn_mask"][b]
            chunks = row.alignment_RX
            mask_L = spread_mask(drawn_L, chunks, row.prompt_length)
            np.testing.assert_array_equal(mask_L, tensors["student_masked"][b])
            np.testing.assert_array_equal(chunk_masked(drawn_L, chunks), tensors["chunk_masked"][b])
            np.testing.assert_array_equal(chunk_masked(mask_L, chunks), tensors["chunk_masked"][b])
            np.testing.assert_array_equal(teacher_mask(row), tensors["teacher_masked"][b])
            np.testing.assert_array_equal(
                chunk_active(mask_L, chunks, row.prompt_length), tensors["chunk_active"][b]
            )
            check_chunks_whole(row)

    @pytest.mark.parametrize("name", [*golden_steps("step_cross"), *golden_steps("step_shared")])
    def test_teacher_inputs(self, name: str, golden_dir: Path) -> None:
        tensors, entry = load_golden(golden_dir, name)
        for b, row in self.golden_rows(tensors):
            streams = teacher_streams(row, comp_demo=entry["comp_demo"])
            expected = [k for k in ("teacher_input_pass1", "teacher_input_pass2") if k in tensors]
            assert len(streams) == len(expected)
            for stream, key in zip(streams, expected, strict=True):
                noised_L = np.where(stream.masked_L, entry["teacher_mask_id"], row.teacher_ids_L)
                order = {
                    "x0_xt": [row.teacher_ids_L, noised_L],
                    "xt_x0": [noised_L, row.teacher_ids_L],
                }
                parts = order.get(entry.get("concat_order", ""), [noised_L])
                np.testing.assert_array_equal(np.concatenate(parts), tensors[key][b])

    def test_halves_are_not_exact_counts(self, golden_dir: Path) -> None:
        """Why halves are drawn per position: the published ones are uneven."""
        shares = []
        for name in golden_steps("step_shared"):
            tensors, entry = load_golden(golden_dir, name)
            if entry["comp_demo"]:
                num_masked_B = tensors["student_masked"].sum(axis=1)
                num_half_B = tensors["in_half_a"].sum(axis=1)
                shares += [(a, m) for a, m in zip(num_half_B, num_masked_B, strict=True)]
        assert any(abs(a - m / 2) > 1 for a, m in shares)


class TestDraws:
    def test_pure_function_of_seed_sample_and_view(self) -> None:
        sample = shared_sample(1)
        first = draw_rows(sample, NOISING)
        draw_rows(shared_sample(2), NOISING)
        for a, b in zip(first, draw_rows(sample, NOISING), strict=True):
            assert_same_row(a, b)
        assert len({row.student_mask_L.tobytes() for row in first}) == NUM_VIEWS
        other_seed = Noising(seed=4, num_views=NUM_VIEWS, grid_G=GRID, demo_ratio=0.5)
        assert any(
            not np.array_equal(a.student_mask_L, b.student_mask_L)
            for a, b in zip(first, draw_rows(sample, other_seed), strict=True)
        )

    def test_masks_do_not_depend_on_the_prompt(self) -> None:
        """A longer system prompt in the template leaves the reply's masks alone."""
        short, long = shared_sample(1), shared_sample(1, length=80, prompt_length=32)
        for a, b in zip(draw_rows(short, NOISING), draw_rows(long, NOISING), strict=True):
            np.testing.assert_array_equal(a.student_mask_L[16:], b.student_mask_L[32:])

    @pytest.mark.parametrize("make", [shared_sample, chunk_sample])
    def test_rows_pass_the_checks(self, make: Callable[[int], PreparedSample]) -> None:
        for number in range(20):
            sample = make(number)
            for row in draw_rows(sample, NOISING):
                check_row(
                    row,
                    alignment=alignment_kind(row.alignment_RX),
                    student_vocab_size=90,
                    teacher_vocab_size=90,
                    num_views=NUM_VIEWS,
                )
                assert not row.student_mask_L[: row.prompt_length].any()

    def test_marginal_frequency_of_masks(self) -> None:
        """Every position is masked with probability t, at every t of the grid."""
        masked: dict[float, list[float]] = {float(t): [0, 0] for t in GRID}
        position_hits = np.zeros(48)
        total_t = 0.0
        for number in range(600):
            for row in draw_rows(shared_sample(number), NOISING):
                labelled_L = row.student_mask_L[row.prompt_length :]
                masked[row.timestep][0] += labelled_L.sum()
                masked[row.timestep][1] += len(labelled_L)
                position_hits += labelled_L
                total_t += row.timestep
        for t, (hits, num) in masked.items():
            assert num > 0, f"timestep {t} never drawn"
            z = (hits - num * t) / np.sqrt(num * t * (1 - t))
            assert abs(z) < 4.5, (t, z)
        spread = np.sqrt(total_t)  # an upper bound of the standard deviation of a position's hits
        assert np.abs(position_hits - total_t).max() < 4.5 * spread

    def test_every_sample_meets_every_stratum(self) -> None:
        edges = np.linspace(1e-3, 1.0, NUM_VIEWS + 1)
        first_strata = set()
        for number in range(64):
            timesteps = [row.timestep for row in draw_rows(shared_sample(number), NOISING)]
            strata = np.searchsorted(edges, timesteps) - 1
            assert sorted(strata.tolist()) == list(range(NUM_VIEWS))
            first_strata.add(int(strata[0]))
        assert first_strata == set(range(NUM_VIEWS)), "a view must see the whole range"

    @pytest.mark.parametrize("demo_ratio", [0.0, 0.25, 0.5, 1.0])
    def test_share_of_half_a(self, demo_ratio: float) -> None:
        num_half = num_masked = 0
        for number in range(300):
            sample = shared_sample(number)
            mask_L = np.arange(64) >= 16
            half_L = draw_half(
                mask_L,
                sample.alignment_RX,
                demo_ratio=demo_ratio,
                seed=0,
                sample_id=sample.sample_id,
                view=0,
            )
            assert not (half_L & ~mask_L).any()
            num_half, num_masked = num_half + half_L.sum(), num_masked + mask_L.sum()
        spread = np.sqrt(num_masked * demo_ratio * (1 - demo_ratio))
        assert abs(num_half - demo_ratio * num_masked) <= 4 * spread

    def test_masks_and_halves_are_independent(self) -> None:
        """Separate streams: were they shared, half A would hold the most easily masked ones."""
        low_t = Noising(seed=3, num_views=1, grid_G=np.array([0.3], np.float32), demo_ratio=0.5)
        rows = [draw_rows(shared_sample(n), low_t)[0] for n in range(300)]
        num_half = sum(int(row.half_a_L.sum()) for row in rows)
        num_masked = sum(int(row.student_mask_L.sum()) for row in rows)
        assert abs(num_half - num_masked / 2) < 4 * np.sqrt(num_masked) / 2

    def test_loose_positions_of_chunk_rows(self) -> None:
        """EOS fill is maskable, and never in half A: the teacher has no counterpart to reveal."""
        masked = 0
        for number in range(50):
            for row in draw_rows(chunk_sample(number), NOISING):
                masked += int(row.student_mask_L[-5:].sum())
                assert not row.half_a_L[-5:].any()
        assert masked > 0


@st.composite
def chunk_rows(draw: st.DrawFn) -> PremaskedRow:
    """Chunks in any place, also across the prompt's end, with any consistent mask and halves."""
    sizes = draw(
        st.lists(st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 4)] * 2), max_size=8)
    )
    chunks, at_s, at_t = [], 0, 0
    for gap_s, gap_t, size_s, size_t in sizes:
        chunks.append([at_s + gap_s, at_s + gap_s + size_s, at_t + gap_t, at_t + gap_t + size_t])
        at_s, at_t = chunks[-1][1], chunks[-1][3]
    num_s, num_t = at_s + draw(st.integers(1, 4)), at_t + draw(st.integers(1, 4))
    chunks_C4 = np.array(chunks, dtype=np.int32).reshape(-1, 4)
    prompt_length = draw(st.integers(0, num_s))
    drawn_L = np.array(draw(st.lists(st.booleans(), min_size=num_s, max_size=num_s)), dtype=bool)
    drawn_L[:prompt_length] = False
    sample = PreparedSample(
        sample_id="h",
        source="made",
        student_ids_L=np.arange(num_s, dtype=np.int32),
        prompt_length=prompt_length,
        teacher_ids_L=np.arange(num_t, dtype=np.int32),
        alignment_RX=chunks_C4,
    )
    mask_L = spread_mask(drawn_L, chunks_C4, prompt_length)
    seed = draw(st.integers(0, 9))
    half_L = draw_half(mask_L, chunks_C4, demo_ratio=0.5, seed=seed, sample_id="h", view=0)
    return row_of(sample, mask_L, half_L)


@st.composite
def run_rows(draw: st.DrawFn) -> PremaskedRow:
    """Runs with gaps on both sides and any mask."""
    runs, at_s, at_t = [], 0, 0
    for gap_s, gap_t, length in draw(
        st.lists(st.tuples(*[st.integers(0, 3)] * 2, st.integers(1, 5)), max_size=5)
    ):
        runs.append([at_s + gap_s, at_t + gap_t, length])
        at_s, at_t = at_s + gap_s + length, at_t + gap_t + length
    num_s, num_t = at_s + draw(st.integers(1, 4)), at_t + draw(st.integers(1, 4))
    bits = st.lists(st.booleans(), min_size=num_s, max_size=num_s)
    mask_L = np.array(draw(bits), dtype=bool)
    sample = PreparedSample(
        sample_id="h",
        source="made",
        student_ids_L=np.arange(num_s, dtype=np.int32),
        prompt_length=0,
        teacher_ids_L=np.arange(num_t, dtype=np.int32),
        alignment_RX=np.array(runs, dtype=np.int32).reshape(-1, 3),
    )
    return row_of(sample, mask_L, mask_L & np.array(draw(bits), dtype=bool))


class TestStreams:
    def check_partition(self, row: PremaskedRow, num_entries: int) -> None:
        """Both passes together mask M and answer every entry, each from the pass that hid it."""
        (whole,) = teacher_streams(row, comp_demo=False)
        first, second = teacher_streams(row, comp_demo=True)
        np.testing.assert_array_equal(whole.masked_L, teacher_mask(row))
        np.testing.assert_array_equal(first.masked_L | second.masked_L, whole.masked_L)
        assert not (first.masked_L & second.masked_L).any()
        for stream in (whole, first, second):
            assert stream.masked_L[stream.wanted_P].all()
            assert (np.diff(stream.wanted_P) > 0).all()
            assert stream.wanted_P.dtype == stream.payload_P.dtype == np.int32
        assert set(whole.payload_P.tolist()) == set(range(num_entries))
        assert not set(first.payload_P.tolist()) & set(second.payload_P.tolist())
        both = sorted(
            zip(
                [*first.wanted_P, *second.wanted_P],
                [*first.payload_P, *second.payload_P],
                strict=True,
            )
        )
        assert both == sorted(zip(whole.wanted_P, whole.payload_P, strict=True))

    @settings(max_examples=200, deadline=None)
    @given(run_rows())
    def test_runs(self, row: PremaskedRow) -> None:
        payload = payload_positions(row.student_mask_L, row.alignment_RX)
        self.check_partition(row, len(payload))
        partner = teacher_partners(row.alignment_RX, len(row.student_ids_L))
        (whole,) = teacher_streams(row, comp_demo=False)
        np.testing.assert_array_equal(whole.wanted_P, partner[payload])
        first, second = teacher_streams(row, comp_demo=True)
        assert not row.half_a_L[payload[first.payload_P]].any(), "pass 1 reveals half A"
        assert row.half_a_L[payload[second.payload_P]].all()

    @settings(max_examples=200, deadline=None)
    @given(chunk_rows())
    def test_chunks(self, row: PremaskedRow) -> None:
        check_chunks_whole(row)
        chunks = row.alignment_RX.tolist()
        masked = [bool(row.student_mask_L[a:b].any()) for a, b, _, _ in chunks]
        active = [
            m and a >= row.prompt_length for m, (a, _, _, _) in zip(masked, chunks, strict=True)
        ]
        assert chunk_masked(row.student_mask_L, row.alignment_RX).tolist() == masked
        assert (
            chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length).tolist() == active
        )
        self.check_partition(row, sum(active))
        expected = np.zeros(len(row.teacher_ids_L), dtype=bool)
        wanted: list[tuple[int, int]] = []
        for (_, _, start, end), is_masked, is_active in zip(chunks, masked, active, strict=True):
            expected[start:end] = is_masked
            entry = wanted[-1][1] + 1 if wanted else 0
            wanted += [(at, entry) for at in range(start, end)] if is_active else []
        (whole,) = teacher_streams(row, comp_demo=False)
        np.testing.assert_array_equal(whole.masked_L, expected)
        assert list(zip(whole.wanted_P.tolist(), whole.payload_P.tolist(), strict=True)) == wanted

    def test_nothing_masked(self) -> None:
        sample = shared_sample(shift=3)
        nothing = np.zeros(64, dtype=bool)
        for stream in teacher_streams(row_of(sample, nothing, nothing), comp_demo=True):
            assert isinstance(stream, TeacherStream)
            assert not stream.masked_L.any() and not len(stream.wanted_P)

    def test_student_positions_without_partner_ask_nothing(self) -> None:
        sample = shared_sample(shift=3)
        runs = sample.alignment_RX.copy()
        runs[0, 2] -= 4
        mask_L = np.arange(64) >= 58
        row = row_of(
            PreparedSample(
                **{**{f: getattr(sample, f) for f in sample.__slots__}, "alignment_RX": runs}
            ),
            mask_L,
            np.zeros(64, dtype=bool),
        )
        (stream,) = teacher_streams(row, comp_demo=False)
        np.testing.assert_array_equal(stream.wanted_P, [61, 62])
