"""The ground floor's commands: verify, inspect, status. They read, and never write to a set."""

import json
import secrets
import sys
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tide_cache.cache import open_cache
from tide_cache.cli import CHECKS_GROUP, load_point, show_error
from tide_cache.errors import TideError, printable
from tide_cache.inspect import lines, summary
from tide_cache.report import write_report
from tide_cache.signing import find_signature, sign_set
from tide_cache.status import lines as status_lines
from tide_cache.status import status as find_status
from tide_cache.store import Store
from tide_cache.verify import Report, default_workers, verify_set, wrong_identity
from tide_cache.writer import read_manifest

Url = Annotated[str, typer.Argument(help="Folder or URL of a premasked set or a cache.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

_LEVEL_TEXTS = {
    "manifest": " as far as its manifest says, no file was read",
    "files": " as far as its files' hashes say, no row was read",
    "deep": "",
}


class VerifyLevel(StrEnum):
    """How much of a set `verify` reads."""

    manifest = "manifest"
    files = "files"
    deep = "deep"


def verify(
    url: Url,
    json_output: Json = False,
    level: Annotated[
        VerifyLevel,
        typer.Option(
            help="manifest: what it says; files: sizes and sha256s too; deep: every row too."
        ),
    ] = VerifyLevel.deep,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: by the size of the set.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep there which shards were found good, and go on from it after a kill.",
        ),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Check first that the set is as the owner of this key signed it (PEM).",
        ),
    ] = None,
    expected_identity: Annotated[
        str | None,
        typer.Option(
            "--identity",
            metavar="SHA256",
            help="Refuse another set than the one that its makers named by this identity.",
        ),
    ] = None,
    against_teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Ask this teacher again about some samples of a sound cache."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="How many samples to ask about, at random.")
    ] = 64,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Which samples; default: nobody can know before.")
    ] = None,
) -> None:
    """Check hashes, schema and every bound of a set; exit 0 if sound, 1 if not, 2 if unreadable.

    [bold]Examples[/bold]

    tide-cache verify runs/cache

    tide-cache verify runs/cache --json | jq .problems

    tide-cache verify s3://lab/cache --level files --resume verify.jsonl

    tide-cache verify runs/cache --public-key lab.pub

    tide-cache verify runs/cache --identity 3f1c…

    tide-cache verify runs/cache --against-teacher WeDLM/WeDLM-8B-Instruct --samples 32
    """
    try:
        store = Store(url)
        signature = None if public_key is None else find_signature(store, public_key)
        report = _verify_with_progress(store, level, workers, resume)
        if expected_identity is not None:
            report.problems[:0] = wrong_identity(report.identity, expected_identity)
        if signature is not None:
            report.signature = signature
            report.problems[:0] = [] if signature == "good" else [signature]
        if against_teacher is not None and report.ok:
            seed = secrets.randbits(32) if seed is None else seed
            _ask_teacher(store, against_teacher, samples, seed, report)
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


def sign(
    url: Url,
    private_key: Annotated[
        Path, typer.Option(metavar="FILE", help="An elliptic curve key of your own (PEM).")
    ],
) -> None:
    """Sign all files of a set on a local disk: writes cache.sig beside its manifest.

    Make a key once, and give key.pub to those who check:

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem

    openssl ec -in key.pem -pubout -out key.pub

    Keyless signatures (Sigstore) are model-signing's own: 'model_signing sign sigstore FOLDER'.

    [bold]Examples[/bold]

    tide-cache sign runs/cache --private-key key.pem
    """
    path = sign_set(Store(url), private_key)
    sys.stdout.write(f"wrote {path}; check it with 'tide-cache verify {url} --public-key FILE'\n")


def inspect(
    url: Url,
    json_output: Json = False,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with plots and a few rows to this file.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="With --html: the student's tokenizer.json, for text.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="With --html: another cache of the premasked set, to draw its teacher beside.",
        ),
    ] = None,
) -> None:
    """Show what a set is: recipe, sizes, teacher, payloads, provenance.

    [bold]Examples[/bold]

    tide-cache inspect runs/cache

    tide-cache inspect s3://lab/cache --json

    tide-cache inspect runs/cache --html report.html --tokenizer student/tokenizer.json

    tide-cache inspect runs/cache --html report.html --beside runs/cache-without-comp-demo
    """
    if html is not None:
        write_report(url, html, tokenizer, beside=beside)
        Console(soft_wrap=True).print(f"wrote {html}", markup=False, highlight=False)
        return
    facts = summary(read_manifest(Store(url)), url=url)
    if json_output:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(title=url, show_header=False, title_justify="left", box=None)
    for label, text in lines(facts):
        table.add_row(Text(label, style="bold"), Text(printable(text)))
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
        table.add_row(Text(label, style="bold"), Text(printable(text)))
    Console().print(table)


def _ask_teacher(store: Store, model: str, num_samples: int, seed: int, report: Report) -> None:
    """Let stage 1, if it is installed, compare a sample of rows with what the teacher says."""
    (point,) = entry_points(group=CHECKS_GROUP, name="against_teacher")
    check = load_point(point, f"verify --{point.name.replace('_', '-')}")
    facts = check(open_cache(store.url), model, num_samples=num_samples, seed=seed)
    report.teacher_check = facts
    for row in facts["rows"]:
        report.problems.append(
            f"sample {row['sample_id']} view {row['view']}: {row['payload']}: not what the teacher "
            f"says at {row['num_differing']} of {row['num_entries']} entries"
        )
    num_unnamed = facts["num_rows_differing"] - len(facts["rows"])
    if num_unnamed > 0:
        report.problems.append(f"{num_unnamed} more rows are not what the teacher says")


def _verify_with_progress(
    store: Store, level: VerifyLevel, workers: int | None, resume: Path | None
) -> Report:
    console = Console(stderr=True)
    columns = (
        TextColumn("verify"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shard]}"),
        TimeRemainingColumn(),
    )
    manifest = read_manifest(store)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("verify", total=len(manifest.shards), shard="")
        return verify_set(
            store,
            level=level.value,
            num_workers=workers or default_workers(manifest),
            resume=resume,
            on_shard=lambda path: bar.update(task, advance=1, shard=path),
        )


def _teacher_text(report: Report) -> str:
    facts = report.teacher_check
    if facts is None:
        return ""
    return (
        f", {facts['num_rows']:,} rows put to the teacher again, {facts['num_rows_differing']:,} "
        f"differ (seed {facts['seed']})"
    )


def _print_report(report: Report) -> None:
    out = Console(soft_wrap=True)
    for problem in report.problems:
        out.print("problem ", style="red", end="")
        out.print(printable(problem), markup=False, highlight=False)
    verdict = "[green]sound[/green]" if report.ok else f"[red]{len(report.problems)} problems[/red]"
    out.print(
        f"{report.url}: {verdict}{_LEVEL_TEXTS[report.level]} ({report.kind} "
        f"{report.identity[:12]}…, {report.num_shards} shards, {report.num_rows:,} rows, "
        f"{report.num_payload_entries:,} payload entries, {report.size_bytes / 1e6:,.1f} MB)"
        + (", signature good" if report.signature == "good" else "")
        + _teacher_text(report),
        highlight=False,
    )
