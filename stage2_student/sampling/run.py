"""The work of `tide-eval generate`: prompts in, answers out, to a terminal, a file or as JSON."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console

from stage2_student.choices import check_choice
from stage2_student.sampler import DenoisingStep, GenerationSettings, LoadedStudent, Sampler
from stage2_student.sampling.loading import load_opened, open_for_generation
from stage2_student.sampling.preconditions import check_batch_size, check_prompts
from stage2_student.sampling.prompts import (
    Message,
    as_conversation,
    check_chat_template,
    read_prompts,
    read_stdin,
    render,
)
from stage2_student.sampling.records import Answer, AnswerFile, answer_key, make_answer
from stage2_student.sampling.views import (
    AnswerProgress,
    Decode,
    DenoisingView,
    StreamedText,
    decoder,
)
from stage2_student.student_source import StudentSource
from tide_cache.errors import ConfigError

Dtype = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """What the command line asks for; see the help of `tide-eval generate`."""

    model: str
    revision: str | None
    prompt: str | None
    prompts_file: Path | None
    settings: GenerationSettings
    takes_block_size_of_model: bool
    batch_size: int
    is_raw: bool
    has_empty_think_block: bool
    device: str
    dtype: str
    shows_denoising: bool
    output: Path | None
    is_dry_run: bool
    is_json: bool

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        check_choice("dtype", self.dtype, Dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratePlan:
    """Everything that is known before a weight is read."""

    source: StudentSource
    settings: GenerationSettings
    device: torch.device
    dtype: torch.dtype
    conversations: list[list[Message]]
    prompt_ids: list[list[int]]
    keys: list[str]
    file: AnswerFile | None
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def numbers_left(self) -> list[int]:
        """The prompts that have no answer yet."""
        return [n for n in range(len(self.prompt_ids)) if n not in self.answers]

    def as_json(self) -> dict[str, Any]:
        """Return what a dry run prints."""
        return {
            "model": self.source.name,
            "settings": asdict(self.settings),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "prompts": len(self.prompt_ids),
            "answered": len(self.answers),
            "prompt_tokens": sum(map(len, self.prompt_ids)),
            "longest_prompt": max(map(len, self.prompt_ids), default=0),
        }


def run_generate(request: GenerateRequest) -> None:
    """Do what was asked. Raises TideErrors that name what cannot be followed."""
    plan = make_plan(request)
    if request.is_dry_run:
        _print_plan(plan, request.is_json)
        return
    generated, seconds = _generate(plan, request)
    if request.is_json:
        answers = [plan.answers[n].as_json() for n in sorted(plan.answers)]
        figures = plan.as_json() | _figures(generated, seconds) | {"answers": answers}
        sys.stdout.write(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    elif generated:
        _print_figures(_figures(generated, seconds))


def make_plan(request: GenerateRequest) -> GeneratePlan:
    """Read model config, tokenizer, prompts and what is answered already. Reads no weights."""
    source = open_for_generation(request.model, revision=request.revision)
    if not request.is_raw:
        check_chat_template(source.tokenizer)
    settings = request.settings
    if request.takes_block_size_of_model and source.block_size is not None:
        settings = replace(settings, block_size=source.block_size)
    conversations = _conversations(request)
    prompt_ids = [
        render(
            source.tokenizer,
            conversation,
            is_raw=request.is_raw,
            has_empty_think_block=request.has_empty_think_block,
        )
        for conversation in conversations
    ]
    check_prompts(
        prompt_ids,
        max_length=source.model_config.max_position_embeddings,
        max_new_tokens=settings.max_new_tokens,
    )
    device, dtype = _pick_device(request.device), request.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    name = source.name if source.revision is None else f"{source.name}@{source.revision}"
    keys = [answer_key(name, settings, ids, dtype) for ids in prompt_ids]
    file = None if request.output is None else AnswerFile(request.output, keys)
    return GeneratePlan(
        source=source,
        settings=settings,
        device=device,
        dtype=cast(torch.dtype, getattr(torch, dtype)),
        conversations=conversations,
        prompt_ids=prompt_ids,
        keys=keys,
        file=file,
        answers={} if file is None else dict(file.answers),
    )


def _conversations(request: GenerateRequest) -> list[list[Message]]:
    if request.prompts_file is not None:
        return read_prompts(request.prompts_file)
    return [read_stdin() if request.prompt is None else as_conversation(request.prompt)]


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: cannot use {name!r}: {reason}", hint="leave it out, or name cpu or cuda"
        ) from error


def _generate(plan: GeneratePlan, request: GenerateRequest) -> tuple[list[Answer], float]:
    """Answer what is left; returns the new answers and the seconds they took, without loading."""
    if not plan.numbers_left:
        return [], 0.0
    student = load_opened(plan.source, dtype=plan.dtype, device=plan.device)
    sampler = Sampler(
        student.model,
        mask_token_id=student.mask_token_id,
        eos_token_id=student.eos_token_id,
        settings=plan.settings,
    )
    decode = decoder(student.tokenizer, student.eos_token_id)
    began_s = time.monotonic()
    if request.prompts_file is None:
        answers = [_answer_one(plan, request, student, sampler, decode)]
    else:
        answers = _answer_many(plan, request, sampler, decode)
    return answers, time.monotonic() - began_s


def _answer_one(
    plan: GeneratePlan,
    request: GenerateRequest,
    student: LoadedStudent,
    sampler: Sampler,
    decode: Decode,
) -> Answer:
    """Answer a single prompt, shown while it is generated where somebody looks."""
    if request.shows_denoising:
        view = DenoisingView(student.tokenizer, student.mask_token_id, Console())
        with view:
            return _answer(plan, sampler, decode, [0], view)[0]
    if request.is_json:
        return _answer(plan, sampler, decode, [0])[0]
    stream = StreamedText(decode, sys.stdout)
    answer = _answer(plan, sampler, decode, [0], stream if sys.stdout.isatty() else None)[0]
    stream.finish(answer.text)
    return answer


def _answer_many(
    plan: GeneratePlan, request: GenerateRequest, sampler: Sampler, decode: Decode
) -> list[Answer]:
    """Answer a file of prompts in its order, and print the answers where nothing else has them."""
    left = plan.numbers_left
    answers: list[Answer] = []
    with AnswerProgress(len(plan.prompt_ids), len(plan.answers)) as progress:
        for first in range(0, len(left), request.batch_size):
            found = _answer(plan, sampler, decode, left[first : first + request.batch_size])
            answers += found
            progress.advance(len(found))
            if plan.file is None and not request.is_json:
                for answer in found:
                    sys.stdout.write(f"{answer.prompt}\n{answer.text}\n\n")
    return answers


def _answer(
    plan: GeneratePlan,
    sampler: Sampler,
    decode: Decode,
    numbers: list[int],
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> list[Answer]:
    """Generate for some prompts and keep what they were answered."""
    found = sampler.generate(
        [plan.prompt_ids[n] for n in numbers],
        batch_size=len(numbers),
        prompt_numbers=numbers,
        on_step=on_step,
    )
    answers = [
        make_answer(
            generation,
            number=number,
            key=plan.keys[number],
            prompt=plan.conversations[number][-1]["content"],
            text=decode(generation.ids),
        )
        for number, generation in zip(numbers, found, strict=True)
    ]
    if plan.file is not None:
        plan.file.append(answers)
    plan.answers.update({answer.number: answer for answer in answers})
    return answers


def _figures(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Return what this run computed; forwards and positions are summed over prompts."""
    num_tokens = sum(len(answer.ids) for answer in answers)
    return {
        "tokens": num_tokens,
        "forwards": sum(answer.num_forwards for answer in answers),
        "positions": sum(answer.num_positions for answer in answers),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(num_tokens / seconds, 2) if seconds else 0.0,
    }


def _print_figures(figures: dict[str, Any]) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(
        f"[dim]{figures['tokens']} tokens in {figures['forwards']} forwards of "
        f"{figures['positions']:,} positions, {figures['seconds']:.1f} s: "
        f"{figures['tokens_per_s']:,.1f} tokens/s[/dim]"
    )


def _print_plan(plan: GeneratePlan, is_json: bool) -> None:
    if is_json:
        sys.stdout.write(json.dumps(plan.as_json(), indent=2) + "\n")
        return
    values = plan.as_json()
    for name, value in {**values, **values.pop("settings")}.items():
        sys.stdout.write(f"{name}: {'none' if value is None else value}\n")
