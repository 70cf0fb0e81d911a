"""The `tide-cache` command: collects its subcommands from the entry points `tide_cache.commands`.

The ground floor brings verify, inspect and what moves sets about; stage 1 registers prepare, plan,
calibrate and build. A stage that cannot be imported (torch is not installed, say) leaves its
command in place as a one-line error with the install command, so that a receiver of caches needs no
torch.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from rich.console import Console

from tide_cache.errors import TideError, printable

GROUP = "tide_cache.commands"
CHECKS_GROUP = "tide_cache.checks"
INSTALL_HINT = {
    "stage1_teacher": "pip install 'tide-cache[teacher]'",
    "stage2_student": "pip install 'tide-cache[student]'",
}
ORDER = [
    *("prepare", "plan", "calibrate", "build", "status", "verify", "sign", "inspect"),
    *("diff", "merge", "pack", "unpack", "push", "pull"),
]

errors = Console(stderr=True, soft_wrap=True)


def make_app(name: str, help_text: str) -> typer.Typer:
    """Return an empty typer app with the options that all our commands share."""
    return typer.Typer(
        name=name,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )


def build_app() -> typer.Typer:
    """Return the `tide-cache` app with every registered command."""
    app = make_app(
        "tide-cache",
        "Offline distillation of diffusion language models: make, check and read teacher caches.",
    )
    found = {point.name: point for point in entry_points(group=GROUP)}
    names = [n for n in ORDER if n in found] + sorted(set(found) - set(ORDER))
    # Only the command that is asked for is imported: `tide-cache verify` never loads torch.
    asked = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for name in names:
        command = _load(found[name]) if asked in (None, name) else _unused
        app.command(name)(command)
    return app


def main() -> None:
    """Run `tide-cache`."""
    run(build_app())


def run(app: Callable[[], Any]) -> None:
    """Run an app: TideErrors become one line and an exit code, everything else keeps its trace."""
    logging.basicConfig(
        level=os.environ.get("TIDE_LOG", "WARNING").upper(),
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        app()
    except TideError as error:
        show_error(error)
        sys.exit(error.exit_code)


def show_error(error: TideError) -> None:
    """Print an error as people read it: what is wrong, then what to do."""
    errors.print("error: ", style="bold red", end="")
    errors.print(printable(error.message), markup=False, highlight=False)
    if error.hint:
        errors.print(printable(f"  {error.hint}"), markup=False, highlight=False)


def load_point(point: EntryPoint, name: str) -> Callable[..., Any]:
    """Import what an entry point names. Raises TideError where its stage is not installed."""
    try:
        found: Callable[..., Any] = point.load()
        return found
    except ModuleNotFoundError as error:
        _missing(point, error, name)
        raise


def _load(point: EntryPoint) -> Callable[..., Any]:
    try:
        command: Callable[..., Any] = point.load()
        return command
    except ModuleNotFoundError as error:
        return functools.wraps(_unused)(functools.partial(_missing, point, error, point.name))


def _missing(point: EntryPoint, error: ModuleNotFoundError, name: str) -> None:
    package = point.value.split(".")[0]
    raise TideError(
        f"'tide-cache {name}' needs {error.name}, which is not installed",
        hint=INSTALL_HINT.get(package),
    )


def _unused() -> None:
    """Not available in this installation."""
