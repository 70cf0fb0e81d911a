"""Payload values that are well-formed and still cannot be what a teacher said.

Shapes: P positions, K candidates, T temperatures, D hidden size, V vocabulary.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from stage2_student.losses import ReplayHead
from stage2_student.teacher_rows import read_replay_head
from tests.hostile_parquet import rehash
from tests.payload_builders import TEMPERATURES, encode, random_logits, sizes, top_candidates
from tests.payload_caches import codec_tensors, make_cache
from tide_cache.cache import open_cache
from tide_cache.errors import FormatError
from tide_cache.manifest import CacheManifest
from tide_cache.payload_facts import CandidatesFacts, HiddenFacts, RankedFacts
from tide_cache.payloads.candidates import Candidates, check_masses, keep_top_p
from tide_cache.payloads.candidates_ranked import RankedCandidates
from tide_cache.payloads.candidates_raw import RawCandidates
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE, Transform

VOCAB, K = 500, 12
COMMON: dict[str, Any] = {
    "k": K, "vocab_size": VOCAB, "temperatures": TEMPERATURES, "mean_logits_positions": 0
}  # fmt: skip
RAW = CandidatesFacts(**COMMON)
CODECS = {
    "raw": lambda: RawCandidates(RAW),
    "ranked": lambda: ranked(bits=6),
    "ranked of 8 bits": lambda: ranked(bits=8),
    "top-p": lambda: ranked(bits=6, top_p=0.9, min_k=2),
}


def ranked(**changes: Any) -> RankedCandidates:
    facts = RankedFacts(**COMMON, ranks="answers", **changes)
    return RankedCandidates(facts, np.arange(VOCAB, dtype=np.int32))


def decoded(kind: str, scale: float) -> tuple[Any, Candidates]:
    codec: Any = CODECS[kind]()
    answers = top_candidates(random_logits(3, 300, VOCAB, scale), K)
    if kind == "top-p":
        answers = keep_top_p(answers, top_p=0.9, min_k=2)
    return codec, codec.decode(encode(codec, answers, sizes(300)), sizes(300))


# From nearly uniform to one id that holds all the mass.
@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", CODECS)
def test_honest_masses_pass(kind: str, scale: float) -> None:
    codec, found = decoded(kind, scale)
    check_masses(found, codec.facts)


@pytest.mark.parametrize("column", range(len(TEMPERATURES)))
@pytest.mark.parametrize("kind", CODECS)
def test_masses_that_cannot_be_are_refused(kind: str, column: int) -> None:
    codec, found = decoded(kind, 3.0)

    def moved(by: float) -> Candidates:
        total_PT = found.logsumexp_PT.copy()
        total_PT[7, column] += by
        return dataclasses.replace(found, logsumexp_PT=total_PT)

    head_P = np.log(np.exp(found.logits_PK[7] / TEMPERATURES[column]).sum())
    below = float(head_P - found.logsumexp_PT[7, column]) - 1.0
    with pytest.raises(FormatError, match="cand_logsumexp: below that of the stored logits"):
        check_masses(moved(below), codec.facts)
    with pytest.raises(FormatError, match="cand_logsumexp: above what ids below"):
        check_masses(moved(np.log(VOCAB) + 1.0), codec.facts)
    if found.tail_logshare_PT is not None:
        for tail in (0.0, -3.0 if found.tail_logshare_PT[7, column] > -1 else -0.1):
            tail_PT = found.tail_logshare_PT.copy()
            tail_PT[7, column] = tail
            with pytest.raises(FormatError, match="cand_tail: not what logits and logsumexp leave"):
                check_masses(dataclasses.replace(found, tail_logshare_PT=tail_PT), codec.facts)


@pytest.mark.parametrize("value", [2e30, -2e30, 3e38])
def test_logits_that_leave_float32_are_refused(value: float) -> None:
    codec = RawCandidates(RAW)
    answers = top_candidates(random_logits(3, 4, VOCAB), K)
    logits_PK = answers.logits_PK.copy()
    logits_PK[2, 0] = value
    total_PT = np.full_like(answers.logsumexp_PT, 3e38)
    answers = dataclasses.replace(answers, logits_PK=logits_PK, logsumexp_PT=total_PT)
    with pytest.raises(FormatError, match="cand_logits: expected logits within 1e"):
        codec.encode(answers, sizes(4))


def test_few_candidates_do_not_decode_to_gigabytes() -> None:
    """Two candidates a position in the file, room for 65,535 when decoded."""
    num, k = 5000, 65_535
    facts = RankedFacts(
        **{**COMMON, "k": k, "vocab_size": 1 << 17}, bits=6, ranks="corpus", top_p=0.5, min_k=1
    )
    narrow = RankedCandidates(facts.model_copy(update={"k": 2}), np.arange(1 << 17, dtype=np.int32))
    answers = top_candidates(random_logits(1, num, 8), 2)
    table = encode(narrow, answers, sizes(num))
    assert table.nbytes < 500_000
    with pytest.raises(FormatError, match="expected at most 268435456 in one batch"):
        RankedCandidates(facts, np.arange(1 << 17, dtype=np.int32)).decode(table, sizes(num))


FACTS = HiddenFacts(
    hidden_size=4, vocab_size=11, bands=(1, 3), num_wide=1, step=0.5, fit_positions=9
)


@pytest.mark.parametrize(("name", "value"), [("synthesis", 1e14), ("mean", 2e15)])
def test_a_transform_that_decodes_beyond_bounds_is_refused(name: str, value: float) -> None:
    tensors = {
        "analysis": np.ones((4, 4), np.float32),
        "synthesis": np.ones((4, 4), np.float32),
        "mean": np.zeros(4, np.float32),
    }
    Transform.from_tensors(FACTS, tensors)
    tensors[name][..., 0] = value
    with pytest.raises(FormatError, match=f"{TRANSFORM_FILE}: synthesis: expected hidden states"):
        Transform.from_tensors(FACTS, tensors)


@pytest.mark.parametrize("value", [2e12, float("nan"), float("-inf")])
def test_a_head_beyond_bounds_is_refused_by_both_stages(tmp_path: Path, value: float) -> None:
    weight = torch.ones(39, 12)
    weight[3, 3] = value
    spoil_head(tmp_path / "cache", weight)
    cache = open_cache(tmp_path / "cache")
    assert isinstance(cache.manifest, CacheManifest) and cache.manifest.hidden is not None
    with pytest.raises(FormatError, match="weight: expected finite numbers within 1e"):
        read_replay_head(cache, cache.manifest.hidden)
    from tide_cache.payloads import check_codec_files

    with pytest.raises(FormatError, match="weight: expected finite numbers within 1e"):
        check_codec_files(cache.store, cache.manifest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int32])
def test_a_head_of_another_type_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    spoil_head(tmp_path / "cache", torch.ones(39, 12).to(dtype))
    cache = open_cache(tmp_path / "cache")
    assert isinstance(cache.manifest, CacheManifest) and cache.manifest.hidden is not None
    with pytest.raises(FormatError, match="weight: expected floats of shape"):
        read_replay_head(cache, cache.manifest.hidden)


def spoil_head(folder: Path, weight: torch.Tensor) -> None:
    make_cache(folder, "hidden")
    (folder / HEAD_FILE).write_bytes(save({"weight": weight}))
    rehash(folder)


def test_a_half_head_that_overflows_stays_finite_and_an_honest_one_is_unchanged() -> None:
    def head(scale: float) -> ReplayHead:
        return ReplayHead(
            weight_VD=torch.linspace(-1, 1, 44).reshape(11, 4).half() * scale,
            bias_V=None,
            synthesis_DR=torch.ones(4, 4) * scale,
            mean_D=torch.zeros(4),
            step=0.5,
        )

    code_PR = torch.tensor([[3, -1, 2, 5], [120, 120, 120, 120]], dtype=torch.int16)
    logits_PV = head(1.0).logits(code_PR)
    hidden_PD = (code_PR.float() * 0.5 @ torch.ones(4, 4)).half()
    expected_PV = torch.nn.functional.linear(hidden_PD, head(1.0).weight_VD).float()
    torch.testing.assert_close(logits_PV, expected_PV, rtol=0, atol=0)
    assert torch.isfinite(head(1e4).logits(code_PR)).all()


def test_the_builders_tensors_are_sound() -> None:
    """So that what the tests above refuse is refused for what was changed."""
    tensors = codec_tensors((FACTS,))[TRANSFORM_FILE]
    Transform.from_tensors(FACTS, tensors)
