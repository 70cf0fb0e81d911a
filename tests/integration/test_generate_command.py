"""`tide-eval generate` on a small released student: what it prints, keeps, refuses."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from stage2_student.eval_cli import app
from stage2_student.release.released_format import save_released
from stage2_student.sampler import GenerationSettings, Sampler, load_for_generation
from tests.small_tokenizers import CHATML, byte_level
from tide_cache.errors import CompatibilityError, ConfigError, DataError, TideError

PROGRAM = [sys.executable, "-c", "from stage2_student.eval_cli import main; main()", "generate"]
QUESTIONS = ["The answer is 1", "1 + 1 = 2", "def f(x):", "user", "naïve café"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    save_released(_model(), byte_level(CHATML), folder, block_size=8, mask_token_id=_mask_id())
    return folder


def _mask_id() -> int:
    mask_id = byte_level(CHATML).convert_tokens_to_ids("<|mask|>")
    assert isinstance(mask_id, int)
    return mask_id


def _model() -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(byte_level(CHATML)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.4,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def _run(*arguments: Any, stdin: str | None = None) -> str:
    """Run the command in this process; returns what it wrote to stdout."""
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)
    if result.exception is not None:
        raise result.exception
    return str(result.stdout)


def _write_questions(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS), encoding="utf-8")
    return path


def _expected(folder: Path, prompts: list[str], **settings: Any) -> list[list[int]]:
    student = load_for_generation(folder)
    tokenizer = student.tokenizer
    sampler = Sampler(
        student.model,
        mask_token_id=student.mask_token_id,
        eos_token_id=student.eos_token_id,
        settings=GenerationSettings(block_size=8, **settings),
    )
    ids = [
        tokenizer(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        for p in prompts
    ]
    return [answer.ids for answer in sampler.generate(ids)]


def test_json_holds_the_samplers_tokens_and_figures(folder: Path) -> None:
    found = json.loads(_run(folder, QUESTIONS[0], "--max-new-tokens", 20, "--json"))
    (answer,) = found["answers"]
    assert [answer["ids"]] == _expected(folder, QUESTIONS[:1], max_new_tokens=20)
    assert found["settings"]["block_size"] == 8  # what the student was trained with
    assert found["tokens"] == len(answer["ids"])
    assert found["forwards"] == answer["num_forwards"] <= 20
    assert found["positions"] == answer["num_positions"]
    assert found["tokens_per_s"] > 0
    tokenizer: PreTrainedTokenizerFast = load_for_generation(folder).tokenizer
    assert answer["text"] == tokenizer.decode(answer["ids"], skip_special_tokens=True)


def test_text_goes_to_stdout_whatever_gave_the_prompt(folder: Path, tmp_path: Path) -> None:
    options = ["--max-new-tokens", 12, "--steps", 6]
    text = _run(folder, QUESTIONS[1], *options)
    assert text == _run(folder, *options, stdin=QUESTIONS[1] + "\n")
    plain = tmp_path / "questions.txt"
    plain.write_text(f"{QUESTIONS[1]}\n\n{QUESTIONS[2]}\n", encoding="utf-8")
    both = _run(folder, "--prompts", plain, *options)
    assert both.startswith(f"{QUESTIONS[1]}\n{text}\n{QUESTIONS[2]}\n")


def test_options_reach_the_sampler(folder: Path) -> None:
    def ids(*options: Any) -> list[int]:
        output = _run(folder, QUESTIONS[0], "--max-new-tokens", 16, "--json", *options)
        return list(json.loads(output)["answers"][0]["ids"])

    settings: dict[str, Any] = {"max_new_tokens": 16}
    for options, changed in (
        (["--steps", 4], {"num_steps": 4}),
        (["--threshold", 0.2], {"threshold": 0.2}),
        (["--cfg", 2], {"cfg_scale": 2.0}),
        (["--temperature", 1.5, "--seed", 9], {"temperature": 1.5, "seed": 9}),
        (["--block-origin", "sequence_start"], {"block_origin": "sequence_start"}),
    ):
        assert [ids(*options)] == _expected(folder, QUESTIONS[:1], **settings, **changed), options
    assert ids("--raw") != ids() != ids("--no-think")


def test_a_file_of_answers_goes_on_where_it_was_cut(folder: Path, tmp_path: Path) -> None:
    questions, output = _write_questions(tmp_path / "q.jsonl"), tmp_path / "answers.jsonl"
    options = ["--prompts", questions, "--max-new-tokens", 12, "--batch-size", 2]
    options += ["--temperature", 0.8, "-o", output]
    assert _run(folder, *options) == ""
    whole = output.read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [a["prompt"] for a in answers] == QUESTIONS
    assert [a["ids"] for a in answers] == _expected(
        folder, QUESTIONS, max_new_tokens=12, temperature=0.8
    )
    lines = whole.splitlines(keepends=True)
    for kept in (b"", lines[0], b"".join(lines[:3]) + lines[3][:40], whole):
        output.write_bytes(kept)
        again = json.loads(_run(folder, *options, "--json"))
        assert output.read_bytes() == whole
        assert [a["ids"] for a in again["answers"]] == [a["ids"] for a in answers]
        num_kept = kept.count(b"\n")
        assert again["forwards"] == sum(a["num_forwards"] for a in answers[num_kept:])


def test_a_killed_process_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    questions, output = _write_questions(tmp_path / "q.jsonl"), tmp_path / "answers.jsonl"
    command = [*PROGRAM, str(folder), "--prompts", str(questions), "--batch-size", "1"]
    command += ["--max-new-tokens", "64", "-o", str(output)]
    process = subprocess.Popen(command)
    while process.poll() is None and not output.is_file():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert output.read_bytes().count(b"\n") < len(QUESTIONS)
    subprocess.run(command, check=True, timeout=120)
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [a["ids"] for a in answers] == _expected(folder, QUESTIONS, max_new_tokens=64)


def test_answers_of_another_run_are_refused(folder: Path, tmp_path: Path) -> None:
    questions, output = _write_questions(tmp_path / "q.jsonl"), tmp_path / "answers.jsonl"
    options = ["--prompts", questions, "-o", output, "--max-new-tokens"]
    _run(folder, *options, 8)
    with pytest.raises(DataError, match=r"line 1: answers prompt 0 of another run"):
        _run(folder, *options, 9)
    output.write_text('{"number": 0}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1: not an answer of this command"):
        _run(folder, *options, 8)


def test_a_dry_run_reads_no_weights(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    questions = _write_questions(tmp_path / "q.jsonl")
    plan = json.loads(_run(bare, "--prompts", questions, "--dry-run", "--json"))
    assert (plan["prompts"], plan["answered"]) == (5, 0)
    assert plan["longest_prompt"] > 10
    assert "block_size" in _run(bare, "--prompts", questions, "--dry-run")
    with pytest.raises(ConfigError, match=r"model.safetensors: no such file"):
        _run(bare, "--prompts", questions)


def _on_a_terminal(command: list[str]) -> str:
    """Run a process whose stdout is a terminal; returns what it wrote there."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL, stdin=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return written.decode()


