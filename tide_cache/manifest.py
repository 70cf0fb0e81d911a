"""The manifests: what a premasked set or a cache is, in one canonical JSON file.

A `Header` is everything known before the first row is made. It is stored in every shard too, so
that a shard says by itself what it belongs to and the manifest can be made again from the shards.
A manifest is a header plus counts and the list of files with their hashes; it is written last, and
the sha256 of its canonical JSON is the identity of the whole. No timestamps, no worker counts: the
same input gives the same manifest.
"""

import json
import re
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from tide_cache.canonical import canonical_json, pretty_json, sha256_hex
from tide_cache.config import StrictModel
from tide_cache.errors import FormatError
from tide_cache.payload_facts import (
    KNOWN_CODECS,
    CandidatesFacts,
    ChunksFacts,
    Count,
    FidelityFacts,
    HiddenFacts,
    PayloadFacts,
    TokenId,
    VocabSize,
)
from tide_cache.rows import MAX_POSITIONS, AlignmentKind

FORMAT: Final = "tide-cache"
FORMAT_VERSION: Final = 2
ORIGINS_VERSION: Final = 3
READABLE_VERSIONS: Final = (1, 2, 3)
MANIFEST = "manifest.json"
SIGNATURE = "cache.sig"
MAX_MANIFEST_BYTES: Final = 1 << 29
_MAX_SAMPLES = 1 << 31
_SHARD_PATH = re.compile(r"data/view-[0-9]{2,4}/[0-9]{5,9}\.parquet")
_FILE_PATH = re.compile(r"(codec/[a-z0-9_]+\.safetensors|README\.md)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    # A manifest may come from a stranger: only paths of these shapes can be named at all.
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"expected {what}")
        return text

    return AfterValidator(check)


Sha256 = Annotated[str, _matching(_SHA256, "64 lower-case hex digits")]
ShardPath = Annotated[str, _matching(_SHARD_PATH, "data/view-NN/NNNNN.parquet")]
FilePath = Annotated[str, _matching(_FILE_PATH, "codec/NAME.safetensors or README.md")]


class TokenizerFacts(StrictModel):
    """Which tokenizer made the ids of one side.

    `vocab_size` counts the ids that may occur (the tokenizer's entries, not the padded rows of an
    embedding). `sha256` is over the canonical content that decides ids, see
    `stage1_teacher.tokenizers`.
    """

    name: str
    sha256: Sha256
    vocab_size: VocabSize
    mask_token_id: TokenId | None
    eos_token_id: TokenId | None
    pad_token_id: TokenId | None


class SourceFacts(StrictModel):
    """One source of conversations: where it came from, its licence and how much of it was taken."""

    name: str
    fingerprint: str
    licence: str | None
    num_rows: Count
    num_rows_taken: Count


class NoisingFacts(StrictModel):
    """How masks were drawn; `drawn: false` says that they came from outside."""

    drawn: bool
    seed: int
    num_timesteps: int = Field(ge=1)
    t_min: float = Field(ge=0, le=1)
    t_max: float = Field(ge=0, le=1)
    demo_ratio: float = Field(ge=0, le=1)


class TeacherFacts(StrictModel):
    """Which teacher answered, how it was asked and on what."""

    name: str
    revision: str | None
    family: str
    weights_sha256: Sha256
    config_sha256: Sha256
    vocab_size: VocabSize
    dtype: str
    attention: str
    backend: str
    block_size: int | None = Field(ge=1, le=MAX_POSITIONS)
    mask_token_id: TokenId
    device: str


class Header(StrictModel):
    """What a premasked set is, known before its first row.

    `shared_vocab_size` counts the leading ids that are the same token on both sides (None where
    two tokenizers share none, `alignment: chunks`).
    """

    format: Literal["tide-cache"] = FORMAT
    format_version: Literal[1, 2, 3] = FORMAT_VERSION
    kind: Literal["premasked"] = "premasked"
    alignment: AlignmentKind
    num_views: int = Field(ge=1, le=1000)
    block_size: int = Field(ge=1, le=MAX_POSITIONS)
    student: TokenizerFacts
    teacher: TokenizerFacts
    shared_vocab_size: VocabSize | None
    noising: NoisingFacts
    sources: tuple[SourceFacts, ...]
    config: dict[str, Any]
    provenance: dict[str, Any]


