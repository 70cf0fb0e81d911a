"""A mixture means the same rows however it is written, and says what it leaves out."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stage1_teacher.mixture import (
    Mixture,
    MixturePlan,
    SourceConfig,
    format_source,
    parse_mixture,
    plan_mixture,
    source_labels,
)
from tide_cache.config import load_config
from tide_cache.errors import ConfigError, DataError

# ---------------------------------------------------------------------------------- the grammar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [{"path": "a"}]),
        ("a+b", [{"path": "a"}, {"path": "b"}]),
        (
            "a+b+c[lang:python]",
            [{"path": "a"}, {"path": "b"}, {"path": "c", "filters": {"lang": "python"}}],
        ),
        ("  a  +\n  b ", [{"path": "a"}, {"path": "b"}]),
        (
            "openai/gsm8k[name:main, split:train, cap:10, weight:.5, license:MIT]",
            [
                {
                    "path": "openai/gsm8k",
                    "name": "main",
                    "split": "train",
                    "cap": 10,
                    "weight": 0.5,
                    "license": "MIT",
                }
            ],
        ),
        ("'a+b'[x:1]", [{"path": "a+b", "filters": {"x": "1"}}]),
        ("'it''s'", [{"path": "it's"}]),
        ("a['split':test]", [{"path": "a", "filters": {"split": "test"}}]),
        ("a[split:'train[:10%]']", [{"path": "a", "split": "train[:10%]"}]),
        ("a[time:10:30]", [{"path": "a", "filters": {"time": "10:30"}}]),
        ("a[note:'']", [{"path": "a", "filters": {"note": ""}}]),
        ("a b[c d:e f]", [{"path": "a b", "filters": {"c d": "e f"}}]),
        (
            "q[prompt_column:text,response_column:code]",
            [{"path": "q", "prompt_column": "text", "response_column": "code"}],
        ),
    ],
)
def test_a_line_becomes_source_configs(text: str, expected: list[dict[str, Any]]) -> None:
    assert parse_mixture(text) == tuple(SourceConfig(**values) for values in expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected a path or hub name"),
        ("+a", "column 1: expected a path or hub name"),
        ("a+", "column 3: expected a path or hub name"),
        ("a[lang]", "column 7: expected ':' and a value after 'lang', as in [lang:python]"),
        ("a[lang:]", "column 8: expected a value for 'lang'"),
        ("a[lang:b", "column 9: expected ',' or ']'"),
        ("a[lang:b+c", "column 11: expected ',' or ']'"),
        ("a[]", "column 3: expected a key"),
        ("a]", "column 2: a path or hub name that holds ] must be in single quotes"),
        ("a[x:1]b", "column 7: expected '+' or the end"),
        ("a['x:1]", "column 3: this quote is never closed"),
        ("a[x:1,x:2]", "column 7: 'x' is given twice"),
        ("a[cap:many]", "sources.0.cap: Input should be a valid integer"),
        ("b+a[cap:0]", "sources.1.cap: Input should be greater than or equal to 1, got '0'"),
        ("a[weight:0]", "sources.0.weight: Input should be greater than 0"),
        ("a[weight:inf]", "sources.0.weight: Input should be a finite number"),
        ("a[prompt_column:q]", "prompt_column and response_column: expected both or neither"),
        ("a[system_column:q]", "expected with prompt_column and response_column"),
        (
            "a[messages_column:m,prompt_column:p,response_column:r]",
            "expected messages_column or prompt_column, not both",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_mixture(text)
    assert message in str(error.value)
    assert str(error.value).startswith("mixture: sources")
    assert str(error.value).count("sources") == 1  # one mistake, one complaint


WORDS = st.text(st.sampled_from("ab+[],:' é/."), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    path=WORDS,
    split=st.none() | WORDS,
    cap=st.none() | st.integers(1, 10**6),
    weight=st.none() | st.floats(1e-3, 1e3),
    filters=st.dictionaries(WORDS | st.sampled_from(["split", "cap"]), WORDS | st.just("")),
)
def test_every_source_can_be_written_as_a_term(filters: dict[str, str], **values: Any) -> None:
    config = SourceConfig(**values, filters=filters)
    assert parse_mixture(format_source(config)) == (config,)


def test_the_yaml_list_says_the_same(tmp_path: Path) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text(
        """
