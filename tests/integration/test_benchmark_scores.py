"""Scores of a student with known answers are exactly the known ones, benchmark by benchmark.

Everything is real but what generates: the chat template, lm-eval, its definitions and filters, our
own, and the processes that run programs. A wrong template, filter or metric changes a figure here.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from stage2_student.benchmark_tasks.chat_text import THINK_BLOCK
from stage2_student.benchmark_tasks.model_folder import load_tokenizer
from stage2_student.benchmark_tasks.protocol import BENCHMARKS
from stage2_student.benchmark_tasks.results import Score
from stage2_student.benchmark_tasks.runner import BenchmarkConfig, run_benchmarks
from stage2_student.benchmark_tasks.task_configs import define
from tests import benchmark_rows as rows
from tests.scripted_students import ScriptedEngine, write_student

Run = Callable[..., tuple[Score, list[str]]]
END = "<|im_start|>assistant\n" + THINK_BLOCK


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def run(student: Path, tmp_path: Path) -> Run:
    """Run one benchmark on a script; returns its score and the prompts that were asked."""

    def run_one(
        task: str, data: Path, script: Callable[[str], str], limit: int | None = None
    ) -> tuple[Score, list[str]]:
        engine = ScriptedEngine(load_tokenizer(student), script)
        config = BenchmarkConfig(
            model=str(student),
            output=tmp_path / "out",
            tasks=task,
            data=data,
            limit=limit,
            run_generated_code=True,
            batch_size=3,
        )
        (score,) = run_benchmarks(config, engine=engine).scores
        benchmark = BENCHMARKS[task]
        for settings in engine.settings:
            assert settings.max_new_tokens == settings.num_steps == benchmark.max_new_tokens
            assert (settings.block_size, settings.temperature, settings.cfg_scale) == (32, 0.0, 0.0)
        for prompt in engine.prompts:
            assert prompt.count(THINK_BLOCK) == 1
            assert prompt.count("<|im_start|>assistant\n") == 1
            assert prompt.startswith("<|im_start|>")
        assert score.num_forwards == 7 * score.num_samples
        return score, engine.prompts

    return run_one


def test_gsm8k_is_scored_by_the_last_number(run: Run, shared_dir: Path) -> None:
    # Targets: 18, 3, 70000, 540, 20, 64, 260, 160, 45, 460.
    answers = {
        "Janet": "She sells 9 eggs at $2 each. The answer is 18.",
        "robe": "3",
        "Josh": "His profit is $70,000",
        "James": "The answer is 540.\nQ: And now?\nA: 7",
        "Wendi": "#### 20",
        "Kylar": "He needs 64.",
        "Toulouse": "<think>\nPerhaps 1?\n</think>\n\nThe answer is 260.",
        "Carla": "The answer is 161.",
        "John": "I cannot tell.",
        "Eliza": "The answer is 460, and 3 more.",
    }

    def script(prompt: str) -> str:
        (answer,) = [answers[key] for key in answers if key in prompt]
        return answer

    score, prompts = run("gsm8k_cot", shared_dir / "data", script, limit=10)
    assert score.score == pytest.approx(70)
    assert score.metrics["exact_match,strict-match"]["score"] == pytest.approx(40)
    assert (score.num_samples, score.num_rows, score.is_limited) == (10, 1319, True)
    assert all(prompt.endswith("\nA:<|im_end|>\n" + END) for prompt in prompts)
    assert all(prompt.count("Q:") == 1 for prompt in prompts)


def test_humaneval_programs_are_run(run: Run, shared_dir: Path) -> None:
    path = shared_dir / "data" / "humaneval" / "HumanEval.jsonl"
    problems = [json.loads(line) for line in path.read_text().splitlines()[:10]]
    right = [problem["canonical_solution"] for problem in problems]
    bodies = [
        right[0],
        right[1] + "\n```\nIt splits at depth 0.",
        right[2] + "\nprint(1 / 0)",
        right[3] + "\nclass Unfinished",
        right[4],
        right[5],
        "    return None\n",
        "    exit(0)\n",
        "    return [(\n",
        "    while True:\n        pass\n",
    ]

    def script(prompt: str) -> str:
        (index,) = [i for i, p in enumerate(problems) if f"def {p['entry_point']}(" in prompt]
        return bodies[index]

    score, prompts = run("humaneval_instruct", shared_dir / "data", script, limit=10)
    assert score.score == pytest.approx(60)
    for prompt in prompts:
        # The answer's beginning stands behind the think block and stays open.
        start = prompt.partition(END)[2]
        assert start.startswith("Here is the completed function:\n```python\n")
        assert "<|im_end|>" not in start


def test_mbpp_programs_are_run(run: Run, shared_dir: Path) -> None:
    path = shared_dir / "data" / "mbpp" / "mbpp.jsonl"
    problems = [json.loads(line) for line in path.read_text().splitlines()]
    problems = [p for p in problems if 11 <= p["task_id"] < 511][:8]
    right = [problem["code"] for problem in problems]
    answers = [
        right[0] + "\n```",
        "\n" + right[1] + "\n```\nDone.\n```python\n1/0\n```",
        right[2].replace("\r\n", "\n") + "```",
        "# a solution\n" + right[3] + "\n```",
        right[4],  # never closes its fence
        "def nothing():\n    return 0\n```",
        "```",
        right[7] + "\nassert False\n```",
    ]

    def script(prompt: str) -> str:
        (index,) = [i for i, p in enumerate(problems) if p["test_list"][0] in prompt]
        return answers[index]

    score, prompts = run("mbpp_instruct", shared_dir / "data", script, limit=8)
    assert score.score == pytest.approx(100 * 4 / 8)
    assert score.num_rows == 500
    assert all(prompt.endswith(END + "```python\n") for prompt in prompts)
    assert all("[BEGIN]" not in prompt for prompt in prompts)


def test_bbh_wants_the_sentence_of_its_three_examples(run: Run, shared_dir: Path) -> None:
    folder = shared_dir / "data" / "bbh" / "bbh"
    targets: dict[str, str] = {}
    seconds: set[str] = set()
    for path in sorted(folder.glob("*.json")):
        first, second = json.loads(path.read_text())["examples"][:2]
        targets |= {row["input"]: row["target"] for row in (first, second)}
        seconds.add(second["input"])

    def script(prompt: str) -> str:
        question = prompt.rpartition("Q: ")[2].rpartition("\nA: Let's think step by step.\n")[0]
        if question in seconds:
            return f"Clearly {targets[question]}. So the answer is not that one."
        return f"First one thing.\nSo the answer is {targets[question]}.\n\nQ: More?\nA: 1"

    score, prompts = run("bbh", shared_dir / "data", script, limit=2)
    assert score.score == pytest.approx(50)
    assert (score.num_samples, score.num_rows) == (54, 6511)
    for prompt in prompts:
        assert prompt.startswith("<|im_start|>system\n")
        # One user turn: three examples with their answers, then the question.
        assert prompt.count("<|im_start|>user\n") == 1
        assert prompt.count("A: Let's think step by step.\n") == 4
        assert prompt.endswith("\nA: Let's think step by step.\n<|im_end|>\n" + END)


def test_hellaswag_is_a_lettered_question(run: Run, tmp_path: Path) -> None:
    rows.write_hellaswag(tmp_path, 8)
    # The right letters are A, B, C, D, A, B, C, D.
    answers = ["A", "b.", "C. x", " D", "The", "d", "", "\nD"]

    def script(prompt: str) -> str:
        return answers[int(prompt.partition("Row ")[2].partition(":")[0])]

    score, prompts = run("hellaswag_gen", tmp_path, script)
    # Right: the first four. "The" holds no letter a to d; a line break ends an answer.
    assert score.score == pytest.approx(50)
    assert not score.is_limited
    first = next(prompt for prompt in prompts if "Row 0" in prompt)
    assert first == (
        "<|im_start|>user\nBaking : Row 0: a man bakes. Bread He then\n"
        "Question: Which ending makes the most sense?\n"
        "A. ending 0 w x\nB. ending 0 x x\nC. ending 0 y x\nD. ending 0 z x\n"
        "You may choose from 'A', 'B', 'C', 'D'.\nAnswer:\n<|im_end|>\n" + END
    )


def test_mmlu_wants_a_capital_letter_first(run: Run, tmp_path: Path) -> None:
    subjects = set(define(BENCHMARKS["mmlu_generative_dream"]).parts.values())
    assert len(subjects) == 57
    rows.write_mmlu(tmp_path, subjects, 5)
    # The right letters are A, B, C, D, A.
    answers = ["A", "B. 1 two", "c", " D", "A)"]

    def script(prompt: str) -> str:
        return answers[int(prompt.partition(" number ")[2].partition("?")[0])]

    score, prompts = run("mmlu_generative_dream", tmp_path, script)
    assert score.score == pytest.approx(60)
    assert score.num_samples == 57 * 5
    assert Counter(prompt.count("Answer:") for prompt in prompts) == {1: 57 * 5}
    first = next(prompt for prompt in prompts if "anatomy number 0" in prompt)
    assert first == (
        "<|im_start|>system\nThe following are multiple choice questions (with answers) about "
        "anatomy.\n\n<|im_end|>\n<|im_start|>user\nanatomy number 0?\nA. 0 one\nB. 0 two\n"
        "C. 0 three\nD. 0 four\nAnswer:<|im_end|>\n" + END
    )


def test_mmlu_pro_wants_a_sentence(run: Run, tmp_path: Path) -> None:
    rows.write_mmlu_pro(tmp_path)
    letters = dict(zip(rows.MMLU_PRO_CATEGORIES, "ABCDEFGHIJABCD", strict=True))
    wrong = {"biology": "A", "law": "The answer is (J).", "math": "answer: J", "other": ""}

    def script(prompt: str) -> str:
        category = prompt.partition("What of ")[2].partition("?")[0]
        return wrong.get(category, f"Hence the answer is ({letters[category]}).\nQuestion: 2?")

    score, prompts = run("mmlu_pro", tmp_path, script)
    assert score.score == pytest.approx(100 * 10 / 14)
    assert all("Answer: Let's think step by step.<|im_end|>\n" + END in p for p in prompts)
    assert all(prompt.count("Question:") == 1 for prompt in prompts)


def test_math_counts_equal_values(run: Run, tmp_path: Path) -> None:
    rows.write_math(tmp_path, 3)

    def script(prompt: str) -> str:
        number = int(prompt.partition("\\frac{")[2].partition("}")[0])
        if number == 1:
            return "Final Answer: The final answer is $\\frac{1}{7}$. I hope it is correct."
        return f"So it is $\\boxed{{{number}/7}}$." if number == 2 else "So it is $\\boxed{9}$."

    score, prompts = run("minerva_math", tmp_path, script)
    assert score.score == pytest.approx(100 * 2 / 3)
    assert score.metrics["exact_match,none"]["score"] == pytest.approx(100 / 3)
    assert all(prompt.endswith("\n\nSolution:<|im_end|>\n" + END) for prompt in prompts)
    assert all(prompt.count("Problem:") == 1 for prompt in prompts)
