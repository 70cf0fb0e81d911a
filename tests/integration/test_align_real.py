"""Alignment on real chats with real tokenizers, against what the tokens themselves spell.

200 conversations of each source by default; `TIDE_FULL_DATA=1` takes all of them.
"""

import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stage1_teacher.align import align_messages
from stage1_teacher.chat import render_chat
from stage1_teacher.positions import align_positions, positions_to_runs
from tests.small_tokenizers import THINKING, TRIMMING
from tide_cache.alignment import check_chunks, check_runs

NUM_ROWS = None if os.environ.get("TIDE_FULL_DATA") else 200
SPACES = ("\n", "\r", " ", "\t")
OTHERS = ["o200k", "gpt2", "bailing-standin"]
BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}


def _jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _gsm8k(data: Path) -> Iterator[tuple[str, ...]]:
    for row in _jsonl(data / "gsm8k/train.jsonl"):
        yield row["question"], row["answer"]
        # The final number alone also occurs earlier in one of nine of these.
        yield row["question"], row["answer"], "The number?", row["answer"].split("#### ")[-1]


def _mbpp(data: Path) -> Iterator[tuple[str, ...]]:
    for row in _jsonl(data / "mbpp/mbpp.jsonl"):
        yield row["text"] + "\r\n" + "\r\n".join(row["test_list"]), row["code"]


def _bbh(data: Path) -> Iterator[tuple[str, ...]]:
    tasks = [
        json.loads(path.read_text(encoding="utf-8"))["examples"]
        for path in sorted((data / "bbh/bbh").glob("*.json"))
    ]
    # Task by task in turn, so that a sample sees all of them.
    for number in range(max(map(len, tasks))):
        for examples in tasks:
            if number < len(examples):
                yield examples[number]["input"], examples[number]["target"]


def _humaneval(data: Path) -> Iterator[tuple[str, ...]]:
    for row in _jsonl(data / "humaneval/HumanEval.jsonl"):
        yield row["prompt"], row["canonical_solution"]


def _seed_tasks(data: Path) -> Iterator[tuple[str, ...]]:
    for name in ("seed_tasks", "user_oriented_instructions"):
        for row in _jsonl(data / f"seed_tasks/{name}.jsonl"):
            for instance in row["instances"]:
                if instance["output"].strip():
                    yield row["instruction"] + "\n\n" + instance["input"], instance["output"]


SOURCES: dict[str, Callable[[Path], Iterator[tuple[str, ...]]]] = {
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "bbh": _bbh,
    "humaneval": _humaneval,
    "seed_tasks": _seed_tasks,
}


