"""A training step from every payload: losses and all gradients are those of the plain computation.

Plain: each row alone as [xt, x0] with every block, all logits at once, gradients by autograd. The
product's: rows packed without dead blocks, head and losses fused in slices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from stage2_student import fused
from stage2_student.attention import BY_ROWS
from stage2_student.batches import Batch, BatchReader, InputForm
from stage2_student.compatibility import teacher_reading
from stage2_student.forward import batch_losses
from stage2_student.losses import LOSS_NAMES
from stage2_student.objective import Objective
from stage2_student.objective_config import PAYLOAD_OF, ObjectiveConfig
from stage2_student.plain import plain_losses
from stage2_student.student import Student
from tests.builders import run_command
from tests.cache_builders import MASK_ID, SetShape, make_workshop
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import make_model
from tide_cache.cache import Cache, open_cache
from tide_cache.geometry import block_diffusion_mask
from tide_cache.rows import table_to_rows

SHAPE = SetShape(num_samples=14, ragged=True, lone_share=0.4, max_blocks=9)
ROWS = np.arange(1, 13)
DISTILLED = [name for name in LOSS_NAMES if PAYLOAD_OF[name] == "candidates"]
CHUNKED = [name for name in LOSS_NAMES if PAYLOAD_OF[name] == "chunks"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A cache of each payload: two written by hand, two built by a teacher through the commands."""
    found = {}
    for name, options in (
        ("raw", {"k": 7, "mean_logits": True}),
        ("whole", {}),
        ("chunks", {"payloads": ("chunks",)}),
    ):
        alignment: dict[str, Any] = {"alignment": "chunks"} if name == "chunks" else {}
        shape = SetShape(**{**SHAPE.__dict__, **alignment})
        found[name] = make_workshop(tmp_path_factory.mktemp(name), shape, **options).cache
    folder = tmp_path_factory.mktemp("built")
    model = make_model("qwen3", vocab_size=448, max_position_embeddings=512)
    build = {
        "fidelity_positions": 0,
        "candidates": {"mean_logits_positions": 100},
        "hidden": {"fit_positions": 256},
    }
    config = write_pipeline(folder, model, num_rows=16, prepare={}, build=build)
    done = run_command("prepare", config, "-o", folder / "premasked", "--workers", "1")
    assert done.returncode == 0, done.stderr
    for name, settings in (("hidden", ()), ("ranked", ("--set", "payloads=[candidates]"))):
        done = run_command(
            *("build", config, "-p", folder / "premasked", "-o", folder / name, *settings)
        )
        assert done.returncode == 0, done.stderr
        found[name] = folder / name
    return found


@dataclass(frozen=True, kw_only=True)
class Step:
    cache: Cache
    config: ObjectiveConfig
    mask_token_id: int
    model: Qwen3ForCausalLM
    batch: Batch

    def plain(self) -> tuple[Tensor, Any]:
        self.model.set_attn_implementation("sdpa")
        found, block_size = [], self.cache.manifest.block_size
        for row in table_to_rows(self.cache.read_rows(1, ROWS), self.cache.manifest.alignment):
            ids_L = torch.from_numpy(row.student_ids_L.astype(np.int64))
            masked_L = torch.from_numpy(row.student_mask_L)
            visible = torch.from_numpy(block_diffusion_mask(len(ids_L), block_size))
            hidden_SD = self.model.model(
                input_ids=torch.cat([torch.where(masked_L, self.mask_token_id, ids_L), ids_L])[
                    None
                ],
                attention_mask={"full_attention": visible[None, None]},
                position_ids=torch.arange(len(ids_L)).repeat(2)[None],
                use_cache=False,
            ).last_hidden_state[0]
            found.append(hidden_SD[: len(ids_L)][masked_L])
        denominators = Objective(self.config).denominators(self.batch)
        head_VD = self.model.lm_head.weight
        return plain_losses(
            torch.cat(found), head_VD, self.batch, self.config, denominators, progress=0.4
        )

    def fused(self) -> tuple[Tensor, Any]:
        self.model.set_attn_implementation(BY_ROWS)
        losses, _ = batch_losses(
            Student(self.model),
            self.batch,
            Objective(self.config),
            num_ids=len(self.model.lm_head.weight),
            device=torch.device("cpu"),
            progress=0.4,
        )
        return losses.total, losses.terms


def make_step(cache: Cache, losses: Any, *, tied: bool, tail: str = "auto") -> Step:
    config = ObjectiveConfig.model_validate({"losses": losses, "tail": tail})
    mask_token_id = cache.manifest.student.mask_token_id or MASK_ID
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=max(cache.manifest.student.vocab_size, 448) + 3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.2,
            tie_word_embeddings=tied,
        )
    )
    form = InputForm(
        block_size=cache.manifest.block_size,
        mask_token_id=mask_token_id,
        attention=BY_ROWS,
        device=torch.device("cpu"),
    )
    reader = BatchReader(cache, form=form, teacher=teacher_reading(cache, config))
    return Step(
        cache=cache,
        config=config,
        mask_token_id=mask_token_id,
        model=model.train(),
        batch=reader.read(1, ROWS),
    )


def gradients(
    step: Step, losses: Callable[[], tuple[Tensor, Any]]
) -> tuple[Any, dict[str, Tensor]]:
    step.model.zero_grad()
    total, terms = losses()
    total.backward()  # type: ignore[no-untyped-call]
    named = step.model.named_parameters()
    return terms, {name: p.grad.clone() for name, p in named if p.grad is not None}


EVERY = [
    *((kind, name) for kind in ("raw", "whole", "ranked", "hidden") for name in DISTILLED),
    *(("chunks", name) for name in CHUNKED),
    ("raw", "ce"),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "loss"), EVERY)
def test_losses_and_gradients_are_the_plain_ones(
    caches: dict[str, Path], kind: str, loss: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_ROUND_FLOATS_CPU", 4 * 451)
    monkeypatch.setattr(fused.plan_slices, "__defaults__", (9 * 451,))
    losses = {"ce": 0.5, loss: 1.0} if loss != "ce" else {"ce": 1.0}
    step = make_step(open_cache(caches[kind]), losses, tied=tied)
    assert step.batch.num_masked > 40
    expected_terms, expected = gradients(step, step.plain)
    terms, found = gradients(step, step.fused)
    for name, term in expected_terms.items():
        assert float(term) > 0
        assert float(terms[name]) == pytest.approx(float(term), rel=1e-5), name
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("tail", ["uniform", "student", "mean_student", "bucket", "none"])
def test_every_tail(caches: dict[str, Path], tail: str) -> None:
    step = make_step(open_cache(caches["raw"]), {"tidal": 1.0}, tied=True, tail=tail)
    _, expected = gradients(step, step.plain)
    _, found = gradients(step, step.fused)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)
