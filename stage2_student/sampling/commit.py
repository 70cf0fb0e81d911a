"""One denoising step without the model: choose tokens, draw noise, commit the surest of them.

Reference and fast sampler share these lines; what they compute logits from is what differs.

Shapes: B rows, N positions of a block, P positions of any rows, V vocabulary.
"""

import hashlib
import math

import torch
from torch import Tensor


def row_generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    """Return the stream that draws for prompt number `index`.

    A stream a prompt: its draws depend on seed, number and device type, and on how many were drawn
    before, never on the company it is in.
    """
    digest = hashlib.sha256(f"tide generate {seed} {index}".encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise, float64: in float32 the smallest draws would cut its tail off."""
    uniform = torch.rand(shape, dtype=torch.float64, device=generator.device, generator=generator)
    return -torch.log(-torch.log(uniform))


def choose(
    logits_PV: Tensor, *, temperature: float = 0.0, noise_PV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the chosen tokens, int64 (P,), and their probabilities, float32 (P,).

    The likeliest token, or with `noise_PV` one drawn at `temperature` by the Gumbel-max trick. The
    probability is that at temperature 1 whatever it was drawn at. Any leading shape will do.
    """
    if noise_PV is None:
        chosen_P = logits_PV.argmax(-1)
    else:
        chosen_P = (logits_PV.double() + temperature * noise_PV).argmax(-1)
    return chosen_P, logits_PV.softmax(-1).gather(-1, chosen_P[..., None])[..., 0]


def commit(
    block_BN: Tensor,
    chosen_BN: Tensor,
    confidence_BN: Tensor,
    *,
    masked_BN: Tensor,
    num_reveal_B: Tensor,
    threshold: float | None,
) -> Tensor:
    """Return the block with its most confident masks replaced by the chosen tokens.

    `masked_BN` bool says where there is a mask to fill; elsewhere nothing changes. Row b commits
    `num_reveal_B[b]` of them, and with `threshold` also all that are above it. Ties go to the
    leftmost. A position whose chosen token is the mask token stays a mask.
    """
    confidence_BN = confidence_BN.masked_fill(~masked_BN, -math.inf)
    best_BN = confidence_BN.argsort(dim=-1, descending=True, stable=True)
    is_ranked_BN = torch.arange(block_BN.shape[1], device=block_BN.device) < num_reveal_B[:, None]
    reveal_BN = torch.zeros_like(masked_BN).scatter(1, best_BN, is_ranked_BN)
    if threshold is not None:
        reveal_BN |= confidence_BN > threshold
    return torch.where(reveal_BN & masked_BN, chosen_BN, block_BN)
