import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stage1_teacher.token_bytes import _byte_alphabet, token_byte_lengths, token_bytes
from tests.small_tokenizers import CHATML, byte_level, letters, lower_casing, meta_space
from tide_cache.errors import ConfigError, DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_byte_alphabet_is_that_of_byte_level_bpe() -> None:
    assert _byte_alphabet() == {letter: byte for byte, letter in bytes_to_unicode().items()}


@given(text=TEXTS)
def test_byte_level_ids_spell_their_text(text: str) -> None:
    tokenizer = byte_level(CHATML)
    ids = encode(tokenizer, text)
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())
    assert token_bytes(tokenizer).spell(ids) == text.encode()


def test_partial_characters_and_added_tokens_have_their_own_bytes() -> None:
    tokenizer = byte_level(CHATML, 300)
    tokenizer.add_tokens([AddedToken("<né>", normalized=False)])
    text = "🦊<|im_end|><né>é"
    pieces = [token_bytes(tokenizer).pieces[token] for token in encode(tokenizer, text)]
    fox, accent = [b"\xf0\x9f", b"\xa6", b"\x8a"], [b"\xc3", b"\xa9"]
    assert pieces == [*fox, b"<|im_end|>", "<né>".encode(), *accent]


def test_table_is_kept_and_made_again_after_a_token_is_added() -> None:
    tokenizer = byte_level(CHATML, 300)
    before = token_bytes(tokenizer)
    assert token_bytes(tokenizer) is before
    tokenizer.add_tokens(["<new>"])
    after = token_bytes(tokenizer)
    assert after.pieces == (*before.pieces, b"<new>")


def test_table_does_not_keep_the_tokenizer_alive() -> None:
    tokenizer = byte_level(CHATML, 300)
    token_bytes(tokenizer)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_ids_that_the_vocabulary_skips_spell_nothing() -> None:
    tokenizer = letters("ab", CHATML)
    lengths_V = token_byte_lengths(tokenizer)
    assert lengths_V.dtype == np.int32
    assert lengths_V.tolist() == [5, 1, 1, 12, 10, 8]  # <unk>, a, b and the control tokens


@pytest.mark.parametrize("prepend", ["first", "always"])
@pytest.mark.parametrize(
    "text", ["The The", " The", "  The\n", "日本 The", "<|im_start|>The<|im_end|> The  ", "🙂", ""]
)
def test_sentencepiece_bounds_do_not_count_the_invented_space(prepend: str, text: str) -> None:
    tokenizer = meta_space(CHATML, prepend=prepend)
    ids = encode(tokenizer, text)
    bounds_M = token_bytes(tokenizer).bounds(ids, text.encode())
    assert bounds_M[0] == 0 and bounds_M[-1] == len(text.encode())
    assert len(bounds_M) == len(ids) + 1
    for index, token in enumerate(ids):
        piece = token_bytes(tokenizer).pieces[token]
        covered = text.encode()[bounds_M[index] : bounds_M[index + 1]]
        assert covered in (piece, piece.removeprefix(b" "))


def test_sentencepiece_byte_fallback_is_one_byte_a_token() -> None:
    tokenizer = meta_space(CHATML)
    ids = encode(tokenizer, "🙂")
    assert token_byte_lengths(tokenizer)[ids[-4:]].tolist() == [1, 1, 1, 1]
    assert token_bytes(tokenizer).bounds(ids, "🙂".encode()).tolist()[-5:] == [0, 1, 2, 3, 4]


def test_character_tokenizer_and_what_it_cannot_spell() -> None:
    tokenizer = letters("ab é", CHATML)
    ids = encode(tokenizer, "bé a")
    assert token_bytes(tokenizer).bounds(ids, "bé a".encode()).tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(DataError, match=r"at byte 1 of 3 token 1 \(id 0\) spells b'<unk>' where"):
        token_bytes(tokenizer).bounds(encode(tokenizer, "bXa"), b"bXa")


def test_a_tokenizer_that_rewrites_is_refused() -> None:
    tokenizer = lower_casing(CHATML)
    with pytest.raises(DataError, match="does not spell the text") as caught:
        token_bytes(tokenizer).bounds(encode(tokenizer, "a Big b"), b"a Big b")
    assert caught.value.reason == "bytes_differ"
    assert "where the text has b'Big b'" in str(caught.value)
    assert "normaliser rewrites" in str(caught.value)


def test_a_text_that_goes_on_behind_the_tokens_is_refused() -> None:
    tokenizer = byte_level(CHATML)
    with pytest.raises(DataError, match="at byte 2 of 3 the tokens end where the text has b'c'"):
        token_bytes(tokenizer).bounds(encode(tokenizer, "ab"), b"abc")


def test_a_slow_tokenizer_is_refused_with_the_next_step() -> None:
    class Slow:
        name_or_path = "some/slow"

    with pytest.raises(ConfigError, match=r"'some/slow': expected a fast tokenizer, got Slow") as e:
        token_bytes(Slow())  # type: ignore[arg-type]
    assert "tokenizer.json" in str(e.value)
