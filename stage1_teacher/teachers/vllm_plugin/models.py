"""vLLM's own model classes with a pooler that scores and the attention of a diffusion layout.

The computation of a layer stays vLLM's. Added: attention block by block, or WeDLM's order (masked
tokens of a prompt moved behind the observed ones, each with its own position id, under causal
attention), and the answers. How it is asked stands in `config.json` (`SETTINGS_FIELD`), which the
backend writes for the engine.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.glm4_moe import Glm4MoeForCausalLM
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from stage1_teacher.teachers.layouts import Layout
from stage1_teacher.teachers.llada2 import split_tensor
from stage1_teacher.teachers.vllm_plugin import SETTINGS_FIELD
from stage1_teacher.teachers.vllm_plugin.attention import blockwise
from stage1_teacher.teachers.vllm_plugin.pooler import AnswerPooler


class _Scorer:
    """Mixed in before a vLLM class: pooler, layout, order of tokens."""

    # What the vLLM class behind it in the order of resolution has.
    config: Any
    compute_logits: Any
    modules: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        settings = getattr(config, SETTINGS_FIELD)
        self.layout = Layout(settings["layout"])
        self.mask_token_id = int(settings["mask_token_id"])
        self.masked_id = int(config.vocab_size)
        self.pooler = AnswerPooler(
            self.compute_logits,
            vocab_size=config.vocab_size,
            head_slice_mib=settings["head_slice_mib"],
        )
        if self.layout is not Layout.OBSERVED_FIRST:
            has_blocks = self.layout.has_blocks
            self._attend_by_block(settings["block_size"] if has_blocks else None)

    def _attend_by_block(self, block_size: int | None) -> None:
        layers = [module for module in self.modules() if isinstance(module, Attention)]
        assert layers
        for layer in layers:
            layer.attn_backend = blockwise(layer.attn_backend, block_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Run a step of whole prompts; masked tokens last where the layout says so."""
        if self.layout is not Layout.OBSERVED_FIRST:
            return self._forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        is_masked = input_ids == self.masked_id
        input_ids = torch.where(is_masked, self.mask_token_id, input_ids)
        prompt = (positions == 0).cumsum(0)
        order = torch.argsort(2 * prompt + is_masked, stable=True)
        hidden = self._forward(
            input_ids[order], positions[order], intermediate_tensors, inputs_embeds
        )
        restored = torch.empty_like(hidden)
        restored[order] = hidden
        return restored

    def _forward(self, *inputs: Any) -> Any:
        return super().forward(*inputs)  # type: ignore[misc]


class TideQwen3Scorer(_Scorer, Qwen3ForCausalLM, VllmModelForPooling):
    """Qwen3, WeDLM and the released students."""


class TideQwen2Scorer(_Scorer, Qwen2ForCausalLM, VllmModelForPooling):
    """Qwen2."""


class TideLlamaScorer(_Scorer, LlamaForCausalLM, VllmModelForPooling):
    """Llama."""


class TideGlm4MoeScorer(_Scorer, Glm4MoeForCausalLM, VllmModelForPooling):
    """LLaDA2, whose tensors are renamed and cut on their way in."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load LLaDA2's tensors as Glm4Moe's."""

        def routed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                yield from split_tensor(name, tensor, self.config)

        loaded: set[str] = super().load_weights(routed())
        return loaded
