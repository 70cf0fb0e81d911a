"""A build whose teacher had to shrink its batches says so, and its rows are those of that budget.

That a teacher shrinks when the memory does not hold a batch is shown in `test_teacher_memory`; here
its budget is what it is after that.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildConfig, BuildPlan, make_plan
from stage1_teacher.build_worker import BuildWorker
from stage1_teacher.events import EventLog
from stage1_teacher.executors.base import MakeWorker, OnDone, Result
from stage1_teacher.executors.local import LocalExecutor
from stage1_teacher.teachers.hf import HfTeacher
from tests.build_grounds import NUM_VIEWS, BuildGround
from tests.builders import run_command
from tide_cache.cache import open_cache
from tide_cache.errors import TideError
from tide_cache.store import Store
from tide_cache.verify import verify_set

SMALL = 96


class Shrinking(LocalExecutor):
    """Its one worker has a teacher whose budget was halved a few times."""

    def run(
        self,
        make_worker: MakeWorker[Result],
        tasks: Sequence[int],
        on_done: OnDone[Result],
        log: EventLog,
    ) -> dict[int, TideError]:
        worker = make_worker(0)
        assert isinstance(worker, BuildWorker) and isinstance(worker.teacher, HfTeacher)
        worker.teacher.token_budget = SMALL
        return super().run(lambda slot: worker, tasks, on_done, log)


def plan_of(ground: BuildGround, output: Path, token_budget: int) -> BuildPlan:
    values = yaml.safe_load(ground.config.read_text())["build"]
    values["teacher"]["token_budget"] = token_budget
    # Nothing is fitted to the teacher, so that both builds share their codecs.
    values["candidates"] |= {"ranks": "corpus", "mean_logits_positions": 0}
    config = BuildConfig.model_validate(values)
    return make_plan(config, open_cache(ground.premasked), str(output))


def test_rows_of_smaller_batches_are_counted_and_equal_those_of_that_budget(
    build_ground: BuildGround, tmp_path: Path
) -> None:
    log = EventLog(tmp_path / "events")
    shrunk = run_build(
        plan_of(build_ground, tmp_path / "shrunk", 4096), executor=Shrinking(1), log=log
    )
    small = run_build(plan_of(build_ground, tmp_path / "small", SMALL), num_workers=1)
    assert shrunk.counts["num_rows_at_smaller_token_budget"] == shrunk.counts["num_rows"]
    assert "num_rows_at_smaller_token_budget" not in small.counts
    assert verify_set(Store(tmp_path / "shrunk")).ok
    one, other = open_cache(tmp_path / "shrunk"), open_cache(tmp_path / "small")
    for view in range(NUM_VIEWS):
        rows = range(one.num_samples)
        assert one.read_rows(view, rows).equals(other.read_rows(view, rows))
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    notes = [event["note"] for event in events if event["event"] == "note"]
    assert len(notes) == len({shard.task for shard in shrunk.shards})
    assert all("smaller batches than configured" in note for note in notes)
    shown = " ".join(run_command("inspect", tmp_path / "shrunk").stdout.split())
    assert f"{shrunk.counts['num_rows']} rows in smaller batches than configured" in shown
