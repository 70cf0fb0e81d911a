"""How the paper asks its eight benchmarks: the settings, one row each.

Source: TIDE's public evaluation script (PKU-YuanGroup/TIDE, `scripts/eval_all.sh` and
`dllm/core/eval/base.py`): block 32, no guidance, temperature 0, low-confidence remasking, one
prompt at a time, as many steps as new tokens, chat template applied, an empty think block, the
few-shot examples inside one user turn, answers cut at the task's stop strings.

The paper names benchmarks, not metrics. `metric` is the one that its figures can be compared with,
`metric_is_certain` says whether there was a choice: GSM8K has a strict filter too (it wants "The
answer is", which a prompt without examples never asks for), MATH an exact match of a sentence that
such a prompt never asks for either.
"""

from dataclasses import dataclass

from tide_cache.errors import ConfigError, did_you_mean

BLOCK_SIZE = 32
PAPER = "paper"


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark as the paper runs it.

    `task` is the published task name, `title` the one of Table 1. `max_new_tokens` is the number of
    sampling steps too. `metric` is lm-eval's "metric,filter".
    """

    task: str
    title: str
    max_new_tokens: int
    num_fewshot: int
    metric: str
    metric_is_certain: bool = True
    runs_code: bool = False


_ROWS = (
    Benchmark(
        task="gsm8k_cot",
        title="GSM8K",
        max_new_tokens=256,
        num_fewshot=0,
        metric="exact_match,flexible-extract",
        metric_is_certain=False,
    ),
    Benchmark(
        task="minerva_math",
        title="MATH",
        max_new_tokens=256,
        num_fewshot=0,
        metric="math_verify,none",
        metric_is_certain=False,
    ),
    Benchmark(
        task="bbh",
        title="BBH",
        max_new_tokens=256,
        num_fewshot=3,
        metric="exact_match,get-answer",
    ),
    Benchmark(
        task="mmlu_pro",
        title="MMLU-Pro",
        max_new_tokens=256,
        num_fewshot=0,
        metric="exact_match,custom-extract",
    ),
    Benchmark(
        task="hellaswag_gen",
        title="HellaSwag",
        max_new_tokens=3,
        num_fewshot=0,
        metric="exact_match,first_option_filter",
    ),
    Benchmark(
        task="mmlu_generative_dream",
        title="MMLU",
        max_new_tokens=3,
        num_fewshot=0,
        metric="exact_match,get_response",
    ),
    Benchmark(
        task="humaneval_instruct",
        title="HumanEval",
        max_new_tokens=256,
        num_fewshot=0,
        metric="pass_at_1,create_test",
        runs_code=True,
    ),
    Benchmark(
        task="mbpp_instruct",
        title="MBPP",
        max_new_tokens=256,
        num_fewshot=0,
        metric="pass_at_1,extract_code",
        runs_code=True,
    ),
)
# In the order of the paper's Table 1.
BENCHMARKS = {row.task: row for row in _ROWS}


def choose_benchmarks(names: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks of `paper` or of a comma-separated list of task names.

    Raises ConfigError on a name that is not one of the eight, and on an empty list.
    """
    words = [word.strip() for word in names.split(",") if word.strip()]
    if not words:
        raise ConfigError("tasks: expected 'paper' or task names, got none")
    chosen: dict[str, Benchmark] = {}
    for word in words:
        if word == PAPER:
            chosen.update(BENCHMARKS)
        elif word in BENCHMARKS:
            chosen[word] = BENCHMARKS[word]
        else:
            raise ConfigError(
                f"tasks: no benchmark {word!r}{did_you_mean(word, BENCHMARKS)}",
                hint=f"known: {PAPER} (all of them), {', '.join(BENCHMARKS)}",
            )
    return tuple(chosen.values())
