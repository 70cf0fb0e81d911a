"""A training step as the published trainer computes it, without a teacher and with one in memory.

Written from the description of that trainer, for measurement beside ours (`benchmarks.step`). What
it does, and what therefore has its cost here: the student runs over all 2 L positions of [xt, x0]
and applies its output head to all of them, and the logits of the first half enter the cross
entropy, whatever is masked. Online distillation adds a teacher that is asked twice a step, once for
each CompDemo half, with full logits each time; the two answers are merged, and TIDAL (or, for a
teacher with another tokenizer, reverse CALM) sees whole (P, V) distributions.

All variants of one `Material` share its batch, masks and student: they differ in what they compute.

Shapes: B rows, L positions, S = 2 L, P masked positions of all rows, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from tide_cache.geometry import block_diffusion_mask

_TEMPERATURE, _LAMBDA = 2.0, 0.5
_EPSILON = 1e-6  # added to the timestep a loss is divided by
_MASK_TOKEN_ID = 151_669


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a Qwen3 or, with `moe`, of LLaDA2.0-mini, which is Glm4Moe to transformers."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    head_dim: int = 64
    num_heads: int | None = None
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    tied: bool = True
    moe: bool = False

    def build(self, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return a model with random weights under `sdpa` (masks are explicit here)."""
        import transformers

        heads = self.num_heads or self.hidden_size // self.head_dim
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size or 3 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.num_kv_heads or max(1, heads // 2),
            "head_dim": self.head_dim,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
            "pad_token_id": None,
            # Logits of a spread near 1, as of a model that says something.
            "initializer_range": self.hidden_size**-0.5,
        }
        name = "Glm4Moe" if self.moe else "Qwen3"
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 6e5 if self.moe else 1e6}
        extra = {"rope_parameters": {**rope, "partial_rotary_factor": 0.5}, **_LLADA2}
        config = getattr(transformers, f"{name}Config")(
            **common, **(extra if self.moe else {"rope_parameters": rope})
        )
        with torch.device(device):
            model: nn.Module = getattr(transformers, f"{name}ForCausalLM")._from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        if self.moe:
            model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
        return model


