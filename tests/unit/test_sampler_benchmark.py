"""What `benchmarks.sampler` reports is counted and compared, at sizes that take seconds."""

from argparse import Namespace
from dataclasses import replace

import pytest

from benchmarks import table3
from benchmarks.sampler import make_variants, measure, random_subject

OPTIONS = {
    "hidden_size": 64,
    "layers": 1,
    "vocab_size": 128,
    "num_prompts": 2,
    "prompt_tokens": 20,
    "new_tokens": 16,
    "block_size": 8,
    "block_origin": "prompt_end",
    "batch_size": 1,
    "thresholds": [0.0, 1.0],
    "repeats": 1,
    "device": "cpu",
}


def test_costs_and_agreement_of_each_variant() -> None:
    options = Namespace(**OPTIONS)
    subject = random_subject(options)
    reference, fast, all_at_once, one_by_one = measure(subject, make_variants(subject, options), 1)
    assert reference.speedup == 1.0
    assert fast.equal_tokens == reference.equal_tokens == one_by_one.equal_tokens == 1.0
    # Of 16 tokens, 16 times as many: 8 forwards over 28 and 36 positions, against a cache.
    assert reference.positions_per_256_tokens == 16 * (8 * 28 + 8 * 36)
    assert fast.positions_per_256_tokens == 16 * (28 + 16 + 14 * 8)
    assert fast.forwards_per_256_tokens == reference.forwards_per_256_tokens == 256
    assert all_at_once.forwards_per_256_tokens == 32
    assert min(each.tokens_per_s for each in (reference, fast, all_at_once)) > 0


def test_table_3_runs_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        name: replace(shape, hidden_size=64, num_layers=2, vocab_size=128, intermediate_size=64)
        for name, shape in table3.PRESETS["small"].items()
    }
    monkeypatch.setitem(table3.PRESETS, "small", tiny)
    rows = table3.measure(Namespace(**OPTIONS, preset="small"))
    assert len(rows) == 5
    assert rows[0].ratio_to_ar == 1.0
    assert all(row.tokens_per_s > 0 and row.peak_bytes > 0 for row in rows)


def test_table_3_at_its_real_sizes_has_the_published_parameters() -> None:
    import torch

    counted = {}
    for name, shape in table3.PRESETS["real"].items():
        model = shape.build(dtype=torch.bfloat16, device=torch.device("meta"))
        counted[name] = sum(p.numel() for p in model.parameters())
    assert counted["student"] == pytest.approx(0.6e9, rel=0.01)
    assert counted["wedlm-8b"] == pytest.approx(8.2e9, rel=0.01)
    assert counted["llada2-mini"] == pytest.approx(16.26e9, rel=0.01)
