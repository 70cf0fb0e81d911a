"""The hash moves with what decides ids, and with nothing else."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.small_tokenizers import CHATML, PLAIN_TAGS, byte_level
from tide_cache.tokenizer_hash import tokenizer_sha256

MASK = "<|mask|>"
Content = dict[str, Any]


def base_content() -> Content:
    content: Content = json.loads(byte_level(CHATML, nfc=True).backend_tokenizer.to_str())
    return content


def hash_of(content: Content, mask_token: str | None = MASK) -> str:
    return tokenizer_sha256(json.dumps(content), mask_token=mask_token)


def swap_two_ids(content: Content) -> None:
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[40:42]
    vocab[one], vocab[other] = vocab[other], vocab[one]


def reorder_merges(content: Content) -> None:
    content["model"]["merges"].reverse()


def drop_normalizer(content: Content) -> None:
    content["normalizer"] = None


def split_otherwise(content: Content) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def add_a_token(content: Content) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "id": 999, "content": "<x>"})


@pytest.mark.parametrize(
    "change", [swap_two_ids, reorder_merges, drop_normalizer, split_otherwise, add_a_token]
)
def test_what_decides_ids_moves_it(change: Callable[[Content], None]) -> None:
    content = base_content()
    before = hash_of(content)
    change(content)
    assert hash_of(content) != before


def trim_offsets(content: Content) -> None:
    content["pre_tokenizer"]["trim_offsets"] = not content["pre_tokenizer"]["trim_offsets"]


def pad(content: Content) -> None:
    content["padding"] = {"strategy": "BatchLongest", "pad_id": 0}


def decode_otherwise(content: Content) -> None:
    content["decoder"] = None


def reorder_added_tokens(content: Content) -> None:
    content["added_tokens"].reverse()


@pytest.mark.parametrize("change", [trim_offsets, pad, decode_otherwise, reorder_added_tokens])
def test_what_does_not_decide_ids_leaves_it(change: Callable[[Content], None]) -> None:
    content = base_content()
    before = hash_of(content)
    change(content)
    assert hash_of(content) == before


def test_offsets_inside_a_sequence_are_left_out_too() -> None:
    one, other = base_content(), base_content()
    for content, trims in ((one, True), (other, False)):
        inner = {**content["pre_tokenizer"], "trim_offsets": trims}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [inner]}
    assert hash_of(one) == hash_of(other)


def test_a_student_that_gained_a_mask_token_keeps_its_hash() -> None:
    tokenizer = byte_level(CHATML)
    new = "<|new-mask|>"
    before = tokenizer_sha256(tokenizer.backend_tokenizer.to_str(), mask_token=new)
    tokenizer.add_special_tokens({"mask_token": AddedToken(new, special=True)})
    text = tokenizer.backend_tokenizer.to_str()
    assert tokenizer_sha256(text, mask_token=new) == before
    assert tokenizer_sha256(text, mask_token=None) != before


def test_the_chat_template_has_no_part() -> None:
    one, other = (byte_level(template).backend_tokenizer for template in (CHATML, PLAIN_TAGS))
    assert hash_of(json.loads(one.to_str())) == hash_of(json.loads(other.to_str()))
