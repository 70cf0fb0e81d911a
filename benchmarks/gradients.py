"""Gradient fidelity against bytes for teachers of several sizes: `tide-cache calibrate` as a table.

For each teacher that `benchmarks.teacher` made: every setting of the ladder, its bytes per masked
position (with pages, checksums and pinned candidates), the same over the teacher's hidden size d,
and the worst gradient cosine of any loss, lambda and temperature; then the smallest setting that
reaches each target. So the growth of `hidden` with d is printed and not assumed.

    python -m benchmarks.gradients runs/benchmark/code runs/benchmark/code-512 runs/benchmark/gsm8k
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from stage1_teacher.calibrate_command import compare_settings, plan_of
from stage1_teacher.calibrate_report import as_json
from stage1_teacher.payload_config import BuildConfig
from tide_cache.cache import open_cache

# (worst cosine, bytes per position over d) of the hidden payload.
TARGETS = ((0.99, 0.25), (0.999, 0.45))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the table of one teacher."""
    premasked = open_cache(folder / "premasked-student")
    model = folder / "teacher" / "final"
    width = json.loads((model / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    config = BuildConfig.model_validate(
        {
            "teacher": {
                "model": str(model),
                "dtype": "float32",
                "device": "cpu",
                "block_size": premasked.manifest.block_size,
            },
            "fidelity_positions": options.positions,
            "hidden": {"fit_positions": options.fit_positions},
            "student": options.student,
        }
    )
    found = as_json(compare_settings(plan_of(config, premasked), premasked))
    lines = [_line(line, width) for line in found["settings"]]
    return {
        "teacher": str(model),
        "hidden_size": width,
        "vocab_size": premasked.manifest.shared_vocab_size,
        "student": found["student"],
        "num_fit_positions": found["num_fit_positions"],
        "num_positions": found["num_positions"],
        "settings": lines,
        "targets": [_reached(lines, *target) for target in TARGETS],
    }


def _line(line: dict[str, Any], width: int) -> dict[str, Any]:
    hidden = sum(v for name, v in line["bytes_by_column"].items() if name.startswith("hidden_"))
    errors = [loss["relative_error"] for loss in line["losses"]]
    return {
        "setting": line["setting"],
        "tail": line["tail"],
        "is_default_tail": line["is_default_tail"],
        "worst_cosine": line["worst_cosine"],
        "worst_relative_error": max(errors),
        "bytes_per_position": line["bytes_per_position"],
        "bytes_over_d": round(line["bytes_per_position"] / width, 4),
        "hidden_bytes_over_d": round(hidden / width, 4) if hidden else None,
        "codec_files_bytes": line["codec_files_bytes"],
        "decode_us_per_position": line["decode_us_per_position"],
    }


def _reached(lines: list[dict[str, Any]], cosine: float, bytes_over_d: float) -> dict[str, Any]:
    good = [li for li in lines if li["hidden_bytes_over_d"] and li["worst_cosine"] >= cosine]
    least = min(good, key=lambda li: li["bytes_over_d"], default=None)
    return {
        "worst_cosine": cosine,
        "at_most_bytes_over_d": bytes_over_d,
        "setting": None if least is None else least["setting"],
        "bytes_over_d": None if least is None else least["bytes_over_d"],
        "is_reached": least is not None and least["bytes_over_d"] <= bytes_over_d,
    }


def _print_table(figures: dict[str, Any]) -> None:
    sys.stdout.write(
        f"{figures['teacher']}: d = {figures['hidden_size']}, V = {figures['vocab_size']}; fitted "
        f"on {figures['num_fit_positions']:,} positions, measured on {figures['num_positions']:,} "
        f"others against a {figures['student']}\n"
    )
    for line in figures["settings"]:
        hidden = line["hidden_bytes_over_d"]
        sys.stdout.write(
            f"  {line['setting']:<44}{line['tail']:<14}{line['worst_cosine']:.4f}"
            f"{line['bytes_per_position']:>8.1f} B{line['bytes_over_d']:>7.3f} d"
            f"{'' if hidden is None else f'  (hidden {hidden:.3f} d)'}\n"
        )
    for target in figures["targets"]:
        verdict = "reached" if target["is_reached"] else "NOT reached"
        sys.stdout.write(
            f"  cosine {target['worst_cosine']} at most {target['at_most_bytes_over_d']} d: "
            f"{verdict}: {target['setting']} at {target['bytes_over_d']} d\n"
        )


def main() -> None:
    """Parse the command line, measure each teacher and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folders", type=Path, nargs="+", help="output folders of benchmarks.teacher"
    )
    parser.add_argument("--positions", type=int, default=2048, help="measured on (2048)")
    parser.add_argument("--fit-positions", type=int, default=16384, help="fitted on (16384)")
    parser.add_argument("--student", help="checkpoint; default: the teacher, noised")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = []
    for folder in options.folders:
        figures.append(measure(folder, options))
        if not options.json:
            _print_table(figures[-1])
    if options.json:
        sys.stdout.write(json.dumps({"teachers": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
