"""Commands by which sets change hands: diff, merge, pack, unpack, push, pull.

Each may be run again after a kill and goes on; results go to stdout, progress to stderr.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from tide_cache import compare
from tide_cache.commands import Json, Url
from tide_cache.errors import ConfigError, StorageError
from tide_cache.fetch import Listed
from tide_cache.manifest import identity
from tide_cache.merge import merge as merge_sets
from tide_cache.merge import plan_merge
from tide_cache.pack import pack as pack_set
from tide_cache.pack import pack_file
from tide_cache.pack import unpack as unpack_set
from tide_cache.part import plan_part, pull_part
from tide_cache.set_files import SetFiles, read_set_files
from tide_cache.store import Store
from tide_cache.targets import FolderTarget, open_target, require_local
from tide_cache.transfer import Target, plan_transfer, transfer
from tide_cache.writer import read_manifest

Advance = Callable[[int], None]
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
            manifest = merge_sets(plan, Store(output), on_task=lambda _: advance(1))
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


def pack(
    url: Url,
    output: Annotated[
        str, typer.Option("-o", "--output", help="A .tar.zst file, or - for stdout.")
    ],
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as cores.")] = None,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Write a set as one .tar.zst file, each file checked on the way; the same set, the same bytes.

    [bold]Examples[/bold]

    tide-cache pack runs/cache -o cache.tar.zst

    tide-cache pack s3://lab/cache -o - | ssh host tide-cache unpack - runs/cache
    """
    store = Store(url)
    files = read_set_files(store)
    facts: dict[str, Any] = {"output": output, **_set_facts(files)}
    if output == "-" and json_output:
        raise ConfigError("pack: --json and -o - would both write to stdout", hint="keep one")
    if not dry_run:
        with _progress("pack", files.size_bytes, in_bytes=True) as advance:
            if output == "-":
                pack_set(store, files, sys.stdout.buffer, num_threads=threads, on_bytes=advance)
                sys.stdout.buffer.flush()
                return
            facts["archive_bytes"] = pack_file(
                store, files, Path(output), num_threads=threads, on_bytes=advance
            )
    _report(facts, json_output, dry_run=dry_run, done="packed", target=output)