_LLADA2: dict[str, Any] = {
    "moe_intermediate_size": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "num_mtp_layers": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowBatch:
    """Rows of one length. `half_a_BL` is the CompDemo half that the first pass reveals."""

    ids_BL: Tensor
    masked_BL: Tensor
    labelled_BL: Tensor
    half_a_BL: Tensor
    timestep_B: Tensor
    mask_token_id: int
    block_size: int

    @property
    def timestep_P(self) -> Tensor:
        """The timestep of each masked position."""
        return self.timestep_B[:, None].expand_as(self.ids_BL)[self.masked_BL]

    def noised_BL(self, masked_BL: Tensor) -> Tensor:
        """Return the ids with the mask token at `masked_BL`."""
        return torch.where(masked_BL, self.mask_token_id, self.ids_BL)


def draw_batch(
    *,
    num_rows: int,
    length: int,
    prompt_length: int,
    vocab_size: int,
    block_size: int,
    timesteps: list[float],
    device: torch.device,
) -> RowBatch:
    """Draw ids, masks of the labelled part and halves, from a fixed seed. Rows take timesteps."""
    random = torch.Generator().manual_seed(0)
    mask_token_id = min(_MASK_TOKEN_ID, vocab_size - 1)
    ids_BL = torch.randint(mask_token_id, (num_rows, length), generator=random)
    timestep_B = torch.tensor([timesteps[row % len(timesteps)] for row in range(num_rows)])
    labelled_BL = (torch.arange(length) >= prompt_length).expand(num_rows, -1)
    drawn_BL = torch.rand((num_rows, length), generator=random) < timestep_B[:, None]
    masked_BL = drawn_BL & labelled_BL
    half_a_BL = masked_BL & (torch.rand((num_rows, length), generator=random) < 0.5)
    return RowBatch(
        ids_BL=ids_BL.to(device),
        masked_BL=masked_BL.to(device),
        labelled_BL=labelled_BL.to(device),
        half_a_BL=half_a_BL.to(device),
        timestep_B=timestep_B.to(device),
        mask_token_id=mask_token_id,
        block_size=block_size,
    )


class Variant(Protocol):
    """One way of computing a step, timed in two parts."""

    name: str

    def forward_backward(self) -> Tensor:
        """Leave gradients at the student and return the detached loss."""
        ...

    def update(self) -> None:
        """Change the student's weights and drop the gradients."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Material:
    """What variants share: a student, the optimiser of its weights, a batch, the number format."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    batch: RowBatch
    autocast: bool

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.batch.ids_BL.device

    def update(self) -> None:
        """Take the optimiser's step."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class PublishedCrossEntropy:
    """No teacher: the head over 2 L positions, cross entropy over L, weighted at masked ones."""

    name = "published: cross entropy"

    def __init__(self, material: Material) -> None:
        self.material = material
        self._mask = _layout_mask(material.batch, "xt_x0")

    def forward_backward(self) -> Tensor:
        """Do the forward and backward of one step."""
        material = self.material
        with torch.autocast(material.device.type, torch.bfloat16, enabled=material.autocast):
            logits_BLV = self._student_logits()
            loss = self._cross_entropy(logits_BLV) + self._distillation(logits_BLV)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(self) -> None:
        """Do the optimiser's part."""
        self.material.update()

    def _student_logits(self) -> Tensor:
        batch = self.material.batch
        both_BS = torch.cat([batch.noised_BL(batch.masked_BL), batch.ids_BL], dim=1)
        logits_BSV = _logits(self.material.student, both_BS, self._mask, twice=True)
        return logits_BSV[:, : batch.ids_BL.shape[1]]

    def _cross_entropy(self, logits_BLV: Tensor) -> Tensor:
        batch = self.material.batch
        nll_BL = functional.cross_entropy(
            logits_BLV.transpose(1, 2), batch.ids_BL, reduction="none"
        )
        weight_BL = batch.masked_BL / (batch.timestep_B[:, None] + _EPSILON)
        return (nll_BL * weight_BL).sum() / batch.labelled_BL.sum()

    def _distillation(self, _logits_BLV: Tensor) -> Tensor:
        return torch.zeros((), device=self.material.device)


class PublishedTidal(PublishedCrossEntropy):
    """A teacher with the student's tokenizer in memory, asked about [x0, xt] for each half."""

    name = "published: cross entropy + online TIDAL"

    def __init__(self, material: Material, teacher: nn.Module) -> None:
        super().__init__(material)
        self.teacher = teacher
        self._teacher_mask = _layout_mask(material.batch, "x0_xt")

    def _distillation(self, logits_BLV: Tensor) -> Tensor:
        batch = self.material.batch
        teacher_PV = self._merged_logits()[batch.masked_BL]
        student_PV = logits_BLV[batch.masked_BL].float()
        num_shared = min(student_PV.shape[1], teacher_PV.shape[1])
        student_PV, teacher_PV = student_PV[:, :num_shared], teacher_PV[:, :num_shared].float()
        share_P1 = (_LAMBDA * (1 - batch.timestep_P))[:, None]
        mixed_PV = (1 - share_P1) * student_PV.detach() + share_P1 * teacher_PV
        target_PV = (mixed_PV / _TEMPERATURE).softmax(dim=-1)
        logprob_PV = (student_PV / _TEMPERATURE).log_softmax(dim=-1)
        kl_PV = functional.kl_div(logprob_PV, target_PV, reduction="none")
        return _TEMPERATURE**2 * kl_PV.sum(dim=-1).mean()

    @torch.no_grad()
    def _merged_logits(self) -> Tensor:
        """Return the teacher's logits (B, L, V), each half's from the pass that hides it."""
        batch = self.material.batch
        hides_b_BLV = self._pass(batch.masked_BL & ~batch.half_a_BL)
        hides_a_BLV = self._pass(batch.half_a_BL)
        return torch.where(batch.half_a_BL[..., None], hides_a_BLV, hides_b_BLV)

    def _pass(self, masked_BL: Tensor) -> Tensor:
        batch = self.material.batch
        both_BS = torch.cat([batch.ids_BL, batch.noised_BL(masked_BL)], dim=1)
        logits_BSV = _logits(self.teacher, both_BS, self._teacher_mask, twice=True)
        return logits_BSV[:, batch.ids_BL.shape[1] :]


class PublishedCalm(PublishedTidal):
    """A teacher with another tokenizer, asked about its own sequence; reverse CALM.

    Every token is a chunk of its own and has the same id for both: what a step costs does not
    depend on how chunks are cut.
    """

    name = "published: cross entropy + online reverse CALM"

    def _distillation(self, logits_BLV: Tensor) -> Tensor:
        batch = self.material.batch
        labels_P1 = batch.ids_BL[batch.masked_BL][:, None]
        teacher_P = _chance(self._merged_logits()[batch.masked_BL], labels_P1)
        student_P = _chance(logits_BLV[batch.masked_BL], labels_P1)
        inside_P = student_P * teacher_P.log()
        return -(inside_P + (1 - student_P) * torch.log1p(-teacher_P)).mean()

    def _pass(self, masked_BL: Tensor) -> Tensor:
        noised_BL = self.material.batch.noised_BL(masked_BL)
        everything = torch.ones_like(noised_BL[0], dtype=torch.bool)
        mask = (everything[:, None] & everything)[None, None]
        return _logits(self.teacher, noised_BL, mask, twice=False)


def _chance(logits_PV: Tensor, labels_P1: Tensor) -> Tensor:
    logprob_P = logits_PV.float().log_softmax(dim=-1).gather(1, labels_P1)[:, 0]
    return (logprob_P / _TEMPERATURE).exp().clamp(1e-7, 1 - 1e-7)


def _layout_mask(batch: RowBatch, order: Literal["xt_x0", "x0_xt"]) -> Tensor:
    length = batch.ids_BL.shape[1]
    visible_SS = torch.from_numpy(block_diffusion_mask(length, batch.block_size, order))
    return visible_SS[None, None].to(batch.ids_BL.device)


def _logits(model: nn.Module, ids_BS: Tensor, mask: Tensor, *, twice: bool) -> Tensor:
    length = ids_BS.shape[1] // (2 if twice else 1)
    position_1S = torch.arange(length, device=ids_BS.device).repeat(2 if twice else 1)[None]
    is_qwen3 = model.config.model_type == "qwen3"  # type: ignore[union-attr]
    logits: Tensor = model(
        input_ids=ids_BS,
        attention_mask={"full_attention": mask} if is_qwen3 else mask,
        position_ids=position_1S,
        use_cache=False,
    ).logits
    return logits
