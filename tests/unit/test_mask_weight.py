"""The weight of a masked token's cross entropy: unbiased is right for every chunk, by enumeration.

Legend: B rows, L positions, P masked positions, C chunks.
"""

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mask_weight import generated_tables, measure, premasked_tables
from stage1_teacher.premask import Noising, PreparedSample, draw_rows, spread_mask
from stage2_student.aligned_rows import count_draws, decode_chunks
from stage2_student.attention import BY_ROWS
from stage2_student.batches import Batch, BatchReader, InputForm, decode_rows
from stage2_student.compatibility import teacher_reading
from stage2_student.losses import ce_loss, ce_per_position, mask_probability
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from tests.cache_builders import (
    MASK_ID,
    NUM_IDS,
    SetShape,
    Workshop,
    make_workshop,
    save_tokenizer,
    write_cache,
    write_premasked,
)
from tide_cache.cache import Cache, open_cache
from tide_cache.errors import ConfigError, DataError
from tide_cache.rows import PremaskedRow, rows_to_table, table_to_rows

SHAPE = SetShape(num_samples=30, ragged=True, alignment="chunks")


def objective_of(losses: dict[str, float], mask_weight: str) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"losses": losses, "mask_weight": mask_weight})


def draws_of(row: PremaskedRow) -> np.ndarray:
    """Walk over the chunks of a row and count the labelled tokens of each, (L,)."""
    num_draws_L = np.ones(len(row.student_ids_L), dtype=np.int64)
    for start, end, _, _ in row.alignment_RX.tolist():
        labelled = [p for p in range(start, end) if p >= row.prompt_length]
        num_draws_L[labelled] = len(labelled)
    return num_draws_L


class Watched(Cache):
    """Remembers which columns were asked for."""

    asked: tuple[str, ...] = ()

    def read_rows(self, view: int, rows: Any, columns: Any = ()) -> Any:
        self.asked = tuple(columns)
        return super().read_rows(view, rows, columns)


def read(cache: Cache, objective: ObjectiveConfig, view: int = 1) -> Batch:
    form = InputForm(
        block_size=cache.manifest.block_size,
        mask_token_id=MASK_ID,
        attention=BY_ROWS,
        device=torch.device("cpu"),
    )
    teacher = teacher_reading(cache, objective)
    reader = BatchReader(cache, form=form, teacher=teacher)
    return reader.read(view, np.arange(cache.num_samples))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("chunks"), SHAPE, payloads=("chunks",))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    left_out=st.integers(0, 3),
    prompt_length=st.integers(0, 6),
    timestep=st.floats(1e-3, 1.0),
)
def test_every_token_counts_once_over_all_draws(
    sizes: list[int], left_out: int, prompt_length: int, timestep: float
) -> None:
    """All 2^n draws of the labelled tokens, through the noising's own spread, by probability."""
    length = sum(sizes)
    edges = np.cumsum([0, *sizes]).tolist()
    table = [[start, end, n, n + 1] for n, (start, end) in enumerate(pairwise(edges))]
    chunks_C4 = np.array([chunk for chunk in table if chunk[2] != left_out], np.int32)
    chunks_C4 = chunks_C4.reshape(-1, 4)
    prompt_length = min(prompt_length, length - 1)
    row = PremaskedRow(
        sample_id="s",
        source="made",
        view=0,
        timestep=timestep,
        student_ids_L=np.zeros(length, np.int32),
        prompt_length=prompt_length,
        student_mask_L=np.zeros(length, bool),
        half_a_L=np.zeros(length, bool),
        teacher_ids_L=np.zeros(length, np.int32),
        alignment_RX=chunks_C4,
    )
    arrow = rows_to_table([row], "chunks")
    noised = decode_rows(arrow, num_ids=NUM_IDS)
    num_draws_L = count_draws(decode_chunks(arrow, noised), noised)[0]
    assert num_draws_L.tolist() == draws_of(row).tolist()
    t = float(noised.timestep_B[0])
    timestep_L = torch.full((length,), t)
    unbiased_L = 1 / (mask_probability(timestep_L, torch.from_numpy(num_draws_L)) + 1e-6)
    expected_L = np.zeros(length)
    for draw in product([False, True], repeat=length - prompt_length):
        drawn_L = np.array([False] * prompt_length + list(draw))
        probability = t ** sum(draw) * (1 - t) ** (len(draw) - sum(draw))
        mask_L = spread_mask(drawn_L, chunks_C4, prompt_length)
        expected_L += probability * mask_L * unbiased_L.numpy()
    # The guard of 1e-6 is 1e-3 of the smallest timestep.
    assert expected_L[prompt_length:] == pytest.approx(1, abs=1.1e-3)
    assert not expected_L[:prompt_length].any()


