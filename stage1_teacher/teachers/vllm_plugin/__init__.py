"""What vLLM loads: model classes that score masked positions, under names of their own.

`pip install` puts `register` under the entry point group `vllm.general_plugins`, so that every
process of an engine, the workers of tensor parallelism included, knows the classes. It only names
them: vLLM imports the modules here when a checkpoint's `architectures` ask for one, and nothing
else ever does. Run with vLLM 0.32.
"""

import functools
import os

# transformers class of a family (`families.Family.class_name`) -> the class here that serves it.
ARCHITECTURES = {
    "Qwen3ForCausalLM": "TideQwen3Scorer",
    "Qwen2ForCausalLM": "TideQwen2Scorer",
    "LlamaForCausalLM": "TideLlamaScorer",
    "Glm4MoeForCausalLM": "TideGlm4MoeScorer",
}
# Set by the backend for the processes of its own engines.
ENGINE_VARIABLE = "TIDE_ENGINE"
# Where the checkpoint's `config.json` tells the worker how it is asked.
SETTINGS_FIELD = "tide_scorer"


def register() -> None:
    """Tell vLLM's registry of the classes; harmless when called again.

    In a process of our own engines, also see to it that it does not outlive its parent.
    """
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in ARCHITECTURES.values():
        if name not in known:
            ModelRegistry.register_model(name, f"{__name__}.models:{name}")
    if os.environ.get(ENGINE_VARIABLE):
        _exit_with_parent()


@functools.cache
def _exit_with_parent() -> None:
    """End an engine's process with the build that started it: killed, it could not stop it."""
    from tide_cache.parent_watch import exit_with_parent

    exit_with_parent()
