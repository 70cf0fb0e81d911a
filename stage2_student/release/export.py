"""A student for others: a run's final student or a checkpoint as one folder that loads anywhere.

The folder holds weights, config, modeling code, tokenizer, the training record and the card, and
nothing of the optimiser. Before it appears it is loaded again through the modeling code that
travels with it and asked for logits: they must be those of the checkpoint. No code of the folder
read from is run; the copy that is checked is this package's own file, byte for byte.

Shapes: B rows, L positions, V ids.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stage2_student import checkpoints
from stage2_student.json_files import read_json_object
from stage2_student.release.benchmark_results import Score
from stage2_student.release.model_card import CARD, write_card
from stage2_student.release.modeling_a2d_qwen3 import A2DQwen3LMHeadModel
from stage2_student.release.released_format import (
    MODELING_FILE,
    RELEASED_MODEL_TYPE,
    WEIGHTS_FILE,
    make_tokenizer_portable,
    save_released,
)
from stage2_student.release.training_record import (
    RECORD_FILE,
    TrainingRecord,
    read_record,
    write_record,
)
from stage2_student.student import build_without_storage, check_weights, load_model
from stage2_student.student_source import read_model_config
from tide_cache.errors import CompatibilityError, ConfigError, TideError

if TYPE_CHECKING:
    from transformers import Qwen3Config, Qwen3ForCausalLM

DtypeName = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FINAL = "final"
_CONFIG = "config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
_WRITTEN = (_CONFIG, WEIGHTS_FILE, MODELING_FILE, RECORD_FILE, CARD, *_TOKENIZER_FILES)
_NUM_ROWS, _NUM_POSITIONS = 2, 48
# Both sides run the same kernels on the same numbers.
TOLERANCE = 1e-5
OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportPlan:
    """What is to be exported: a student's folder, read as far as its headers.

    `num_steps` is None where the folder does not say how far it was trained.
    """

    folder: Path
    config_values: dict[str, Any]
    model_config: "Qwen3Config"
    record: TrainingRecord | None
    dtype: DtypeName
    num_parameters: int

    @property
    def num_steps(self) -> int | None:
        """How many steps the student was trained."""
        return None if self.record is None else self.record.steps_done

    @property
    def tokenizer_files(self) -> list[str]:
        """The tokenizer's files that are there."""
        return [name for name in _TOKENIZER_FILES if (self.folder / name).is_file()]

    @property
    def weight_bytes(self) -> int:
        """How many bytes the weights take."""
        return self.num_parameters * DTYPES[self.dtype].itemsize

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "source": str(self.folder),
            "steps": self.num_steps,
            "dtype": self.dtype,
            "num_parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "has_record": self.record is not None,
            "has_tokenizer": bool(self.tokenizer_files),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written, and how far its logits are from the checkpoint's."""

    output: str
    size_bytes: int
    max_difference: float

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def find_student(path: Path) -> Path:
    """Return the folder of a run's final student, of its newest checkpoint, or the folder itself.

    Raises ConfigError where there is none of them.
    """
    if (path / _CONFIG).is_file():
        return path
    if (path / FINAL / _CONFIG).is_file():
        return path / FINAL
    present = checkpoints.list_checkpoints(path)
    if not present:
        raise ConfigError(
            f"{path}: holds no student (no {_CONFIG}, no {FINAL}/, no {checkpoints.FOLDER}/)",
            hint="name the output folder of a run, or a folder such as "
            "OUTPUT/checkpoints/step-00000500",
        )
    return present[-1]