def test_a_terminal_gets_the_text_block_by_block(folder: Path) -> None:
    options = [str(folder), QUESTIONS[2], "--max-new-tokens", "24"]
    streamed = _on_a_terminal([*PROGRAM, *options]).replace("\r\n", "\n")
    assert streamed == _run(*options)


def test_a_terminal_shows_masks_becoming_tokens(folder: Path) -> None:
    options = [str(folder), QUESTIONS[2], "--max-new-tokens", "16", "--show-denoising"]
    drawn = _on_a_terminal([*PROGRAM, *options])
    num_masks = [int(found) for found in re.findall(r"(\d+) masks left", drawn)]
    ids = _expected(folder, QUESTIONS[2:3], max_new_tokens=16)[0]
    first_block = list(range(7, -1, -1))
    assert num_masks[:8] == first_block
    assert (
        len(set(range(1, len(ids) + 1)) - set(map(int, re.findall(r"forward (\d+)", drawn)))) == 0
    )
    assert "\x1b[1;32m" in drawn  # committed now: bold green
    assert "\x1b[36m" in drawn  # committed before: cyan
    assert "░" in drawn


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["{f}", "a", "--prompts", "{f}/q"], ConfigError, "either a prompt or --prompts, got both"),
        (["{f}", "--prompts", "{f}/none.jsonl"], ConfigError, r"none.jsonl: cannot read it"),
        (["{f}"], ConfigError, "PROMPT: expected a prompt, got none; give it as an argument"),
        (["{f}", "a", "--steps", "0"], ConfigError, "num_steps: expected at least 1, got 0"),
        (["{f}", "a", "--batch-size", "0"], ConfigError, "batch_size: expected at least 1"),
        (["{f}", "a", "--block-origin", "prompt-end"], ConfigError, "did you mean 'prompt_end'"),
        (["{f}", "a", "--dtype", "float16"], ConfigError, "dtype: expected one of auto, bfloat16"),
        (["{f}", "a", "--device", "gpu"], ConfigError, "device: cannot use 'gpu'"),
        (["{f}", "a", "--max-new-tokens", "600"], DataError, "max_position_embeddings"),
        (["{f}/none", "a"], TideError, "none"),
        (["{f}", "a", "--json", "--show-denoising"], ConfigError, "and not with --json"),
    ],
)
def test_what_cannot_be_followed_is_named(
    folder: Path, arguments: list[str], error: type[TideError], message: str
) -> None:
    with pytest.raises(error, match=message):
        _run(*[argument.format(f=folder) for argument in arguments], stdin="")


def test_lines_that_are_no_prompts_are_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for line, message in (
        ("{", "line 2: not JSON"),
        ('{"question": "a"}', "line 2: expected a string, or an object with 'prompt'"),
        ('{"messages": [{"role": "user"}]}', "each with the texts 'role' and 'content'"),
    ):
        path.write_text(f'"fine"\n{line}\n', encoding="utf-8")
        with pytest.raises(DataError, match=message):
            _run(folder, "--prompts", path)


def test_a_tokenizer_without_a_template_says_raw(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.chat_template = None
    save_released(_model(), tokenizer, tmp_path, mask_token_id=_mask_id())
    with pytest.raises(ConfigError, match=r"expected a chat template, got none; .*--raw"):
        _run(tmp_path, "a")
    assert json.loads(_run(tmp_path, "a", "--raw", "--json"))["answers"]


def test_an_autoregressive_model_is_refused(folder: Path, tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    byte_level(CHATML).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected a block-diffusion student, got an autoregr"):
        _run(tmp_path, "a")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CompatibilityError, match="model_type: expected one of"):
        _run(tmp_path, "a")


def test_weights_are_loaded_in_the_number_asked_for(folder: Path) -> None:
    student = load_for_generation(folder, dtype=torch.bfloat16)
    assert student.model.dtype == torch.bfloat16
    assert student.model.model.rotary_emb.inv_freq.dtype == torch.float32
    found = json.loads(_run(folder, "a", "--dtype", "bfloat16", "--json"))
    assert found["dtype"] == "bfloat16"
    assert found["answers"][0]["ids"]
