"""Trained students leave the house: other environments load them and compute what we compute.

Each environment is a virtual environment without this project, `.venv-transformers-*` beside the
checkout or those that TIDE_RELEASED_VENVS names (separated by colons), and, always, the installed
one. A real process of each runs `load_released.py` over students that were really trained, as they
left their run and after `tide-train export`. The other side of every comparison is this project's
own model and sampler.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from stage2_student.config import TrainConfig
from stage2_student.release.export import DTYPES, export, plan_export
from stage2_student.sampling.blocks import staircase_mask
from stage2_student.sampling.reference import generate_reference
from stage2_student.sampling.settings import GenerationSettings
from stage2_student.student import load_model
from stage2_student.student_source import read_model_config
from stage2_student.trainer import train
from tests.cache_builders import (
    EOS_ID,
    MASK_ID,
    SetShape,
    Workshop,
    save_tokenizer,
    write_cache,
    write_premasked,
)
from tests.support import PROJECT_ROOT, find_golden

BLOCK = 4
INSTALLED = "installed"
SCRIPT = Path(__file__).with_name("load_released.py")
ARCHITECTURE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
CHAT_TEMPLATE = "{% for m in messages %}word7 {{ m['content'] }} <eos> {% endfor %}"
STUDENTS = ("tied", "tied-checkpoint", "tied-as-bfloat16", "untied", "bfloat16", "golden")
# Under each way of calling: float32, and bfloat16 in units of its last place at a logit of 4
# (2^-5 = 0.03), because another order of the same sum may round the other way.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.0625}


def environments() -> dict[str, Path | None]:
    """The python of each environment by its name, None for one that has to be made first."""
    given = os.environ.get("TIDE_RELEASED_VENVS")
    folders = (
        [Path(folder) for folder in given.split(":")]
        if given
        else sorted(mark.parent for mark in PROJECT_ROOT.glob(".venv-transformers-*/.installed"))
    )
    found: dict[str, Path | None] = {f.name: f / "bin/python" for f in folders}
    return {INSTALLED: Path(sys.executable), **(found or {"separate": None})}


ENVIRONMENTS = environments()


@dataclass(kw_only=True)
class Student:
    """A folder to hand out, the folder that we load ourselves, and what is asked of both."""

    folder: Path
    ours: Path
    dtype: torch.dtype
    request: dict[str, Any]

    @cached_property
    def model(self) -> Qwen3ForCausalLM:
        values = json.loads((self.ours / "config.json").read_text())
        config = read_model_config(values, where="ours")
        return load_model(
            self.ours, config, dtype=self.dtype, attention_implementation="sdpa"
        ).eval()

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        return our_logits(self.model, self.request)

    @cached_property
    def tokens(self) -> list[list[int]]:
        asked = dict(self.request["sampler"])
        ids = {name: asked.pop(name) for name in ("mask_token_id", "eos_token_id")}
        return generate_reference(
            self.model, self.request["prompts"], settings=GenerationSettings(**asked), **ids
        )


def trained(workshop: Workshop, name: str, **student: Any) -> Path:
    """Train a tiny student for real and return the folder of its run."""
    config = workshop.config(
        output=str(workshop.folder / name),
        student={
            "init": "random",
            "tokenizer": str(workshop.tokenizer),
            "architecture": {**ARCHITECTURE, **student.pop("architecture", {})},
            **student,
        },
        optimizer={"learning_rate": 1e-2},
        max_steps=30,
        checkpoints={"every": 10},
    )
    train(TrainConfig.model_validate(config), workshop.cache)
    return workshop.folder / name


def exported(source: Path, output: Path, **options: Any) -> Path:
    report = export(plan_export(source, **options), output)
    assert report.max_difference == 0
    return output


def as_asked(folder: Path, ids: list[list[int]], prompts: list[list[int]], **sampler: int) -> Any:
    text = "a b c word9" if (folder / "tokenizer.json").is_file() else None
    return {
        "folder": str(folder),
        "ids": ids,
        "prompts": prompts,
        "sampler": sampler,
        "text": text,
    }


def add_chat(tokenizer: Path) -> None:
    """Give the tokenizer what those of real students have: special tokens more, a template."""
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    fast.add_special_tokens({"additional_special_tokens": ["word7", "word8"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(tokenizer)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Student]:
    workshop = Workshop(folder=tmp_path_factory.mktemp("students"))
    add_chat(save_tokenizer(workshop.tokenizer))
    write_premasked(workshop.premasked, workshop.tokenizer, SetShape(num_samples=40))
    write_cache(workshop.cache, workshop.premasked)
    tied = trained(workshop, "tied-run")
    untied = {"tie_word_embeddings": False, "rope_theta": 12345.0}
    untied_run = trained(workshop, "untied-run", architecture=untied)
    bfloat16_run = trained(workshop, "bfloat16-run", dtype="bfloat16")
    out = workshop.folder / "out"
    checkpoint = tied / "checkpoints/step-00000020"
    places = {
        "tied": (tied / "final", tied / "final", torch.float32),
        "tied-checkpoint": (exported(checkpoint, out / "c"), checkpoint, torch.float32),
        "tied-as-bfloat16": (
            exported(tied, out / "b", dtype="bfloat16"),
            tied / "final",
            torch.bfloat16,
        ),
        "untied": (exported(untied_run, out / "u"), untied_run / "final", torch.float32),
        "bfloat16": (exported(bfloat16_run, out / "h"), bfloat16_run / "final", torch.bfloat16),
    }
    ids = torch.randint(2, 38, (2, 16), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [row[:length] for row, length in zip(ids * 2, (3, 4, 9, 6), strict=True)]
    sampler = {
        "block_size": BLOCK,
        "mask_token_id": MASK_ID,
        "eos_token_id": EOS_ID,
        "max_new_tokens": 12,
        "num_steps": 9,
    }
    found = {
        name: Student(
            folder=folder,
            ours=ours,
            dtype=dtype,
            request=as_asked(folder, ids, prompts, **sampler),
        )
        for name, (folder, ours, dtype) in places.items()
    }
    golden = find_golden()
    if golden is not None and (golden / "models/student_tiny").is_dir():
        found["golden"] = golden_student(golden / "models/student_tiny", out / "g")
    return found


def golden_student(folder: Path, output: Path) -> Student:
    """The student in the published layout, through our export."""
    expected = load_file(folder / "expected.safetensors")
    steps, new = expected["steps_new_1"].tolist()
    numbers = [n for n in range(12) if expected[f"steps_new_{n}"].tolist() == [steps, new]][:3]
    request = as_asked(
        exported(folder, output),
        expected["train_input"][:2].tolist(),
        [expected[f"prompt_{n}"].tolist() for n in numbers],
        block_size=32,
        mask_token_id=500,
        eos_token_id=511,
        max_new_tokens=new,
        num_steps=steps,
    )
    request["published_tokens"] = [expected[f"output_{n}"].tolist() for n in numbers]
    return Student(folder=output, ours=folder, dtype=torch.float32, request=request)


@pytest.fixture(scope="module", params=list(ENVIRONMENTS))
def answers(
    request: pytest.FixtureRequest,
    students: dict[str, Student],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    """What an environment answers, in one process for all students."""
    python = ENVIRONMENTS[request.param]
    if python is None:
        pytest.skip("no .venv-transformers-*: run 'make test-released', which makes two")
    out = tmp_path_factory.mktemp("answers")
    asked = {name: student.request for name, student in students.items()}
    (out / "request.json").write_text(json.dumps({"students": asked}))
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [str(python), "-I", str(SCRIPT), str(out / "request.json"), str(out)],
        cwd=out,
        env={**kept, **SETTINGS, "HF_HOME": str(out / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((out / "answers.json").read_text())
    assert facts["imported"] == []
    if request.param != INSTALLED:
        assert facts["importable"] == [], "an environment that has this project shows nothing"
    return out, facts


@torch.no_grad()
def our_logits(model: Qwen3ForCausalLM, request: dict[str, Any]) -> dict[str, Tensor]:
    """The logits for each way of calling, from the stock class under explicit masks."""
    ids_BL, block_size = torch.tensor(request["ids"]), request["sampler"]["block_size"]
    num_rows, num_positions = ids_BL.shape

    def logits(ids: Tensor, visible: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, attention_mask={"full_attention": visible}).logits
        return found

    everything = torch.ones(1, 1, num_positions, num_positions, dtype=torch.bool)
    unpadded = everything.expand(num_rows, -1, -1, -1).clone()
    unpadded[1, :, :, num_positions - 5 :] = False
    blocks = staircase_mask(num_positions, block_size, 0)[None, None]
    half = num_positions // (2 * block_size) * block_size
    # Of a cached prefix the hidden states never saw what came later.
    behind = everything.clone()
    behind[:, :, :half, half:] = False
    expected = {
        "none": logits(ids_BL, everything),
        "padding": logits(ids_BL, unpadded),
        "blocks": logits(ids_BL, blocks),
        "prefix": logits(ids_BL[:, :half], everything[:, :, :half, :half]),
        "behind_a_cached_prefix": logits(ids_BL, behind)[:, half:],
    }
    return expected | {
        "blocks_added": expected["blocks"],
        "eager_blocks": expected["blocks"],
        "layers": expected["none"],
        "stock": expected["none"],
    }


def ask(answers: tuple[Path, dict[str, Any]], students: dict[str, Student], name: str) -> Any:
    if name not in students:
        pytest.skip("no golden vectors: set TIDE_GOLDEN to a folder with index.json")
    out, facts = answers
    return students[name], facts["students"][name], out / f"{name}.safetensors"


@pytest.mark.parametrize("name", STUDENTS)
def test_the_logits_are_ours(
    answers: tuple[Path, dict[str, Any]], students: dict[str, Student], name: str
) -> None:
    student, facts, path = ask(answers, students, name)
    assert facts["class"] == "A2DQwen3LMHeadModel"
    assert facts["problems"] == 0  # no weight missing, left over or of another shape
    assert facts["dtype"] == str(student.dtype)
    found, expected = load_file(path), student.logits
    assert found.keys() == expected.keys()
    assert not torch.allclose(expected["none"], expected["blocks"], atol=0.1)  # masks matter
    for how, logits in expected.items():
        assert found[how].dtype == student.dtype
        difference = float((found[how].float() - logits.float()).abs().max())
        assert difference <= TOLERANCES[student.dtype], how


@pytest.mark.parametrize("name", STUDENTS)
def test_a_plain_sampler_gives_our_tokens(
    answers: tuple[Path, dict[str, Any]], students: dict[str, Student], name: str
) -> None:
    student, facts, _ = ask(answers, students, name)
    assert facts["tokens"] == student.tokens
    said = {token for tokens in student.tokens for token in tokens}
    assert len(said) > 3  # it has something to say
    if name == "golden":
        assert student.tokens == student.request["published_tokens"]


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "golden"])
def test_config_and_tokenizer_are_ours(
    answers: tuple[Path, dict[str, Any]], students: dict[str, Student], name: str
) -> None:
    student, facts, _ = ask(answers, students, name)
    assert facts["rope_theta"] == (12345.0 if name == "untied" else 1e6)
    assert (facts["block_size"], facts["mask_token_id"]) == (BLOCK, MASK_ID)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(student.ours)
    text = student.request["text"]
    assert facts["text_ids"] == tokenizer(text).input_ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
    assert facts["chat_ids"] == chat
    assert len(chat) == 6
    assert facts["tokenizer_mask_id"] == MASK_ID
    assert {"word7", "word8"} <= set(facts["special_tokens"])


def test_the_stored_type_is_where_each_release_reads_it(students: dict[str, Student]) -> None:
    for student in students.values():
        values = json.loads((student.folder / "config.json").read_text())
        told = str(student.dtype).removeprefix("torch.")
        assert (values["dtype"], values["torch_dtype"]) == (told, told)
        assert values["rope_theta"] == values["rope_parameters"]["rope_theta"]
        stored = load_file(student.folder / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {DTYPES[told]}
        assert ("lm_head.weight" in stored) != values["tie_word_embeddings"]
