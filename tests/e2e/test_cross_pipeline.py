"""Real input through the whole cross-tokenizer pipeline, against the teacher in memory.

GSM8K conversations, Qwen3 for the student, the LLaDA2 stand-in for the teacher, a random checkpoint
in LLaDA2's layout. The cached chunk log-probs and each of the four CALM losses must be those of a
plain forward of both CompDemo halves through the stock class in this process.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from stage2_student.losses import calm_loss
from stage2_student.objective import Objective
from stage2_student.objective_config import ObjectiveConfig
from stage2_student.student import Student
from stage2_student.teacher_rows import TeacherReading
from tests.e2e.test_shared_pipeline import plain_student_logits, tiny_qwen3
from tests.teacher_checkpoints import edit_config, make_model, write_checkpoint
from tide_cache.alignment import chunk_active
from tide_cache.cache import Cache, open_cache
from tide_cache.manifest import CacheManifest
from tide_cache.payloads import open_codecs
from tide_cache.rows import PremaskedRow, table_to_rows
from tide_cache.store import Store
from tide_cache.verify import verify_set

TEACHER_ROWS, TEACHER_MASK, STUDENT_MASK, BLOCK_SIZE = 157184, 156895, 151669, 32
CALM_LOSSES = ("calm", "reverse_calm", "calm_tidal", "reverse_calm_tidal")


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One prepared set and the teacher, on disk and in memory."""

    folder: Path
    teacher: Any

    def build(self, *, comp_demo: bool) -> Cache:
        output = self.folder / f"cache-{comp_demo}"
        config = BuildConfig.model_validate(
            {
                "teacher": {"model": str(self.folder / "teacher"), "dtype": "float32"},
                "comp_demo": comp_demo,
            }
        )
        plan = make_plan(config, open_cache(self.folder / "premasked"), str(output))
        run_build(plan, num_workers=1)
        return open_cache(output)


@pytest.fixture(scope="module")
def pipeline(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("cross-pipeline")
    tokenizers = {
        "student": shared_dir / "tokenizers/qwen3",
        "teacher": shared_dir / "tokenizers/bailing-standin",
    }
    lines = (shared_dir / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted(map(json.loads, lines), key=lambda r: len(r["question"]) + len(r["answer"]))
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as file:
        for row in rows[60:64]:
            file.write(json.dumps({"prompt": row["question"], "response": row["answer"]}) + "\n")
    teacher = make_model("llada2_moe", vocab_size=TEACHER_ROWS, max_position_embeddings=1024)
    write_checkpoint(folder / "teacher", "llada2_moe", teacher, num_files=2)
    edit_config(folder / "teacher", mask_token_id=TEACHER_MASK)
    tiny_qwen3(1).save_pretrained(folder / "student")
    for side, source in tokenizers.items():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / side / name).write_bytes((source / name).read_bytes())
    config = PrepareConfig.model_validate(
        {
            "sources": str(folder / "chat.jsonl"),
            "student": {"tokenizer": str(tokenizers["student"]), "max_length": 128},
            "teacher": {"tokenizer": str(tokenizers["teacher"]), "max_length": 256},
            "alignment": "chunks",
            "block_size": BLOCK_SIZE,
            "num_views": 2,
            "samples_per_shard": 2,
        }
    )
    plan, encoder = make_prepare_plan(config)
    manifest = run_prepare(plan, str(folder / "premasked"), encoder=encoder, num_workers=1)
    assert manifest.counts["num_samples"] == 4
    assert manifest.counts["num_active_chunks"] > 50
    yield Pipeline(folder=folder, teacher=teacher)


@torch.no_grad()
def online_logprobs(teacher: Any, row: PremaskedRow, *, comp_demo: bool) -> torch.Tensor:
    """The teacher's log-prob of each active chunk, by plain bidirectional forwards. (C,)."""
    active = row.alignment_RX[
        chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length)
    ].tolist()
    clean = torch.from_numpy(row.teacher_ids_L.astype(np.int64))
    everyone = torch.ones(1, 1, len(clean), len(clean), dtype=torch.bool)
    attend = torch.zeros(everyone.shape).masked_fill(~everyone, float("-inf"))  # eager: no bools
    found = torch.zeros(len(active))
    for hides_half_a in (True, False) if comp_demo else (None,):
        # A pass hides the chunks of one half, or of both, and answers for what it hides.
        hidden = [
            index
            for index, (start, *_) in enumerate(active)
            if hides_half_a is None or bool(row.half_a_L[start]) == hides_half_a
        ]
        noised = clean.clone()
        for index in hidden:
            noised[active[index][2] : active[index][3]] = TEACHER_MASK
        logits = teacher(input_ids=noised[None], attention_mask=attend).logits[0]
        logprob = logits.gather(1, clean[:, None])[:, 0] - logits.logsumexp(-1)
        for index in hidden:
            found[index] = logprob[active[index][2] : active[index][3]].sum()
    return found