def unpack(
    archive: Annotated[str, typer.Argument(help="A file made by pack, or - for stdin.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check all of it, write nothing.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Read a .tar.zst file of pack into a folder, each file checked before the set is there.

    [bold]Examples[/bold]

    tide-cache unpack cache.tar.zst runs/cache

    curl -s https://host/cache.tar.zst | tide-cache unpack - runs/cache
    """
    with _opened(archive) as source, _progress("unpack", None, in_bytes=True) as advance:
        manifest = unpack_set(source, None if dry_run else folder, where=archive, on_bytes=advance)
    listed: list[Listed] = [*manifest.files, *manifest.shards]
    facts = {
        "archive": archive,
        "identity": identity(manifest),
        "num_files": len(listed) + 1,
        "size_bytes": sum(facts.size_bytes for facts in listed),
    }
    _report(facts, json_output, dry_run=dry_run, done="unpacked", target=str(folder))


def push(
    folder: Annotated[str, typer.Argument(help="Folder of a finished set.")],
    url: Annotated[
        str, typer.Argument(help="A folder, s3://BUCKET/PATH or hf://datasets/USER/NAME.")
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite and remove files of another set there.")
    ] = False,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Send a set to where others can read it: what is not there yet, the manifest last.

    Run it again after a break, or when the set has grown. Token ids are text: whoever can read the
    set can read the conversations in it.

    [bold]Examples[/bold]

    tide-cache push runs/cache s3://lab/cache

    tide-cache push runs/cache hf://datasets/lab/cache --dry-run
    """
    source, target = require_local(folder), open_target(url)
    _transfer("push", source, target, replace, dry_run, json_output)


def pull(
    url: Url,
    folder: Annotated[str, typer.Argument(help="Folder to make, or to go on with.")],
    views: Annotated[
        str | None, typer.Option(help="Only these views, as in 0,1; they are numbered anew.")
    ] = None,
    payload: Annotated[
        str | None, typer.Option(help="Only these payloads, as in candidates or chunks.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite and remove files of another set there.")
    ] = False,
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Fetch a set, or a part of it, each file checked on the way; the manifest comes last.

    Run it again after a break: what is there and sound is not fetched again, what is damaged is
    repaired. A part is a set of its own that says what it is part of.

    [bold]Examples[/bold]

    tide-cache pull s3://lab/cache runs/cache

    tide-cache pull https://host/cache runs/part --views 0,1 --payload candidates
    """
    source, output = Store(url), require_local(folder)
    if views is None and payload is None:
        _transfer("pull", source, FolderTarget(output), replace, dry_run, json_output)
        return
    plan = plan_part(
        read_manifest(source),
        views=None if views is None else _numbers(views),
        payloads=None if payload is None else payload.split(","),
    )
    facts = {"url": source.url, "target": folder, **plan.as_json()}
    if not dry_run:
        with _progress("pull", plan.bytes_to_fetch, in_bytes=True) as advance:
            manifest = pull_part(plan, source, output, on_bytes=advance)
        facts |= {"identity": identity(manifest), "counts": manifest.counts}
    if json_output:
        _print_json({**facts, "dry_run": dry_run})
        return
    verb = "would fetch" if dry_run else "fetched"
    _print_lines(
        [
            f"{folder}: {verb} views {', '.join(map(str, plan.views))} of {facts['whole'][:12]}…, "
            f"{facts['bytes_to_fetch'] / 1e6:,.1f} of {facts['bytes_of_whole'] / 1e6:,.1f} MB"
        ]
    )


def _transfer(
    what: str, source: Store, target: Target, replace: bool, dry_run: bool, json_output: bool
) -> None:
    plan = plan_transfer(read_set_files(source), target)
    facts = {"url": source.url, "target": target.url, **plan.as_json()}
    if not dry_run:
        with _progress(what, plan.bytes_to_send, in_bytes=True) as advance:
            transfer(source, target, plan, replace=replace, on_bytes=advance)
    if json_output:
        _print_json({**facts, "dry_run": dry_run})
        return
    if plan.is_finished:
        _print_lines([f"{target.url}: nothing to do, the set is there"])
        return
    verb = "would send" if dry_run else "sent"
    _print_lines(
        [
            f"{target.url}: {verb} {facts['num_to_send']:,} of {len(plan.files.listed):,} files, "
            f"{facts['bytes_to_send'] / 1e6:,.1f} of {facts['size_bytes'] / 1e6:,.1f} MB"
        ]
    )
    for path in plan.overwrites[:10] if dry_run else []:
        _print_lines([f"  another set's {path} is in the way: --replace overwrites it"])


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--views: expected numbers as in 0,1, got {text!r}") from error


def _opened(archive: str) -> BinaryIO:
    """Open an archive; standard input without a buffer, so that what has come is used at once."""
    try:
        if archive == "-":
            return os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
        return Path(archive).open("rb")
    except OSError as error:
        raise StorageError(f"{archive}: cannot read: {error.strerror}") from error


def _set_facts(files: SetFiles) -> dict[str, Any]:
    return {
        "identity": identity(files.manifest),
        "num_files": len(files.listed) + len(files.unlisted),
        "size_bytes": files.size_bytes,
    }


def _report(
    facts: dict[str, Any], json_output: bool, *, dry_run: bool, done: str, target: str
) -> None:
    if json_output:
        _print_json({**facts, "dry_run": dry_run})
        return
    verb = f"would have {done}" if dry_run else done
    _print_lines(
        [
            f"{target}: {verb} {facts['identity'][:12]}…, {facts['num_files']:,} files, "
            f"{facts['size_bytes'] / 1e6:,.1f} MB"
        ]
    )


def _print_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def _print_lines(lines: Sequence[str]) -> None:
    out = Console(soft_wrap=True)
    for line in lines:
        out.print(line, markup=False, highlight=False)


@contextmanager
def _progress(what: str, total: int | None, *, in_bytes: bool = False) -> Iterator[Advance]:
    """Show a bar on a terminal's stderr; yields the function that moves it."""
    console = Console(stderr=True)
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as bar:
        task = bar.add_task(what, total=total)
        yield lambda num: bar.update(task, advance=num)
