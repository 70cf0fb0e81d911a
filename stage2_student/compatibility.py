"""Whether a student, a config and a set fit together, asked before any weight is read.

Each refusal names the field, what was expected, what came, and what to do. What fits on paper but
would train something else than its author believes (another tokenizer, another block size, a
temperature whose mass the cache does not know) is refused, never adapted.
"""

import logging
from collections.abc import Sequence
from typing import Literal

from stage2_student.objective_config import ObjectiveConfig, PayloadName
from stage2_student.student_source import StudentSource
from stage2_student.teacher_rows import (
    CandidatesReading,
    TeacherReading,
    read_mean_logits,
    read_replay_head,
)
from tide_cache.cache import Cache
from tide_cache.errors import CompatibilityError
from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.payload_facts import CandidatesFacts, ChunksFacts
from tide_cache.payloads import Codecs, open_codecs
from tide_cache.tails import NEEDS_MEAN, Tail

logger = logging.getLogger(__name__)


def check_student(cache: Cache, source: StudentSource) -> None:
    """Raise CompatibilityError unless the student reads the set's ids as the set means them."""
    facts, where = cache.manifest.student, cache.url
    if facts.sha256 not in source.tokenizer_sha256s:
        raise CompatibilityError(
            f"{where}: student.sha256: made for the tokenizer {facts.name!r} "
            f"({facts.sha256[:12]}…), got that of {source.name!r} "
            f"({min(source.tokenizer_sha256s)[:12]}…)",
            hint="train a student with that tokenizer, or prepare and build a set for this one",
        )
    if facts.mask_token_id is not None and facts.mask_token_id != source.mask_token_id:
        raise CompatibilityError(
            f"{where}: student.mask_token_id: expected {facts.mask_token_id}, got "
            f"{source.mask_token_id} of {source.name!r}",
            hint="set student.mask_token to the token that the set was prepared with",
        )
    if facts.vocab_size > source.num_embedding_rows:
        raise CompatibilityError(
            f"{where}: student.vocab_size: the set has ids up to {facts.vocab_size - 1}, the "
            f"student {source.name!r} embeds {source.num_embedding_rows}",
            hint="start from a checkpoint whose embedding covers its tokenizer",
        )
    _check_block_size(cache, source)


def check_objective(cache: Cache, objective: ObjectiveConfig, num_embedding_rows: int) -> None:
    """Raise CompatibilityError unless the set holds what the losses read."""
    for payload, loss in objective.payloads.items():
        facts = {
            "candidates": candidates_facts(cache.manifest),
            "chunks": chunks_facts(cache.manifest),
        }[payload]
        if facts is None:
            raise _missing_payload(cache, payload, loss)
        if isinstance(facts, CandidatesFacts):
            _check_candidates(cache, facts, objective, num_embedding_rows)


def check_alike(caches: Sequence[Cache]) -> None:
    """Raise CompatibilityError unless a student can read all caches of a run in the same way."""
    first = caches[0]
    identities: dict[str, str] = {}
    for cache in caches:
        if cache.identity in identities:
            raise CompatibilityError(
                f"{cache.url}: the same cache as {identities[cache.identity]}",
                hint="name it once, and give it more weight in cache_weights",
            )
        identities[cache.identity] = cache.url
        if cache.manifest.block_size != first.manifest.block_size:
            raise CompatibilityError(
                f"{cache.url}: block_size: {first.url} was made for "
                f"{first.manifest.block_size}, this one for {cache.manifest.block_size}",
                hint="train on caches of one block size, or prepare one of them anew",
            )


def candidates_facts(manifest: Manifest) -> CandidatesFacts | None:
    """Return the facts of the `candidates` payload, or None where the set does not hold it."""
    return manifest.candidates if isinstance(manifest, CacheManifest) else None


def chunks_facts(manifest: Manifest) -> ChunksFacts | None:
    """Return the facts of the `chunks` payload, or None where the set does not hold it."""
    return manifest.chunks if isinstance(manifest, CacheManifest) else None


def teacher_reading(cache: Cache, objective: ObjectiveConfig) -> TeacherReading | None:
    """Say what has to be read for the losses: nothing where they need no teacher and no chunks.

    The set must have passed `check_objective`. Raises FormatError for damaged codec files.
    """
    wanted = objective.payloads
    # With one tokenizer each mask is one draw: nothing to count, and `unbiased` is `published`.
    num_draws = objective.counts_draws and cache.manifest.alignment == "chunks"
    if not wanted and not num_draws:
        return None
    codecs = Codecs()
    if wanted and isinstance(cache.manifest, CacheManifest):
        codecs = open_codecs(cache.store, cache.manifest)
    return TeacherReading(
        alignment=cache.manifest.alignment,
        candidates=candidates_reading(cache, codecs, tail=objective.tail)
        if "candidates" in wanted
        else None,
        chunks=codecs.chunks if "chunks" in wanted else None,
        num_draws=num_draws,
    )


