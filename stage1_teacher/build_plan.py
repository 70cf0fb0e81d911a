"""What a build will make, decided before a model is loaded: config, checks, header.

A plan is a frozen value that worker processes receive whole; the header in it is what the finished
cache will say of itself. All refusals that do not need the teacher's weights in memory happen here.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from stage1_teacher.teachers.base import ScoreSpec, TeacherConfig, TeacherIdentity
from stage1_teacher.teachers.checkpoint import Checkpoint, open_checkpoint
from stage1_teacher.teachers.identity import identify_teacher
from stage1_teacher.tokenizers import load_tokenizer, tokenizer_facts
from tide_cache import provenance
from tide_cache.alignment import payload_positions
from tide_cache.cache import Cache
from tide_cache.config import StrictModel
from tide_cache.errors import CompatibilityError, ConfigError, DataError
from tide_cache.manifest import (
    CacheHeader,
    CandidatesFacts,
    ChunksFacts,
    Header,
    PremaskedManifest,
    TeacherFacts,
    identity,
)
from tide_cache.rows import table_to_rows

logger = logging.getLogger(__name__)
_PACKAGES = ("numpy", "pyarrow", "torch", "transformers", "safetensors")
_DEFAULT_PAYLOADS = {"positions": ("candidates",), "chunks": ("chunks",)}
Temperature = Annotated[float, Field(gt=0, le=100)]


class CandidatesConfig(StrictModel):
    """The `candidates` payload."""

    k: int = Field(64, ge=1, description="Candidates per masked position; up to the vocabulary.")
    temperatures: tuple[Temperature, ...] = Field(
        (1.0, 2.0), min_length=1, max_length=16, description="Whose logsumexp is stored, exactly."
    )
    vocab_size: Literal["auto"] | int = Field(
        "auto", description="Ids that teacher and student share; auto: the premasked set's figure."
    )
    mean_logits_positions: int = Field(
        4096, ge=0, description="Masked positions over which the tail's mean logits are taken."
    )

    @field_validator("temperatures")
    @classmethod
    def _distinct(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(temperatures)) != len(temperatures):
            raise ValueError("expected each temperature once")
        return temperatures


class BuildConfig(StrictModel):
    """`tide-cache build`: a teacher, and what of its answers is kept."""

    teacher: TeacherConfig
    payloads: tuple[Literal["candidates", "chunks"], ...] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="What the cache holds; default: candidates where both sides share a tokenizer, "
        "chunks where they do not.",
    )
    candidates: CandidatesConfig = CandidatesConfig()
    comp_demo: bool = Field(
        True, description="Two passes, each revealing the other half (CompDemo); false: one pass."
    )
    samples_per_batch: int = Field(
        128, ge=1, description="Samples scored at a time within a task; bounds memory."
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """Everything that a worker needs to build any task; picklable."""

    config: BuildConfig
    premasked_url: str
    output_url: str
    header: CacheHeader
    teacher: TeacherIdentity
    tasks: tuple[int, ...]
    fit_rows: tuple[int, ...]

    @property
    def spec(self) -> ScoreSpec:
        """What is asked of the teacher; the true token's log-prob comes with every answer."""
        candidates = self.header.candidates
        if candidates is None:
            return ScoreSpec(k=0, temperatures=(), vocab_size=self.header.teacher_model.vocab_size)
        return ScoreSpec(
            k=candidates.k,
            temperatures=candidates.temperatures,
            vocab_size=candidates.vocab_size,
        )