@pytest.mark.parametrize("timestep", [0.05, 0.3, 0.9])
def test_the_mean_over_real_draws(timestep: float) -> None:
    """20,000 chunks of each length, drawn as `prepare` draws; bounds are 5 standard errors."""
    num_chunks, sizes = 20_000, (1, 2, 3, 4)
    size_C = np.tile(sizes, num_chunks)
    end_C = np.cumsum(size_C)
    order_C = np.arange(len(size_C))
    sample = PreparedSample(
        sample_id="many",
        source="made",
        student_ids_L=np.zeros(int(end_C[-1]), np.int32),
        prompt_length=0,
        teacher_ids_L=np.zeros(len(size_C), np.int32),
        alignment_RX=np.stack([end_C - size_C, end_C, order_C, order_C + 1], 1).astype(np.int32),
    )
    grid_G = np.array([timestep], np.float32)
    (row,) = draw_rows(sample, Noising(seed=5, num_views=1, grid_G=grid_G, demo_ratio=0.5))
    masked_C = row.student_mask_L[end_C - 1]
    for size in sizes:
        share = masked_C[size_C == size].mean()
        t, n = torch.tensor([timestep]), torch.tensor([size])
        probability = float(mask_probability(t, n))
        error = 5 * np.sqrt((1 - probability) / probability / num_chunks)
        assert share / probability == pytest.approx(1, abs=error)
        over_count = (1 - (1 - timestep) ** size) / timestep
        assert share / timestep == pytest.approx(over_count, abs=error * over_count)
        if size == 3 and timestep == 0.05:
            assert over_count == pytest.approx(2.85, abs=0.005)
            assert share / timestep > 2.5  # so far from 1 that no error explains it


def test_one_draw_is_the_published_weight() -> None:
    timestep_P = torch.tensor([1e-3, 0.0166, 0.5, 0.9999, 1.0])
    assert torch.equal(mask_probability(timestep_P), timestep_P)
    one_P = torch.ones(5, dtype=torch.int64)
    assert torch.allclose(mask_probability(timestep_P, one_P), timestep_P, rtol=3e-7, atol=0)
    many_P = mask_probability(timestep_P, 30 * one_P)
    exact_P = 1 - (1 - timestep_P.double()) ** 30
    assert torch.allclose(many_P.double(), exact_P, rtol=1e-6, atol=0)


def test_counts_of_another_length_are_refused() -> None:
    logits_PV, labels_P, timestep_P = torch.zeros(3, 5), torch.zeros(3).long(), torch.ones(3)
    with pytest.raises(DataError, match=r"num_draws_P: expected shape \(3,\)"):
        ce_per_position(logits_PV, labels_P, timestep_P, num_draws_P=torch.ones(4))