def chosen_tail(manifest: CacheManifest, tail: Literal["auto"] | Tail) -> Tail:
    """Return the tail that is meant: for `auto` the most faithful one that the cache has."""
    if tail != "auto":
        return tail
    if manifest.hidden is not None:
        return "hidden"
    facts = manifest.candidates
    return "mean" if facts is not None and facts.mean_logits_positions else "uniform"


def candidates_reading(
    cache: Cache, codecs: Codecs, *, tail: Literal["auto"] | Tail
) -> CandidatesReading:
    """Say how a cache's candidates are read, with what their tail needs."""
    manifest, codec = cache.manifest, codecs.candidates
    assert isinstance(manifest, CacheManifest) and codec is not None
    chosen = chosen_tail(manifest, tail)
    if chosen == "none":
        logger.warning(
            "tail none: the candidates are renormalised, which is a wrong gradient wherever the "
            "teacher is not sure; for comparison only"
        )
    is_hidden = chosen == "hidden" and manifest.hidden is not None
    return CandidatesReading(
        codec=codec,
        tail=chosen,
        mean_logits_V=read_mean_logits(cache, codec.facts) if chosen in NEEDS_MEAN else None,
        hidden=codecs.hidden if is_hidden else None,
        head=read_replay_head(cache, manifest.hidden)
        if is_hidden and manifest.hidden is not None
        else None,
    )


def _check_block_size(cache: Cache, source: StudentSource) -> None:
    block_size = cache.manifest.block_size
    if source.block_size not in (None, block_size):
        raise CompatibilityError(
            f"{cache.url}: block_size: the set was made for {block_size}, the student "
            f"{source.name!r} has {source.block_size}",
            hint=f"set student.block_size: {block_size} to train it on with the set's blocks, or "
            "prepare a set with its own",
        )


def _check_candidates(
    cache: Cache, facts: CandidatesFacts, objective: ObjectiveConfig, num_embedding_rows: int
) -> None:
    temperature = objective.temperature
    if not any(abs(stored - temperature) <= 1e-6 * temperature for stored in facts.temperatures):
        stored = ", ".join(f"{value:g}" for value in facts.temperatures)
        raise CompatibilityError(
            f"{cache.url}: objective.temperature: the cache was built for {stored}, got "
            f"{temperature:g}",
            hint="train at one of these, or build the cache again with this temperature",
        )
    if facts.vocab_size > num_embedding_rows:
        raise CompatibilityError(
            f"{cache.url}: payload candidates: vocab_size: the teacher speaks of "
            f"{facts.vocab_size} ids, the student has {num_embedding_rows}",
            hint="start from a checkpoint whose embedding covers its tokenizer",
        )
    if objective.tail in NEEDS_MEAN and facts.mean_logits_positions == 0:
        raise CompatibilityError(
            f"{cache.url}: objective.tail: {objective.tail!r} needs the teacher's mean logits, "
            "which this cache does not hold",
            hint="set objective.tail: uniform, or build with mean_logits_positions above 0",
        )
    manifest = cache.manifest
    if objective.tail == "hidden" and not (
        isinstance(manifest, CacheManifest) and manifest.hidden is not None
    ):
        raise CompatibilityError(
            f"{cache.url}: objective.tail: 'hidden' needs the payload hidden, which this cache "
            "does not hold",
            hint="set objective.tail: auto, or build with payloads: [hidden]",
        )


def _missing_payload(cache: Cache, payload: PayloadName, loss: str) -> CompatibilityError:
    if not isinstance(cache.manifest, CacheManifest):
        return CompatibilityError(
            f"{cache.url}: objective.losses: {loss!r} needs a teacher's answers (payload "
            f"{payload!r}), got a premasked set, which has none",
            hint="run 'tide-cache build' on it and train from the cache, or keep 'ce' alone",
        )
    held = ", ".join(facts.name for facts in cache.manifest.payloads)
    return CompatibilityError(
        f"{cache.url}: objective.losses: {loss!r} needs the payload {payload!r}, the cache holds "
        f"{held}",
        hint="choose losses over what it holds, or build a cache with that payload",
    )
