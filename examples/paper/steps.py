"""The commands behind the paper's tables at real size, in order: a plan, nothing is run here.

Every step is one of the product's own commands, resumes by itself when it is run again, and can be
run by hand on whichever machine it suits: `prepare` wants processors, `build` a large GPU, `train`
and `evaluate` one consumer card.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.paper.cells import (
    ABLATIONS,
    AR_MODEL,
    BD3LM_MODEL,
    FOLDER,
    METHODS,
    CacheName,
    Cell,
    Method,
    PipelineName,
    read_cell,
)
from stage1_teacher.prepare_config import PrepareConfig
from tide_cache.config import load_config

Stage = Literal["download", "prepare", "build", "verify", "train", "evaluate", "measure"]
Caches = Literal["one", "published", "both"]
AR_RESULTS = "results_*.json"
TABLE_3 = "table3.json"
_RELEASED_DATA = {
    "shared": "TIDE-dllm/distill_wedlm_sft",
    "cross": "TIDE-dllm/distill_llada2_sft",
}
# Three of lm-eval's own settings for an autoregressive model; examples as in the paper's script.
_AR_TASKS = (
    ("gsm8k_cot,minerva_math,mmlu_pro,hellaswag_gen,mmlu_generative_dream", 0),
    ("humaneval_instruct,mbpp_instruct", 0),
    ("bbh", 3),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is wanted of the tables. `overrides` are [PIPELINE.]SECTION.KEY=VALUE for the
    commands' --set.

    `released` evaluates the released students instead of training; `launch` is put before the
    training command's arguments in place of `tide-train`; `preset`: sizes of table 3.
    """

    output: Path
    pipelines: tuple[PipelineName, ...] = ("shared", "cross")
    tables: tuple[int, ...] = (1, 2, 3)
    caches: Caches = "one"
    released: bool = False
    overrides: tuple[str, ...] = ()
    launch: tuple[str, ...] = ("tide-train",)
    evaluate: tuple[str, ...] = ()
    preset: Literal["real", "small"] = "real"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command. `results`: where, once it is finished, lm-eval's results lie.

    `stdout`: the file that keeps what it prints, and says that it was run.
    """

    stage: Stage
    name: str
    command: tuple[str, ...]
    results: Path | None = None
    stdout: Path | None = None
    pipeline: PipelineName | None = None
    cell: str | None = None

    @property
    def text(self) -> str:
        """The command as a shell reads it."""
        kept = "" if self.stdout is None else f" > {shlex.quote(str(self.stdout))}"
        return shlex.join(self.command) + kept

    @property
    def is_done(self) -> bool:
        """Whether running it again would do it again; all other commands know by themselves."""
        if self.stdout is not None:
            return self.stdout.is_file()
        return self.results is not None and any(self.results.rglob(AR_RESULTS))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """A row that benchmarks are run for, and where its scores go.

    `row` is the paper's name of it, None for a row that the paper does not have.
    """

    label: str
    pipeline: PipelineName | None
    model: str
    folder: Path
    row: str | None
    caches: str = ""


def plan_steps(options: Options) -> list[Step]:
    """Return all steps in the order in which they can run."""
    steps = [step for name in options.pipelines for step in _sets(options, name)]
    steps += [_train(options, cell) for cell in trained_cells(options)]
    steps += [step for model in evaluated_models(options) for step in _evaluate(options, model)]
    if 3 in options.tables:
        steps.append(_table_3(options))
    return steps


def trained_cells(options: Options) -> list[Cell]:
    """Return the cells to train, each once."""
    if options.released:
        return []
    names: list[str] = []
    if 1 in options.tables:
        names += [name for method in _methods(options) for name in _cells(method, options.caches)]
    if 2 in options.tables and "shared" in options.pipelines:
        names += [cell for _, cell in ABLATIONS]
    return [read_cell(name) for name in dict.fromkeys(names)]


def evaluated_models(options: Options) -> list[EvaluatedModel]:
    """Return the rows of tables 1 and 2, each with its model."""
    models = []
    if 1 in options.tables:
        models += [
            _undistilled(options, "AR", AR_MODEL),
            _undistilled(options, "BD3LM", BD3LM_MODEL),
        ]
        models += [m for method in _methods(options) for m in _distilled(options, method)]
    if 2 in options.tables and "shared" in options.pipelines and not options.released:
        models += [_student(options, label, read_cell(cell), None) for label, cell in ABLATIONS]
    return list({model.folder: model for model in reversed(models)}.values())[::-1]


def _sets(options: Options, pipeline: PipelineName) -> Iterator[Step]:
    """Yield the steps up to a verified cache; none where nothing of the pipeline is trained."""
    cells = [cell for cell in trained_cells(options) if cell.pipeline == pipeline]
    if not cells:
        return
    config = FOLDER / pipeline / "pipeline.yaml"
    prepare = load_config(
        config, PrepareConfig, overrides_of(options, "prepare", pipeline), section="prepare"
    )
    if prepare.published is not None:
        data = Path(prepare.published.path)
        yield Step(
            stage="download",
            name=f"{pipeline}: released data",
            command=("hf", "download", _RELEASED_DATA[pipeline], "--repo-type", "dataset",
                     "--local-dir", str(data)),
            pipeline=pipeline,
        )  # fmt: skip
    premasked = options.output / pipeline / "premasked"
    yield Step(
        stage="prepare",
        name=f"{pipeline}: premasked set",
        command=("tide-cache", "prepare", _relative(config), "-o", str(premasked),
                 *_flags(options, "prepare", pipeline)),
        pipeline=pipeline,
    )  # fmt: skip
    first_with: dict[CacheName, Cell] = {}
    for cell in cells:
        first_with.setdefault(cell.cache, cell)
    for name, cell in sorted(first_with.items()):  # the build sections of its cells are equal
        cache = options.output / pipeline / name
        yield Step(
            stage="build",
            name=f"{pipeline}: {name}",
            command=("tide-cache", "build", _relative(config if name == "cache" else cell.path),
                     "-p", str(premasked),
                     "-o", str(cache), *_flags(options, "build", pipeline)),
            pipeline=pipeline,
            cell=cell.name,
        )  # fmt: skip
        yield Step(
            stage="verify",
            name=f"{pipeline}: {name}",
            command=("tide-cache", "verify", str(cache)),
            pipeline=pipeline,
        )


def _train(options: Options, cell: Cell) -> Step:
    return Step(
        stage="train",
        name=cell.name,
        command=(
            *options.launch,
            _relative(cell.path),
            "--cache",
            str(options.output / cell.pipeline / cell.cache),
            "--set",
            f"output={options.output / cell.name}",
            *_flags(options, "train", cell.pipeline),
        ),
        pipeline=cell.pipeline,
        cell=cell.name,
    )


def _evaluate(options: Options, model: EvaluatedModel) -> Iterator[Step]:
    if model.label == "AR":
        yield from _evaluate_ar(options, model)
        return
    row = () if model.row is None else ("--row", model.row)
    yield Step(
        stage="evaluate",
        name=_name(model),
        command=("tide-eval", "run", "--model", model.model, "--output", str(model.folder),
                 *row, *options.evaluate),
        pipeline=model.pipeline,
    )  # fmt: skip


def _evaluate_ar(options: Options, model: EvaluatedModel) -> Iterator[Step]:
    """Yield lm-eval's own runs of the autoregressive model, one for each number of examples."""
    from stage2_student.benchmark_tasks.task_configs import DEFINITIONS

    for number, (tasks, num_fewshot) in enumerate(_AR_TASKS):
        folder = model.folder / f"part-{number}"
        code = "humaneval" in tasks
        if code and "--run-generated-code" not in options.evaluate:
            continue
        yield Step(
            stage="evaluate",
            name=f"AR, {tasks}",
            command=("lm-eval", "run", "--model", "hf", "--model_args",
                     f"pretrained={model.model},dtype=bfloat16,enable_thinking=False",
                     "--tasks", tasks, "--num_fewshot", str(num_fewshot), "--apply_chat_template",
                     "--include_path", str(DEFINITIONS), "--batch_size", "auto",
                     "--output_path", str(folder),
                     *(("--confirm_run_unsafe_code",) if code else ())),
            results=folder,
        )  # fmt: skip


