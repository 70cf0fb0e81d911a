"""How a student's layers are run: what they keep for the backward, and whether they are compiled.

Neither is part of what is learnt. Activation checkpointing keeps one hidden state per layer and
computes the layer again in the backward: the same numbers to the bit, for a third more computing.
`compile` fuses each layer by torch.compile, one layer at a time, so that all layers of a model
share what is compiled; it is told to expect sequences of any length, because batches vary.
"""

from typing import TYPE_CHECKING

from stage2_student.student_source import StudentConfig

if TYPE_CHECKING:
    from transformers import Qwen3ForCausalLM


def set_up_layers(model: "Qwen3ForCausalLM", config: StudentConfig) -> "Qwen3ForCausalLM":
    """Apply the config's choices to a loaded model and return it. Names of weights stay."""
    if config.activation_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:  # its name in earlier releases of transformers 5
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    return model
