"""What every teacher backend is asked for and gives back, as numpy arrays.

A request is one sample: its clean ids once, and every noised stream of it (views times CompDemo
halves) as bit masks. Putting the streams of a sample together is what lets a backend compute the
clean half once for all of them. Nothing here imports torch, so that a backend may live in another
process (vLLM) and the pipeline around it can be planned on a machine without one.

Shapes: L positions of the sample, P wanted (scored) positions of a stream, K candidates, V
vocabulary, T temperatures.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from tide_cache.config import StrictModel
from tide_cache.errors import CompatibilityError, ConfigError, DataError
from tide_cache.payloads.hidden import Transform

if TYPE_CHECKING:
    from torch import Tensor

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float32]

AttentionChoice = Literal["published", "native", "block_diffusion", "bidirectional"]
DTypeName = Literal["float32", "bfloat16", "float16"]


class VllmOptions(StrictModel):
    """What backend vllm alone needs to know."""

    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that one engine spreads over.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a device's memory that the engine may take."
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="Memory for keys and values; default: what gpu_memory_utilization leaves. "
        "Give it on a CPU, where that share is of the whole machine.",
    )
    max_model_len: int = Field(
        4096, ge=1, description="Tokens of the longest sample; one step of the engine holds them."
    )
    max_num_seqs: int = Field(256, ge=1, description="Prompts in one step of the engine, at most.")


class TeacherConfig(StrictModel):
    """Which teacher to run, what it may see, and how much of it at once."""

    model: str = Field(description="Folder of a checkpoint, or its name on the Hugging Face Hub.")
    revision: str | None = Field(None, description="Commit, tag or branch of a hub checkpoint.")
    license: str | None = Field(
        None,
        description="Of the weights, for the cache's card; default: what the model's own says.",
    )
    backend: Literal["hf", "vllm"] = Field(
        "hf", description="Engine that runs the teacher: transformers, or vLLM (pip extra vllm)."
    )
    vllm: VllmOptions | None = Field(None, description="Options of backend vllm.")
    attention: AttentionChoice = Field(
        "published",
        description="published: as TIDE queried this family; native: as its own inference does.",
    )
    dtype: DTypeName = Field("bfloat16", description="Type of the weights and the forward pass.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU if any.")
    device_map: Literal["auto"] | dict[str, str] | None = Field(
        None, description="Spread the layers over several GPUs: auto, or module name to device."
    )
    block_size: int = Field(32, ge=1, description="Positions in a block of the attention layout.")
    mask_token_id: int | None = Field(
        None, ge=0, description="Id the teacher sees at masked positions; read from its files."
    )
    passes: Literal["shared", "separate"] = Field(
        "shared",
        description="shared: one clean half serves all streams of a sample and dead blocks are "
        "dropped; separate: one whole forward per stream, the slow reference.",
    )
    token_budget: int = Field(16384, ge=1, description="Tokens in one forward, padding included.")
    head_slice_mib: int = Field(256, ge=1, description="Size of one slice of float32 logits.")
    attn_implementation: Literal["sdpa"] = Field("sdpa", description="Attention kernel.")

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("expected auto, cpu, cuda or cuda:N")
        return device

    @model_validator(mode="after")
    def _one_placement(self) -> "TeacherConfig":
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device and device_map are both given: leave device at auto")
        return self

    @model_validator(mode="after")
    def _one_engine(self) -> "TeacherConfig":
        if self.backend == "hf":
            if self.vllm is not None:
                raise ValueError("vllm: goes with backend: vllm")
            return self
        if self.device_map is not None:
            raise ValueError("device_map: goes with backend: hf; set vllm.tensor_parallel_size")
        if self.passes != "shared":
            raise ValueError("passes: separate goes with backend: hf")
        if self.spans_devices and self.device not in ("auto", "cpu"):
            raise ValueError("vllm.tensor_parallel_size above 1: leave device at auto")
        return self

    @property
    def vllm_options(self) -> VllmOptions:
        """The options of backend vllm, defaults where none are given."""
        return self.vllm or VllmOptions()

    @property
    def spans_devices(self) -> bool:
        """Whether one copy of the teacher takes several devices."""
        return self.device_map is not None or self.vllm_options.tensor_parallel_size > 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TeacherIdentity:
    """What must be equal for two runs to have used the same teacher in the same way."""

    name: str
    revision: str | None
    family: str
    backend: str
    weights_sha256: str
    config_sha256: str
    tokenizer_files_sha256: str | None
    dtype: str
    attention: str
    block_size: int | None
    mask_token_id: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """One noised copy of a sample.

    `masked_L` bool (L,): the teacher's input carries the mask id there. `wanted_P` int (P,),
    ascending: the masked positions to score. Raises DataError where the two do not fit.
    """

    masked_L: BoolArray
    wanted_P: IntArray

    def __post_init__(self) -> None:
        if self.masked_L.dtype != np.bool_ or self.masked_L.ndim != 1:
            raise DataError(
                f"masked_L: expected a bool vector, got {self.masked_L.dtype} "
                f"of shape {self.masked_L.shape}"
            )
        wanted = self.wanted_P
        if wanted.ndim != 1 or wanted.dtype.kind != "i":
            raise DataError(
                f"wanted_P: expected an integer vector, got {wanted.dtype} of shape {wanted.shape}"
            )
        if not len(wanted):
            return
        if np.any(np.diff(wanted) <= 0):
            raise DataError("wanted_P: expected ascending positions without repeats")
        if wanted[0] < 0 or wanted[-1] >= len(self.masked_L):
            raise DataError(
                f"wanted_P: expected positions in [0, {len(self.masked_L)}), "
                f"got {wanted[0]}..{wanted[-1]}"
            )
        if not self.masked_L[wanted].all():
            position = wanted[~self.masked_L[wanted]][0]
            raise DataError(f"wanted_P: position {position} is not masked, so it has no prediction")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """One sample with all its noised streams.

    `clean_ids_L` int (L,): the true ids, unpadded, which are also the labels. `name` is what
    errors call the sample by.
    """

    clean_ids_L: IntArray
    streams: tuple[Stream, ...]
    name: str = ""

    def __post_init__(self) -> None:
        ids = self.clean_ids_L
        if ids.ndim != 1 or ids.dtype.kind != "i" or not len(ids):
            raise DataError(
                f"clean_ids_L: expected a non-empty integer vector, got {ids.dtype} "
                f"of shape {ids.shape}"
            )
        for index, stream in enumerate(self.streams):
            if len(stream.masked_L) != len(ids):
                raise DataError(
                    f"stream {index}: masked_L has {len(stream.masked_L)} positions, "
                    f"clean_ids_L has {len(ids)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSpec:
    """What to keep of each wanted position.

    Candidates and logsumexps are over ids below `vocab_size` (the shared vocabulary). `k` may be 0
    and `temperatures` empty where only the label's log-prob is needed. `transform`: the hidden
    states are wanted as its codes. Raises ConfigError.
    """

    k: int
    temperatures: tuple[float, ...]
    vocab_size: int
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ConfigError(f"vocab_size: expected at least 1, got {self.vocab_size}")
        if not 0 <= self.k <= self.vocab_size:
            raise ConfigError(
                f"k: expected 0 to {self.vocab_size} candidates (the vocabulary), got {self.k}"
            )
        for temperature in self.temperatures:
            if not (math.isfinite(temperature) and temperature > 0):
                raise ConfigError(f"temperatures: expected positive numbers, got {temperature}")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ConfigError(f"temperatures: {self.temperatures} holds a repeat")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The teacher's answer for one stream, in the order of its wanted positions.

    `topk_ids_PK` int32 and `topk_logits_PK` float32, descending, equal logits by ascending id;
    `logsumexp_PT` float32 over ids below the spec's vocabulary; `label_logprob_P` float32, log p of
    the true id under the teacher's own full softmax at temperature 1 (nats); `hidden_codes_PR`
    int16, what the spec's transform makes of the hidden state, None where it has none.
    """

    topk_ids_PK: npt.NDArray[np.int32]
    topk_logits_PK: FloatArray
    logsumexp_PT: FloatArray
    label_logprob_P: FloatArray
    hidden_codes_PR: npt.NDArray[np.int16] | None = None

    def rows(self, start: int, stop: int) -> "Scores":
        """Return the answer for positions `start` to `stop` of this one, as views."""
        return self.take(slice(start, stop))

    def take(self, index: slice | IntArray) -> "Scores":
        """Return the answer for some positions of this one, in the order asked for."""
        chosen: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            chosen[field.name] = None if values is None else values[index]
        return Scores(**chosen)

    @classmethod
    def concatenate(cls, parts: Sequence["Scores"], spec: ScoreSpec) -> "Scores":
        """Join answers row-wise; no parts give an answer of zero positions."""
        if not parts:
            return cls(
                topk_ids_PK=np.zeros((0, spec.k), np.int32),
                topk_logits_PK=np.zeros((0, spec.k), np.float32),
                logsumexp_PT=np.zeros((0, len(spec.temperatures)), np.float32),
                label_logprob_P=np.zeros(0, np.float32),
                hidden_codes_PR=None
                if spec.transform is None
                else np.zeros((0, len(spec.transform.limit_R)), np.int16),
            )
        joined: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            columns = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if columns[0] is None else np.concatenate(columns)
        return cls(**joined)


