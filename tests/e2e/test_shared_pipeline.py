"""Real input through the whole shared-tokenizer pipeline, against the teacher in memory.

GSM8K conversations, the real Qwen3 tokenizer, two chat templates that differ, a teacher with random
weights and the real vocabulary. The cache at k = V must give the losses that a plain transformers
forward of both CompDemo halves gives in this process, and the default cache, whose payload
`hidden` is replayed, must come close to them and train.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml

from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildConfig, make_plan
from stage1_teacher.prepare import make_plan as make_prepare_plan
from stage1_teacher.prepare import run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage2_student.attention import BY_ROWS
from stage2_student.batches import Batch, BatchReader, InputForm
from stage2_student.compatibility import candidates_reading
from stage2_student.losses import ce_loss, kl_loss, tidal_loss
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.student import Student
from stage2_student.teacher_rows import TeacherReading
from tide_cache.alignment import payload_positions, teacher_partners
from tide_cache.cache import Cache, open_cache
from tide_cache.geometry import block_diffusion_mask
from tide_cache.manifest import CacheManifest
from tide_cache.payloads import open_codecs
from tide_cache.rows import PremaskedRow, table_to_rows
from tide_cache.store import Store
from tide_cache.tails import Tail
from tide_cache.verify import verify_set

VOCAB_ROWS, BLOCK_SIZE, MASK_ID = 151936, 32, 151669
TEACHER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One prepared set, its caches by (comp_demo, k), and the teacher that made them."""

    folder: Path
    premasked: Path
    teacher: Any
    shared_vocab_size: int

    def build(
        self, *, comp_demo: bool, num_workers: int = 1, name: str = "cache", **payload: Any
    ) -> Cache:
        """Build a cache; `payload`: keys of the config, by default the default payloads."""
        output = self.folder / f"{name}-{comp_demo}"
        config = BuildConfig.model_validate(
            {
                "teacher": {
                    "model": str(self.folder / "teacher"),
                    "dtype": "float32",
                    "block_size": BLOCK_SIZE,
                },
                "comp_demo": comp_demo,
                "hidden": {"fit_positions": 256},
                "fidelity_positions": 32,
                **payload,
            }
        )
        plan = make_plan(config, open_cache(self.premasked), str(output))
        run_build(plan, num_workers=num_workers)
        return open_cache(output)


