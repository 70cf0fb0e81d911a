"""Packed rows without dead blocks give the hidden states and gradients of the plain layout.

Shapes: B rows, L positions, N packed tokens, P masked positions, D hidden, V ids.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import Qwen3Config, Qwen3ForCausalLM

from stage2_student.aligned_rows import NoisedRows
from stage2_student.attention import (
    BY_ROWS,
    FLEX_TILE,
    dense_mask,
    flex_mask,
    make_mask,
    row_mask,
)
from stage2_student.packing import PackedRows, pack_rows
from stage2_student.student import Student
from tide_cache.geometry import block_diffusion_mask

CPU = torch.device("cpu")
MASK_ID, BLOCK = 39, 16
pack = partial(pack_rows, block_size=BLOCK, mask_token_id=MASK_ID)


def draw_rows(lengths: Sequence[int], *, masked: float, seed: int = 0) -> NoisedRows:
    """Rows of random ids with a share of their positions masked."""
    random = np.random.default_rng(seed)
    num_rows, num_positions = len(lengths), max(lengths)
    length_B = np.array(lengths)
    real_BL = np.arange(num_positions) < length_B[:, None]
    return NoisedRows(
        ids_BL=np.where(real_BL, random.integers(2, 38, (num_rows, num_positions)), 0),
        length_B=length_B,
        masked_BL=(random.random((num_rows, num_positions)) < masked) & real_BL,
        labelled_B=length_B,
        timestep_B=np.full(num_rows, 0.5, np.float32),
    )


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,  # far from uniform, so that a wrong mask shows
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).train()


def packed_hidden(model: Qwen3ForCausalLM, packed: PackedRows, implementation: str) -> Tensor:
    model.set_attn_implementation(implementation)
    mask = make_mask(packed.places, implementation=implementation, device=CPU)
    hidden_PD: Tensor = Student(model)(
        torch.from_numpy(packed.ids_N)[None],
        torch.from_numpy(packed.position_N)[None],
        mask,
        torch.from_numpy(packed.masked_index_P),
    )
    return hidden_PD


def plain_hidden(model: Qwen3ForCausalLM, noised: NoisedRows) -> Tensor:
    """Each row alone as [xt, x0], every block of both halves."""
    model.set_attn_implementation("sdpa")
    found = []
    for row, length in enumerate(noised.length_B.tolist()):
        ids_L = torch.from_numpy(noised.ids_BL[row, :length])
        masked_L = torch.from_numpy(noised.masked_BL[row, :length])
        visible = torch.from_numpy(block_diffusion_mask(length, BLOCK))
        hidden_SD = model.model(
            input_ids=torch.cat([torch.where(masked_L, MASK_ID, ids_L), ids_L])[None],
            attention_mask={"full_attention": visible[None, None]},
            position_ids=torch.arange(length).repeat(2)[None],
            use_cache=False,
        ).last_hidden_state[0]
        found.append(hidden_SD[:length][masked_L])
    return torch.cat(found)


def gradients(model: Qwen3ForCausalLM, hidden_PD: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weight_PD = torch.randn(hidden_PD.shape, generator=torch.Generator().manual_seed(1))
    (hidden_PD * weight_PD).sum().backward()  # type: ignore[no-untyped-call]
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in named.items()}


@pytest.mark.parametrize("implementation", [BY_ROWS, "sdpa"])
@pytest.mark.parametrize(
    ("lengths", "masked"),
    [
        ([400, 37, 64, 1, 130, 390, 5, 17], 0.05),  # long rows alone, short ones together
        ([16, 32, 48], 1.0),
        ([33], 0.1),
        ([300, 290], 0.6),
    ],
)
def test_hidden_states_and_gradients_are_those_of_the_plain_layout(
    implementation: str, lengths: list[int], masked: float
) -> None:
    noised, model = draw_rows(lengths, masked=masked), make_model()
    plain_PD = plain_hidden(model, noised)
    expected = gradients(model, plain_PD)
    packed = pack(noised)
    assert len(packed.ids_N) < 2 * sum(lengths)
    found_PD = packed_hidden(model, packed, implementation)
    torch.testing.assert_close(found_PD, plain_PD, rtol=0, atol=2e-5)
    for name, gradient in gradients(model, found_PD).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * scale, msg=name)


rows_strategy = st.tuples(
    st.lists(st.integers(1, 90), min_size=1, max_size=9), st.floats(0, 1), st.integers(0, 99)
)


@given(rows_strategy, st.sampled_from([1, FLEX_TILE]))
@settings(deadline=None)
def test_what_is_packed(drawn: tuple[list[int], float, int], tile: int) -> None:
    """Row by row and position by position: what must be there is, and nothing else."""
    lengths, masked, seed = drawn
    noised = draw_rows(lengths, masked=masked, seed=seed)
    packed = pack(noised, tile=tile)
    expected: list[tuple[int, bool, int]] = []
    for row, length in enumerate(lengths):
        live = {p // BLOCK for p in range(length) if noised.masked_BL[row, p]}
        expected += [(row, True, p) for p in range(length) if live and p // BLOCK < max(live)]
        expected += [(row, False, p) for p in range(length) if p // BLOCK in live]
    if not expected:
        expected = [(0, True, 0)]
    places, count = packed.places, len(packed.ids_N) - packed.num_filled
    assert len(packed.ids_N) % tile == 0
    assert 0 <= packed.num_filled < tile
    found = zip(
        places.row_N[:count], places.is_clean_N[:count], packed.position_N[:count], strict=True
    )
    assert [(int(r), bool(c), int(p)) for r, c, p in found] == expected
    assert (places.row_N[count:] == -1).all()
    masked_at = [
        n for n, (r, clean, p) in enumerate(expected) if not clean and noised.masked_BL[r, p]
    ]
    assert packed.masked_index_P.tolist() == masked_at
    ids = [
        MASK_ID if n in set(masked_at) else noised.ids_BL[r, p]
        for n, (r, _, p) in enumerate(expected)
    ]
    assert packed.ids_N[:count].tolist() == ids
    np.testing.assert_array_equal(places.block_N[:count], packed.position_N[:count] // BLOCK)


@given(rows_strategy)
@settings(deadline=None, max_examples=30)
def test_masks_of_rows_and_tiles_are_the_dense_one(drawn: tuple[list[int], float, int]) -> None:
    lengths, masked, seed = drawn
    noised = draw_rows([4 * length for length in lengths], masked=masked / 4, seed=seed)
    places = pack(noised, tile=FLEX_TILE).places
    dense_NN = dense_mask(places)
    tiles = flex_mask(places, CPU)
    size = len(dense_NN)
    visible = torch.from_numpy(dense_NN)
    expected = create_block_mask(
        lambda _b, _h, q, k: visible[q, k], None, None, size, size, device="cpu"
    )
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(tiles, name), getattr(expected, name)), name
    assert torch.equal(tiles.to_dense(), expected.to_dense())
    of_pairs = create_mask(tiles.mask_mod, 1, 1, size, size, device="cpu")
    assert torch.equal(of_pairs[0, 0], visible)
    places = pack(noised).places
    dense_NN = dense_mask(places)
    rows = row_mask(places, CPU)
    rebuilt_NN, start = np.zeros_like(dense_NN), 0
    for group, (first, second) in enumerate(zip(rows.first, rows.second, strict=True)):
        middle = start + rows.sizes[2 * group]
        stop = middle + rows.sizes[2 * group + 1]
        if first is not None:
            rebuilt_NN[start:middle, start:middle] = first.numpy()
        rebuilt_NN[middle:stop, start:stop] = second.numpy()
        start = stop
    np.testing.assert_array_equal(rebuilt_NN, dense_NN)
