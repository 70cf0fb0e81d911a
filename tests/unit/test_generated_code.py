"""Programs that a student wrote: which text is the program, and when it passes."""

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage2_student.benchmark_tasks.code_execution import Limits, passes
from stage2_student.benchmark_tasks.generated_code import (
    fenced_block,
    humaneval_programs,
    mbpp_programs,
    pass_at_1,
)

FEW = Limits(cpu_s=1, wall_s=3.0)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """lm-eval's own functions; the metric that they fetch from the hub on import is left out."""
    metric = types.SimpleNamespace(compute=lambda **_: None)
    absent = types.ModuleType("evaluate")
    absent.load = lambda name: metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evaluate", absent)
    folder = Path(lm_eval.tasks.__file__).parent
    functions = {}
    for name in ("humaneval", "mbpp"):
        functions[name] = types.ModuleType(f"stock_{name}")
        exec((folder / name / "utils.py").read_text(), functions[name].__dict__)
    return types.SimpleNamespace(**functions)


ANSWERS = st.lists(
    st.sampled_from(["```", "\n", "python", "def f():", "    return 1", "```python", " ", "x = 2"]),
    max_size=12,
).map("".join)


def test_filters_agree_with_lm_eval(stock: types.SimpleNamespace) -> None:
    @given(answer=ANSWERS)
    def agree(answer: str) -> None:
        docs = [{"prompt": "def f():\n"}]
        ours = humaneval_programs([[answer]], docs)
        assert ours == stock.humaneval.build_predictions_instruct([[answer]], docs)
        # Where the prompt's fence is followed by a line break, lm-eval's rule is ours.
        ours = mbpp_programs([["\n" + answer]], docs)
        assert ours == stock.mbpp.build_predictions([["\n" + answer]], docs)

    agree()


def test_an_answer_may_begin_on_the_line_of_the_fence(stock: types.SimpleNamespace) -> None:
    answer = "def f():\n    return 1\n```"
    assert fenced_block(answer) == "def f():\n    return 1"
    # lm-eval takes the first word for a language: the program that it runs cannot pass.
    assert stock.mbpp.extract_code_blocks(answer) == " f():\n    return 1"


def test_an_open_block_is_no_program() -> None:
    assert fenced_block("def f():\n    return 1") == ""


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "print('much' * 100_000)",
        "import sys\nprint('x', file=sys.stderr)",
        "open('own file', 'w').write('x')",
        "import threading\nthreading.Thread(target=input).start()",
        "assert __name__ != '__main__'",
    ],
)
def test_what_reaches_its_end_passes(program: str) -> None:
    assert passes(program, "assert True", FEW)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "def f(:",
        "1 / 0",
        "exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit(100)",
        "while True: pass",
        "import time\ntime.sleep(60)",
        "x = bytearray(8 * 2**30)",
        "open('x', 'wb').write(bytes(2**25))",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "\ud800",
    ],
)
def test_what_does_not_reach_its_end_fails(program: str) -> None:
    began_s = time.monotonic()
    assert not passes(program, "", FEW)
    assert time.monotonic() - began_s < 20


def test_a_program_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    check = "import os\nassert 'HF_TOKEN' not in os.environ\nassert os.listdir() == ['program.py']"
    assert passes(check, "")


def test_what_a_program_starts_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    assert passes(program, "")
    time.sleep(3)
    assert not mark.exists()


def test_pass_at_1_is_a_share() -> None:
    programs = [["def f(): return 1"], ["def f(): return 2"]]
    assert pass_at_1(["assert f() == 1"] * 2, programs) == 0.5


@pytest.mark.slow
def test_the_released_solutions_pass(shared_dir: Path) -> None:
    problems = read_lines(shared_dir / "data" / "humaneval" / "HumanEval.jsonl")
    assert len(problems) == 164
    for problem in problems:
        tests = f"{problem['test']}\ncheck({problem['entry_point']})"
        assert passes(problem["prompt"] + problem["canonical_solution"], tests), problem["task_id"]
    problems = read_lines(shared_dir / "data" / "mbpp" / "mbpp.jsonl")
    problems = [p for p in problems if 11 <= p["task_id"] < 511]
    failed = [p["task_id"] for p in problems if not passes(p["code"], "\n".join(p["test_list"]))]
    # Its tests need a set-up that the task's definition does not run; no answer can pass.
    assert failed == [367]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
