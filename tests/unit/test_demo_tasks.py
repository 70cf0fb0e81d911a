"""The demo's rows can be checked exactly, its sets never share a prompt, its tokenizers are real.

The answers are checked against rules written again here, in another way than the generator's.
"""

import json
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.demo.tasks import (
    TASKS,
    Split,
    check,
    generate_rows,
    split_of,
    task_of,
    valid_answers,
    write_jsonl,
)
from examples.demo.tokenizer import (
    CHARACTERS,
    PAIRS,
    TokenizerSpec,
    build_tokenizer,
    save_tokenizer,
)
from tide_cache.errors import ConfigError, DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPLITS = get_args(Split)
ROWS = {split: generate_rows(split, 900, seed=4) for split in SPLITS}
ROW_LIMIT_TOKENS = 16
PINNED = {
    "sort dbca": "test",
    "next abc": "teacher",
    "odd 38291": "student",
    "max 0009": "validation",
}


def _shifted(letters: str) -> str:
    """The letter after each one in the circle of 26."""
    return "".join(LETTERS[(ord(letter) - ord("a") + 1) % 26] for letter in letters)


def _is_right(prompt: str, answer: str) -> bool:
    """The rules of the six kinds, by properties of the answer alone."""
    word, argument = prompt.split(" ")
    if word == "sort":
        return len(answer) == 4 and set(answer) == set(argument) and list(answer) == sorted(answer)
    if word == "next":
        return answer == _shifted(argument)
    if word[0] in "1234":
        return answer == argument[int(word[0]) - 1]
    if word == "max":
        return len(answer) == 1 and answer in argument and all(answer >= d for d in argument)
    if word == "two":
        places = [argument.find(letter) for letter in answer]
        return len(places) == 2 and 0 <= places[0] < places[1]
    if len(answer) != 1 or answer not in argument:
        return False
    digit = int(answer)
    return {"even": digit % 2 == 0, "odd": digit % 2 == 1, "low": digit < 5, "big": digit > 4}[word]


@pytest.mark.parametrize("split", SPLITS)
def test_every_reply_is_right_by_an_independent_rule(split: Split) -> None:
    for row in ROWS[split]:
        assert _is_right(row.prompt, row.answer), row
        assert check(row.prompt, row.answer)


@given(data=st.data())
def test_check_agrees_with_the_rules_on_any_answer(data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS["test"]))
    argument = row.prompt.split(" ")[1]
    near = st.text(alphabet=argument + "a0z9", min_size=0, max_size=5)
    answer = data.draw(st.one_of(near, st.sampled_from(valid_answers(row.prompt))))
    assert check(row.prompt, answer) == _is_right(row.prompt, answer)


def test_valid_answers_are_complete_and_without_duplicates() -> None:
    for row in ROWS["test"]:
        answers = valid_answers(row.prompt)
        assert len(set(answers)) == len(answers)
        if task_of(row.prompt).name in ("pick", "two"):
            size = len(row.answer)
            candidates = {"".join(p) for p in permutations(row.prompt.split(" ")[1], size)}
            assert set(answers) == {a for a in candidates if _is_right(row.prompt, a)}
    assert max(len(valid_answers(row.prompt)) for row in ROWS["test"]) == 10


def test_replies_vary_where_several_are_right() -> None:
    places = Counter(
        valid_answers(row.prompt).index(row.answer)
        for row in ROWS["teacher"]
        if task_of(row.prompt).name == "two"
    )
    assert set(places) == set(range(10))


def test_sets_are_disjoint_whatever_the_seed() -> None:
    prompts = {
        split: {row.prompt for seed in (0, 1) for row in generate_rows(split, 600, seed=seed)}
        for split in SPLITS
    }
    for split, found in prompts.items():
        assert {split_of(prompt) for prompt in found} == {split}
        for other in SPLITS:
            assert other == split or not found & prompts[other]


def test_split_is_pinned() -> None:
    # A changed hash would let yesterday's test prompts into today's training.
    assert [split_of(p) for p in PINNED] == list(PINNED.values())


def test_kinds_are_equally_frequent_and_prompts_unique() -> None:
    counts = Counter(task_of(row.prompt).name for row in ROWS["student"])
    assert counts == {task.name: 150 for task in TASKS}
    assert len({row.prompt for row in ROWS["student"]}) == 900
    words = Counter(row.prompt.split(" ")[0] for row in ROWS["student"])
    assert set(words) == {word for task in TASKS for word in task.words}


def test_tens_of_thousands_of_rows_are_possible() -> None:
    rows = generate_rows("teacher", 24_000, seed=0)
    assert len({row.prompt for row in rows}) == 24_000


