"""The hidden payload: codes survive exactly, the transform stays within half a step, files fit.

Shapes: B rows, P positions, R components, D hidden size, V vocabulary.
"""

import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.payload_builders import damaged, encode, forged, resealed, sizes, to_cells
from tide_cache.errors import FormatError
from tide_cache.payload_facts import HiddenFacts
from tide_cache.payloads.hidden import (
    HiddenCodec,
    Transform,
    limits,
    read_head,
    replay_reference,
)


def make_facts(
    bands: tuple[int, ...], num_wide: int = 0, *, hidden_size: int | None = None, step: float = 0.5
) -> HiddenFacts:
    return HiddenFacts(
        hidden_size=hidden_size or sum(bands),
        vocab_size=11,
        bands=bands,
        num_wide=num_wide,
        step=step,
        fit_positions=100,
    )


def any_codes(random: np.random.Generator, facts: HiddenFacts, num_positions: int) -> np.ndarray:
    """Any codes within the limits, the limits themselves among them."""
    limit_R = limits(facts).astype(int)
    code_PR = random.integers(-limit_R, limit_R + 1, (num_positions, len(limit_R)))
    at_limit_PR = random.random(code_PR.shape) < 0.2
    code_PR = np.where(at_limit_PR, random.choice([-1, 1], code_PR.shape) * limit_R, code_PR)
    return code_PR.astype(np.int16)


@st.composite
def any_facts(draw: st.DrawFn) -> HiddenFacts:
    bands = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=8)))
    return make_facts(bands, draw(st.integers(0, sum(bands))))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 9999),
    facts=any_facts(),
    num=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def test_round_trip_is_exact(seed: int, facts: HiddenFacts, num: list[int]) -> None:
    code_PR = any_codes(np.random.default_rng(seed), facts, sum(num))
    codec = HiddenCodec(facts)
    table = encode(codec, code_PR, sizes(*num))
    found = codec.decode(table, sizes(*num))
    np.testing.assert_array_equal(found, code_PR)
    assert found.dtype == np.int16
    assert encode(codec, found, sizes(*num)).equals(table)
    last = codec.decode(table.slice(len(num) - 1, 1), sizes(num[-1]))
    np.testing.assert_array_equal(last, code_PR[sum(num[:-1]) :])


def test_every_code_of_two_bytes_survives() -> None:
    codec = HiddenCodec(make_facts((2,), 1))
    code_PR = np.zeros((1 << 16, 2), dtype=np.int16)
    code_PR[:, 0] = np.arange(-(1 << 15), 1 << 15)
    code_PR[:256, 1] = np.arange(-128, 128)
    num_B = sizes(1 << 15, 0, 1 << 15)
    np.testing.assert_array_equal(codec.decode(encode(codec, code_PR, num_B), num_B), code_PR)


def test_the_bytes_of_version_1() -> None:
    """By hand: within a row, all positions of a component stand together."""
    codec = HiddenCodec(make_facts((2, 1), 1))
    code_PR = np.array([[258, 3, -1], [-2, 4, 5], [7, -128, 127]], dtype=np.int16)
    table = encode(codec, code_PR, sizes(2, 1))
    assert table.column_names == ["hidden_0", "hidden_1", "hidden_high", "hidden_crc32"]
    cells = to_cells(table)
    assert cells["hidden_0"] == [bytes([2, 254, 3, 4]), bytes([7, 128])]
    assert cells["hidden_1"] == [bytes([255, 5]), bytes([127])]
    assert cells["hidden_high"] == [bytes([1, 255]), bytes([0])]
    for row in range(2):
        data = b"".join(cells[name][row] for name in table.column_names[:3])
        assert int.from_bytes(cells["hidden_crc32"][row], "little") == zlib.crc32(data)


def test_without_wide_components_there_is_no_column_for_them() -> None:
    names = [field.name for field in HiddenCodec(make_facts((1, 2))).fields()]
    assert names == ["hidden_0", "hidden_1", "hidden_crc32"]


@pytest.mark.parametrize("value", [-129, 128, 32767])
def test_a_code_beyond_its_byte_is_not_written(value: int) -> None:
    code_PR = np.zeros((3, 4), dtype=np.int16)
    code_PR[1, 1] = value
    encode(HiddenCodec(make_facts((4,), 2)), code_PR, sizes(3))
    with pytest.raises(FormatError, match="hidden codes: expected narrow components within int8"):
        encode(HiddenCodec(make_facts((4,), 1)), code_PR, sizes(3))