def test_a_batch_counts_the_labelled_tokens_of_each_chunk(workshop: Workshop) -> None:
    cache = open_cache(workshop.cache)
    batch = read(cache, objective_of({"ce": 1.0, "calm": 1.0}, "unbiased"))
    rows = table_to_rows(cache.read_rows(1, range(30)), "chunks")
    expected = [draws_of(row)[row.student_mask_L] for row in rows]
    assert batch.teacher.num_draws_P is not None
    assert batch.teacher.num_draws_P.tolist() == np.concatenate(expected).tolist()
    cut = {  # chunks of which the prompt holds a part and the mask the rest
        end - row.prompt_length
        for row in rows
        for start, end, _, _ in row.alignment_RX.tolist()
        if start < row.prompt_length < end and row.student_mask_L[end - 1]
    }
    assert cut == {1, 2}
    assert set(batch.teacher.num_draws_P.tolist()) == {1, 2, 3}
    assert batch.without_targets().teacher.num_draws_P is not None
    assert len(batch.without_targets().teacher.num_draws_P) == 0  # type: ignore[arg-type]


def test_a_premasked_set_gives_the_same_counts_from_one_more_column(workshop: Workshop) -> None:
    source = open_cache(workshop.premasked)
    watched = Watched(source.store, source.manifest)
    rows = {"sample_id", "student_ids", "prompt_length", "student_mask", "timestep"}
    ce_alone = objective_of({"ce": 1.0}, "unbiased")
    batch = read(watched, ce_alone)
    assert set(watched.asked) == rows | {"chunks"}
    of_cache = read(open_cache(workshop.cache), ce_alone).teacher.num_draws_P
    assert batch.teacher.num_draws_P is not None
    assert of_cache is not None
    assert torch.equal(batch.teacher.num_draws_P, of_cache)
    assert read(watched, objective_of({"ce": 1.0}, "published")).teacher.num_draws_P is None
    assert set(watched.asked) == rows
    # Where no cross entropy is asked for nothing is counted.
    calm = objective_of({"calm": 1.0}, "unbiased")
    assert read(open_cache(workshop.cache), calm).teacher.num_draws_P is None


@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_the_gradient_is_the_formula(workshop: Workshop, norm: str) -> None:
    """Row by row in float64: weight (softmax - onehot) / denominator, at every masked position."""
    cache = open_cache(workshop.premasked)
    config = ObjectiveConfig.model_validate(
        {"losses": ["ce"], "loss_norm": norm, "mask_weight": "unbiased"}
    )
    batch = read(cache, config)
    generator = torch.Generator().manual_seed(0)
    logits_PV = torch.randn(batch.num_masked, NUM_IDS, generator=generator).requires_grad_()
    objective = Objective(config)
    head_VV = torch.eye(NUM_IDS)  # logits in place of hidden states
    losses = objective(logits_PV, head_VV, batch, objective.denominators(batch), progress=0.3)
    (gradient_PV,) = torch.autograd.grad(losses.total, logits_PV)
    rows = table_to_rows(cache.read_rows(1, range(30)), "chunks")
    labelled_B = [len(row.student_ids_L) - row.prompt_length for row in rows]
    expected, value, at = [], 0.0, 0
    for row, labelled in zip(rows, labelled_B, strict=True):
        denominator = {"token": sum(labelled_B), "sequence": 30 * labelled, "batch": 30}[norm]
        for position in np.flatnonzero(row.student_mask_L).tolist():
            hidden = 1 - (1 - row.timestep) ** int(draws_of(row)[position])
            weight = 1 / (hidden + 1e-6) / denominator
            p_V = logits_PV[at].detach().double().softmax(-1)
            label = int(row.student_ids_L[position])
            value -= weight * float(p_V[label].log())
            p_V[label] -= 1
            expected.append(weight * p_V)
            at += 1
    assert float(losses.total.detach()) == pytest.approx(value, rel=1e-5)
    assert torch.allclose(gradient_PV.double(), torch.stack(expected), rtol=1e-4, atol=1e-9)
    outside = ce_loss(
        logits_PV.detach(),
        batch.labels_P,
        batch.timestep_P,
        labelled_per_row_B=batch.labelled_per_row_B,
        row_P=batch.row_P,
        normalization=norm,  # type: ignore[arg-type]
        num_draws_P=batch.teacher.num_draws_P,
    )
    assert float(outside) == pytest.approx(value, rel=1e-5)