def describe_request(index: int, request: ScoreRequest) -> str:
    """Say in errors which request of a call is meant."""
    return f"request {index} ({request.name})" if request.name else f"request {index}"


def check_requests(
    requests: Sequence[ScoreRequest], spec_vocab_size: int, *, teacher: str, vocab_size: int
) -> None:
    """Refuse what a teacher of `vocab_size` logits cannot answer.

    Raises CompatibilityError for a larger shared vocabulary, DataError for an id outside.
    """
    if spec_vocab_size > vocab_size:
        raise CompatibilityError(
            f"vocab_size: {teacher} has {vocab_size} logits, got {spec_vocab_size}"
        )
    for index, request in enumerate(requests):
        ids = request.clean_ids_L
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise DataError(
                f"{describe_request(index, request)}: token id {wrong} is outside the vocabulary "
                f"of {teacher} ({vocab_size} ids)",
                hint="was the sample prepared with this teacher's tokenizer?",
            )


DROP_HINT = "set bad_samples: drop to leave such samples out, counted in the manifest"


class NonFiniteLogitsError(DataError):
    """A NaN or an infinity among the teacher's logits, and where it stood.

    `row` counts within the logits that were reduced; `request_index` and `stream_index` are set
    once the backend has traced it to a request, so that a caller can set that sample aside.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, reason: str = "nonfinite_logits"
    ) -> None:
        super().__init__(message, hint=hint, reason=reason)
        self.row: int | None = None
        self.request_index: int | None = None
        self.stream_index: int | None = None

    @classmethod
    def at(
        cls, request_index: int, request: ScoreRequest, stream_index: int, wanted: int
    ) -> "NonFiniteLogitsError":
        """Name the request, the stream and the position of its wanted row number `wanted`."""
        position = request.streams[stream_index].wanted_P[wanted]
        error = cls(
            f"{describe_request(request_index, request)}, stream {stream_index}, position "
            f"{position}: the teacher's logits hold NaN or infinity"
        )
        error.request_index, error.stream_index = request_index, stream_index
        return error


@runtime_checkable
class Teacher(Protocol):
    """What a build needs of a teacher; every backend has it."""

    @property
    def identity(self) -> TeacherIdentity:
        """Say which teacher this is and how it is queried."""
        ...

    @property
    def vocab_size(self) -> int:
        """Count the rows of the output head (padded rows included)."""
        ...

    @property
    def mask_token_id(self) -> int:
        """Return the id the teacher sees at masked positions."""
        ...

    def score(self, requests: Sequence[ScoreRequest], spec: ScoreSpec) -> list[list[Scores]]:
        """Score every wanted position. Returns one `Scores` per stream, per request."""
        ...


@runtime_checkable
class OpenTeacher(Teacher, Protocol):
    """A teacher in this process, of which everything can be had: what calibration needs."""

    @property
    def hidden_size(self) -> int:
        """Return the width of what the output head reads."""
        ...

    def hidden_states(self, requests: Sequence[ScoreRequest]) -> "list[list[Tensor]]":
        """Return what the head reads at the wanted positions, (P, d) per stream, per request."""
        ...

    def head(self) -> "tuple[Tensor, Tensor | None]":
        """Return the output head's weight (V, d) and bias (V,) or None, where they are."""
        ...