def plan_export(path: Path, *, dtype: DtypeName | None = None) -> ExportPlan:
    """Read what is to be exported, no weights. `dtype` defaults to that of the checkpoint.

    Raises ConfigError, FormatError, and CompatibilityError where it is no block-diffusion student.
    """
    folder = find_student(path)
    values = read_json_object(folder / _CONFIG)
    if values.get("model_type") != RELEASED_MODEL_TYPE:
        raise CompatibilityError(
            f"{folder / _CONFIG}: model_type: expected {RELEASED_MODEL_TYPE!r}, got "
            f"{values.get('model_type')!r}",
            hint="only students of tide-train, and released ones, can be exported",
        )
    model_config = read_model_config(values, where=str(folder))
    check_weights(folder, model_config)
    model = build_without_storage(model_config)
    return ExportPlan(
        folder=folder,
        config_values=values,
        model_config=model_config,
        record=read_record(folder),
        dtype=dtype or _stored_dtype(values, folder),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def export(
    plan: ExportPlan,
    output: Path,
    *,
    load_from: str | None = None,
    scores: tuple[Score, ...] = (),
    on_stage: OnStage = lambda _: None,
) -> ExportReport:
    """Write the folder, whole or not at all, replacing an earlier export.

    `load_from` is the name under which the card says it is loaded (default: the folder's own).
    Raises ConfigError where other files are in the way, TideError where the written folder does not
    give the checkpoint's logits, StorageError when the disk is full.
    """
    require_free(output, plan.folder)
    on_stage("load")
    model = load_model(
        plan.folder,
        plan.model_config,
        dtype=DTYPES[plan.dtype],
        attention_implementation="sdpa",
    ).eval()
    differences = []

    def write(folder: Path) -> None:
        on_stage("write")
        save_released(
            model,
            None,
            folder,
            block_size=plan.config_values.get("block_size"),
            mask_token_id=plan.config_values.get("mask_token_id"),
        )
        for name in plan.tokenizer_files:
            shutil.copyfile(plan.folder / name, folder / name)
        if _TOKENIZER_CONFIG in plan.tokenizer_files:
            make_tokenizer_portable(folder)
        if plan.record is not None:
            write_record(plan.record, folder)
        write_card(folder, plan.record, load_from=load_from or output.name, scores=scores)
        on_stage("verify")
        differences.append(_verify(model, folder))

    checkpoints.publish_folder(output, write)
    return ExportReport(
        output=str(output),
        size_bytes=sum(path.stat().st_size for path in output.iterdir()),
        max_difference=differences[0],
    )


def require_free(output: Path, source: Path) -> None:
    """Raise ConfigError unless `output` is new, empty, or an earlier export."""
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise ConfigError(f"{output}: holds the student that is exported", hint="name another one")
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"{output}: expected a folder, got a file")
    others = sorted(path.name for path in output.iterdir() if path.name not in _WRITTEN)
    if others:
        raise ConfigError(
            f"{output}: holds files that are no export's (first: {others[0]})",
            hint="name a new folder",
        )


@torch.no_grad()
def _verify(model: "Qwen3ForCausalLM", folder: Path) -> float:
    """Return the largest difference of the folder's logits from the model's."""
    theirs = A2DQwen3LMHeadModel.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, attn_implementation="sdpa"
    ).eval()
    ids_BL = _fixed_ids(model.config.vocab_size)
    visible_11LL = torch.ones(1, 1, _NUM_POSITIONS, _NUM_POSITIONS, dtype=torch.bool)
    expected_BLV = model(input_ids=ids_BL, attention_mask={"full_attention": visible_11LL}).logits
    found_BLV = theirs(input_ids=ids_BL).logits
    difference = float((found_BLV.float() - expected_BLV.float()).abs().max())
    if found_BLV.dtype != expected_BLV.dtype or not difference <= TOLERANCE:
        raise TideError(
            f"{folder}: loaded again, its logits differ from the checkpoint's by {difference:.2g} "
            f"(expected at most {TOLERANCE:g}); nothing was exported",
            hint="this should not be: please report it with the versions of torch and transformers",
        )
    return difference


def _fixed_ids(vocab_size: int) -> Tensor:
    """Return the same ids each time, int64 (B, L), spread over the vocabulary."""
    count = torch.arange(_NUM_ROWS * _NUM_POSITIONS)
    return (count * 7919 % vocab_size).reshape(_NUM_ROWS, _NUM_POSITIONS)


def _stored_dtype(values: dict[str, Any], folder: Path) -> DtypeName:
    name = values.get("dtype") or values.get("torch_dtype")
    if name in ("float32", "bfloat16"):
        return name  # type: ignore[no-any-return]
    raise CompatibilityError(
        f"{folder / _CONFIG}: dtype: expected float32 or bfloat16, got {name!r}",
        hint="choose one of them with --dtype",
    )
