"""How an explicit attention mask reaches transformers, and the proof that it is obeyed.

Masks are bool [B, 1, N, N] with True for visible, under sdpa: eager attention *adds* a bool mask,
which is wrong in silence (0.5 in the logits). Qwen classes take a ready mask in a dict by layer
type, Llama and Glm4Moe as a 4D tensor, and each release could change that, so every teacher is
probed once when it is loaded: a token that may look ahead must feel the token ahead, and one that
may not must not.
"""

from typing import Any

import torch

from stage1_teacher.teachers.layouts import Roles, visible
from tide_cache.errors import CompatibilityError


def run_body(
    model: Any,
    ids_BN: torch.Tensor,
    position_ids_BN: torch.Tensor,
    mask_BNN: torch.Tensor,
    *,
    mask_by_layer_type: bool,
) -> torch.Tensor:
    """Run the model up to its last norm under an explicit mask.

    Returns the hidden states (B, N, d) that the output head reads.
    """
    mask = mask_BNN[:, None]
    output = model.model(
        input_ids=ids_BN,
        position_ids=position_ids_BN,
        attention_mask={"full_attention": mask} if mask_by_layer_type else mask,
        use_cache=False,
    )
    hidden_BNd: torch.Tensor = output.last_hidden_state
    return hidden_BNd


def batch_mask(
    stream_BN: torch.Tensor, block_BN: torch.Tensor, order_BN: torch.Tensor
) -> torch.Tensor:
    """Build the masks of a batch from the tokens' roles. Returns bool (B, N, N)."""
    query = Roles(
        stream=stream_BN[:, :, None], block=block_BN[:, :, None], order=order_BN[:, :, None]
    )
    key = Roles(stream=stream_BN[:, None], block=block_BN[:, None], order=order_BN[:, None])
    mask_BNN: torch.Tensor = visible(query, key)
    return mask_BNN


@torch.no_grad()
def check_mask_is_obeyed(model: Any, *, mask_by_layer_type: bool) -> None:
    """Run four tokens twice, the last one changed, and compare which hidden states moved.

    Token 0 may see the last token, token 1 may not (not even through token 0). Raises
    CompatibilityError where the installed transformers does otherwise.
    """
    embedding_Vd = model.get_input_embeddings().weight
    device = embedding_Vd.device
    ids_BN = torch.zeros((2, 4), dtype=torch.long, device=device)
    ids_BN[1, 3] = _least_like_token_0(embedding_Vd)
    mask_NN = torch.eye(4, dtype=torch.bool, device=device)
    mask_NN[0, 3] = mask_NN[1, 2] = True
    hidden_BNd = run_body(
        model,
        ids_BN,
        torch.arange(4, device=device).expand(2, 4),
        mask_NN.expand(2, 4, 4),
        mask_by_layer_type=mask_by_layer_type,
    ).float()
    if not bool(torch.isfinite(hidden_BNd).all()):
        return  # broken weights: scoring names the request that meets them
    change_N = (hidden_BNd[0] - hidden_BNd[1]).abs().amax(dim=-1)
    noise = 1e-2 * float(change_N[3])
    if not (change_N[0] > 0 and change_N[1] <= noise and change_N[2] <= noise):
        import transformers

        raise CompatibilityError(
            f"transformers {transformers.__version__}: {type(model).__name__} does not obey an "
            "explicit attention mask, so the teacher would be queried wrongly",
            hint="install a version that the project supports (see its constraints.txt)",
        )


def _least_like_token_0(embedding_Vd: torch.Tensor) -> torch.Tensor:
    first_Vd = embedding_Vd[:256].float()
    distance_V: torch.Tensor = (first_Vd - first_Vd[0]).norm(dim=-1)
    return distance_V.argmax()