@pytest.mark.parametrize(
    ("code_PR", "found"),
    [
        (np.zeros((3, 5), np.int16), r"int16 \(3, 5\)"),
        (np.zeros((3, 4), np.int32), r"int32 \(3, 4\)"),
        (np.zeros(12, np.int16), r"int16 \(12,\)"),
    ],
)
def test_codes_of_another_shape_or_type_are_not_written(code_PR: np.ndarray, found: str) -> None:
    message = rf"hidden codes: expected int16 \(P, 4\), got {found}"
    with pytest.raises(FormatError, match=message):
        encode(HiddenCodec(make_facts((4,))), code_PR, sizes(3))


def test_any_damaged_byte_is_noticed() -> None:
    codec = HiddenCodec(make_facts((2, 3), 1))
    code_PR = any_codes(np.random.default_rng(0), codec.facts, 4)
    for what, spoilt in damaged(encode(codec, code_PR, sizes(3, 0, 1))):
        with pytest.raises(FormatError):
            codec.decode(spoilt, sizes(3, 0, 1))
            pytest.fail(what)


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 1 << 32))
def test_forged_bytes_are_refused_or_codes(seed: int) -> None:
    codec = HiddenCodec(make_facts((2, 3), 1))
    code_PR = any_codes(np.random.default_rng(1), codec.facts, 4)
    table = forged(encode(codec, code_PR, sizes(3, 0, 1)), seed)
    try:
        found = codec.decode(table, sizes(3, 0, 1))
    except FormatError:
        return
    assert found.shape == (4, 5)
    assert found.dtype == np.int16
    assert (np.abs(found[:, 1:].astype(int) + 0.5) < 128).all()


def test_a_wrong_length_or_column_is_refused() -> None:
    codec = HiddenCodec(make_facts((2, 3), 1))
    table = encode(codec, any_codes(np.random.default_rng(0), codec.facts, 4), sizes(3, 1))
    with pytest.raises(FormatError, match="hidden_0: expected 4 bytes, got 6"):
        codec.decode(table, sizes(2, 2))
    cells = to_cells(table)
    cells["hidden_high"] = [b"abc", b""]
    with pytest.raises(FormatError, match="hidden_high: expected 1 bytes, got 0"):
        codec.decode(resealed(cells, table.schema), sizes(3, 1))
    with pytest.raises(FormatError, match="hidden_1: expected a column of binary, got None"):
        codec.decode(table.drop_columns(["hidden_1"]), sizes(3, 1))
    wrong = table.set_column(3, "hidden_crc32", pa.array([0, 0], pa.uint32()))
    with pytest.raises(FormatError, match=r"hidden_crc32: expected 0x00000000, got 0x.*changed"):
        codec.decode(wrong, sizes(3, 1))


def tensors_of(facts: HiddenFacts, seed: int = 0) -> dict[str, np.ndarray]:
    """A rotation, its first components, and a mean."""
    random = np.random.default_rng(seed)
    size, kept = facts.hidden_size, facts.num_components
    rotation, _ = np.linalg.qr(random.normal(size=(size, size)))
    basis_RD = rotation[:kept].astype(np.float32)
    mean_D = random.normal(size=size).astype(np.float32)
    return {"analysis": basis_RD, "synthesis": np.ascontiguousarray(basis_RD.T), "mean": mean_D}


@given(seed=st.integers(0, 999), step=st.sampled_from([1e-3, 0.1, 2.0]))
def test_a_hidden_state_comes_back_within_half_a_step(seed: int, step: float) -> None:
    facts = make_facts((2, 10), 2, step=step)
    transform = Transform.from_tensors(facts, tensors_of(facts, seed))
    random = np.random.default_rng(seed)
    code_PR = any_codes(random, facts, 5)
    inside_PR = random.uniform(-0.5, 0.5, code_PR.shape) * step + code_PR * step
    hidden_PD = inside_PR @ transform.synthesis_DR.T.astype(float) + transform.mean_D
    found_PR = transform.to_codes(hidden_PD.astype(np.float32))
    assert found_PR.dtype == np.int16
    back_PD = transform.to_hidden(found_PR)
    assert back_PD.dtype == np.float32
    # A rotation keeps lengths: half a step in each of 12 components, and float32's rounding.
    slack_P = 1e-5 * np.abs(inside_PR).max(axis=1) + 1e-5
    error_P = np.linalg.norm(back_PD - hidden_PD, axis=1)
    assert (error_P <= 0.5 * step * np.sqrt(12) + slack_P).all()
    error_PR = np.abs(found_PR * step - inside_PR)
    assert (error_PR <= 0.5 * step + slack_P[:, None]).all()