class CacheHeader(Header):
    """What a cache is, known before its first row: a premasked set, a teacher and payloads."""

    kind: Literal["cache"] = "cache"  # type: ignore[assignment]
    premasked_sha256: Sha256
    comp_demo: bool
    teacher_model: TeacherFacts
    payloads: tuple[PayloadFacts, ...] = Field(min_length=1, max_length=3)
    fidelity: tuple[FidelityFacts, ...] = ()
    build_config: dict[str, Any]
    build_provenance: dict[str, Any]

    @field_validator("payloads")
    @classmethod
    def _each_once(cls, payloads: tuple[PayloadFacts, ...]) -> tuple[PayloadFacts, ...]:
        if len({payload.name for payload in payloads}) != len(payloads):
            raise ValueError("expected each payload once")
        names = {payload.name for payload in payloads}
        if "hidden" in names and "candidates" not in names:
            raise ValueError("hidden: expected candidates beside it, which pin the top")
        return payloads

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        candidates, hidden = self.candidates, self.hidden
        if candidates is None:
            return self
        if self.alignment == "chunks":
            raise ValueError("candidates: expected alignment positions, a shared tokenizer")
        shared = self.shared_vocab_size
        if shared is not None and candidates.vocab_size > shared:
            raise ValueError(f"candidates: vocab_size: expected at most the {shared} shared ids")
        if candidates.k > candidates.vocab_size:
            raise ValueError(f"candidates: k: expected at most {candidates.vocab_size}")
        if hidden is not None and hidden.vocab_size != candidates.vocab_size:
            raise ValueError(f"hidden: vocab_size: expected {candidates.vocab_size}")
        return self

    @property
    def candidates(self) -> CandidatesFacts | None:
        """The `candidates` payload, if the cache holds it."""
        return next((p for p in self.payloads if isinstance(p, CandidatesFacts)), None)

    @property
    def chunks(self) -> ChunksFacts | None:
        """The `chunks` payload, if the cache holds it."""
        return next((p for p in self.payloads if isinstance(p, ChunksFacts)), None)

    @property
    def hidden(self) -> HiddenFacts | None:
        """The `hidden` payload, if the cache holds it."""
        return next((p for p in self.payloads if isinstance(p, HiddenFacts)), None)


class ShardFacts(StrictModel):
    """One Parquet file: the rows of one view of one task."""

    path: ShardPath
    task: Count
    view: Count
    num_rows: int = Field(ge=1, lt=1 << 31)
    size_bytes: Count
    sha256: Sha256


class FileFacts(StrictModel):
    """One file beside the shards."""

    path: FilePath
    size_bytes: Count
    sha256: Sha256


class OriginFacts(StrictModel):
    """A set that this one was made from: merged with others, or a part taken of it.

    Shards that were taken over as they were carry its header, whose sha256 as canonical JSON is
    `header_sha256`. `views` and `payloads` say what a part has of it, None: all. `num_samples`
    were taken, `num_duplicates` were left out because an earlier set has them. `made` holds what
    the set says of its own making: config and provenance.
    """

    relation: Literal["merged", "part"]
    identity: Sha256
    header_sha256: Sha256
    num_samples: Count
    num_duplicates: Count = 0
    views: tuple[Count, ...] | None = None
    payloads: tuple[str, ...] | None = None
    made: dict[str, Any]


class _Complete(StrictModel):
    counts: dict[str, Count]
    dropped: dict[str, Count]
    files: tuple[FileFacts, ...]
    shards: tuple[ShardFacts, ...]
    origins: tuple[OriginFacts, ...] = Field((), max_length=10_000)

    @model_validator(mode="after")
    def _origins_of_their_version(self) -> Self:
        version = getattr(self, "format_version", ORIGINS_VERSION)
        if self.origins and version < ORIGINS_VERSION:
            raise ValueError(f"origins: expected none in format {version}, got some")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Sets without origins keep the bytes, and so the identity, of the versions before.
        values: dict[str, Any] = handler(self)
        if not self.origins:
            values.pop("origins", None)
        return values


class PremaskedManifest(Header, _Complete):
    """The manifest of a premasked set."""


class CacheManifest(CacheHeader, _Complete):
    """The manifest of a teacher cache."""


