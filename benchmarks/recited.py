"""A student that recites: trained for minutes on a few texts, so that it is sure of what follows.

What a threshold saves, and what it changes, depends on how sure the student is; random weights are
sure of nothing and a good student of much. This one has read a few docstrings of the standard
library again and again, as block diffusion has it: [xt, x0] under the training mask, cross entropy
over masked positions. It is the favourable end; `make demo` has students that must think.

Shapes: B rows, L positions, P masked positions, V ids.
"""

import logging

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3ForCausalLM

from benchmarks.published_step import Shape
from tide_cache.geometry import block_diffusion_mask

logger = logging.getLogger(__name__)


def train_to_recite(
    rows_BL: Tensor,
    *,
    prompt_tokens: int,
    mask_token_id: int,
    block_size: int,
    hidden_size: int,
    num_layers: int,
    steps: int,
    batch_size: int = 8,
) -> Qwen3ForCausalLM:
    """Train from random weights on rows of one length, int64 (B, L); prompts are never masked."""
    torch.manual_seed(0)
    shape = Shape(hidden_size=hidden_size, num_layers=num_layers, vocab_size=mask_token_id + 1)
    model = shape.build(dtype=torch.float32, device=torch.device("cpu")).train()
    assert isinstance(model, Qwen3ForCausalLM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        batch_BL = rows_BL[torch.randint(len(rows_BL), (batch_size,))]
        loss = _loss(model, batch_BL, prompt_tokens, mask_token_id, block_size)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            logger.info("step %d of %d: loss %.3f", step, steps, loss.item())
    return model.eval()


def _loss(
    model: Qwen3ForCausalLM,
    batch_BL: Tensor,
    prompt_tokens: int,
    mask_token_id: int,
    block_size: int,
) -> Tensor:
    """Return the mean cross entropy over masked positions, at a timestep of each row's own."""
    num_rows, length = batch_BL.shape
    timestep_B1 = torch.rand(num_rows, 1).clamp(0.1, 1.0)
    masked_BL = torch.rand(num_rows, length) < timestep_B1
    masked_BL[:, :prompt_tokens] = False
    noised_BL = batch_BL.masked_fill(masked_BL, mask_token_id)
    visible = torch.from_numpy(block_diffusion_mask(length, block_size))
    position_L = torch.arange(length)
    hidden = model.model(
        input_ids=torch.cat([noised_BL, batch_BL], dim=1),
        attention_mask={"full_attention": visible[None, None]},
        position_ids=torch.cat([position_L, position_L])[None],
        use_cache=False,
    ).last_hidden_state[:, :length]
    logits_PV = model.lm_head(hidden[masked_BL])
    return functional.cross_entropy(logits_PV, batch_BL[masked_BL])
