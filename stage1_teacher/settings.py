"""Payload settings that calibrate compares, and how one is fitted: facts, codecs, codec files.

A setting is what a person could write into the build's config. Fitting it takes the teacher at a
few thousand positions: the rank table and mean logits of `candidates`, basis and step of `hidden`.

Shapes: P positions, K candidates, V vocabulary, D hidden size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save

from stage1_teacher.hidden_fit import FittedBasis, Head, cut_basis
from stage1_teacher.payload_config import PIN_BITS, PIN_K, BuildConfig
from tide_cache.payload_facts import CandidatesFacts, HiddenFacts, PayloadFacts, RankedFacts
from tide_cache.payloads import Codecs, make_codecs
from tide_cache.payloads.candidates import CODEC_FILE, MEAN_LOGITS_TENSOR, RANKS_TENSOR
from tide_cache.payloads.hidden import HEAD_FILE, TRANSFORM_FILE, Transform
from tide_cache.tails import Tail

LADDER_K = (16, 32, 64, 128)
LADDER_NATS = (0.1, 0.03, 0.01, 0.003, 0.001)
_DEFAULT_K, _DEFAULT_BITS = 64, 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to store a shared-tokenizer payload; `nats` None: candidates alone."""

    k: int
    bits: int | None  # None: codec raw
    nats: float | None = None
    top_p: float | None = None
    min_k: int | None = None

    @property
    def name(self) -> str:
        """How tables and manifests call it."""
        how_many = f"k={self.k}"
        if self.top_p is not None:
            how_many = f"k={self.min_k}..{self.k} top-p {self.top_p:g}"
        text = f"candidates {how_many} {'raw' if self.bits is None else f'{self.bits} bits'}"
        return text if self.nats is None else f"hidden {self.nats:g} nats + {text}"

    @property
    def default_tail(self) -> Tail:
        """The tail that stage 2 takes where nothing else is asked for."""
        return "mean" if self.nats is None else "hidden"


def configured_setting(config: BuildConfig, alignment: str) -> Setting | None:
    """Return the setting that a config asks for by name, None where it holds chunks alone."""
    wanted, chosen = config.wanted(alignment), config.candidates
    if "candidates" not in wanted:
        return None
    beside_hidden = "hidden" in wanted
    bits: int | None = chosen.bits or (PIN_BITS if beside_hidden else _DEFAULT_BITS)
    k = chosen.k or (PIN_K if beside_hidden else _DEFAULT_K)
    return Setting(
        k=k,
        bits=None if chosen.codec == "raw" else bits,
        nats=config.hidden.nats if beside_hidden else None,
        top_p=chosen.top_p,
        min_k=None if chosen.top_p is None else (chosen.min_k or 1),
    )


def ladder(vocab_size: int, *, has_hidden: bool = True) -> list[Setting]:
    """Return the settings that calibrate compares and `payload: auto` chooses from."""
    settings = [Setting(k=min(k, vocab_size), bits=6) for k in LADDER_K]
    settings.append(Setting(k=min(64, vocab_size), bits=8))
    pin = min(PIN_K, vocab_size)
    if has_hidden:
        settings += [Setting(k=pin, bits=PIN_BITS, nats=nats) for nats in LADDER_NATS]
    return list(dict.fromkeys(settings))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """What was learnt of the teacher on the fit positions.

    `num_positions` 0 and `mean_logits_V` None: nothing was asked for. `basis` is made on first use.
    """

    vocab_size: int
    temperatures: tuple[float, ...]
    num_positions: int
    mean_logits_V: npt.NDArray[np.float32] | None
    id_of_rank_V: npt.NDArray[np.int32]
    ranks: str
    head: Head | None
    basis: Callable[[], FittedBasis] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FittedSetting:
    """A setting with everything that encoding and decoding it takes."""

    setting: Setting
    payloads: tuple[PayloadFacts, ...]
    codecs: Codecs
    candidates: CandidatesFacts
    hidden: HiddenFacts | None
    transform: Transform | None


def rank_ids(
    count_V: npt.NDArray[np.integer[Any]], mean_logits_V: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.int32]:
    """Return ids by descending count, then by descending mean logit, then ascending: int32 (V,)."""
    second_V = np.zeros(len(count_V)) if mean_logits_V is None else -mean_logits_V
    order_V = np.lexsort((np.arange(len(count_V)), second_V, -count_V))
    return order_V.astype(np.int32)


def fit_setting(setting: Setting, fit: Fit) -> FittedSetting:
    """Fit one setting. Asserts that `fit` holds what it needs."""
    common = {
        "k": setting.k,
        "vocab_size": fit.vocab_size,
        "temperatures": fit.temperatures,
        "mean_logits_positions": 0 if fit.mean_logits_V is None else fit.num_positions,
    }
    candidates: CandidatesFacts
    if setting.bits is None:
        candidates = CandidatesFacts(**common)
    else:
        candidates = RankedFacts(
            **common,
            bits=setting.bits,
            top_p=setting.top_p,
            min_k=setting.min_k,
            ranks=fit.ranks,
        )
    payloads: tuple[PayloadFacts, ...] = (candidates,)
    hidden = transform = None
    if setting.nats is not None:
        assert fit.basis is not None
        hidden, transform = cut_basis(fit.basis(), setting.nats, fit.vocab_size)
        payloads += (hidden,)
    return FittedSetting(
        setting=setting,
        payloads=payloads,
        codecs=make_codecs(payloads, {RANKS_TENSOR: fit.id_of_rank_V}),
        candidates=candidates,
        hidden=hidden,
        transform=transform,
    )


def codec_files(fitted: FittedSetting, fit: Fit) -> dict[str, bytes]:
    """Return the codec files of a cache of this setting, by path."""
    files: dict[str, bytes] = {}
    tensors: dict[str, torch.Tensor] = {}
    if fit.mean_logits_V is not None:
        tensors[MEAN_LOGITS_TENSOR] = torch.from_numpy(fit.mean_logits_V)
    if isinstance(fitted.candidates, RankedFacts):
        tensors[RANKS_TENSOR] = torch.from_numpy(fit.id_of_rank_V)
    if tensors:
        files[CODEC_FILE] = save(tensors)
    if fitted.transform is not None:
        assert fit.head is not None
        files[TRANSFORM_FILE] = save(
            {
                "analysis": torch.from_numpy(fitted.transform.analysis_RD),
                "synthesis": torch.from_numpy(fitted.transform.synthesis_DR),
                "mean": torch.from_numpy(fitted.transform.mean_D),
            }
        )
        head = {"weight": fit.head.weight_VD.detach().cpu().contiguous()}
        if fit.head.bias_V is not None:
            head["bias"] = fit.head.bias_V.detach().cpu().contiguous()
        files[HEAD_FILE] = save(head)
    return files