def test_codes_are_cut_at_their_limits() -> None:
    facts = make_facts((1, 2), 1)
    identity = {"analysis": np.eye(3, dtype="f4"), "synthesis": np.eye(3, dtype="f4")}
    transform = Transform.from_tensors(facts, identity | {"mean": np.ones(3, np.float32)})
    assert limits(facts).tolist() == [32767, 127, 127]
    hidden_PD = np.array([[1e9, 1e9, -1e9], [-1e9, 1.2, 0.3], [1, 1.25, 1.75]], np.float32)
    code_PR = transform.to_codes(hidden_PD)
    # Halves are rounded to even.
    assert code_PR.tolist() == [[32767, 127, -127], [-32767, 0, -1], [0, 0, 2]]
    np.testing.assert_array_equal(transform.to_hidden(code_PR[2:]), [[1, 1, 2]])


def test_a_part_of_the_components_drops_the_others() -> None:
    facts = make_facts((2,), 2, hidden_size=5, step=1e-3)
    tensors = tensors_of(facts)
    transform = Transform.from_tensors(facts, tensors)
    offset_D = np.random.default_rng(3).normal(size=5).astype(np.float32)
    basis_RD = tensors["analysis"]
    expected_D = tensors["mean"] + basis_RD.T @ (basis_RD @ offset_D)
    back_PD = transform.to_hidden(transform.to_codes((tensors["mean"] + offset_D)[None]))
    np.testing.assert_allclose(back_PD[0], expected_D, atol=1e-3)


@pytest.mark.parametrize("name", ["analysis", "synthesis", "mean"])
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    facts = make_facts((2, 1), 1, hidden_size=4)
    tensors = tensors_of(facts)
    good, where = tensors[name], f"codec/hidden.safetensors: {name}"
    shape = str(good.shape).replace("(", r"\(").replace(")", r"\)")
    spoilt = good.copy()
    spoilt.flat[1] = np.nan
    for bad, message in [
        (None, f"expected float32 {shape}, got None"),
        (good.astype(np.float16), rf"expected float32 {shape}, got \(dtype\('float16'\)"),
        (good[:-1], rf"expected float32 {shape}, got \(dtype\('float32'\)"),
        (spoilt, "expected finite numbers"),
        (np.where(np.isnan(spoilt), np.float32(np.inf), spoilt), "expected finite numbers"),
    ]:
        changed = {key: value for key, value in tensors.items() if key != name}
        if bad is not None:
            changed[name] = bad
        with pytest.raises(FormatError, match=f"^{where}: {message}"):
            Transform.from_tensors(facts, changed)


def test_the_head_is_read_and_applied() -> None:
    facts = make_facts((3,), hidden_size=3)
    random = np.random.default_rng(0)
    weight_VD = random.normal(size=(11, 3)).astype(np.float16)
    bias_V = random.normal(size=11).astype(np.float32)
    hidden_PD = random.normal(size=(4, 3)).astype(np.float32)
    weight, bias = read_head({"weight": weight_VD, "bias": bias_V}, facts, where="f")
    assert weight.dtype == np.float32
    assert bias is not None
    expected_PV = np.einsum("pd,vd->pv", hidden_PD, weight_VD.astype(np.float32))
    replayed_PV = replay_reference(hidden_PD, weight, bias)
    np.testing.assert_allclose(replayed_PV, expected_PV + bias_V, rtol=1e-5, atol=1e-5)
    weight, bias = read_head({"weight": weight_VD}, facts, where="f")
    assert bias is None
    np.testing.assert_allclose(replay_reference(hidden_PD, weight, None), expected_PV, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, r"f: weight: expected floats of shape \(11, 3\)"),
        ({"weight": np.zeros((3, 11), "f4")}, r"f: weight: expected floats of shape \(11, 3\)"),
        ({"weight": np.zeros((11, 3), "i4")}, r"f: weight: expected floats of shape \(11, 3\)"),
        ({"weight": np.full((11, 3), np.inf, "f4")}, "f: weight: expected finite numbers"),
        ({"bias": np.zeros(10, "f4")}, r"f: bias: expected floats of shape \(11,\)"),
        ({"bias": np.full(11, np.nan, "f4")}, "f: bias: expected finite numbers"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    changes: dict[str, np.ndarray | None], message: str
) -> None:
    tensors = {"weight": np.zeros((11, 3), "f4"), "bias": np.zeros(11, "f4"), **changes}
    given_tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(FormatError, match=message):
        read_head(given_tensors, make_facts((3,), hidden_size=3), where="f")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bands": (3, 2)}, "bands: expected at most hidden_size = 4 components, got 5"),
        ({"num_wide": 4}, "num_wide: expected at most 3 components"),
        ({"bands": ()}, "at least 1 item"),
        ({"bands": (1, 0)}, "greater than or equal to 1"),
        ({"step": 0.0}, "greater than 0"),
        ({"step": float("inf")}, "finite"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(
    changes: dict[str, object], message: str
) -> None:
    facts = make_facts((2, 1), hidden_size=4).model_dump()
    with pytest.raises(ValueError, match=message):
        HiddenFacts.model_validate({**facts, **changes})