def _table_3(options: Options) -> Step:
    """Return the measurement of table 3, of random weights: what they hold changes no figure."""
    return Step(
        stage="measure",
        name="table 3",
        command=("python", "-m", "benchmarks.sampler", "--table3", "--preset", options.preset,
                 "--json"),
        stdout=options.output / TABLE_3,
    )  # fmt: skip


def _distilled(options: Options, method: Method) -> Iterator[EvaluatedModel]:
    if options.released:
        yield EvaluatedModel(
            label=method.label,
            pipeline=method.pipeline,
            model=method.released,
            folder=options.output / "released" / f"{method.pipeline}-{method.label}",
            row=method.row,
            caches="released",
        )
        return
    for name in dict.fromkeys(_cells(method, options.caches)):
        yield _student(options, method.label, read_cell(name), method.row)


def _student(options: Options, label: str, cell: Cell, row: str | None) -> EvaluatedModel:
    return EvaluatedModel(
        label=label,
        pipeline=cell.pipeline,
        model=str(options.output / cell.name / "final"),
        folder=options.output / "scores" / cell.name,
        row=row,
        caches="with CompDemo" if cell.cache == "cache" else "without CompDemo",
    )


def _undistilled(options: Options, label: str, model: str) -> EvaluatedModel:
    folder = options.output / "scores" / label
    return EvaluatedModel(label=label, pipeline=None, model=model, folder=folder, row=label)


def _methods(options: Options) -> list[Method]:
    return [method for method in METHODS if method.pipeline in options.pipelines]


def _cells(method: Method, caches: Caches) -> Sequence[str]:
    return {
        "one": (method.one_cache,),
        "published": (method.as_published,),
        "both": (method.one_cache, method.as_published),
    }[caches]


def _name(model: EvaluatedModel) -> str:
    if model.pipeline is None:
        return model.label
    as_published = ", as published" if model.folder.name.endswith("_as_published") else ""
    return f"{model.pipeline}: {model.label}{as_published}"


def overrides_of(options: Options, section: str, pipeline: PipelineName) -> list[str]:
    """Return the KEY=VALUE of a section: those for both pipelines, then those for this one."""
    return [
        text.removeprefix(prefix)
        for prefix in (f"{section}.", f"{pipeline}.{section}.")
        for text in options.overrides
        if text.startswith(prefix)
    ]


def _flags(options: Options, section: str, pipeline: PipelineName) -> Iterator[str]:
    for text in overrides_of(options, section, pipeline):
        yield from ("--set", text)


def _relative(path: Path) -> str:
    """Return a config as it is named from the checkout's root, where the commands run."""
    return str(path.relative_to(FOLDER.parent.parent))