def make_plan(config: BuildConfig, premasked: Cache, output_url: str) -> BuildPlan:
    """Check that premasked set, teacher and payload fit together and return the plan.

    Hashes the teacher's weights; loads nothing. Raises ConfigError, CompatibilityError, DataError.
    """
    manifest = premasked.manifest
    if not isinstance(manifest, PremaskedManifest):
        raise CompatibilityError(
            f"{premasked.url}: kind: expected a premasked set, got a {manifest.kind}",
            hint="make one with 'tide-cache prepare'",
        )
    if not manifest.shards:
        raise DataError(f"{premasked.url}: the premasked set has no rows", reason="empty")
    checkpoint = open_checkpoint(config.teacher.model, config.teacher.revision)
    head_rows = int(checkpoint.config.get("vocab_size", 0))
    names = config.payloads or _DEFAULT_PAYLOADS[manifest.alignment]
    _check_embedding(head_rows, manifest)
    fit_rows: tuple[int, ...] = ()
    payloads: list[CandidatesFacts | ChunksFacts] = []
    if "candidates" in names:
        vocab_size = _shared_vocab_size(config.candidates, manifest, premasked.url)
        _check_vocabulary(config.candidates.k, vocab_size, head_rows)
        wanted = config.candidates.mean_logits_positions
        fit_rows, fit_positions = choose_fit_rows(premasked, wanted)
        payloads.append(_candidates_facts(config.candidates, vocab_size, fit_positions))
    if "chunks" in names:
        payloads.append(ChunksFacts(codec="raw", codec_version=1))
    _check_tokenizer(checkpoint, manifest)
    _check_block_size(config.teacher, manifest)
    teacher = identify_teacher(config.teacher, checkpoint)
    header = CacheHeader(
        **{name: getattr(manifest, name) for name in Header.model_fields if name != "kind"},
        premasked_sha256=identity(manifest),
        comp_demo=config.comp_demo,
        teacher_model=_teacher_facts(teacher, head_rows, device_name(config.teacher)),
        payloads=tuple(payloads),
        build_config=config.model_dump(mode="json"),
        build_provenance=provenance.collect("tide-cache build", _PACKAGES),
    )
    return BuildPlan(
        config=config,
        premasked_url=premasked.url,
        output_url=output_url,
        header=header,
        teacher=teacher,
        tasks=tuple(sorted({shard.task for shard in manifest.shards})),
        fit_rows=fit_rows,
    )


def choose_fit_rows(premasked: Cache, num_positions: int) -> tuple[tuple[int, ...], int]:
    """Choose evenly spread rows of view 0 that hold at least `num_positions` payload positions.

    Returns row numbers and the exact count of their positions; a pure function of the set. Zero
    positions asked for, or a set that has none, gives none.
    """
    if num_positions == 0:
        return (), 0
    # Halving strides visits the whole set evenly, however early the loop stops.
    num_rows = premasked.num_samples
    order = sorted(range(num_rows), key=lambda row: (_bit_reversed(row), row))
    chosen: list[int] = []
    found = 0
    for start in range(0, num_rows, 64):
        rows = order[start : start + 64]
        for row, content in zip(
            rows, table_to_rows(premasked.read_rows(0, rows), "positions"), strict=True
        ):
            chosen.append(row)
            found += len(payload_positions(content.student_mask_L, content.alignment_RX))
            if found >= num_positions:
                return tuple(sorted(chosen)), found
    return (tuple(sorted(chosen)), found) if found else ((), 0)


def device_name(config: TeacherConfig) -> str:
    """Return the kind of device that decides rounding: `cpu`, or the name of the GPU."""
    wants_gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if wants_gpu else "cpu"


def _bit_reversed(row: int) -> int:
    return int(f"{row:032b}"[::-1], 2)


def _candidates_facts(
    config: CandidatesConfig, vocab_size: int, fit_positions: int
) -> CandidatesFacts:
    return CandidatesFacts(
        codec="raw",
        codec_version=1,
        k=config.k,
        vocab_size=vocab_size,
        temperatures=config.temperatures,
        mean_logits_positions=fit_positions,
    )


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


def _check_vocabulary(k: int, vocab_size: int, head_rows: int) -> None:
    if k > vocab_size:
        raise ConfigError(
            f"candidates.k: expected at most the {vocab_size} ids of the shared vocabulary, got {k}"
        )
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


def projected_bytes(plan: BuildPlan, counts: Mapping[str, int]) -> int:
    """Return the payloads' size before compression: an upper bound of what `raw` codecs write."""
    total = 0
    for payload in plan.header.payloads:
        if isinstance(payload, CandidatesFacts):
            per_entry = 8 * payload.k + 4 * len(payload.temperatures) + 4
        else:
            per_entry = 4
        total += per_entry * (
            counts.get("num_payload_positions", 0) + counts.get("num_active_chunks", 0)
        )
    return total