def test_rows_are_a_function_of_split_and_seed() -> None:
    assert generate_rows("student", 900, seed=4) == ROWS["student"]
    assert generate_rows("student", 900, seed=5) != ROWS["student"]


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.35, 1.0])
def test_the_stated_fraction_of_replies_is_wrong(fraction: float) -> None:
    rows = generate_rows("student", 600, seed=1, wrong_fraction=fraction)
    wrong = [row for row in rows if not check(row.prompt, row.answer)]
    assert len(wrong) == round(fraction * 600)
    for row in wrong:
        right = valid_answers(row.prompt)[0]
        assert len(row.answer) == len(right)
        assert row.answer.isdigit() == right.isdigit()
    if 0 < fraction < 1:
        assert {task_of(row.prompt).name for row in wrong} == {task.name for task in TASKS}


def test_written_rows_are_chat(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS["test"][:50])
    lines = path.read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    assert [[m["role"] for m in turns] for turns in messages] == [["user", "assistant"]] * 50
    contents = [tuple(m["content"] for m in turns) for turns in messages]
    assert contents == [(row.prompt, row.answer) for row in ROWS["test"][:50]]


def test_a_used_up_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # `max` knows 10,000 prompts, of which the test set holds a tenth; 20 draws give up sooner.
    monkeypatch.setattr("examples.demo.tasks._MAX_REDRAWS", 20)
    with pytest.raises(ConfigError, match=r"the test set has no more prompts of kind '[a-z]+'"):
        generate_rows("test", 12_000, seed=0)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="split: expected one of teacher, student"):
        generate_rows("train", 10, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"wrong_fraction in \[0, 1\], got 10 and 1.5"):
        generate_rows("test", 10, seed=0, wrong_fraction=1.5)
    with pytest.raises(DataError, match=r"begin with one of sort, next, .* got 'add 1'"):
        check("add 1", "2")


@pytest.fixture(scope="module", params=[CHARACTERS, PAIRS], ids=["characters", "pairs"])
def spec(request: pytest.FixtureRequest) -> TokenizerSpec:
    spec: TokenizerSpec = request.param
    return spec


@pytest.fixture(scope="module")
def tokenizer(
    spec: TokenizerSpec, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(spec, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_loaded_tokenizer_has_its_special_tokens(
    spec: TokenizerSpec, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.is_fast
    assert len(tokenizer) == 43 + len(spec.merges)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (spec.pad, spec.end)
    assert (tokenizer.mask_token, tokenizer.unk_token) == (spec.mask, spec.unknown)
    ids = [tokenizer.convert_tokens_to_ids(text) for text in spec.special_tokens]
    assert ids == [0, 1, 2, 3, 4, 5]
    for text, token_id in zip(spec.special_tokens, ids, strict=True):
        assert tokenizer(text).input_ids == [token_id]
        assert token_id in tokenizer.all_special_ids


def test_every_row_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in ROWS["teacher"]:
        text = tokenizer.apply_chat_template(row.as_chat()["messages"], tokenize=False)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == row.prompt + row.answer


def test_offsets_cut_the_text_where_the_tokens_are(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in ROWS["validation"][:200]:
        text = tokenizer.apply_chat_template(row.as_chat()["messages"], tokenize=False)
        encoded = tokenizer(text, return_offsets_mapping=True)
        pieces = [text[start:end] for start, end in encoded.offset_mapping]
        assert "".join(pieces) == text
        assert pieces == [tokenizer.decode([token_id]) for token_id in encoded.input_ids]


def test_the_generation_prompt_is_how_a_rendered_row_begins(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for row in ROWS["validation"][:200]:
        messages = row.as_chat()["messages"]
        prompt_ids = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=False
        )
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids[: len(prompt_ids)] == prompt_ids
        assert tokenizer.decode(ids[len(prompt_ids) :]) == row.answer + tokenizer.eos_token


def test_rows_fit_two_blocks_of_eight(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [
        len(tokenizer.apply_chat_template(row.as_chat()["messages"], return_dict=False))
        for row in ROWS["teacher"]
    ]
    assert max(lengths) == ROW_LIMIT_TOKENS


def test_several_turns_render_in_order(
    spec: TokenizerSpec, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [*ROWS["test"][0].as_chat()["messages"], *ROWS["test"][1].as_chat()["messages"]]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "".join(
        f"{spec.user}{row.prompt}{spec.assistant}{row.answer}{spec.end}" for row in ROWS["test"][:2]
    )


def test_a_role_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="the demo has no role system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "hi"}], tokenize=False)


def test_characters_outside_the_alphabet_become_unknown(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    unknown = tokenizer.unk_token_id
    assert tokenizer("aé").input_ids[1:] == [unknown, unknown]  # one for each byte
    assert tokenizer("Z").input_ids == [unknown]


def test_the_second_tokenizer_cuts_otherwise() -> None:
    characters, pairs = (build_tokenizer(spec) for spec in (CHARACTERS, PAIRS))
    merged = Counter(
        len(characters(row.answer).input_ids) - len(pairs(row.answer).input_ids)
        for row in ROWS["teacher"]
        if task_of(row.prompt).name == "sort"
    )
    assert merged[1] > 5
    assert merged[0] > merged[1]
    assert pairs("abcd").tokens() == ["ab", "cd"]
    assert characters("abcd").tokens() == list("abcd")
