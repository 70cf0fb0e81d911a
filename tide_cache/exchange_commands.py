"""Commands by which sets change hands: diff, merge, pack, unpack, push, pull.

Each may be run again after a kill and goes on; results go to stdout, progress to stderr.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tide_cache import compare
from tide_cache.commands import Json, Url
from tide_cache.manifest import identity
from tide_cache.merge import merge as merge_sets
from tide_cache.merge import plan_merge
from tide_cache.store import Store
from tide_cache.writer import read_manifest

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")]


def diff(first: Url, second: Url, json_output: Json = False) -> None:
    """Explain why two sets can or cannot be merged or trained from together.

    Exit code 0 if they can be merged, 1 if not.

    [bold]Examples[/bold]

    tide-cache diff runs/cache s3://lab/cache

    tide-cache diff runs/a runs/b --json | jq .can_merge
    """
    found = compare.compare(read_manifest(Store(first)), read_manifest(Store(second)))
    if json_output:
        _print_json({"urls": [first, second], **found.as_json()})
    else:
        _print_lines(compare.lines(found, (first, second)))
    raise typer.Exit(1 if found.against_merging else 0)


def merge(
    urls: Annotated[list[str], typer.Argument(help="Two or more sets of one recipe.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder or URL to write to.")],
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Make one set of several over different samples; samples that occur twice are kept once.

    [bold]Examples[/bold]

    tide-cache merge runs/first runs/second -o runs/both

    tide-cache merge s3://lab/a s3://lab/b -o runs/both --dry-run
    """
    plan = plan_merge(urls)
    facts = plan.as_json()
    if not dry_run:
        with _progress("merge", len(plan.tasks)) as advance:
            manifest = merge_sets(plan, Store(output), on_task=lambda _: advance())
        facts |= {"output": output, "identity": identity(manifest), "counts": manifest.counts}
    if json_output:
        _print_json({**facts, "dry_run": dry_run})
        return
    verb = "would make" if dry_run else "made"
    _print_lines(
        [
            f"{verb} {output}: {facts['num_samples']:,} samples in {facts['num_tasks']:,} tasks "
            f"({facts['num_tasks_copied']:,} copied as they are), {facts['num_duplicates']:,} "
            "duplicates left out",
            *[
                f"  {source['url']}: {source['num_samples']:,} samples, "
                f"{source['num_duplicates']:,} of them in an earlier set"
                for source in facts["sources"]
            ],
        ]
    )


def _print_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def _print_lines(lines: Sequence[str]) -> None:
    out = Console(soft_wrap=True)
    for line in lines:
        out.print(line, markup=False, highlight=False)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    """Show a bar on a terminal's stderr; yields the function that moves it by one."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount=1: bar.update(task, advance=amount)