@cache
def conversations(source: str, data: Path) -> list[list[dict[str, str]]]:
    roles = ["user", "assistant"] * 2
    return [
        [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        for texts in list(SOURCES[source](data))[:NUM_ROWS]
    ]


@cache
def load(folder: Path, template: str | None = None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@cache
def speller(folder: Path) -> list[bytes]:
    """The bytes of every id, by transformers' own alphabet instead of the table under test."""
    tokenizer = load(folder)
    added = tokenizer.added_tokens_decoder
    return [
        added[token].content.encode()
        if token in added
        else bytes(BYTE_OF[letter] for letter in tokenizer.convert_ids_to_tokens(token))
        for token in range(len(tokenizer))
    ]


def token_starts(pieces: list[bytes], ids: np.ndarray) -> np.ndarray:
    return np.cumsum([0, *(len(pieces[token]) for token in ids.tolist())])


def check(messages, alignment, pieces_a, pieces_b) -> None:
    """Check that chunks are all common boundaries inside the contents, and spell their bytes."""
    ids_a, ids_b = alignment.ids_a, alignment.ids_b
    check_chunks(alignment.chunks, len(ids_a), len(ids_b), where="test")
    starts_a, starts_b = token_starts(pieces_a, ids_a), token_starts(pieces_b, ids_b)
    spans_a, spans_b = alignment.chat_a.messages, alignment.chat_b.messages
    message_of = np.searchsorted(
        [span.byte_start for span in spans_a], starts_a[alignment.chunks[:, 0]], side="right"
    )
    for number, message in enumerate(messages, start=1):
        content = unicodedata.normalize("NFC", message["content"]).encode()
        span_a, span_b = spans_a[number - 1], spans_b[number - 1]
        # Where the part of the content that both sides show begins and ends.
        low = max(span_a.content_byte_start, span_b.content_byte_start)
        high = min(span_a.content_byte_end, span_b.content_byte_end)
        in_content_a = starts_a - span_a.byte_start + span_a.content_byte_start
        in_content_b = starts_b - span_b.byte_start + span_b.content_byte_start
        common = np.intersect1d(in_content_a, in_content_b)
        common = common[(common >= low) & (common <= high)]
        chunks = alignment.chunks[message_of == number]
        assert in_content_a[chunks[:, 0]].tolist() == common[:-1].tolist()
        assert in_content_a[chunks[:, 1]].tolist() == common[1:].tolist()
        assert in_content_b[chunks[:, 2]].tolist() == common[:-1].tolist()
        assert in_content_b[chunks[:, 3]].tolist() == common[1:].tolist()
        for a0, a1, b0, b1 in chunks.tolist():
            text = content[in_content_a[a0] : in_content_a[a1]]
            assert text == b"".join(pieces_a[token] for token in ids_a[a0:a1].tolist())
            assert text == b"".join(pieces_b[token] for token in ids_b[b0:b1].tolist())
        num_covered = int(common[-1] - common[0]) if len(common) else 0
        assert alignment.edge_bytes[number - 1] == high - low - num_covered
        assert alignment.trimmed_bytes[number - 1] == len(content) - (high - low)
    assert (alignment.in_response == (message_of == len(messages))).all()


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("source", list(SOURCES))
def test_reply_lies_in_minimal_chunks_of_equal_bytes(
    shared_dir: Path, source: str, other: str
) -> None:
    folder_a, folder_b = shared_dir / "tokenizers/qwen3", shared_dir / "tokenizers" / other
    for messages in conversations(source, shared_dir / "data"):
        alignment = align_messages(messages, load(folder_a), load(folder_b))
        check(messages, alignment, speller(folder_a), speller(folder_b))


@pytest.mark.parametrize("template", [TRIMMING, THINKING], ids=["trimming", "thinking"])
@pytest.mark.parametrize("source", list(SOURCES))
def test_other_templates_on_one_side(shared_dir: Path, source: str, template: str) -> None:
    folder_a, folder_b = shared_dir / "tokenizers/qwen3", shared_dir / "tokenizers/bailing-standin"
    for messages in conversations(source, shared_dir / "data")[:50]:
        alignment = align_messages(messages, load(folder_a, template), load(folder_b))
        check(messages, alignment, speller(folder_a), speller(folder_b))


def test_a_reply_is_lost_to_the_edges_only_where_the_template_has_no_control_tokens(
    shared_dir: Path,
) -> None:
    # o200k writes "<role>" as text, whose ">" merges with the reply's first word; the LLaDA2
    # stand-in loses nothing unless a reply begins with a line feed, which Qwen merges.
    lost = dict.fromkeys(OTHERS, 0)
    for source in SOURCES:
        for messages in conversations(source, shared_dir / "data")[:30]:
            for other in OTHERS:
                alignment = align_messages(
                    messages,
                    load(shared_dir / "tokenizers/qwen3"),
                    load(shared_dir / "tokenizers" / other),
                )
                lost[other] += alignment.edge_bytes[-1]
                if other == "bailing-standin" and not messages[-1]["content"].startswith(SPACES):
                    assert alignment.edge_bytes[-1] == 0
                    assert alignment.trimmed_bytes[-1] == 0
    assert lost["o200k"] > lost["bailing-standin"]


@pytest.mark.parametrize("source", list(SOURCES))
def test_positions_of_two_templates_pair_up_all_of_the_reply(shared_dir: Path, source: str) -> None:
    folder = shared_dir / "tokenizers/qwen3"
    for messages in conversations(source, shared_dir / "data"):
        student, teacher = (
            render_chat(messages, load(folder, THINKING)),
            render_chat(messages, load(folder)),
        )
        a_P, b_P = align_positions(student, teacher)
        check_runs(positions_to_runs(a_P, b_P), student.ids_L, teacher.ids_L, where="test")
        reply = student.messages[-1]
        paired = student.bounds_M[a_P + 1] - student.bounds_M[a_P]
        in_reply = student.bounds_M[a_P] >= reply.byte_start
        # To the last byte: the reply, "<|im_end|>" and the line feed behind it.
        shown = len(student.text.encode()) - reply.byte_start
        first_token_merges = (
            reply.byte_start not in student.bounds_M
            or teacher.messages[-1].byte_start not in teacher.bounds_M
        )
        assert paired[in_reply].sum() == shown or first_token_merges
        assert not first_token_merges or messages[-1]["content"][0] in "\r\n\t "
