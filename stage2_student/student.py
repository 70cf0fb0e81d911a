"""The student: a stock Qwen3 asked about masked positions of [xt, x0], and how it is loaded.

`forward` stops at the final hidden states of the masked positions; the output head is applied by
the loss, so that logits exist for P positions instead of B x 2L (one in ten, commonly, and each is
0.6 MB at 151,936 ids). Weights come strictly: every tensor named and shaped as the config says.

Shapes: B rows, L positions, S = 2 L for [xt, x0], P masked positions of all rows, D hidden, V ids.
"""

import logging
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stage2_student.attention import AttentionMask
from stage2_student.student_source import StudentSource, fetch_weights, weight_files
from tide_cache.errors import CompatibilityError, FormatError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Qwen3Config, Qwen3ForCausalLM

logger = logging.getLogger(__name__)
_HEAD = "lm_head.weight"


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
        input_ids_BS: Tensor,
        position_ids_1S: Tensor,
        attention_mask: AttentionMask,
        masked_index_P: Tensor,
    ) -> Tensor:
        """Return the final hidden states at the masked positions, float (P, D).

        `masked_index_P` int64 counts positions through the flattened (B, S); those of the first
        half predict the token at their own position, without a shift.
        """
        hidden_BSD: Tensor = self.model.model(
            input_ids=input_ids_BS,
            attention_mask={"full_attention": attention_mask},
            position_ids=position_ids_1S,
            use_cache=False,
        ).last_hidden_state
        return hidden_BSD.flatten(0, 1).index_select(0, masked_index_P)


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
