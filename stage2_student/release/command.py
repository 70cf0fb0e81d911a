"""`tide-train export`: a student for others, on the disk and, if asked, on the hub."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from stage2_student.release.export import OnStage
    from tide_cache.hub import HubTarget

_NUM_STAGES = 3


class Dtype(StrEnum):
    """Numbers that weights can be written in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def export(
    student: Annotated[
        Path, typer.Argument(help="Output folder of a run, or folder of a checkpoint.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights written; default: as they are.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="results.json of benchmarks, for the card.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="hf://USER/NAME", help="Send it to the hub, too.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="How a new hub repository is made.")
    ] = True,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite files of another model on the hub.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a trained student as a folder that AutoModelForMaskedLM loads, with its model card.

    Of a run the final student is taken, or else the newest checkpoint. What was written is loaded
    again and compared before it appears. A push that broke off goes on when it is run again; the
    hub's own client finds the token (hf auth login, HF_TOKEN).

    [bold]Examples[/bold]

    tide-train export runs/student -o runs/released

    tide-train export runs/student/checkpoints/step-00000500 -o runs/half-way --dtype bfloat16

    tide-train export runs/student -o runs/released --results results.json --push hf://lab/student
    """
    from stage2_student.release.benchmark_results import read_results
    from stage2_student.release.export import export as export_student
    from stage2_student.release.export import plan_export, require_free
    from stage2_student.release.push import hub_name, open_hub

    target = None if push is None else open_hub(push, private=private)
    plan = plan_export(student, dtype=None if dtype is None else dtype.value)
    require_free(output, plan.folder)
    scores = () if results is None else read_results(results)
    facts: dict[str, Any] = {**plan.as_json(), "output": str(output), "num_scores": len(scores)}
    if not dry_run:
        with _stages() as on_stage:
            report = export_student(
                plan,
                output,
                load_from=None if push is None else hub_name(push),
                scores=scores,
                on_stage=on_stage,
            )
        facts |= report.as_json()
    if target is not None:
        facts["push"] = {"url": target.url}
        if not dry_run:
            facts["push"] = _push(output, target, replace=replace)
    _show({**facts, "dry_run": dry_run}, json_output)


def _push(folder: Path, target: "HubTarget", *, replace: bool) -> dict[str, Any]:
    from stage2_student.release.push import plan_push, push

    plan = plan_push(folder, target)
    if plan.to_send:
        with _bar("push", plan.bytes_to_send) as bar:
            task = bar.task_ids[0]
            push(folder, target, plan, replace=replace, on_bytes=lambda num: bar.advance(task, num))
    return plan.as_json()


def _show(facts: dict[str, Any], json_output: bool) -> None:
    if json_output:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    steps = "of unknown training" if facts["steps"] is None else f"after {facts['steps']:,} steps"
    verb = "would write" if facts["dry_run"] else "wrote"
    lines = [
        f"{facts['output']}: {verb} {facts['source']} ({steps}), {facts['num_parameters']:,} "
        f"parameters in {facts['dtype']}, {facts['weight_bytes'] / 1e6:,.1f} MB of weights"
    ]
    if "max_difference" in facts:
        lines.append(f"  loaded again: logits differ by {facts['max_difference']:.2g}")
    if not facts["has_record"]:
        lines.append("  no training.json there: the card cannot say what it was trained on")
    if not facts["has_tokenizer"]:
        lines.append("  no tokenizer there: readers will need one from elsewhere")
    if "push" in facts:
        lines.append(_pushed(facts["push"], facts["dry_run"]))
    out = Console(soft_wrap=True)
    for line in lines:
        out.print(line, markup=False, highlight=False)


def _pushed(push: dict[str, Any], dry_run: bool) -> str:
    if dry_run:
        return f"{push['url']}: would send it there"
    if not push["num_to_send"]:
        return f"{push['url']}: nothing to do, the student is there"
    return (
        f"{push['url']}: sent {push['num_to_send']} of {push['num_files']} files, "
        f"{push['bytes_to_send'] / 1e6:,.1f} MB"
    )


@contextmanager
def _stages() -> "Iterator[OnStage]":
    """Show which of the stages of an export is at work; yields what is told of a new one."""
    with _bar("export", _NUM_STAGES) as bar:
        task = bar.task_ids[0]
        begun: list[str] = []

        def on_stage(name: str) -> None:
            bar.update(task, description=name, completed=len(begun))
            begun.append(name)

        yield on_stage


@contextmanager
def _bar(what: str, total: int) -> Iterator[Progress]:
    """Show a bar with one task on a terminal's stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as bar:
        bar.add_task(what, total=total)
        yield bar
