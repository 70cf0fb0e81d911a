"""The paper's Table 1, to be printed beside a run of one's own.

Source: arXiv 2604.26951 and the public README of PKU-YuanGroup/TIDE. In percent. AR and BD3LM are
released models that were evaluated and not distilled: Qwen3-0.6B and
dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1. "(shared)" is the pipeline with WeDLM-8B as teacher,
"(cross)" the one with LLaDA2.0-mini.
"""

from tide_cache.errors import ConfigError, did_you_mean

SOURCE = "arXiv 2604.26951, Table 1"

_TITLES = ("GSM8K", "MATH", "BBH", "MMLU-Pro", "HellaSwag", "MMLU", "HumanEval", "MBPP", "Avg")
_FIGURES = {
    "AR": (59.60, 32.40, 41.50, 24.70, 47.40, 52.80, 32.30, 36.60, 40.91),
    "BD3LM": (45.56, 13.08, 26.32, 13.80, 39.28, 39.15, 46.34, 37.80, 32.67),
    "KL (shared)": (43.97, 9.40, 25.79, 13.19, 39.78, 39.57, 41.46, 31.20, 30.55),
    "TIDE-Cross (shared)": (45.03, 9.76, 26.00, 12.88, 39.50, 39.09, 42.68, 31.40, 30.79),
    "TIDE-Shared (shared)": (48.98, 11.16, 26.79, 14.48, 40.50, 39.92, 48.78, 37.80, 33.55),
    "CALM (cross)": (48.60, 13.14, 24.21, 13.47, 40.42, 39.42, 43.90, 34.80, 32.25),
    "TIDE-Shared (cross)": (49.89, 12.98, 26.85, 14.02, 39.57, 39.54, 49.39, 38.40, 33.83),
    "TIDE-Cross (cross)": (52.24, 13.20, 27.37, 14.52, 39.88, 39.59, 48.17, 38.60, 34.20),
}
ROWS = tuple(_FIGURES)


def paper_row(name: str) -> dict[str, float]:
    """Return a row of Table 1 as {benchmark or "Avg": percent}. Raises ConfigError if unknown."""
    if name not in _FIGURES:
        raise ConfigError(
            f"row: Table 1 has no row {name!r}{did_you_mean(name, ROWS)}",
            hint=f"known: {', '.join(ROWS)}",
        )
    return dict(zip(_TITLES, _FIGURES[name], strict=True))
