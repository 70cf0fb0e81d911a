"""`tide-cache plan`: as a process, and its tokens beside those that a real build then runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stage1_teacher.build import run_build
from stage1_teacher.build_plan import BuildConfig, make_plan
from stage1_teacher.calibrate_command import compare_settings
from stage1_teacher.calibrate_command import plan_of as calibration_plan_of
from stage1_teacher.calibrate_report import as_json as as_calibration_json
from stage1_teacher.gpus import find_gpu
from stage1_teacher.payload_sizes import measured_sizes
from stage1_teacher.plan_cost import CostPlan, Machine, plan_cost
from stage1_teacher.plan_report import as_json, lines
from stage1_teacher.prepare import make_plan as make_prepare_plan
from stage1_teacher.prepare import run_prepare
from stage1_teacher.prepare_config import PrepareConfig
from stage1_teacher.teachers.batching import PaddedBatch
from stage1_teacher.teachers.hf import HfTeacher
from stage1_teacher.teachers.layouts import PADDING_STREAM
from stage1_teacher.token_count import TokenCount, choose_calls
from tests.builders import make_tokenizer, run_command
from tests.pipelines import write_pipeline
from tests.teacher_checkpoints import make_model, write_checkpoint, write_config
from tests.unit.test_model_cost import LLADA2_MINI, WEDLM_8B
from tide_cache.cache import open_cache
from tide_cache.config import load_config
from tide_cache.errors import CompatibilityError, ConfigError, FormatError

NUM_SAMPLES = 44


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shared-tokenizer set, a chunk set of the same chats, and teachers for both.

    Tasks of 8 samples and calls of 5, so that calls differ in size.
    """
    folder = tmp_path_factory.mktemp("plan")
    config = write_pipeline(
        folder,
        make_model("qwen3", vocab_size=448, max_position_embeddings=512),
        num_rows=NUM_SAMPLES,
        prepare={},
        build={
            "samples_per_batch": 5,
            "candidates": {"k": 12, "mean_logits_positions": 100},
            "hidden": {"fit_positions": 256},
            "fidelity_positions": 64,
        },
    )
    prepare(config, folder / "premasked")
    other = make_tokenizer(folder, vocab_size=300, name="llada2-tokenizer")
    model = make_model("llada2_moe", vocab_size=448, max_position_embeddings=512)
    write_checkpoint(folder / "llada2", "llada2_moe", model)
    shutil.copytree(other, folder / "llada2", dirs_exist_ok=True)
    chunks = ["alignment=chunks", f"teacher.tokenizer={other}", "teacher.max_length=200"]
    prepare(config, folder / "premasked-chunks", *chunks)
    return folder


def prepare(path: Path, output: Path, *overrides: str) -> None:
    config = load_config(path, PrepareConfig, overrides, section="prepare")
    prepare_plan, encoder = make_prepare_plan(config)
    run_prepare(prepare_plan, str(output), encoder=encoder, num_workers=1)


def load_build(folder: Path, *overrides: str) -> BuildConfig:
    return load_config(folder / "pipeline.yaml", BuildConfig, overrides, section="build")


def plan_of(
    folder: Path, *overrides: str, gpu: str = "h100", read: int = 2048, **more: Any
) -> CostPlan:
    premasked = folder / ("premasked-chunks" if "payloads=[chunks]" in overrides else "premasked")
    return plan_cost(
        load_build(folder, *overrides),
        open_cache(premasked),
        Machine(gpu=find_gpu(gpu), mfu=0.35, usd_per_gpu_hour=2.0),
        max_samples_read=read,
        **more,
    )


