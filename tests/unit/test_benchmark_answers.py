"""From messages to prompts, from tokens to answers, and answers that survive a kill."""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
from lm_eval.api.registry import get_model
from transformers import AutoTokenizer

from stage2_student.benchmark_tasks.answer_journal import Answer, AnswerJournal, answer_key
from stage2_student.benchmark_tasks.chat_text import THINK_BLOCK, cut_answer, render
from stage2_student.benchmark_tasks.engines import Batches, WorkerEngine
from stage2_student.benchmark_tasks.language_model import TideLM
from stage2_student.benchmark_tasks.model_folder import load_tokenizer, model_sha256
from stage2_student.benchmark_tasks.progress import NoProgress
from stage2_student.sampling.settings import Generation, GenerationSettings
from tests.scripted_students import ScriptedEngine, write_student
from tests.small_tokenizers import CHATML, THINKING, byte_level
from tide_cache.errors import ConfigError, DataError, TideError

USER = {"role": "user", "content": "Hi"}
BEGUN = {"role": "assistant", "content": "\n```python\n"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("student"))


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_the_think_block_stands_where_the_answer_begins(template: str) -> None:
    tokenizer = byte_level(template)
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + THINK_BLOCK
    asked = render(tokenizer, [USER], add_generation_prompt=True, think_block=True)
    assert asked == expected
    # Qwen3's template writes the block in front of a begun answer itself; ChatML does not.
    begun = render(tokenizer, [USER, BEGUN], add_generation_prompt=False, think_block=True)
    assert begun == expected + "```python\n"


def test_without_the_think_block_the_template_stands_alone() -> None:
    tokenizer = byte_level(CHATML)
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, [USER], add_generation_prompt=True, think_block=False) == head
    begun = render(tokenizer, [USER, BEGUN], add_generation_prompt=False, think_block=False)
    assert begun == head + "\n```python\n"


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("7\n\nQ: 8", ["Q:", "\n\n"], "7"),
        ("7", [], "7"),
        ("<think>\nhm\n</think>\n\n7", [], "7"),
        ("<think>a Q: b</think>7 Q: 8", ["Q:"], "7 "),
        ("Q: 8", ["Q:"], ""),
    ],
)
def test_answers_are_cut(text: str, until: list[str], expected: str) -> None:
    assert cut_answer(text, until) == expected


def test_prompts_become_the_tokens_of_qwen3(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "tokenizers" / "qwen3")
    engine = Recorder()
    settings = GenerationSettings(max_new_tokens=8)
    model = TideLM(tokenizer=tokenizer, engine=engine, settings=settings)
    prompt = model.apply_chat_template([USER])
    model.generate_until([request(prompt, until=[])])
    (ids,) = engine.prompts
    assert tokenizer.decode(ids) == prompt
    # A turn's end inside the prompt, none behind it: the answer is open.
    assert [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id] == [4]
    names = tokenizer.convert_ids_to_tokens(ids)
    assert names[:5] == ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]
    assert names[-4:] == ["<think>", "ĊĊ", "</think>", "ĊĊ"]