def all_rows(cache: Cache, view: int) -> list[PremaskedRow]:
    return table_to_rows(cache.read_rows(view, range(cache.num_samples)), "chunks")


def read_batch(cache: Cache, view: int) -> Batch:
    assert isinstance(cache.manifest, CacheManifest)
    form = InputForm(
        block_size=BLOCK_SIZE,
        mask_token_id=STUDENT_MASK,
        attention=BY_ROWS,
        device=torch.device("cpu"),
    )
    codecs = open_codecs(cache.store, cache.manifest)
    reading = TeacherReading(alignment="chunks", chunks=codecs.chunks)
    reader = BatchReader(cache, form=form, teacher=reading)
    return reader.read(view, np.arange(cache.num_samples))


@pytest.mark.parametrize("comp_demo", [True, False])
def test_cached_chunk_losses_equal_the_online_ones(pipeline: Pipeline, comp_demo: bool) -> None:
    cache, view = pipeline.build(comp_demo=comp_demo), 0
    rows = all_rows(cache, view)
    online_C = torch.cat(
        [online_logprobs(pipeline.teacher, row, comp_demo=comp_demo) for row in rows]
    )
    batch = read_batch(cache, view)
    assert batch.teacher.chunks is not None
    torch.testing.assert_close(batch.teacher.chunks.logprob_C, online_C, rtol=1e-5, atol=1e-5)

    model = tiny_qwen3(1)
    student_C, timestep_C = [], []
    for row in rows:
        logits_PV = plain_student_logits(model, row)
        labels_P = torch.from_numpy(row.student_ids_L.astype(np.int64))[row.student_mask_L]
        logprob_P = logits_PV.gather(1, labels_P[:, None])[:, 0] - logits_PV.logsumexp(-1)
        place = np.cumsum(row.student_mask_L) - 1
        active_C = chunk_active(row.student_mask_L, row.alignment_RX, row.prompt_length)
        for start, end, *_ in row.alignment_RX[active_C].tolist():
            assert row.student_mask_L[start:end].all()
            student_C.append(logprob_P[place[start] : place[end - 1] + 1].sum())
            timestep_C.append(row.timestep)
    student, timestep = torch.stack(student_C), torch.tensor(timestep_C)
    objective = Objective(ObjectiveConfig(losses=dict.fromkeys(CALM_LOSSES, 1.0)))
    model.set_attn_implementation(BY_ROWS)
    plain = Student(model)
    with torch.no_grad():
        hidden_PD = plain(
            batch.input_ids_1N,
            batch.position_ids_1N,
            batch.attention_mask,
            batch.masked_index_P,
        )
        cached = objective(
            hidden_PD, plain.head_VD, batch, objective.denominators(batch), progress=0.4
        )
    for name in CALM_LOSSES:
        expected = calm_loss(
            student,
            online_C,
            temperature=2.0,
            direction="reverse" if name.startswith("reverse") else "forward",
            timestep_C=timestep,
            progress=0.4,
            interpolate=name.endswith("tidal"),
        )
        assert cached.terms[name].item() == pytest.approx(expected.item(), rel=1e-5), name  # type: ignore[index]


@pytest.mark.parametrize("loss", CALM_LOSSES)
def test_every_loss_trains_through_the_command(pipeline: Pipeline, loss: str) -> None:
    cache = pipeline.build(comp_demo=True)
    report = verify_set(Store(cache.url))
    assert report.ok, report.problems
    path = pipeline.folder / f"{loss}.yaml"
    published = loss.replace("calm", "alm").replace("tidal", "taid")  # the published flag's name
    config = {
        "output": str(pipeline.folder / f"run-{loss}"),
        "student": {"init": str(pipeline.folder / "student")},
        "objective": {"losses": ["ce", published]},
        "stream": {"batch_size": 4},
        "optimizer": {"learning_rate": 1e-2},
        "metrics": {"every": 1},
        "max_steps": 6,
    }
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "stage2_student", str(path), "--cache", cache.url, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (pipeline.folder / f"run-{loss}/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines if "loss" in json.loads(line)]
    assert len(losses) == 6
    assert all(np.isfinite(line[f"loss/{loss}"]) for line in losses)
    assert losses[-1]["loss/ce"] < losses[0]["loss/ce"]