def text_of(cost: CostPlan) -> str:
    return "\n".join(text for _, text in lines(cost))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["teacher.passes=separate", "comp_demo=false", "teacher.token_budget=300"],
        ["payloads=[chunks]", "teacher.model={ground}/llada2"],
    ],
)
def test_planned_tokens_are_those_that_a_build_runs(
    ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    overrides = [word.format(ground=ground) for word in overrides]
    cost = plan_of(ground, *overrides)
    assert cost.tokens.is_exact
    ran: list[TokenCount] = []
    forward = HfTeacher.forward

    def counted(self: HfTeacher, batch: PaddedBatch) -> Any:
        num_sequences, longest = batch.ids.shape
        ran.append(
            TokenCount(
                num_tokens=int((batch.stream != PADDING_STREAM).sum()),
                num_computed=batch.ids.size,
                num_pairs=num_sequences * longest**2,
                num_forwards=1,
                longest=longest,
            )
        )
        return forward(self, batch)

    monkeypatch.setattr(HfTeacher, "forward", counted)
    build_plan = make_plan(cost.config, open_cache(cost.premasked_url), str(tmp_path / "cache"))
    manifest = run_build(build_plan, num_workers=1)
    expected = cost.tokens.configured + cost.tokens.calibration
    found = sum(ran, TokenCount())
    for name in ("num_tokens", "num_computed", "num_pairs", "num_forwards", "longest"):
        assert getattr(found, name) == getattr(expected, name), name
    assert cost.num_masked_positions == manifest.counts["num_masked_positions"] > 100
    if "teacher.passes=separate" in overrides:
        assert cost.tokens.configured == cost.tokens.separate
    elif "payloads=[chunks]" not in overrides:
        assert cost.tokens.configured.num_tokens < 0.7 * cost.tokens.separate.num_tokens
        assert cost.tokens.configured.num_scored == cost.tokens.separate.num_scored
        assert cost.num_payload_entries == cost.tokens.configured.num_scored
        assert cost.tokens.calibration.num_tokens > 0


def test_the_command_says_what_it_would_take(ground: Path) -> None:
    done = run_command(
        "plan",
        ground / "pipeline.yaml",
        *("-p", ground / "premasked", "--gpu", "H200", "--usd-per-gpu-hour", "2"),
        *("--set", "teacher.dtype=bfloat16"),
    )
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for part in (
        f"{NUM_SAMPLES} samples x 2 views = {2 * NUM_SAMPLES} rows",
        "plain separate passes:",
        "counted on every row of the set",
        "of weights in bfloat16 fit one H200 SXM",
        "USD at 2 an hour, assuming 35% of its 990 TFLOP/s (--mfu; not measured)",
        "hidden 0.01 nats + candidates k=12 8 bits, 42 to 57 bytes each, as configured",
        "measures these bytes; then plan --calibration FILE",
    ):
        assert part in text, part


def test_json_projects_to_other_sizes_and_no_weights_are_needed(
    ground: Path, tmp_path: Path
) -> None:
    """WeDLM-8B over a million samples: only its config.json is there."""
    write_config_alone(tmp_path / "wedlm", WEDLM_8B)
    words = (f"teacher.model={tmp_path}/wedlm", "teacher.dtype=bfloat16")
    small = as_json(plan_of(ground, *words))
    large = as_json(plan_of(ground, *words, gpu="l40s", num_samples=1_000_000))
    assert small["tokens"]["is_exact"] is True
    assert large["tokens"]["is_exact"] is False
    assert large["num_samples_of_set"] == NUM_SAMPLES
    assert large["counts"]["num_rows"] == 2_000_000
    factor = 1e6 / NUM_SAMPLES
    for key in ("num_tokens", "num_computed", "num_scored"):
        assert large["tokens"]["configured"][key] == pytest.approx(
            factor * small["tokens"]["configured"][key]
        )
    assert large["teacher"]["num_parameters"] == pytest.approx(8.19e9, rel=1e-3)
    tokens = large["tokens"]["configured"]["num_computed"]
    calibration = large["tokens"]["calibration"]["num_computed"]
    assert large["flops"]["body"] == pytest.approx(2 * 6.9458e9 * (tokens + calibration), rel=1e-3)
    assert large["gpu"]["gpu_hours"] == pytest.approx(
        large["flops"]["total"] / (362e12 * 0.35 * 3600)
    )
    assert large["gpu"]["gpu_hours_separate"] > 1.4 * large["gpu"]["gpu_hours"]
    hidden = next(p for p in large["payloads"] if p["is_configured"])
    low, high = hidden["cache_bytes"]
    entries = large["counts"]["num_payload_entries"]
    assert high - low == pytest.approx((57 / 256 * 4096 - 42) * entries, rel=1e-6)
    assert low > 42 * entries + large["row_bytes"] > 42 * entries


def write_config_alone(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    write_config(folder, config)


def test_a_teacher_that_does_not_fit_is_spread_and_takes_turns(
    ground: Path, tmp_path: Path
) -> None:
    write_config_alone(tmp_path / "llada2", LLADA2_MINI)
    words = ("payloads=[chunks]", f"teacher.model={tmp_path}/llada2", "teacher.dtype=bfloat16")
    one, two = (plan_of(ground, *words, gpu=name) for name in ("h100", "rtx4090"))
    assert (one.num_gpus, two.num_gpus) == (1, 2)  # 32.5 GB on 80 and on 24
    hours = [cost.gpu_hours(cost.operations) for cost in (one, two)]
    assert hours[0] is not None
    assert hours[1] == pytest.approx(hours[0] * 2 * 989.5 / 165.2)
    assert "do not fit one RTX 4090 (24 GB): spread them over 2 with" in text_of(two)
    (chunks,) = one.payloads
    assert chunks.is_configured
    assert chunks.once_bytes == 0


def test_a_large_set_is_read_in_part_and_says_so(ground: Path) -> None:
    whole, part = plan_of(ground), plan_of(ground, read=20)
    assert not part.tokens.is_exact
    assert 10 <= part.tokens.num_read <= 30
    assert part.num_payload_entries == whole.num_payload_entries, "the manifest's count is exact"
    error = part.tokens.relative_error
    assert error is not None
    assert 0 < error < 0.5
    ratio = part.tokens.configured.num_computed / whole.tokens.configured.num_computed
    assert abs(ratio - 1) < max(4 * error, 0.1)
    text = text_of(part)
    assert f"estimated: {part.tokens.num_read} of {NUM_SAMPLES} samples were read" in text
    assert "not projected: peaks are of bfloat16" in text  # the config says float32


def test_chosen_calls_are_spread_evenly() -> None:
    calls = [range(10 * number, 10 * number + 10) for number in range(100)]
    assert choose_calls(calls, 1000) == calls
    assert [call.start for call in choose_calls(calls, 40)] == [120, 370, 620, 870]
    assert len(choose_calls(calls, 1)) == 1


def test_a_calibration_replaces_ranges(ground: Path, tmp_path: Path) -> None:
    config, premasked = load_build(ground), open_cache(ground / "premasked")
    facts = as_calibration_json(compare_settings(calibration_plan_of(config, premasked), premasked))
    table = facts["settings"]
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(facts))
    found = as_json(plan_of(ground, calibration_path=path))
    for payload in found["payloads"]:
        (line,) = [
            line for line in table if line["setting"] == payload["name"] and line["is_default_tail"]
        ]
        low, high = payload["cache_bytes"]
        assert low == high
        # The table's bytes are rounded to a hundredth.
        entries = found["counts"]["num_payload_entries"]
        assert abs(low - line["projected_cache_bytes"]) <= 0.005 * entries + 1
    (chosen,) = [p["name"] for p in found["payloads"] if p["is_configured"]]
    assert chosen == "hidden 0.01 nats + candidates k=12 8 bits"

    other = tmp_path / "other.json"
    other.write_text('{"settings": [{"tail": "mean"}]}')
    with pytest.raises(FormatError, match=r"expected the table of 'tide-cache calibrate --json'"):
        measured_sizes(other, config, "positions")


def test_refusals_name_the_option_or_the_field(ground: Path) -> None:
    done = run_command("plan", ground / "pipeline.yaml", "-p", ground / "premasked", "--mfu", "35")
    assert done.returncode == 2
    assert "--mfu: expected a share in (0, 1], got 35" in done.stderr
    with pytest.raises(ConfigError, match=r"--gpu: expected one of a100, h100"):
        plan_of(ground, gpu="h1000")
    with pytest.raises(CompatibilityError, match="cut into blocks of 8, got 16"):
        plan_of(ground, "teacher.block_size=16")
