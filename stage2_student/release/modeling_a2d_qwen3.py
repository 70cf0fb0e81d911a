"""A block-diffusion Qwen3 as `AutoModelForMaskedLM` loads it (model type `a2d-qwen3`).

This file travels with saved students as their modeling code, so beside torch it imports
transformers alone and runs on 4.57 and 5.x. The model is Qwen3 without the causal mask: every
position sees all others unless `attention_mask` says otherwise. A mask (rows, keys) hides padding;
a mask (rows or 1, 1, queries, keys) is taken as it is, which is how block diffusion passes its
layout.
"""

import inspect
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

# Keys and values of earlier calls: transformers 5.24 gave `past_key_values` another name.
_LATER_NAME = "cache"
_NAMES = inspect.signature(Qwen3Model.forward).parameters
_PAST = _LATER_NAME if _LATER_NAME in _NAMES else "past_key_values"


class A2DQwen3Config(Qwen3Config):  # type: ignore[misc]
    """Qwen3's config under the released model type."""

    model_type = "a2d-qwen3"


class A2DQwen3Model(Qwen3Model):  # type: ignore[misc]
    """Qwen3's layers with bidirectional attention."""

    config_class = A2DQwen3Config

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the layers; `attention_mask` as the module says, or Qwen3's own dict of masks."""
        later = options.pop(_LATER_NAME, None)
        past = later if past_key_values is None else past_key_values
        if not isinstance(attention_mask, dict):
            tokens = input_ids if input_ids is not None else inputs_embeds
            if tokens is None:
                raise ValueError("give input_ids or inputs_embeds")
            num_past = 0 if past is None else past.get_seq_length()
            mask = self._explicit_mask(attention_mask, tokens, num_past)
            attention_mask = dict.fromkeys(("full_attention", "sliding_attention"), mask)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{_PAST: past},
            **options,
        )

    def _explicit_mask(self, mask: Any, tokens: torch.Tensor, num_past: int) -> Any:
        num_rows, num_queries = tokens.shape[:2]
        if mask is None:
            shape = (1, 1, num_queries, num_queries + num_past)
            mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        elif torch.is_tensor(mask) and mask.ndim == 2:
            mask = mask[:, None, None, :].bool().expand(num_rows, 1, num_queries, mask.shape[1])
        is_bool = torch.is_tensor(mask) and mask.dtype == torch.bool
        if is_bool and self.config._attn_implementation == "eager":
            # Eager attention adds the mask to the scores: a bool one would be silently wrong.
            lowest = torch.finfo(self.dtype).min
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, lowest)
        return mask


class A2DQwen3LMHeadModel(Qwen3ForCausalLM):  # type: ignore[misc]
    """The layers with the output head. Logits stand at the position they predict: no shift."""

    config_class = A2DQwen3Config

    def __init__(self, config: A2DQwen3Config) -> None:
        super().__init__(config)
        self.model = A2DQwen3Model(config)
        self.post_init()
