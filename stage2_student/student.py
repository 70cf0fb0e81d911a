"""The student: a stock Qwen3 asked about the masked positions of packed rows, and how it is loaded.

The transformer stops at the final hidden states of the masked positions, and output head and losses
are one function (`fused`), so that logits exist for a slice of P positions instead of B x 2L (each
is 0.6 MB at 151,936 ids). That function runs inside `forward`, where wrappers that spread or gather
parameters (DDP, FSDP2) see every use of them. Weights come strictly: every tensor named and shaped
as the config says.

Shapes: N packed tokens, P masked positions of all rows, D hidden, V ids.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from stage2_student.attention import AttentionMask
from stage2_student.fused import TableGradient
from stage2_student.student_source import StudentSource, fetch_weights, weight_files
from tide_cache.errors import CompatibilityError, FormatError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Qwen3Config, Qwen3ForCausalLM

logger = logging.getLogger(__name__)
_HEAD = "lm_head.weight"
# Hidden states at masked positions (P, D), the head (V, D), and where a tied head's gradient goes.
HeadLosses = Callable[[Tensor, Tensor, TableGradient | None], Any]


class Student(nn.Module):
    """A Qwen3 seen as a block-diffusion model."""

    def __init__(self, model: "Qwen3ForCausalLM") -> None:
        super().__init__()
        self.model = model

    @property
    def head_VD(self) -> Tensor:
        """The output head, float (V, D); the embedding itself where they are tied."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def forward(
        self,
        input_ids_1N: Tensor,
        position_ids_1N: Tensor,
        attention_mask: AttentionMask,
        masked_index_P: Tensor,
        losses: HeadLosses | None = None,
    ) -> Any:
        """Return the final hidden states at the masked positions, float (P, D).

        `masked_index_P` int64 counts packed tokens; each predicts the token at its own position,
        without a shift. With `losses` return what it makes of hidden states and head.
        """
        table = None
        if losses is not None and self._is_tied and torch.is_grad_enabled():
            table = TableGradient()
            embedded_1ND: Tensor = _TiedEmbedding.apply(  # type: ignore[no-untyped-call]
                input_ids_1N, self.head_VD, table
            )
        else:
            embedded_1ND = self.model.get_input_embeddings()(input_ids_1N)
        hidden_1ND: Tensor = self.model.model(
            inputs_embeds=embedded_1ND,
            attention_mask={"full_attention": attention_mask},
            position_ids=position_ids_1N,
            use_cache=False,
        ).last_hidden_state
        hidden_PD = hidden_1ND[0].index_select(0, masked_index_P)
        return hidden_PD if losses is None else losses(hidden_PD, self.head_VD, table)

    @property
    def _is_tied(self) -> bool:
        return self.head_VD is self.model.get_input_embeddings().weight


class _TiedEmbedding(torch.autograd.Function):
    """Look up rows of a table; backward, add to the gradient that the output head left behind."""

    @staticmethod
    def forward(ctx: Any, ids_1N: Tensor, table_VD: Tensor, table: TableGradient) -> Tensor:
        ctx.ids_1N, ctx.table, ctx.shape, ctx.dtype = ids_1N, table, table_VD.shape, table_VD.dtype
        return functional.embedding(ids_1N, table_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1ND: Tensor) -> tuple[None, Tensor, None]:
        found_VD, ctx.table.value_VD = ctx.table.value_VD, None
        if found_VD is None:
            found_VD = gradient_1ND.new_zeros(ctx.shape, dtype=ctx.dtype)
        gradient_ND = gradient_1ND.flatten(0, 1).to(ctx.dtype)
        return None, found_VD.index_add_(0, ctx.ids_1N.flatten(), gradient_ND), None


def load_student(
    source: StudentSource, *, dtype: torch.dtype, attention_implementation: str, seed: int
) -> "Qwen3ForCausalLM":
    """Load the student's weights, or draw them from `seed` for `init: random`. On the CPU.

    Raises CompatibilityError where weights and config do not fit, FormatError for a broken file.
    """
    from transformers import Qwen3ForCausalLM

    config = source.model_config
    if source.folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Qwen3ForCausalLM._from_config(
                config, dtype=dtype, attn_implementation=attention_implementation
            )
    model = load_model(
        fetch_weights(source),
        config,
        dtype=dtype,
        attention_implementation=attention_implementation,
    )
    if source.needs_mask_row or source.num_embedding_rows > config.vocab_size:
        give_mask_row(model, source.mask_token_id)
    return model


def load_model(
    folder: "Path", config: "Qwen3Config", *, dtype: torch.dtype, attention_implementation: str
) -> "Qwen3ForCausalLM":
    """Load a checkpoint folder strictly into the stock class. Errors: see `load_student`."""
    from transformers import Qwen3ForCausalLM
    from transformers.utils import logging as transformers_logging

    check_weights(folder, config)
    transformers_logging.disable_progress_bar()
    # dtype goes through from_pretrained: model.to(bfloat16) would round the rotary frequencies too.
    return Qwen3ForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention_implementation,
        use_safetensors=True,
        local_files_only=True,
    )


def build_without_storage(config: "Qwen3Config") -> "Qwen3ForCausalLM":
    """Build a model whose parameters have shapes but no memory."""
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


def check_weights(folder: "Path", config: "Qwen3Config") -> None:
    """Compare the names and shapes in a checkpoint's headers with the config. Reads no weights.

    Raises CompatibilityError naming what is missing, left over or of another shape.
    """
    expected = {
        name: tuple(t.shape) for name, t in build_without_storage(config).state_dict().items()
    }
    present = _shapes(weight_files(folder))
    if config.tie_word_embeddings:
        expected.pop(_HEAD, None)
        present.pop(_HEAD, None)
    problems = [f"{name} is missing" for name in expected.keys() - present.keys()]
    problems += [f"{name} is not part of the model" for name in present.keys() - expected.keys()]
    problems += [
        f"{name}: expected shape {expected[name]}, got {present[name]}"
        for name in expected.keys() & present.keys()
        if expected[name] != present[name]
    ]
    if problems:
        raise CompatibilityError(
            f"{folder}: {len(problems)} tensors do not fit config.json; first: {min(problems)}",
            hint="the folder mixes two checkpoints, or a download is not complete",
        )


@torch.no_grad()
def give_mask_row(model: "Qwen3ForCausalLM", mask_token_id: int) -> None:
    """Give a new mask token the mean embedding of the ids before it, growing the table if it must.

    The mean is where a token without meaning of its own starts: all others are equally near.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    if mask_token_id >= num_rows:
        logger.info("embedding grown from %d to %d rows", num_rows, mask_token_id + 1)
        model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    tables = [model.get_input_embeddings().weight]
    if not model.config.tie_word_embeddings:
        tables.append(model.get_output_embeddings().weight)
    for table_VD in tables:
        mean_D = table_VD[:mask_token_id].float().mean(dim=0)
        table_VD[mask_token_id] = mean_D.to(table_VD.dtype)


def _shapes(files: "list[Path]") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    shapes[name] = tuple(shard.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{path}: not a whole safetensors file: {error}", hint="download it again"
            ) from error
    return shapes
