"""What a teacher weighs and computes, counted on its own class without any weights.

The model is built without storage from `config.json` alone and its matrices are counted, so that a
family's oddities (shared experts, a dense first layer, few key heads) need no formula of their own.
LLaDA2.0-mini: 16.26e9 parameters, of which 1.11e9 multiply a token, output head included.

Counted: matrix products (2 operations a weight and token), attention scores and their sums (4 a
query, key and channel). Left out: norms, rotations, softmax, the router's sort; under 1%.
"""

import dataclasses
from typing import Any

from stage1_teacher.teachers.checkpoint import Checkpoint
from stage1_teacher.teachers.families import build_config, find_family
from stage1_teacher.teachers.loading import build_without_storage


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """Counts of one model.

    `num_parameters`: all (a tied head once). `num_body_active`: weights that multiply one token
    below the output head. `attention_channels`: heads times head size, over all layers.
    """

    num_parameters: int
    num_body_active: int
    hidden_size: int
    vocab_size: int
    attention_channels: int

    @property
    def num_active(self) -> int:
        """Weights that multiply a token that is scored: body and output head."""
        return self.num_body_active + self.hidden_size * self.vocab_size

    def body_flops(self, num_tokens: float) -> float:
        """Return the operations of the body's matrices on so many tokens."""
        return 2.0 * self.num_body_active * num_tokens

    def attention_flops(self, num_pairs: float) -> float:
        """Return the operations of all attention layers on so many (query, key) pairs."""
        return 4.0 * self.attention_channels * num_pairs

    def head_flops(self, num_scored: float) -> float:
        """Return the operations of the output head at so many positions."""
        return 2.0 * self.hidden_size * self.vocab_size * num_scored


def measure_model(checkpoint: Checkpoint) -> ModelCost:
    """Count a checkpoint's model; only its config is read. Raises CompatibilityError."""
    family = find_family(checkpoint)
    config = build_config(family, checkpoint)
    return count_model(build_without_storage(family.class_name, config, "sdpa"))


def count_model(model: Any) -> ModelCost:
    """Count a transformers `*ForCausalLM`, with or without storage."""
    config = model.config
    embedding = model.get_input_embeddings().weight
    active = 0.0
    for parameter in model.model.parameters():
        if parameter is embedding or parameter.dim() < 2:
            continue  # a look-up, a norm, a bias
        share = 1.0
        if parameter.dim() == 3:  # stacked experts
            assert parameter.shape[0] == config.n_routed_experts
            share = config.num_experts_per_tok / config.n_routed_experts
        active += share * parameter.numel()
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return ModelCost(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_body_active=round(active),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_channels=config.num_hidden_layers * config.num_attention_heads * head_size,
    )
