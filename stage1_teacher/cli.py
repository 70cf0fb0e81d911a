"""Stage 1's commands under `tide-cache`. They parse options, report, and leave the work to others.

Results go to stdout (`--json` for programs), progress to stderr.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from tide_cache.config import load_config
from tide_cache.errors import ConfigError
from tide_cache.writer import TaskRecord

_DRY_RUN_ROWS = 256

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def prepare(
    config_path: ConfigPath,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="DIR", help="Folder or URL of the premasked set."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one per processor.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help=f"Encode the first {_DRY_RUN_ROWS} rows, print projected counts, write nothing.",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Turn chat data into a premasked set: tokenise, align, draw timesteps, masks and halves.

    Needs no GPU. Safe to kill and to run again: finished tasks are kept. The bytes do not depend
    on the number of workers.

    [bold]Examples[/bold]

    tide-cache prepare examples/wedlm_to_qwen3.yaml -o runs/premasked

    tide-cache prepare prepare.yaml -o runs/premasked --set seed=7 --set student.max_length=1024

    tide-cache prepare prepare.yaml --dry-run --json | jq .projected_counts
    """
    # Imported here: these bring transformers and datasets, for which no other command should wait.
    from stage1_teacher import prepare_report
    from stage1_teacher.prepare import dry_run as run_dry
    from stage1_teacher.prepare import make_plan, run_prepare
    from stage1_teacher.prepare_config import PrepareConfig
    from stage1_teacher.progress import RowProgress

    config = load_config(config_path, PrepareConfig, overrides or (), section="prepare")
    if output is None and not dry_run:
        raise ConfigError("prepare: expected -o DIR, where the set goes", hint="or --dry-run")
    plan, encoder = make_plan(config)
    if dry_run or output is None:
        seen = run_dry(plan, encoder, _DRY_RUN_ROWS)
        if json_output:
            _print_json(prepare_report.dry_run_as_json(plan, seen))
        else:
            _print_lines(prepare_report.dry_run_lines(plan, seen))
        return
    num_tasks = {"made": 0, "kept": 0}
    with RowProgress("prepare", len(plan.rows)) as progress:

        def on_task(record: TaskRecord, num_rows: int, was_done: bool) -> None:
            num_tasks["kept" if was_done else "made"] += 1
            num_dropped = num_rows - record.counts.get("num_samples", 0)
            progress.advance(num_rows, num_dropped=num_dropped, was_done=was_done)

        manifest = run_prepare(plan, output, encoder=encoder, num_workers=workers, on_task=on_task)
    if json_output:
        _print_json(prepare_report.as_json(manifest, output, num_tasks=num_tasks))
    else:
        _print_lines(prepare_report.lines(manifest, output, num_tasks=num_tasks))