def tiny_qwen3(seed: int, **changes: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | changes
    config = Qwen3Config(
        vocab_size=VOCAB_ROWS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        **sizes,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # logits that differ, not a flat softmax
    return model


@pytest.fixture(scope="module")
def pipeline(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("shared-pipeline")
    tokenizer = str(shared_dir / "tokenizers/qwen3")
    lines = (shared_dir / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda r: len(r["question"]) + len(r["answer"]))
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[40:43]:
            file.write(json.dumps({"prompt": row["question"], "response": row["answer"]}) + "\n")
    teacher = tiny_qwen3(0)
    teacher.save_pretrained(folder / "teacher")
    tiny_qwen3(1).save_pretrained(folder / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (shared_dir / "tokenizers/qwen3" / name).read_bytes()
        for model in ("teacher", "student"):
            (folder / model / name).write_bytes(data)
    config = PrepareConfig.model_validate(
        {
            "sources": str(folder / "chat.jsonl"),
            "student": {"tokenizer": tokenizer, "max_length": 128},
            "teacher": {
                "tokenizer": tokenizer,
                "max_length": 160,
                "chat_template": TEACHER_TEMPLATE,
            },
            "block_size": BLOCK_SIZE,
            "num_views": 2,
            "samples_per_shard": 2,
        }
    )
    plan, encoder = make_prepare_plan(config)
    manifest = run_prepare(plan, str(folder / "premasked"), encoder=encoder, num_workers=1)
    assert manifest.counts["num_samples"] == 3
    assert manifest.shared_vocab_size is not None
    yield Pipeline(
        folder=folder,
        premasked=folder / "premasked",
        teacher=teacher,
        shared_vocab_size=manifest.shared_vocab_size,
    )


@torch.no_grad()
def online_logits(teacher: Any, row: PremaskedRow, *, comp_demo: bool) -> torch.Tensor:
    """The teacher's logits at the row's payload positions, by plain forwards of [x0, xt]."""
    partner_L = teacher_partners(row.alignment_RX, len(row.student_ids_L))
    clean = torch.from_numpy(row.teacher_ids_L.astype(np.int64))
    num_positions = len(clean)
    mask = torch.from_numpy(block_diffusion_mask(num_positions, BLOCK_SIZE, "x0_xt"))[None, None]
    position = torch.arange(num_positions).repeat(2)[None]
    half_b_L = row.student_mask_L & ~row.half_a_L
    passes = [half_b_L, row.half_a_L] if comp_demo else [row.student_mask_L]
    answers: dict[int, torch.Tensor] = {}
    for masked_L in passes:
        students = [p for p in np.flatnonzero(masked_L).tolist() if partner_L[p] >= 0]
        noised = clean.clone()
        noised[partner_L[students]] = MASK_ID
        logits = teacher(
            input_ids=torch.cat([clean, noised])[None],
            attention_mask={"full_attention": mask},
            position_ids=position,
        ).logits[0, num_positions:]
        answers |= {p: logits[partner_L[p]] for p in students}
    positions = payload_positions(row.student_mask_L, row.alignment_RX).tolist()
    return torch.stack([answers[p] for p in positions])


def every_logit(k: int) -> dict[str, Any]:
    """The payload that loses nothing."""
    candidates = {"codec": "raw", "k": k, "mean_logits_positions": 50}
    return {"payloads": ["candidates"], "candidates": candidates, "fidelity_positions": 0}


def mean_kl(logits_QV: torch.Tensor, other_QV: torch.Tensor) -> float:
    """KL(first || second) on average over positions, in nats."""
    logp_QV = torch.log_softmax(logits_QV.double(), dim=-1)
    logq_QV = torch.log_softmax(other_QV.double(), dim=-1)
    return float((logp_QV.exp() * (logp_QV - logq_QV)).sum(dim=-1).mean())


def all_rows(cache: Cache, view: int) -> list[PremaskedRow]:
    return table_to_rows(cache.read_rows(view, range(cache.num_samples)), "positions")


def read_batch(cache: Cache, view: int, tail: Literal["auto"] | Tail = "uniform") -> Batch:
    manifest = cache.manifest
    assert isinstance(manifest, CacheManifest)
    codecs = open_codecs(cache.store, manifest)
    reader = BatchReader(
        cache,
        form=InputForm(
            block_size=BLOCK_SIZE,
            mask_token_id=MASK_ID,
            attention=BY_ROWS,
            device=torch.device("cpu"),
        ),
        teacher=TeacherReading(
            alignment="positions",
            candidates=candidates_reading(cache, codecs, tail=tail),
        ),
    )
    return reader.read(view, np.arange(cache.num_samples))


@torch.no_grad()
def plain_student_logits(model: Any, row: PremaskedRow) -> torch.Tensor:
    """The student's logits at all masked positions, by a whole forward of [xt, x0]."""
    clean = torch.from_numpy(row.student_ids_L.astype(np.int64))
    num_positions = len(clean)
    noised = clean.clone()
    noised[torch.from_numpy(row.student_mask_L)] = MASK_ID
    mask = torch.from_numpy(block_diffusion_mask(num_positions, BLOCK_SIZE, "xt_x0"))
    logits = model(
        input_ids=torch.cat([noised, clean])[None],
        attention_mask={"full_attention": mask[None, None]},
        position_ids=torch.arange(num_positions).repeat(2)[None],
    ).logits[0, :num_positions]
    return logits[torch.from_numpy(row.student_mask_L)]


@pytest.mark.parametrize("comp_demo", [True, False])
def test_cached_losses_and_logits_equal_the_online_ones(
    pipeline: Pipeline, comp_demo: bool
) -> None:
    num_ids = pipeline.shared_vocab_size
    cache = pipeline.build(comp_demo=comp_demo, name="exact", **every_logit(num_ids))
    view = 1
    rows = all_rows(cache, view)
    online = [online_logits(pipeline.teacher, row, comp_demo=comp_demo) for row in rows]
    online_QV = torch.cat(online)[:, :num_ids]
    batch = read_batch(cache, view)
    teacher = batch.teacher.candidates
    assert teacher is not None

    # Every decoded row's logits are those of the plain forwards.
    torch.testing.assert_close(teacher.dense(1.0), online_QV, rtol=1e-5, atol=1e-5)
    for index, t in enumerate((1.0, 2.0)):
        expected = torch.logsumexp(online_QV / t, dim=-1)
        torch.testing.assert_close(teacher.logsumexp_PT[:, index], expected, rtol=1e-6, atol=1e-6)

    model = tiny_qwen3(1)
    student_PV = torch.cat([plain_student_logits(model, row) for row in rows])
    with_payload_P = torch.cat(
        [
            torch.from_numpy(teacher_partners(r.alignment_RX, len(r.student_ids_L)) >= 0)[
                torch.from_numpy(r.student_mask_L)
            ]
            for r in rows
        ]
    )
    timestep_P = torch.cat([torch.full((int(r.student_mask_L.sum()),), r.timestep) for r in rows])
    labels_P = torch.cat(
        [torch.from_numpy(r.student_ids_L.astype(np.int64))[r.student_mask_L] for r in rows]
    )
    num_labelled = torch.tensor([len(r.student_ids_L) - r.prompt_length for r in rows])
    student_QV, timestep_Q = student_PV[with_payload_P], timestep_P[with_payload_P]
    expected = {
        "ce": ce_loss(student_PV, labels_P, timestep_P, labelled_per_row_B=num_labelled),
        "kl": kl_loss(student_QV, online_QV, temperature=2.0, direction="forward"),
        "reverse_kl": kl_loss(student_QV, online_QV, temperature=2.0, direction="reverse"),
        "tidal": tidal_loss(student_QV, online_QV, timestep_Q, progress=0.3, temperature=2.0),
    }
    model.set_attn_implementation(BY_ROWS)
    student = Student(model)
    with torch.no_grad():
        hidden_PD = student(
            batch.input_ids_1N,
            batch.position_ids_1N,
            batch.attention_mask,
            batch.masked_index_P,
        )
        objective = Objective(ObjectiveConfig(losses=dict.fromkeys(expected, 1.0)))
        cached = objective(
            hidden_PD, student.head_VD, batch, objective.denominators(batch), progress=0.3
        )
    for name, loss in expected.items():
        assert cached.terms[name].item() == pytest.approx(loss.item(), rel=1e-5), name  # type: ignore[index]
    assert with_payload_P.sum() < len(with_payload_P), "some positions should have no partner"


def test_default_payloads_replay_the_teacher(pipeline: Pipeline) -> None:
    """Sixteen exact ids and rounded hidden states against every logit of the plain forwards.

    A random teacher says nearly the same of every mask, so the rounding has to be fine for the
    replay to say more than the mean of all answers.
    """
    cache = pipeline.build(
        comp_demo=True,
        name="fine",
        hidden={"fit_positions": 256, "nats": 1e-7},
        fidelity_positions=0,
    )
    manifest = cache.manifest
    assert isinstance(manifest, CacheManifest)
    assert [payload.name for payload in manifest.payloads] == ["candidates", "hidden"]
    rows = all_rows(cache, 1)
    online = [online_logits(pipeline.teacher, row, comp_demo=True) for row in rows]
    online_QV = torch.cat(online)[:, : pipeline.shared_vocab_size]
    teacher = read_batch(cache, 1, tail="auto").teacher.candidates
    assert teacher is not None
    assert teacher.tail == "hidden"
    for t in (1.0, 2.0):
        found = mean_kl(online_QV / t, teacher.dense(t) / t)
        alike = mean_kl(online_QV / t, online_QV.mean(dim=0, keepdim=True) / t)
        assert found < alike / 10, f"T = {t}: {found:.2g} nats, the mean alone {alike:.2g}"


def test_comp_demo_changes_the_answers(pipeline: Pipeline) -> None:
    """A merged cache is not the single pass's: the other half is revealed."""
    two, one = (pipeline.build(comp_demo=c) for c in (True, False))
    a, b = (read_batch(cache, 1).teacher.candidates for cache in (two, one))
    assert a is not None
    assert b is not None
    assert (a.logsumexp_PT - b.logsumexp_PT).abs().max() > 1e-3


def test_one_and_three_workers_write_the_same_bytes(pipeline: Pipeline) -> None:
    first = pipeline.build(comp_demo=True, num_workers=1, name="one").url
    second = pipeline.build(comp_demo=True, num_workers=3, name="three").url
    files = sorted(str(p.relative_to(first)) for p in Path(first).rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(second)) for p in Path(second).rglob("*.*"))
    for name in files:
        assert (Path(first) / name).read_bytes() == (Path(second) / name).read_bytes(), name


def test_the_cache_is_sound_and_trains_through_the_command(pipeline: Pipeline) -> None:
    cache = pipeline.build(comp_demo=True)
    report = verify_set(Store(cache.url))
    assert report.ok, report.problems
    assert report.num_payload_entries == cache.manifest.counts["num_payload_positions"]
    path = pipeline.folder / "train.yaml"
    config = {
        "output": str(pipeline.folder / "run"),
        "student": {"init": str(pipeline.folder / "student")},
        "objective": {"losses": ["ce", "taid_aligned"], "timestep_weight": "midrange"},
        "stream": {"batch_size": 2},
        "optimizer": {"learning_rate": 1e-2},
        "metrics": {"every": 1},
        "max_steps": 20,
    }
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "stage2_student", str(path), "--cache", cache.url, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 20
    lines = (pipeline.folder / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(losses) == 20
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    assert (pipeline.folder / "run/final/model.safetensors").is_file()
