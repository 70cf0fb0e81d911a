"""What a training step needs on a GPU, computed from configs before any weight is loaded.

Parameters, their gradients and moments are counted. Activations are derived: what autograd keeps of
a Qwen3 layer for its backward, in bytes a token, with D hidden, Q = heads x head_dim,
K = kv_heads x head_dim, I intermediate, s the bytes of the residual stream (4 for float32 weights,
2 for bfloat16) and c those of a matrix product (2 under autocast or with bfloat16 weights):

    two norms over D     each its input in float32 (4 D) and its normalised value (s D)
    their outputs        what q, k, v and gate, up multiply: 2 c D; under autocast each of the five
                         casts its own copy: 5 c D
    q_norm, k_norm       their inputs in float32 and normalised values: (4 + c) (Q + K)
    attention            query, key, value, output and its copy for o_proj: c (3 Q + 2 K), and a
                         float32 logsumexp a head. By rows (sdpa), clean and noised keys and values
                         of a row are put together for its noised tokens, c 2 K a token, and each
                         mask is kept in the type of the scores: c for each pair that it speaks of,
                         3 L^2 in a row whose blocks are all live
    MLP                  gate, its activation, up, their product: 4 c I
    reciprocal norms     4 bytes for each of 2 + heads + kv_heads norms

and under autocast a bfloat16 copy of every matrix. With activation checkpointing there is one
hidden state (s D) for each layer, and all of the above for the one layer in work. A test holds this
against the bytes that autograd keeps of real models, to 1 %, under sdpa; flex cannot run backwards
on a CPU and is derived only. The rest are allowances, not yet held against a GPU: temporaries of a
layer's backward (4 c I + 12 D a token), a slice of logits with its intermediate values
(`HEAD_SLICES` of `SLICE_FLOATS` float32, one more for a replayed teacher), a product's share of the
head's gradient in 16 bits and, with bfloat16 weights, its sum in float32, and `RESERVED_BYTES` for
what CUDA and its libraries take. Several GPUs add the buckets in which they exchange gradients.

The rows are taken to be as long as they may be, and each noised block to be live: T = 2 L a row.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from stage2_student.fused import SLICE_FLOATS

if TYPE_CHECKING:
    from transformers import Qwen3Config

HEAD_SLICES = 4
RESERVED_BYTES = 1 << 30
MICRO_BATCHES = (1, 2, 4, 8, 16)
_BLOCK = 256  # values that share a scale in 8-bit moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One choice of number formats, and whether activations are computed again."""

    weights: Literal["float32", "bfloat16"] = "float32"
    precision: Literal["float32", "bf16"] = "float32"
    state: Literal["float32", "8bit"] = "float32"
    activation_checkpointing: bool = False

    @property
    def overrides(self) -> dict[str, str]:
        """The keys of a TrainConfig that choose it, as `--set` takes them."""
        return {
            "student.dtype": self.weights,
            "precision": self.precision,
            "optimizer.state": self.state,
            "student.activation_checkpointing": str(self.activation_checkpointing).lower(),
        }

    @property
    def checkpointed(self) -> "Setting":
        """The same with activations computed again."""
        return replace(self, activation_checkpointing=True)

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight, of its gradient, and of a value of the residual stream."""
        return 4 if self.weights == "float32" else 2

    @property
    def product_bytes(self) -> int:
        """Bytes of a value that goes into a matrix product."""
        return 2 if self.is_autocast else self.weight_bytes

    @property
    def is_autocast(self) -> bool:
        """Whether float32 weights are cast for each product."""
        return self.weights == "float32" and self.precision == "bf16"


def ladder() -> list[Setting]:
    """Return the settings that are compared, from the one that gives up nothing on downwards.

    Autocast, which is faster, comes before computing again, which is slower.
    """
    autocast = Setting(precision="bf16")
    pure = replace(autocast, weights="bfloat16")
    pairs = [
        each
        for setting in (
            replace(autocast, state="8bit"),
            pure,
            replace(pure, state="8bit"),
        )
        for each in (setting, setting.checkpointed)
    ]
    plain = Setting()
    return [plain, autocast, plain.checkpointed, autocast.checkpointed, *pairs]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """The sizes of a Qwen3 that memory depends on. `head` counts the values of the output head."""

    num_layers: int
    hidden: int
    query: int
    key: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head: int
    layer_matrices: int
    tables: int
    vectors: int

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.layer_matrices + self.tables + self.vectors


def model_size(config: "Qwen3Config", *, num_embedding_rows: int | None = None) -> ModelSize:
    """Count a Qwen3's sizes. `num_embedding_rows`: its vocabulary where a mask token is added."""
    c = config
    num_rows = num_embedding_rows or c.vocab_size
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = 2 * c.hidden_size * (query + key) + 3 * c.hidden_size * c.intermediate_size
    biases = query + 2 * key + c.hidden_size if c.attention_bias else 0
    vectors = 2 * c.hidden_size + 2 * c.head_dim + biases
    return ModelSize(
        num_layers=c.num_hidden_layers,
        hidden=c.hidden_size,
        query=query,
        key=key,
        intermediate=c.intermediate_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head=num_rows * c.hidden_size,
        layer_matrices=c.num_hidden_layers * matrices,
        tables=num_rows * c.hidden_size * (1 if c.tie_word_embeddings else 2),
        vectors=c.num_hidden_layers * vectors + c.hidden_size,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one forward reads: packed tokens, and the pairs of them in sdpa's masks (flex: 0)."""

    num_tokens: int
    num_pairs: int = 0


def full_rows(num_rows: int, length: int, *, attention: Literal["flex", "sdpa"]) -> Load:
    """Return the most that rows of a length can take: every block live."""
    pairs = 3 * length * length if attention == "sdpa" else 0
    return Load(num_tokens=num_rows * 2 * length, num_pairs=num_rows * pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """Bytes of a step by what they are for. `casts`: bfloat16 copies of float32 matrices."""

    weights: int
    gradients: int
    state: int
    casts: int
    activations: int
    head: int
    teacher_head: int

    @property
    def total(self) -> int:
        """All of them, and what is reserved."""
        return int(sum(asdict(self).values())) + RESERVED_BYTES

    def as_json(self) -> dict[str, int]:
        """Return the bytes by name, with their total."""
        return {**asdict(self), "reserved": RESERVED_BYTES, "total": self.total}


def layer_bytes(size: ModelSize, setting: Setting, load: Load) -> int:
    """Return the bytes that autograd keeps of one layer (see the module), without cast weights."""
    s, c = setting.weight_bytes, setting.product_bytes
    norms = 2 * (4 + s) * size.hidden + (5 if setting.is_autocast else 2) * c * size.hidden
    heads = (4 + c) * (size.query + size.key)
    attended = c * (3 * size.query + 2 * size.key) + 4 * size.num_heads
    if load.num_pairs:
        attended += c * 2 * size.key
    reciprocals = 4 * (2 + size.num_heads + size.num_kv_heads)
    per_token = norms + heads + attended + reciprocals + 4 * c * size.intermediate
    return int(load.num_tokens * per_token + c * load.num_pairs)


def saved_bytes(size: ModelSize, setting: Setting, load: Load) -> int:
    """Return the bytes that autograd keeps after a forward up to the final hidden states."""
    if setting.activation_checkpointing:
        layers = size.num_layers * setting.weight_bytes * size.hidden * load.num_tokens
    else:
        layers = size.num_layers * layer_bytes(size, setting, load)
    final_norm = (4 + setting.weight_bytes) * size.hidden * load.num_tokens
    rotary = 2 * setting.weight_bytes * size.query // size.num_heads * load.num_tokens
    return layers + final_norm + rotary


def memory_use(
    size: ModelSize,
    setting: Setting,
    *,
    load: Load,
    teacher_head_bytes: int = 0,
) -> MemoryUse:
    """Return what a step with this much in one forward needs at its peak."""
    moments = 8.0 if setting.state == "float32" else 2 * (1 + 4 / _BLOCK)
    matrices = size.layer_matrices + size.tables
    activations = saved_bytes(size, setting, load)
    if setting.activation_checkpointing:
        activations += layer_bytes(size, setting, load)
    working = 4 * setting.product_bytes * size.intermediate + 12 * size.hidden
    cast = size.layer_matrices + size.head if setting.is_autocast else 0
    return MemoryUse(
        weights=setting.weight_bytes * size.num_parameters,
        gradients=setting.weight_bytes * size.num_parameters,
        state=round(moments * matrices) + 8 * size.vectors,
        casts=2 * cast,
        activations=activations + working * load.num_tokens,
        head=_head_bytes(size, setting, replays=teacher_head_bytes > 0),
        teacher_head=teacher_head_bytes,
    )


def _head_bytes(size: ModelSize, setting: Setting, *, replays: bool) -> int:
    slices = 4 * SLICE_FLOATS * (HEAD_SLICES + (1 if replays else 0))
    share = 2 * size.head if setting.product_bytes == 2 else 0
    # With float32 weights the sum is the gradient that autograd is given.
    summed = 4 * size.head if setting.weights == "bfloat16" else 0
    return slices + share + summed


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingPlan:
    """A setting, its use at each micro-batch (in rows), and the largest that fits, or None."""

    setting: Setting
    uses: dict[int, MemoryUse]
    largest: int | None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "set": self.setting.overrides,
            "bytes": {str(rows): use.as_json() for rows, use in self.uses.items()},
            "largest_micro_batch": self.largest,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What fits on a card. `own` is what the config asks for, `micro_batch` its rows.

    `chosen` is `own` where that fits, else the first setting of the ladder that does.
    """

    gpu_bytes: int
    num_parameters: int
    positions_per_row: int
    micro_batch: int
    attention: Literal["flex", "sdpa"]
    settings: tuple[SettingPlan, ...]
    own: SettingPlan
    chosen: SettingPlan | None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "gpu_bytes": self.gpu_bytes,
            "num_parameters": self.num_parameters,
            "positions_per_row": self.positions_per_row,
            "micro_batch": self.micro_batch,
            "attention": self.attention,
            "settings": [each.as_json() for each in self.settings],
            "own": self.own.as_json(),
            "chosen": None if self.chosen is None else self.chosen.setting.overrides,
        }


def plan_memory(
    size: ModelSize,
    own: Setting,
    *,
    positions_per_row: int,
    micro_batch: int,
    gpu_bytes: int,
    attention: Literal["flex", "sdpa"] = "flex",
    teacher_head_bytes: int = 0,
) -> MemoryPlan:
    """Compare the settings of the ladder, and `own`, at the usual micro-batches and `micro_batch`.

    `positions_per_row` is L, the longest that a row may be.
    """

    def plan(setting: Setting) -> SettingPlan:
        uses = {
            rows: memory_use(
                size,
                setting,
                load=full_rows(rows, positions_per_row, attention=attention),
                teacher_head_bytes=teacher_head_bytes,
            )
            for rows in sorted({*MICRO_BATCHES, micro_batch})
        }
        fitting = [rows for rows, use in uses.items() if use.total <= gpu_bytes]
        return SettingPlan(setting=setting, uses=uses, largest=max(fitting, default=None))

    own_plan, plans = plan(own), tuple(plan(setting) for setting in ladder())
    fitting = (p for p in (own_plan, *plans) if p.uses[micro_batch].total <= gpu_bytes)
    return MemoryPlan(
        gpu_bytes=gpu_bytes,
        num_parameters=size.num_parameters,
        positions_per_row=positions_per_row,
        micro_batch=micro_batch,
        attention=attention,
        settings=plans,
        own=own_plan,
        chosen=next(fitting, None),
    )