def build(
    config_path: ConfigPath,
    premasked: Annotated[
        str, typer.Option("-p", "--premasked", metavar="DIR", help="Premasked set to answer.")
    ],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="DIR", help="Folder or URL of the cache."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; default: one per GPU, or per processor without one."),
    ] = None,
    executor: Annotated[
        Literal["local", "ray"],
        typer.Option(help="local: processes of this machine; ray: actors of a Ray cluster."),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster to join; default: one of its own."),
    ] = None,
    shard_range: Annotated[
        str | None,
        typer.Option(
            metavar="i/N", help="Build only share i (from 0) of N: Slurm arrays, torchrun."
        ),
    ] = None,
    events: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Event log; default: DIR.events.jsonl if DIR is local."),
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be made, stop.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Run the teacher over a premasked set, once, and write its answers as a cache.

    Safe to kill and to run again: finished tasks are kept. Any number of builds may fill one
    folder. The bytes depend neither on the workers nor on the executor.

    [bold]Examples[/bold]

    tide-cache build examples/wedlm_to_qwen3.yaml -p runs/premasked -o runs/cache

    tide-cache build build.yaml -p runs/premasked -o runs/cache --set candidates.k=32

    tide-cache build build.yaml -p s3://lab/premasked -o s3://lab/cache --executor ray

    tide-cache build build.yaml -p runs/premasked -o runs/cache --shard-range 3/8

    tide-cache build build.yaml -p runs/premasked --dry-run --json
    """
    # Imported here: these bring torch and transformers, for which no other command should wait.
    from stage1_teacher import build_report
    from stage1_teacher.build import run_share
    from stage1_teacher.build_options import default_event_log, open_executor, parse_shard_range
    from stage1_teacher.build_plan import BuildConfig, make_plan
    from stage1_teacher.events import EventLog
    from stage1_teacher.progress import RowProgress
    from tide_cache.cache import open_cache

    config = load_config(config_path, BuildConfig, overrides or (), section="build")
    if output is None and not dry_run:
        raise ConfigError("build: expected -o DIR, where the cache goes", hint="or --dry-run")
    source = open_cache(premasked)
    share = parse_shard_range(shard_range or "0/1")
    if dry_run:
        plan = make_plan(config, source, output or "")
        counts = source.manifest.counts
        if json_output:
            _print_json(build_report.dry_run_as_json(plan, counts))
        else:
            _print_lines(build_report.dry_run_lines(plan, counts))
        return
    runner, device = open_executor(executor, config.teacher, workers, ray_address)
    plan = make_plan(config, source, output or "", device=device)
    num_tasks = {"made": 0, "kept": 0}
    mine = set(share.of(plan.tasks))
    num_rows = sum(shard.num_rows for shard in source.manifest.shards if shard.task in mine)
    with RowProgress("build", num_rows) as progress:

        def on_task(record: TaskRecord, was_done: bool) -> None:
            num_tasks["kept" if was_done else "made"] += 1
            counts = record.counts
            progress.advance(
                counts.get("num_rows", 0),
                num_dropped=sum(record.dropped.values()),
                num_positions=counts.get("num_masked_positions", 0),
                size_bytes=record.size_bytes,
                was_done=was_done,
            )

        def on_event(event: str, facts: dict[str, Any]) -> None:
            if event == "task_set_aside":
                progress.fail()

        manifest = run_share(
            plan,
            share,
            num_workers=workers,
            executor=runner,
            on_task=on_task,
            on_calibration=progress.preparing("calibrate"),
            log=EventLog(events or default_event_log(plan.output_url), on_event),
        )
    if manifest is None:
        facts = build_report.share_facts(plan.output_url, share, num_tasks=num_tasks)
        if json_output:
            _print_json(facts)
        else:
            _print_lines(build_report.share_lines(facts))
        return
    if json_output:
        _print_json(build_report.as_json(manifest, plan.output_url, num_tasks=num_tasks))
    else:
        _print_lines(build_report.lines(manifest, plan.output_url, num_tasks=num_tasks))


def calibrate(
    config_path: ConfigPath,
    premasked: Annotated[
        str, typer.Option("-p", "--premasked", metavar="DIR", help="Premasked set to sample.")
    ],
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Check a finished cache on other positions instead of comparing."
        ),
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be asked of the teacher, stop.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Compare payload settings against the teacher's full logits: fidelity, bytes, decode cost.

    A build measures its own setting by itself, and with `payload: auto` chooses from this table.

    [bold]Examples[/bold]

    tide-cache calibrate examples/wedlm_to_qwen3.yaml -p runs/premasked

    tide-cache calibrate build.yaml -p runs/premasked --set student=runs/student/final --json

    tide-cache calibrate build.yaml -p runs/premasked --cache runs/cache
    """
    # Imported here: these bring torch and transformers, for which no other command should wait.
    from stage1_teacher import calibrate_report
    from stage1_teacher.calibrate_command import check_finished, compare_settings, plan_of
    from stage1_teacher.payload_config import BuildConfig
    from stage1_teacher.progress import SliceProgress
    from tide_cache.cache import open_cache

    config = load_config(config_path, BuildConfig, overrides or (), section="build")
    source = open_cache(premasked)
    plan = plan_of(config, source)
    if dry_run:
        facts = calibrate_report.dry_run_facts(plan)
    else:
        with SliceProgress("calibrate") as progress:
            if cache is not None:
                facts = check_finished(plan, source, open_cache(cache), on_slice=progress.update)
            else:
                found = compare_settings(plan, source, on_slice=progress.update)
                facts = calibrate_report.as_json(found)
    if json_output:
        _print_json(facts)
    else:
        calibrate_report.print_facts(facts)


def plan(
    config_path: ConfigPath,
    premasked: Annotated[
        str, typer.Option("-p", "--premasked", metavar="DIR", help="Premasked set to plan for.")
    ],
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200, b200, l40s, rtx4090 or mi300x.")
    ] = "h100",
    mfu: Annotated[
        float, typer.Option(help="Share of the GPU's peak that is assumed to be reached.")
    ] = 0.35,
    usd_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="Price.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Project to so many samples; default: the set's.")
    ] = None,
    read: Annotated[
        int, typer.Option(min=1, help="Samples to lay out at most; of a larger set, a part.")
    ] = 2048,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What 'tide-cache calibrate --json' printed: measured bytes."
        ),
    ] = None,
    overrides: Overrides = None,
    json_output: Json = False,
) -> None:
    """Say what a build will cost before anything is spent: tokens, GPU-hours, gigabytes.

    Needs no GPU and no weights: of the teacher, `config.json` alone is read.

    [bold]Examples[/bold]

    tide-cache plan examples/wedlm_to_qwen3.yaml -p runs/premasked --gpu h200

    tide-cache plan build.yaml -p runs/premasked --samples 1000000 --usd-per-gpu-hour 2.5

    tide-cache plan build.yaml -p runs/premasked --set teacher.passes=separate --json
    """
    # Imported here: these bring torch and transformers, for which no other command should wait.
    from stage1_teacher import plan_report
    from stage1_teacher.gpus import find_gpu
    from stage1_teacher.payload_config import BuildConfig
    from stage1_teacher.plan_cost import Machine, plan_cost
    from tide_cache.cache import open_cache

    machine = Machine(gpu=find_gpu(gpu), mfu=mfu, usd_per_gpu_hour=usd_per_gpu_hour)
    cost = plan_cost(
        load_config(config_path, BuildConfig, overrides or (), section="build"),
        open_cache(premasked),
        machine,
        num_samples=samples,
        max_samples_read=read,
        calibration_path=calibration,
    )
    if json_output:
        _print_json(plan_report.as_json(cost))
    else:
        _print_lines(plan_report.lines(cost))


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _print_lines(lines: list[tuple[str, str]]) -> None:
    console = Console(soft_wrap=True)
    for label, text in lines:
        console.print(f"{label:<10}", style="bold", end="")
        # Names of sources hold brackets, which are no markup.
        console.print(text, markup=False, highlight=False)
