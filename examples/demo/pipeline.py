"""The stages of the small pipelines, each through the product's own functions, in one folder.

Generated rows -> premasked sets -> a teacher trained on the first of them -> caches of its answers
to the others. `make demo` and `make paper-mini` are made of these; what is finished is kept when a
stage runs again, because the product's own commands keep it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from examples.demo.config import PipelineConfig
from examples.demo.tasks import Split, generate_rows, write_jsonl
from examples.demo.tokenizer import CHARACTERS, PAIRS, save_tokenizer
from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildConfig
from stage1_teacher.build_plan import make_plan as plan_build
from stage1_teacher.prepare import make_plan as plan_prepare
from stage1_teacher.prepare import run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage2_student.config import TrainConfig
from stage2_student.trainer import train
from tide_cache.cache import open_cache
from tide_cache.config import parse_config
from tide_cache.errors import TideError
from tide_cache.manifest import CacheManifest, Manifest
from tide_cache.store import Store
from tide_cache.verify import Report, verify_set

# What the teacher learns from, what it is asked about, and two sets that nobody learns from.
Part = Literal["teacher", "student", "held_out", "validation"]
PARTS: tuple[Part, ...] = get_args(Part)
TOKENIZERS = {"characters": CHARACTERS, "pairs": PAIRS}
_HELD_OUT_TIMESTEPS = {"num": 1, "min": 0.49, "max": 0.51}


class Pipeline:
    """A small pipeline in a folder, stage by stage."""

    def __init__(self, config: PipelineConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> str:
        """Return a path in the pipeline's folder."""
        return str(self.folder / name)

    def write_data(self, parts: Sequence[Part] = ("teacher", "student", "held_out")) -> None:
        """Write the rows of each part as JSONL, and both tokenizers."""
        seed = self.config.data.seed
        for part in parts:
            split, num_rows, wrong = self._rows_of(part)
            rows = generate_rows(split, num_rows, seed=seed, wrong_fraction=wrong)
            write_jsonl(self.folder / f"{part}.jsonl", rows)
        for tokenizer in {self.config.teacher_tokenizer, self.config.student_tokenizer}:
            save_tokenizer(TOKENIZERS[tokenizer], self.folder / f"tokenizer-{tokenizer}")

    def _rows_of(self, part: Part) -> tuple[Split, int, float]:
        data = self.config.data
        rows: dict[Part, tuple[Split, int, float]] = {
            "teacher": ("teacher", data.teacher_rows, 0.0),
            "student": ("student", data.student_rows, data.wrong_fraction),
            "held_out": (self.config.split, data.held_out_rows, 0.0),
            "validation": ("validation", data.held_out_rows, 0.0),
        }
        return rows[part]

    def prepare(self, part: Part) -> Manifest:
        """Make `premasked-PART`; what the teacher learns from has its own tokens on both sides."""
        masking, config = self.config.masking, self.config
        teachers = self.path(f"tokenizer-{config.teacher_tokenizer}")
        students = self.path(f"tokenizer-{config.student_tokenizer}")
        for_teacher, held_out = part == "teacher", part in ("held_out", "validation")
        timesteps: Any = masking.teacher_timesteps if for_teacher else masking.student_timesteps
        values = {
            "sources": [{"path": self.path(f"{part}.jsonl"), "license": "Apache-2.0"}],
            "student": {
                "tokenizer": teachers if for_teacher else students,
                "max_length": masking.max_length,
            },
            "teacher": {"tokenizer": teachers, "max_length": masking.max_length},
            "alignment": "positions" if for_teacher or config.is_shared else "chunks",
            "block_size": masking.block_size,
            "num_views": 1 if held_out else masking.num_views,
            "timesteps": _HELD_OUT_TIMESTEPS if held_out else timesteps.model_dump(),
        }
        plan, encoder = plan_prepare(parse_config(values, PrepareConfig, where="demo: prepare"))
        return run_prepare(plan, self.path(f"premasked-{part}"), encoder=encoder)

    def train_teacher(self) -> None:
        """Train the teacher, or find it trained."""
        values = {
            **self.config.teacher_train,
            "output": self.path("teacher"),
            "device": "cpu",
        }
        values["student"] = {
            **values["student"],
            "tokenizer": self.path(f"tokenizer-{self.config.teacher_tokenizer}"),
            "mask_token": TOKENIZERS[self.config.teacher_tokenizer].mask,
        }
        config = parse_config(values, TrainConfig, where="demo: teacher_train")
        train(config, self.path("premasked-teacher"))

    def build(
        self, part: Part, changes: dict[str, Any] | None = None, *, cache: str | None = None
    ) -> CacheManifest:
        """Ask the teacher about a part and write `cache` (default: `cache-PART`)."""
        values = {**self.config.build, **(changes or {})}
        values["teacher"] = {
            "block_size": self.config.masking.block_size,
            "device": "cpu",
            "dtype": "float32",
            **values.get("teacher", {}),
            "model": self.path("teacher/final"),
        }
        config = parse_config(values, BuildConfig, where="demo: build")
        premasked = open_cache(self.path(f"premasked-{part}"))
        return run_build(plan_build(config, premasked, self.path(cache or f"cache-{part}")))

    def build_held_out(self) -> CacheManifest:
        """Write `cache-held_out` of whole distributions, asked as students are: its KL is exact."""
        if not self.config.is_shared:
            return self.build("held_out")
        shared = open_cache(self.path("premasked-held_out")).manifest.shared_vocab_size
        return self.build(
            "held_out",
            {
                "payload": None,
                "payloads": ["candidates"],
                "candidates": {"codec": "raw", "k": shared, "mean_logits_positions": 0},
                "comp_demo": False,
            },
        )

    def verify(self, name: str) -> Report:
        """Check a set of the folder; raises TideError where it is not sound."""
        report = verify_set(Store(self.path(name)))
        if not report.ok:
            raise TideError(f"{name}: {report.problems[0]}")
        return report

    def student_config(self, output: Path, *, seed: int, objective: dict[str, Any]) -> TrainConfig:
        """Return what `tide-train` reads to train a student with some losses."""
        values = {**self.config.student_train, "output": str(output), "seed": seed, "device": "cpu"}
        values["student"] = {
            **values["student"],
            "tokenizer": self.path(f"tokenizer-{self.config.student_tokenizer}"),
            "mask_token": TOKENIZERS[self.config.student_tokenizer].mask,
        }
        values["objective"] = {**values.get("objective", {}), **objective}
        return parse_config(values, TrainConfig, where=f"student {output.name}")
