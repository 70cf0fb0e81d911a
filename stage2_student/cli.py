"""The `tide-train` command: one config, one cache, one student; and `tide-train export`.

Training needs no word for itself: what is no command's name is a config. Torch is imported after
the arguments are read, so that `--help` and a misspelt option answer at once, and its absence is
one line with the install command.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from stage2_student.release.command import export
from tide_cache.cli import INSTALL_HINT, make_app, run
from tide_cache.errors import TideError

if TYPE_CHECKING:
    from stage2_student.config import TrainConfig

_TRAIN = "train"
_PACKAGES = ("torch", "transformers", "accelerate", "safetensors")


class _TrainUnlessNamed(TyperGroup):
    """Takes arguments that begin with no command's name as those of `train`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] != "--help" and args[0] not in self.commands:
            args = [_TRAIN, *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        train = self.commands[_TRAIN]
        train.format_help(type(ctx)(train, info_name=ctx.command_path), formatter)


app = make_app("tide-train", "Train a student from a teacher cache, and hand it on.")


@app.callback(cls=_TrainUnlessNamed)
def _commands() -> None:
    """Train a student from a teacher cache ('train' may be left out), and hand it on."""


@app.command(_TRAIN)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see examples/.")],
    cache: Annotated[
        list[str],
        typer.Option(help="Folder or URL of a cache or premasked set; may be given several times."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest checkpoint; never; or a checkpoint's folder.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, stop.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what fits on a GPU, before any weight is loaded.")
    ] = False,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of that GPU.")] = 12.0,
    public_key: Annotated[
        Path | None,
        typer.Option(help="Take only caches that the owner of this key signed (PEM, local sets)."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a student from a teacher cache, or go on with a run that was stopped.

    The same command resumes: it goes on from the newest checkpoint in the config's output folder.

    [bold]Examples[/bold]

    tide-train examples/wedlm_to_qwen3.yaml --cache runs/cache

    tide-train student.yaml --cache runs/cache --dry-run

    tide-train student.yaml --cache runs/cache --plan --gpu-memory 12

    tide-train student.yaml --cache runs/cache --set optimizer.learning_rate=1e-4 --set seed=3

    tide-train student.yaml --cache runs/code --cache runs/math --set cache_weights=[2,1]

    accelerate launch --num_processes 8 -m stage2_student student.yaml --cache runs/cache
    """
    train_config = _read(config, overrides or [])
    if public_key is not None:
        _require_signatures(cache, public_key)
    if plan:
        _plan(train_config, cache, gpu_memory, json_output)
    else:
        _run(train_config, cache, resume, dry_run, json_output)


app.command("export")(export)


def _read(path: Path, overrides: list[str]) -> "TrainConfig":
    from stage2_student.config import TrainConfig
    from tide_cache.config import load_config

    return load_config(path, TrainConfig, overrides, section="train")


def _require_signatures(caches: list[str], public_key: Path) -> None:
    from tide_cache.signing import check_signature
    from tide_cache.store import Store

    for url in caches:
        check_signature(Store(url), public_key)


def _plan(
    config: "TrainConfig", cache: list[str], gpu_memory_gib: float, json_output: bool
) -> None:
    from stage2_student.memory_table import memory_plan_of, print_memory_plan
    from stage2_student.plan import open_run

    plan = memory_plan_of(open_run(config, cache), gpu_memory_gib=gpu_memory_gib)
    if json_output:
        sys.stdout.write(json.dumps(plan.as_json(), indent=2) + "\n")
    else:
        print_memory_plan(plan, Console(soft_wrap=True))


def _run(
    config: "TrainConfig", cache: list[str], resume: str, dry_run: bool, json_output: bool
) -> None:
    from accelerate import PartialState

    from stage2_student.plan import describe, open_run
    from stage2_student.progress import make_progress
    from stage2_student.trainer import train as run_training

    if dry_run:
        _show("plan", describe(open_run(config, cache)), json_output)
        return
    summary = run_training(config, cache, resume=resume, progress=make_progress())
    if PartialState().is_main_process:
        _show("trained", summary.as_json(), json_output)


def _show(title: str, facts: dict[str, Any], json_output: bool) -> None:
    if json_output:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(title=title, show_header=False, title_justify="left", box=None)
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/bold]", _text(value))
    Console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Run `tide-train`."""
    run(_run_app)


def _run_app() -> None:
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise TideError(
            f"tide-train needs {error.name}, which is not installed",
            hint=INSTALL_HINT["stage2_student"],
        ) from error
