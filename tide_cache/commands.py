"""The ground floor's commands: verify, inspect, status. They read, and never write to a set."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tide_cache.cli import show_error
from tide_cache.errors import TideError
from tide_cache.inspect import lines, summary
from tide_cache.report import write_report
from tide_cache.status import lines as status_lines
from tide_cache.status import status as find_status
from tide_cache.store import Store
from tide_cache.verify import Report, verify_set
from tide_cache.writer import read_manifest

Url = Annotated[str, typer.Argument(help="Folder or URL of a premasked set or a cache.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def verify(url: Url, json_output: Json = False) -> None:
    """Check hashes, schema and every bound of a set; exit 0 if sound, 1 if not, 2 if unreadable.

    [bold]Examples[/bold]

    tide-cache verify runs/cache

    tide-cache verify runs/cache --json | jq .problems
    """
    try:
        store = Store(url)
        report = _verify_with_progress(store)
    except TideError as error:
        if json_output:
            sys.stdout.write(json.dumps({"url": url, "ok": False, "problems": [str(error)]}) + "\n")
        else:
            show_error(error)
        raise typer.Exit(2) from error
    if json_output:
        sys.stdout.write(json.dumps(report.as_json(), indent=2) + "\n")
    else:
        _print_report(report)
    raise typer.Exit(0 if report.ok else 1)


def inspect(
    url: Url,
    json_output: Json = False,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with plots and a few rows to this file.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="With --html: the student's tokenizer.json, for text.")
    ] = None,
) -> None:
    """Show what a set is: recipe, sizes, teacher, payloads, provenance.

    [bold]Examples[/bold]

    tide-cache inspect runs/cache

    tide-cache inspect s3://lab/cache --json

    tide-cache inspect runs/cache --html report.html --tokenizer student/tokenizer.json
    """
    if html is not None:
        write_report(url, html, tokenizer)
        Console(soft_wrap=True).print(f"wrote {html}", markup=False, highlight=False)
        return
    facts = summary(read_manifest(Store(url)), url=url)
    if json_output:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(title=url, show_header=False, title_justify="left", box=None)
    for label, text in lines(facts):
        table.add_row(Text(label, style="bold"), Text(text))
    Console().print(table)


def status(url: Url, json_output: Json = False) -> None:
    """Show how far a set under way is: tasks, rows, speed, what was dropped or has failed.

    Reads the folder alone, so it works from anywhere and disturbs nobody.

    [bold]Examples[/bold]

    tide-cache status runs/cache

    tide-cache status s3://lab/cache --json | jq .num_rows_done
    """
    facts = find_status(Store(url))
    if json_output:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(title=url, show_header=False, title_justify="left", box=None)
    for label, text in status_lines(facts):
        table.add_row(Text(label, style="bold"), Text(text))
    Console().print(table)


def _verify_with_progress(store: Store) -> Report:
    console = Console(stderr=True)
    columns = (
        TextColumn("verify"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shard]}"),
        TimeRemainingColumn(),
    )
    total = len(read_manifest(store).shards)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("verify", total=total, shard="")
        return verify_set(store, on_shard=lambda path: bar.update(task, advance=1, shard=path))


def _print_report(report: Report) -> None:
    out = Console(soft_wrap=True)
    for problem in report.problems:
        out.print("problem ", style="red", end="")
        out.print(problem, markup=False, highlight=False)
    verdict = "[green]sound[/green]" if report.ok else f"[red]{len(report.problems)} problems[/red]"
    out.print(
        f"{report.url}: {verdict} ({report.kind} {report.identity[:12]}…, {report.num_shards} "
        f"shards, {report.num_rows:,} rows, {report.num_payload_entries:,} payload entries, "
        f"{report.size_bytes / 1e6:,.1f} MB)",
        highlight=False,
    )