Manifest = PremaskedManifest | CacheManifest
AnyHeader = TypeVar("AnyHeader", bound=Header)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`: JSON for people with sorted keys."""
    return pretty_json(manifest.model_dump(mode="json"))


def identity(manifest: Manifest) -> str:
    """Return the identity of a set: the sha256 of its manifest's canonical JSON."""
    return sha256_hex(canonical_json(manifest.model_dump(mode="json")))


def header_of(manifest: Manifest) -> Header:
    """Return the header of a set: what each of its own shards carries."""
    kind = CacheHeader if isinstance(manifest, CacheManifest) else Header
    values = manifest.model_dump(mode="json")
    return kind.model_validate({name: values[name] for name in kind.model_fields})


def header_sha256(header: Header) -> str:
    """Return the sha256 of a header as canonical JSON."""
    return sha256_hex(canonical_json(header.model_dump(mode="json")))


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """Read and check a manifest. Raises FormatError naming the field, expected and got."""
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
        canonical_json(values)  # no infinity by way of 1e999, no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise FormatError(f"{where}: not a tide-cache manifest (no format: {FORMAT!r})")
    version = values.get("format_version")
    if version not in READABLE_VERSIONS:
        *most, last = map(str, READABLE_VERSIONS)
        readable = f"{', '.join(most)} and {last}"
        raise FormatError(
            f"{where}: format_version: this program reads {readable}, got {version!r}",
            hint="install a newer tide-cache",
        )
    kind = values.get("kind")
    _check_codecs(values.get("payloads"), where)
    models: dict[Any, type[Manifest]] = {"premasked": PremaskedManifest, "cache": CacheManifest}
    if not isinstance(kind, str) or kind not in models:
        raise FormatError(f"{where}: kind: expected premasked or cache, got {kind!r}")
    try:
        manifest = models[kind].model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        location = "".join(f"{part}." for part in problem["loc"])[:-1]
        told = problem["msg"].removeprefix("Value error, ")
        raise FormatError(f"{where}: {location + ': ' if location else ''}{told}") from error
    _check_shards(manifest, where)
    return manifest


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _check_codecs(payloads: Any, where: str) -> None:
    """Refuse a payload of a newer program in words that say so."""
    for payload in payloads if isinstance(payloads, list) else []:
        if not isinstance(payload, dict):
            continue
        name, codec = payload.get("name"), payload.get("codec")
        version = payload.get("codec_version")
        is_named = isinstance(name, str) and isinstance(codec, str)
        if not is_named or version not in KNOWN_CODECS.get((name, codec), ()):
            known = ", ".join(
                f"{of}: {kind} {'/'.join(map(str, versions))}"
                for (of, kind), versions in KNOWN_CODECS.items()
            )
            raise FormatError(
                f"{where}: payload {name}: codec {codec!r} version {version!r}: this program reads "
                f"{known}",
                hint="install a newer tide-cache",
            )


def _check_shards(manifest: Manifest, where: str) -> None:
    """Refuse a shard list in which a file is named twice or a task lacks a view."""
    expected_views = list(range(manifest.num_views))
    tasks: dict[int, list[ShardFacts]] = {}
    for shard in manifest.shards:
        tasks.setdefault(shard.task, []).append(shard)
        if shard.path != shard_path(shard.task, shard.view):
            raise FormatError(
                f"{where}: shards: {shard.path}: expected {shard_path(shard.task, shard.view)}"
            )
        # Even of equal rows each group of 256 takes a kilobyte; loaders make room for every row.
        if shard.num_rows > shard.size_bytes:
            raise FormatError(
                f"{where}: shards: {shard.path}: {shard.num_rows} rows in {shard.size_bytes} bytes"
            )
    num_samples = sum(shard.num_rows for shard in manifest.shards if shard.view == 0)
    if num_samples > _MAX_SAMPLES:
        raise FormatError(f"{where}: shards: expected at most {_MAX_SAMPLES} samples")
    for task, shards in tasks.items():
        if [shard.view for shard in shards] != expected_views:
            raise FormatError(
                f"{where}: shards: task {task}: expected views {expected_views} in order, got "
                f"{[shard.view for shard in shards]}"
            )
        if len({shard.num_rows for shard in shards}) != 1:
            raise FormatError(f"{where}: shards: task {task}: views differ in num_rows")
    if list(tasks) != sorted(tasks):
        raise FormatError(f"{where}: shards: expected tasks in ascending order")


def shard_path(task: int, view: int) -> str:
    """Return the path of the shard that holds one view of one task."""
    return f"data/view-{view:02d}/{task:05d}.parquet"