sources:
  - {path: code, filters: {lang: python, level: 3, checked: true}, cap: 5, weight: 2}
  - data/chat.jsonl[split:train]
  - path: pairs.csv
    prompt_column: q
    response_column: a
    system_column: s
"""
    )
    line = (
        "code[lang:python,level:3,checked:true,cap:5,weight:2] + data/chat.jsonl[split:train]"
        " + pairs.csv[prompt_column:q,response_column:a,system_column:s]"
    )
    assert load_config(file, Mixture).sources == parse_mixture(line)
    file.write_text(f"sources: {line!r}")
    assert load_config(file, Mixture).sources == parse_mixture(line)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("sources: [{paht: a}]", "unknown key 'sources.0.paht' (did you mean 'path'?)"),
        ("sources: [{path: a, wieght: 2}]", "(did you mean 'weight'?)"),
        ("sources: []", "sources: expected at least one source"),
        ("sources: ['a+b']", "expected one source per list entry, got 2 in 'a+b'"),
        ("sources: 'a['", "sources: column 3: expected a key"),
        ("sources: [{path: a, filters: {lang: null}}]", "sources.0.filters.lang"),
        ("{}", "missing key 'sources'"),
    ],
)
def test_a_config_file_with_a_mistake_is_named(tmp_path: Path, yaml: str, message: str) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml)
    with pytest.raises(ConfigError) as error:
        load_config(file, Mixture)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_a_source_is_frozen_and_its_schema_takes_a_line_or_a_list() -> None:
    with pytest.raises(ValidationError):
        SourceConfig(path="a").cap = 3  # type: ignore[misc]
    sources = Mixture.model_json_schema()["properties"]["sources"]
    assert {option["type"] for option in sources["anyOf"]} == {"string", "array"}


def test_labels_are_unique_and_free_of_folders() -> None:
    configs = parse_mixture(
        "/home/me/chat.jsonl + elsewhere/chat.jsonl + openai/gsm8k[name:main,cap:3]"
        " + ./code/[lang:python] + x[label:mine] + y[label:mine]"
    )
    assert source_labels(configs) == (
        "chat.jsonl",
        "chat.jsonl#2",
        "openai/gsm8k[name:main]",
        "code[lang:python]",
        "mine",
        "mine#2",
    )


# ------------------------------------------------------------------------------------- the plan


def taken(plan: MixturePlan) -> list[list[int]]:
    """The rows of each source, ascending."""
    return [
        sorted(plan.row_index_R[plan.source_index_R == source].tolist())
        for source in range(len(plan.shares))
    ]


def configs_of(*options: str) -> tuple[SourceConfig, ...]:
    return parse_mixture("+".join(f"s{index}{text}" for index, text in enumerate(options)))


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sizes=SIZES, seed=st.integers(0, 2**63))
def test_no_row_is_repeated_and_every_row_is_accounted_for(
    data: st.DataObject, sizes: list[int], seed: int
) -> None:
    caps = [data.draw(st.none() | st.integers(1, 80)) for _ in sizes]
    weights = [data.draw(st.none() | st.integers(1, 5)) for _ in sizes]
    configs = [
        SourceConfig(path=f"s{i}", cap=cap, weight=weight)
        for i, (cap, weight) in enumerate(zip(caps, weights, strict=True))
    ]
    try:
        plan = plan_mixture(sizes, configs, seed)
    except ConfigError as error:  # a weight that leaves a source nothing
        assert "leaves no row" in str(error)
        assert any(weight is not None for weight in weights)
        return
    assert plan.source_index_R.dtype == np.int32
    assert plan.row_index_R.dtype == np.int64
    kept = [min(size, cap or size) for size, cap in zip(sizes, caps, strict=True)]
    for rows, share, size, limit in zip(taken(plan), plan.shares, sizes, kept, strict=True):
        assert len(set(rows)) == len(rows) == share.num_taken <= limit
        assert all(0 <= row < size for row in rows)
        assert share.num_rows == size
        assert share.num_over_cap == size - limit
        assert share.num_taken + share.num_over_cap + share.num_over_weight == size
    counts = [share.num_taken for share in plan.shares]
    if all(weight is None for weight in weights):
        assert counts == kept
    else:
        shares = [weight or 1 for weight in weights]
        scale = min(size / share for size, share in zip(kept, shares, strict=True))
        assert any(count == size for count, size in zip(counts, kept, strict=True))
        for count, share in zip(counts, shares, strict=True):
            assert share * scale - 1 < count <= share * scale + 1e-9


def test_the_order_is_a_seeded_shuffle_that_mixes_the_sources() -> None:
    configs = configs_of("", "")
    first, again, other = (plan_mixture([500, 500], configs, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.row_index_R, again.row_index_R)
    np.testing.assert_array_equal(first.source_index_R, again.source_index_R)
    assert (first.row_index_R != other.row_index_R).mean() > 0.9
    # In a shuffle about half of the neighbours come from different sources.
    changes = np.diff(first.source_index_R) != 0
    assert 0.4 < changes.mean() < 0.6


def test_the_plan_is_the_same_on_every_machine() -> None:
    plan = plan_mixture([40, 30], configs_of("[cap:25]", "[weight:2]"), seed=7)
    digest = hashlib.sha256(plan.source_index_R.tobytes() + plan.row_index_R.tobytes())
    assert digest.hexdigest()[:16] == "3d6383f9b92f5dcf"


def test_a_larger_cap_keeps_the_rows_of_a_smaller_one() -> None:
    small, large = (
        taken(plan_mixture([1000, 10], configs_of(f"[cap:{cap}]", ""), seed=3))[0]
        for cap in (50, 200)
    )
    assert set(small) < set(large)
    assert max(small) > 500  # drawn from everywhere, not the head of the file


def test_another_source_beside_it_does_not_change_the_choice() -> None:
    alone = taken(plan_mixture([1000], configs_of("[cap:50]"), seed=3))[0]
    beside = taken(plan_mixture([1000, 70], configs_of("[cap:50]", "[cap:20]"), seed=3))[0]
    assert alone == beside


def test_moving_the_data_does_not_change_the_choice() -> None:
    here, there = (
        taken(plan_mixture([1000], parse_mixture(f"{path}[cap:50]"), seed=3))[0]
        for path in ("data/chat.jsonl", "/elsewhere/chat.jsonl")
    )
    assert here == there


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ([100, 100], ["[weight:2]", "[weight:1]"], [100, 50]),
        ([100, 100], ["[weight:2]", ""], [100, 50]),
        ([100, 300], ["[weight:.1]", "[weight:.3]"], [100, 300]),  # decimal, not binary
        ([100, 1000], ["[weight:.3]", "[weight:.1]"], [100, 33]),
        ([1000, 60], ["[cap:100,weight:5]", "[weight:1]"], [100, 20]),
        ([10, 10], ["[weight:7]", "[weight:7]"], [10, 10]),
    ],
)
def test_weights_set_the_shares(sizes: list[int], options: list[str], expected: list[int]) -> None:
    plan = plan_mixture(sizes, configs_of(*options), seed=0)
    assert [share.num_taken for share in plan.shares] == expected


def test_what_is_left_out_is_said() -> None:
    plan = plan_mixture([1000, 60, 7], configs_of("[cap:100,weight:1]", "", "[weight:.1]"), 0)
    assert [share.describe() for share in plan.shares] == [
        "s0: 60 of 1000 rows (cap leaves out 900, weight leaves out 40)",
        "s1: 60 of 60 rows",
        "s2: 6 of 7 rows (weight leaves out 1)",
    ]


def test_a_source_without_rows_and_a_weight_without_effect_are_refused() -> None:
    with pytest.raises(DataError, match="s1: empty source"):
        plan_mixture([5, 0], configs_of("", ""), seed=0)
    with pytest.raises(
        ConfigError, match=r"s1: weight 0\.01 leaves no row of this source"
    ) as error:
        plan_mixture([5, 5], configs_of("[weight:1]", "[weight:0.01]"), seed=0)
    assert "cap:N" in str(error.value.hint)