class Recorder:
    """Keeps the tokens that are asked and answers nothing."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, batch_size: int
    ) -> Batches:
        self.prompts += [list(prompt) for prompt in prompts]
        empty = Generation(ids=[], eos_token_id=None, num_forwards=0, num_positions=0)
        yield [(i, empty) for i in range(len(prompts))]

    def close(self) -> None:
        pass


def answer(key: str, text: str = "x") -> Answer:
    return Answer(key=key, text=text, num_new_tokens=3, num_forwards=2)


def test_a_journal_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "a.jsonl"
    journal = AnswerJournal(path)
    journal.add([answer("a", "line\nbreak \ud800 é")])
    journal.add([answer("b")])
    again = AnswerJournal(path)
    assert again.get("a") == answer("a", "line\nbreak \ud800 é")
    assert again.get("b") == answer("b")
    assert again.get("c") is None


def test_every_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    AnswerJournal(path).add([answer("a")])
    first = path.read_bytes()
    AnswerJournal(path).add([answer("b")])
    whole = path.read_bytes()
    for length in range(len(first), len(whole)):
        path.write_bytes(whole[:length])
        journal = AnswerJournal(path)
        assert journal.get("b") is None
        journal.add([answer("b")])
        assert path.read_bytes() == whole


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 1 is not an answer"):
        AnswerJournal(tmp_path / "a.jsonl")
    for line in ("{", "[1]", "\xff"):
        (tmp_path / "a.jsonl").write_text(line + "\n", encoding="latin-1")
        with pytest.raises(DataError, match=r"a\.jsonl: line 1: "):
            AnswerJournal(tmp_path / "a.jsonl")


def test_a_key_depends_on_model_settings_and_prompt() -> None:
    keys = {answer_key({"model": m, "steps": s}, p) for m in "ab" for s in (1, 2) for p in "xy"}
    assert len(keys) == 8


def test_the_model_hash_is_over_what_decides_answers(student: Path, tmp_path: Path) -> None:
    before = model_sha256(student)
    assert model_sha256(write_student(tmp_path / "same")) == before
    assert model_sha256(write_student(tmp_path / "other", seed=1)) != before


def request(prompt: str, **arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=(prompt, arguments))


def model_on(student: Path, script: Any, **options: Any) -> tuple[TideLM, ScriptedEngine]:
    tokenizer = load_tokenizer(student)
    engine = ScriptedEngine(tokenizer, script)
    settings = GenerationSettings(max_new_tokens=8)
    return TideLM(tokenizer=tokenizer, engine=engine, settings=settings, **options), engine


def test_answers_come_in_the_order_of_requests(student: Path) -> None:
    model, engine = model_on(student, str.upper, batch_size=2)
    prompts = ["a", "longer", "bc", "a"]
    answers = model.generate_until([request(prompt, until=[]) for prompt in prompts])
    assert answers == ["A", "LONGER", "BC", "A"]
    # The longest first, and a prompt that is asked twice is generated once.
    assert engine.prompts == ["longer", "bc", "a"]


def test_a_request_may_name_one_stop_string(student: Path) -> None:
    model, _ = model_on(student, str.upper)
    assert model.generate_until([request("one two", until=" ")]) == ["ONE"]
    assert model.generate_until([request("one two")]) == ["ONE TWO"]


def test_a_worker_that_dies_is_one_line(student: Path) -> None:
    engine = WorkerEngine(student, ["cpu", "cpu"], "float32")
    model = TideLM(
        tokenizer=load_tokenizer(student),
        engine=engine,
        settings=GenerationSettings(max_new_tokens=32),
        progress=KillAWorker(),
    )
    with pytest.raises(TideError, match="a worker process ended"):
        model.generate_until([request("word " * n, until=[]) for n in range(1, 14)])
    model.close()


class KillAWorker(NoProgress):
    """Kills a worker once it has answered."""

    def update(self, num_answered: int) -> None:
        (first, *_) = multiprocessing.active_children()
        first.kill()


def test_likelihoods_are_refused(student: Path) -> None:
    model, _ = model_on(student, str.upper)
    for method in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(ConfigError, match="a block-diffusion student generates"):
            method([])


def test_it_is_registered_and_both_constructors_work(student: Path) -> None:
    assert get_model("tide") is TideLM
    given = {"pretrained": str(student), "max_new_tokens": 4, "batch_size": 2, "device": "cpu"}
    text = ",".join(f"{name}={value}" for name, value in given.items())
    # As lm-eval calls them: its own defaults in the second place, ours win.
    defaults = {"batch_size": 1, "max_batch_size": None, "device": None}
    models = [
        get_model("tide").create_from_arg_string(text, defaults),
        get_model("tide").create_from_arg_obj(given, defaults),
    ]
    answers = [model.generate_until([request("Hi", until=[])]) for model in models]
    assert answers[0] == answers[1]
    assert [model.batch_size for model in models] == [2, 2]
    assert models[0].answers[0].num_new_tokens <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=x,treshold=0.9", r"no argument 'treshold' \(did you mean 'threshold'\?\)"),
        ("threshold=0.9", "expected pretrained=FOLDER"),
        ("pretrained=/nowhere/x", "no such folder"),
    ],
)
def test_arguments_are_checked(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_model("tide").create_from_arg_string(arguments)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    student = write_student(tmp_path)
    (student / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        load_tokenizer(student)


@pytest.mark.parametrize("as_text", [True, False])
def test_lm_eval_runs_it_by_name(student: Path, as_text: bool) -> None:
    arguments: dict[str, Any] = {"pretrained": str(student), "max_new_tokens": 3, "device": "cpu"}
    definition = {
        "task": "echo",
        "custom_dataset": _two_rows,
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    results = lm_eval.simple_evaluate(
        model="tide",
        model_args=",".join(f"{k}={v}" for k, v in arguments.items()) if as_text else arguments,
        tasks=[definition],
        batch_size=2,
        apply_chat_template=True,
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    assert results["results"]["echo"]["sample_len"] == 2


def _two_rows(**_: Any) -> dict[str, Any]:
    import datasets

    return {"test": datasets.Dataset.from_list([{"question": x, "answer": x} for x in "ab"])}


def test_the_tokenizer_is_named_for_caches(student: Path) -> None:
    model, _ = model_on(student, str.upper)
    assert "/" not in model.tokenizer_name
    assert "im_start" in (model.chat_template(True) or "")
    assert model.chat_template(False) is None
