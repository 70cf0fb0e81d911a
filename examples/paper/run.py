"""The paper's tables at real size: every command in order, or what they will cost.

Each command is one of the product's own and is printed before it runs, so that any of them can be
run by hand, elsewhere, or again. Whatever is finished is kept by running this again.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from examples.paper.cells import PIPELINES, PipelineName
from examples.paper.markdown import table
from examples.paper.projection import Cards, Cost, project
from examples.paper.steps import Caches, Options, Stage, Step, plan_steps
from examples.paper.tables import markdown, read_scores, read_table_3
from stage1_teacher.gpus import find_gpu
from stage1_teacher.plan_cost import Machine
from tide_cache.canonical import pretty_json
from tide_cache.cli import run as run_app
from tide_cache.errors import ConfigError, TideError, did_you_mean
from tide_cache.store import Store

console = Console(stderr=True, soft_wrap=True, highlight=False)


def main(
    pipeline: Annotated[str, typer.Argument(help="shared, cross or all.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    tables: Annotated[str, typer.Option("--table", help="Of 1, 2, 3.")] = "1,2,3",
    stages: Annotated[
        str, typer.Option(help=f"Only these: {', '.join(get_args(Stage))}.")
    ] = ",".join(get_args(Stage)),
    caches: Annotated[
        str,
        typer.Option(
            help="Table 1 from the one cache, as published (KL, CALM and TIDE-Cross "
            "without CompDemo), or both."
        ),
    ] = "one",
    released: Annotated[
        bool, typer.Option("--released", help="Evaluate the released students; train none.")
    ] = False,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="HumanEval and MBPP, see tide-eval run.")
    ] = False,
    evaluate_with: Annotated[
        str, typer.Option(help="More options of tide-eval run, such as '--batch-size 16'.")
    ] = "",
    launch: Annotated[
        str, typer.Option(help="What trains, such as 'accelerate launch … -m stage2_student'.")
    ] = "tide-train",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="[PIPELINE.]SECTION.KEY=VALUE", help="Of prepare, build, train."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(help="Of the build, for projections.")] = "h100",
    card: Annotated[str, typer.Option(help="Of training, for projections.")] = "rtx4090",
    mfu: Annotated[float, typer.Option(help="Share of both peaks that is assumed.")] = 0.35,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Project to so many samples; default: the set's.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Sizes of table 3: real, or small for a look on a CPU.")
    ] = "real",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every command, with hours and GB; run none.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the paper's tables with the real teachers, or say what that costs.

    [bold]Examples[/bold]

    python -m examples.paper.run all -o runs/paper --dry-run

    python -m examples.paper.run shared -o runs/paper --stages download,prepare,build,verify

    python -m examples.paper.run shared -o runs/paper --stages train,evaluate --table 1

    python -m examples.paper.run all -o runs/paper --released --table 1
    """
    options = Options(
        output=output,
        pipelines=_pipelines(pipeline),
        tables=tuple(int(_one_of(word, ("1", "2", "3"), "--table")) for word in _words(tables)),
        caches=_one_of(caches, get_args(Caches), "--caches"),
        released=released,
        overrides=tuple(_checked(text) for text in overrides or ()),
        launch=tuple(shlex.split(launch)),
        evaluate=(
            *(("--run-generated-code",) if run_generated_code else ()),
            *shlex.split(evaluate_with),
        ),
        preset=_one_of(preset, ("real", "small"), "--preset"),
    )
    wanted = [_one_of(word, get_args(Stage), "--stages") for word in _words(stages)]
    steps = [step for step in plan_steps(options) if step.stage in wanted]
    if dry_run:
        machine = Machine(gpu=find_gpu(gpu), mfu=mfu, usd_per_gpu_hour=None)
        cards = Cards(teacher=machine, student=find_gpu(card), student_mfu=mfu)
        _print_plan([(s, project(s, options, cards, samples)) for s in steps], json_output)
        return
    for step in steps:
        run_step(step)
    _print_tables(options, json_output)


def run_step(step: Step) -> None:
    """Run a command, its output on stderr. Raises TideError where it fails."""
    console.print(f"[bold]{step.stage}[/bold] {step.name}: ", end="")
    console.print(step.text, markup=False)
    if step.is_done:
        console.print("  done before")
        return
    keeps = step.stdout is not None
    done = subprocess.run(
        [*_program(step.command[0]), *step.command[1:]],
        stdout=subprocess.PIPE if keeps else sys.stderr,
    )
    if done.returncode:
        raise TideError(
            f"{step.stage} {step.name}: the command ended with {done.returncode}",
            hint="run the same command again: what is finished is kept",
        )
    if step.stdout is not None:
        Store(step.stdout.parent).publish(step.stdout.name, done.stdout)


def _program(name: str) -> list[str]:
    """Return how a program of this environment is started."""
    if name == "python":
        return [sys.executable]
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name}: is not installed", hint="pip install 'tide-cache[eval,hub]'")
    return [found]


def _print_plan(plan: Sequence[tuple[Step, Cost]], json_output: bool) -> None:
    if json_output:
        sys.stdout.write(json.dumps([_as_json(*each) for each in plan], indent=2) + "\n")
        return
    rows = [
        [step.stage, step.name, _hours(cost), _gigabytes(cost), cost.note] for step, cost in plan
    ]
    text = table(("stage", "what", "GPU-hours", "GB", "projected"), rows)
    commands = "\n".join(step.text for step, _ in plan)
    sys.stdout.write(f"{text}\n\n{commands}\n")


def _as_json(step: Step, cost: Cost) -> dict[str, Any]:
    return {
        "stage": step.stage,
        "name": step.name,
        "command": step.text,
        "gpu_hours": cost.hours,
        "size_bytes": cost.size_bytes,
        "note": cost.note,
    }


def _print_tables(options: Options, json_output: bool) -> None:
    scored = read_scores(options)
    third = read_table_3(options)
    figures: dict[str, Any] = {
        "models": [row.as_json() for row in scored],
        "table_3": third,
    }
    text = markdown(scored, options, third)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "figures.json").write_bytes(pretty_json(figures))
    (options.output / "tables.md").write_text(text, encoding="utf-8")
    sys.stdout.write(json.dumps(figures, indent=2) + "\n" if json_output else text)


def _hours(cost: Cost) -> str:
    return "" if cost.hours is None else f"{cost.hours:,.1f}"


def _gigabytes(cost: Cost) -> str:
    if cost.size_bytes is None:
        return ""
    low, high = (f"{size / 1e9:,.1f}" for size in cost.size_bytes)
    return low if low == high else f"{low} to {high}"


def _pipelines(word: str) -> tuple[PipelineName, ...]:
    _one_of(word, (*PIPELINES, "all"), "pipeline")
    return tuple(name for name in PIPELINES if word in (name, "all"))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _checked(text: str) -> str:
    words = text.partition("=")[0].split(".")
    section = words[1] if words[0] in PIPELINES and len(words) > 1 else words[0]
    if section not in ("prepare", "build", "train"):
        raise ConfigError(
            f"--set {text!r}: expected [PIPELINE.]SECTION.KEY=VALUE with section prepare, build or "
            f"train, got {section!r}"
        )
    return text


def _one_of(word: str, known: Sequence[Any], what: str) -> Any:
    if word not in known:
        raise ConfigError(
            f"{what}: expected one of {', '.join(known)}, got {word!r}{did_you_mean(word, known)}"
        )
    return word


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)
