"""The lm-eval tasks of a benchmark: lm-eval's own definitions by reference, with our overrides.

What is overridden: the number of examples, where rows come from, and for code the filter and the
metric (see `generated_code`). Two benchmarks are not in lm-eval; their definitions are ours, in
`definitions/`, which `lm_eval --include_path` takes as well. Only the folders that are needed are
indexed: an index of all of lm-eval's takes seconds.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage2_student.benchmark_tasks import generated_code
from stage2_student.benchmark_tasks.local_data import LocalRows, Row
from stage2_student.benchmark_tasks.protocol import Benchmark
from tide_cache.errors import DataError, StorageError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

DEFINITIONS = Path(__file__).with_name("definitions")
# Folders of lm-eval's tasks, relative to its `tasks/`.
_STOCK_FOLDERS = {
    "gsm8k_cot": ("gsm8k",),
    "minerva_math": ("minerva_math", "benchmarks"),
    "bbh": ("bbh/cot_fewshot",),
    "mmlu_pro": ("mmlu_pro",),
    "hellaswag_gen": (),
    "mmlu_generative_dream": ("mmlu/generative",),
    "humaneval_instruct": ("humaneval",),
    "mbpp_instruct": ("mbpp",),
}
# Keys of a group's definition that are about the group; all others are overrides of its tasks.
_GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")
_PASS_AT_1 = [{"metric": generated_code.pass_at_1, "aggregation": "mean", "higher_is_better": True}]
_CODE_FILTERS = {
    "humaneval_instruct": ("create_test", generated_code.humaneval_programs),
    "mbpp_instruct": ("extract_code", generated_code.mbpp_programs),
}
# Sub-tasks that all read one file, of which lm-eval's own definitions pick their rows.
_ONE_FILE = ("mmlu_pro",)

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """A benchmark's definition before any row is read.

    `leaves` maps the names of its tasks to overrides, in lm-eval's order; `parts` names the part of
    the data set that each reads ("" where there are no parts); `group` is the group's definition,
    None for a single task.
    """

    benchmark: Benchmark
    leaves: Mapping[str, Config]
    parts: Mapping[str, str]
    group: Config | None
    index: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTasks:
    """What `lm_eval.evaluator.evaluate` takes."""

    tasks: dict[str, "Task"]
    groups: dict[str, "Group"]


def define(benchmark: Benchmark) -> Definition:
    """Look up a benchmark in lm-eval's definitions and ours. Reads no data."""
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent
    folders = [stock / folder for folder in _STOCK_FOLDERS[benchmark.task]]
    index = lm_eval.tasks.TaskManager(include_path=[*folders, DEFINITIONS], include_defaults=False)
    leaves = dict(_leaves(index.task_index, benchmark.task, {}))
    parts = {
        name: index.task_index[name].cfg["dataset_name"]
        if len(leaves) > 1 and benchmark.task not in _ONE_FILE
        else ""
        for name in leaves
    }
    top = index.task_index[benchmark.task].cfg
    return Definition(
        benchmark=benchmark,
        leaves=leaves,
        parts=parts,
        group=top if "group" in top else None,
        index=index,
    )


def load_tasks(definition: Definition, local: LocalRows | None) -> LoadedTasks:
    """Build the tasks, on local rows or (None) on what lm-eval downloads.

    Raises StorageError where a download fails, DataError where a sub-task has no rows.
    """
    quiet_lm_eval()
    task = definition.benchmark.task
    tasks: dict[str, Any] = {}
    for name in definition.leaves:
        try:
            tasks[name] = _load_leaf(definition, name, local)
        except IndexError as error:
            raise DataError(f"{task}: the data set has no rows for {name}") from error
        except (OSError, ValueError) as error:
            if local is not None:
                raise
            raise StorageError(
                f"{task}: lm-eval cannot get its data set: {(str(error).splitlines() or [''])[0]}",
                hint="give the files with --data DIR, or check the network (HF_HUB_OFFLINE)",
            ) from error
    return LoadedTasks(tasks=tasks, groups=_groups(definition, tasks))


def quiet_lm_eval() -> None:
    """Silence what lm-eval says about each of 60 sub-tasks: our own overrides, mostly."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _leaves(index: Mapping[str, Any], name: str, changes: Config) -> Iterator[tuple[str, Config]]:
    """Walk groups and tags down to tasks, with the overrides collected on the way."""
    entry = index[name]
    if entry.cfg is not None and "group" in entry.cfg:
        own = {k: v for k, v in entry.cfg.items() if k not in _GROUP_KEYS}
        yield from _members(index, entry.cfg["task"], {**changes, **own})
    elif entry.cfg is None:
        for tagged in sorted(entry.tags):
            yield from _leaves(index, tagged, changes)
    else:
        yield name, changes


def _members(
    index: Mapping[str, Any], members: Sequence[Any], changes: Config
) -> Iterator[tuple[str, Config]]:
    for member in members:
        if isinstance(member, str):
            yield from _leaves(index, member, changes)
        else:
            yield from _members(index, member["task"], changes)


def _load_leaf(definition: Definition, name: str, local: LocalRows | None) -> Any:
    """Build one task with its overrides."""
    benchmark = definition.benchmark
    changes = {**definition.leaves[name], "num_fewshot": benchmark.num_fewshot}
    if benchmark.num_fewshot == 0:
        # The examples' split would be read even where none are drawn from it.
        changes |= {"fewshot_split": None, "fewshot_config": None}
    if local is not None:
        changes |= _rows_override(local.rows[definition.parts[name]])
    if benchmark.runs_code:
        from lm_eval.api.task import ConfigurableTask

        return ConfigurableTask(config=_code_config(definition, name, changes))
    # lm-eval takes overrides of a task by name from a group only.
    one = {"group": "overridden", "task": [{"task": name, **changes}]}
    return definition.index.load([one])["tasks"][name]


def _groups(definition: Definition, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Build the group that adds up sub-tasks, if the benchmark is one."""
    from lm_eval.api.group import Group

    if definition.group is None:
        return {}
    keys = [key for key in _GROUP_KEYS if key in definition.group and key != "tag"]
    group = Group.from_config({key: copy.deepcopy(definition.group[key]) for key in keys})
    for task in tasks.values():
        group.add(task)
    return {group.name: group}


def _code_config(definition: Definition, name: str, changes: Config) -> Config:
    """Return the stock definition with our filter and metric in the place of its functions."""
    filter_name, programs = _CODE_FILTERS[name]
    stock = copy.deepcopy(definition.index.task_index[name].cfg)
    stock.pop("tag", None)
    return {
        **stock,
        **changes,
        "metric_list": _PASS_AT_1,
        "filter_list": [
            {"name": filter_name, "filter": [{"function": "custom", "filter_fn": programs}]}
        ],
    }


def _rows_override(rows: Sequence[Row]) -> Config:
    """Replace a task's download by rows in memory, whatever its splits are called."""

    def dataset(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(list(rows))}

    return {
        "custom_dataset": dataset,
        "dataset_path": None,
        "dataset_name": None,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
