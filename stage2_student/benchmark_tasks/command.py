"""`tide-eval run`: the paper's benchmarks on a student."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tide_cache.errors import TideError

if TYPE_CHECKING:
    from stage2_student.benchmark_tasks.plan import BenchmarkConfig

_INSTALL = "pip install 'tide-cache[eval]'"
_NEEDS = ("torch", "transformers", "safetensors", "lm_eval", "datasets", "math_verify", "antlr4")


def benchmark(
    model: Annotated[str, typer.Option(help="Folder or hub name of a block-diffusion student.")],
    output: Annotated[Path, typer.Option(help="Folder for results; started again, it goes on.")],
    tasks: Annotated[
        str, typer.Option(help="'paper' for all eight, or names with commas between.")
    ] = "paper",
    data: Annotated[
        Path | None, typer.Option(help="Folder of local data sets; default: lm-eval downloads.")
    ] = None,
    row: Annotated[
        str | None, typer.Option(help="Row of the paper's Table 1 to print beside the scores.")
    ] = None,
    run_generated_code: Annotated[
        bool,
        typer.Option(
            "--run-generated-code",
            help="Run HumanEval and MBPP: programs that the student writes, without a sandbox.",
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only the first questions of each sub-task.")
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Prompts a forward; the same answers but for ties of rounding."),
    ] = 1,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda:0, or several: cuda:0,cuda:1 (a process each).")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16, on a CPU float32), float32, bfloat16, float16.")
    ] = "auto",
    threshold: Annotated[
        float | None,
        typer.Option(help="Commit tokens likelier than this: faster, not the published protocol."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="The paper's is 32.")] = 32,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub name.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Ask a student the paper's benchmarks, with the published settings.

    [bold]Examples[/bold]

    tide-eval run --model runs/wedlm/student/final --output runs/wedlm/eval --data data

    tide-eval run --model TIDE-dllm/distill-WeDLM-TIDE_Shared --output eval
    --row "TIDE-Shared (shared)" --device cuda:0,cuda:1 --batch-size 16 --run-generated-code

    tide-eval run --model student --output try --tasks gsm8k_cot --limit 20 --data data
    """
    # lm-eval draws a bar for each of its 60 sub-tasks; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from stage2_student.benchmark_tasks.plan import BenchmarkConfig

        config = BenchmarkConfig(
            model=model,
            output=output,
            tasks=tasks,
            data=data,
            revision=revision,
            limit=limit,
            batch_size=batch_size,
            devices=tuple(word.strip() for word in device.split(",") if word.strip()),
            dtype=dtype,
            threshold=threshold,
            block_size=block_size,
            run_generated_code=run_generated_code,
            row=row,
        )
        _show_plan(config, json_output) if dry_run else _run(config, json_output)
    except ModuleNotFoundError as error:
        if error.name not in _NEEDS:
            raise
        raise TideError(
            f"tide-eval run needs {error.name}, which is not installed", hint=_INSTALL
        ) from error


def _run(config: "BenchmarkConfig", json_output: bool) -> None:
    from stage2_student.benchmark_tasks.progress import make_progress
    from stage2_student.benchmark_tasks.runner import run_benchmarks
    from stage2_student.benchmark_tasks.score_table import print_table

    results = run_benchmarks(config, progress=make_progress())
    if json_output:
        sys.stdout.write(json.dumps(results.as_json(), indent=2) + "\n")
    else:
        print_table(results, Console(soft_wrap=True))


def _show_plan(config: "BenchmarkConfig", json_output: bool) -> None:
    from stage2_student.benchmark_tasks.plan import plan_benchmarks
    from stage2_student.benchmark_tasks.task_configs import load_tasks

    plan = plan_benchmarks(config)
    for planned in plan.planned:
        if planned.rows is not None:
            load_tasks(planned.definition, planned.rows)
    rows = [planned.as_json() for planned in plan.planned]
    if json_output:
        facts = {"benchmarks": rows, "left_out": dict(plan.left_out)}
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(*(name.replace("_", " ") for name in rows[0]), box=None)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console(soft_wrap=True)
    console.print(table)
    for task, reason in plan.left_out.items():
        console.print(f"{task}: {reason}", markup=False, highlight=False)