def test_published_ignores_counts_that_a_batch_happens_to_have(workshop: Workshop) -> None:
    cache = open_cache(workshop.premasked)
    with_counts = read(cache, objective_of({"ce": 1.0}, "unbiased"))
    published = objective_of({"ce": 1.0}, "published")
    hidden_PD = torch.randn(with_counts.num_masked, 8, generator=torch.Generator().manual_seed(0))
    head_VD = torch.randn(NUM_IDS, 8, generator=torch.Generator().manual_seed(1))
    totals = []
    for batch in (with_counts, read(cache, published)):
        objective = Objective(published)
        denominators = objective.denominators(batch)
        totals.append(objective(hidden_PD, head_VD, batch, denominators, progress=0.0).total)
    assert torch.equal(*totals)


def test_with_one_tokenizer_nothing_is_counted_and_nothing_changes(tmp_path: Path) -> None:
    shape = SetShape(num_samples=12)
    workshop = make_workshop(tmp_path, shape)
    watched = Watched(open_cache(workshop.cache).store, open_cache(workshop.cache).manifest)
    asked, batches = [], []
    for weight in ("published", "unbiased"):
        batches.append(read(watched, objective_of({"ce": 1.0, "tidal": 1.0}, weight)))
        asked.append(watched.asked)
    assert asked[0] == asked[1]
    assert batches[0].teacher.num_draws_P is batches[1].teacher.num_draws_P is None
    assert teacher_reading(watched, objective_of({"ce": 1.0}, "unbiased")) is None


def test_a_straddling_chunk_masked_in_part_is_refused(tmp_path: Path) -> None:
    """Its mask has no draw, so no weight; as with chunks behind the prompt."""

    def unmask_one(row: PremaskedRow) -> PremaskedRow:
        for start, end, _, _ in row.alignment_RX.tolist():
            if start < row.prompt_length < end - 1 and row.student_mask_L[end - 1]:
                mask_L = row.student_mask_L.copy()
                mask_L[end - 1] = False
                return replace(row, student_mask_L=mask_L, half_a_L=row.half_a_L & mask_L)
        return row

    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    write_premasked(tmp_path / "set", tokenizer, SHAPE, change=unmask_one)
    with pytest.raises(DataError, match="student_mask: expected whole chunks, got a part"):
        read(open_cache(tmp_path / "set"), objective_of({"ce": 1.0}, "unbiased"))


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="'published' or 'unbiased'"):
        objective_of({"ce": 1.0}, "biased")


def test_the_benchmark_shows_the_over_count(workshop: Workshop, tmp_path: Path) -> None:
    figures = measure(generated_tables(60, seed=1))
    assert figures["whole"]["unbiased"] == pytest.approx(1, abs=0.03)
    assert figures["whole"]["published"] == pytest.approx(figures["whole"]["published_exact"], 0.03)
    assert figures["whole"]["published_exact"] == pytest.approx(1.29, abs=0.02)
    assert figures["formula"][0]["published"][2] == pytest.approx(2.8525)
    by_length = [line["published_exact"] for line in figures["by_chunk_tokens"][:4]]
    assert by_length == sorted(by_length)
    assert by_length[0] == pytest.approx(1, abs=1e-3)
    of_set = measure(premasked_tables(str(workshop.premasked)))
    labelled = sum(
        len(row.student_ids_L) - row.prompt_length
        for view in range(2)
        for row in table_to_rows(open_cache(workshop.cache).read_rows(view, range(30)), "chunks")
    )
    assert of_set["whole"]["num_tokens"] == labelled
    shared = make_workshop(tmp_path, SetShape(num_samples=2))
    write_cache(tmp_path / "other", shared.premasked)
    with pytest.raises(ConfigError, match="alignment: expected 'chunks', got 'positions'"):
        measure(premasked_tables(str(tmp_path / "other")))
