import json
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import align as benchmark
from stage1_teacher.align import align_bytes, align_bytes_reference, align_chats, align_messages
from stage1_teacher.chat import REFUSALS, render_chat
from stage1_teacher.token_bytes import token_bytes
from tests.small_tokenizers import (
    CHATML,
    EXPECTED_TEXT,
    PLAIN_TAGS,
    THINKING,
    TRIMMING,
    byte_level,
    letters,
    lower_casing,
    meta_space,
)
from tests.unit.test_chat import assistant, conversations, system, user
from tide_cache.alignment import check_chunks
from tide_cache.errors import DataError


class TestAlignBytes:
    @pytest.mark.parametrize(
        ("lengths_a", "lengths_b", "chunks"),
        [
            ([1, 2], [1, 2], [(0, 1, 0, 1), (1, 2, 1, 2)]),
            ([3], [1, 1, 1], [(0, 1, 0, 3)]),
            ([2, 2, 1], [1, 2, 2], [(0, 3, 0, 3)]),
            ([2, 2, 1], [1, 1, 3], [(0, 1, 0, 2), (1, 3, 2, 3)]),
            ([], [], []),
            # A token of zero bytes opens the chunk behind it, or closes the last one.
            ([0, 2], [2], [(0, 2, 0, 1)]),
            ([1, 0, 1], [1, 1], [(0, 1, 0, 1), (1, 3, 1, 2)]),
            ([1, 0, 1], [1, 0, 0, 1], [(0, 1, 0, 1), (1, 3, 1, 4)]),
            ([2, 0, 0], [1, 1, 0], [(0, 3, 0, 3)]),
            ([0, 0], [], []),
            ([0], [0, 0], []),
        ],
    )
    def test_table(self, lengths_a, lengths_b, chunks) -> None:
        for align in (align_bytes, align_bytes_reference):
            got = align(lengths_a, lengths_b)
            assert got.dtype == np.int32 and got.shape == (len(chunks), 4)
            assert got.tolist() == [list(chunk) for chunk in chunks]

    @given(data=st.data(), with_zeros=st.booleans())
    def test_fast_path_equals_the_reference_and_is_minimal(self, data, with_zeros: bool) -> None:
        lengths = st.lists(st.integers(0 if with_zeros else 1, 4), max_size=30)
        a, b = data.draw(lengths), data.draw(lengths)
        short, missing = (a, sum(b) - sum(a)) if sum(a) < sum(b) else (b, sum(a) - sum(b))
        short += [1] * missing
        chunks_C4 = align_bytes(a, b)
        assert chunks_C4.tolist() == align_bytes_reference(a, b).tolist()
        common = sorted({*np.cumsum([0, *a]).tolist()} & {*np.cumsum([0, *b]).tolist()})
        assert len(chunks_C4) == len(common) - 1
        for (a0, a1, b0, b1), start, end in zip(chunks_C4, common[:-1], common[1:], strict=True):
            assert sum(a[:a0]) == sum(b[:b0]) == start
            assert sum(a[:a1]) == sum(b[:b1]) == end
        if len(chunks_C4):
            assert chunks_C4[0, [0, 2]].tolist() == [0, 0]
            assert chunks_C4[-1, [1, 3]].tolist() == [len(a), len(b)]
            assert (chunks_C4[1:, [0, 2]] == chunks_C4[:-1, [1, 3]]).all()

    def test_lengths_may_be_small_unsigned_integers(self) -> None:
        lengths = np.full(1000, 255, dtype=np.uint8)
        assert align_bytes(lengths, [255_000]).tolist() == [[0, 1000, 0, 1]]

    @pytest.mark.parametrize("align", [align_bytes, align_bytes_reference])
    def test_differing_totals_are_refused(self, align) -> None:
        with pytest.raises(DataError, match="got 3 and 4 bytes; normalise the text") as caught:
            align([1, 2], [4])
        assert caught.value.reason == "bytes_differ"

    @pytest.mark.parametrize("bad", [[[1, 2]], [1.5, 1.5], [4, -1], ["abc"]])
    def test_other_things_than_lengths_are_refused(self, bad) -> None:
        with pytest.raises(DataError, match=r"lengths_b: expected one dimension of integers >= 0"):
            align_bytes([3], bad)


def token_starts(tokenizer, ids):
    """Where every token begins, from the bytes of the tokens alone, and the end."""
    pieces = [token_bytes(tokenizer).pieces[token] for token in ids.tolist()]
    return [len(b"".join(pieces[:count])) for count in range(len(pieces) + 1)]


def expected_chunks(turns, tokenizer_a, tokenizer_b, alignment):
    """Chunks by sets of byte positions, from what the templates are known to write."""
    chunks, is_reply = [], []
    starts_a = token_starts(tokenizer_a, alignment.ids_a)
    starts_b = token_starts(tokenizer_b, alignment.ids_b)
    pieces_a = EXPECTED_TEXT[tokenizer_a.chat_template](turns)
    pieces_b = EXPECTED_TEXT[tokenizer_b.chat_template](turns)
    at_a = at_b = 0
    for number, (piece_a, piece_b) in enumerate(zip(pieces_a, pieces_b, strict=True)):
        content = turns[number][1]
        shown_a, shown_b = piece_a[1], piece_b[1]
        at_a += len(piece_a[0].encode())
        at_b += len(piece_b[0].encode())
        # A trimmed content is the untrimmed one from its first kept character on.
        cut_a = len(content) - len(content.lstrip()) if len(shown_a) < len(content) else 0
        cut_a = min(cut_a, len(content) - len(shown_a))
        cut_b = len(content) - len(content.lstrip()) if len(shown_b) < len(content) else 0
        cut_b = min(cut_b, len(content) - len(shown_b))
        start, end = max(cut_a, cut_b), min(cut_a + len(shown_a), cut_b + len(shown_b))
        if content.strip() or (shown_a == shown_b == content):
            from_a = at_a + len(content[cut_a:start].encode())
            from_b = at_b + len(content[cut_b:start].encode())
            length = len(content[start:end].encode())
            inside_a = {byte - from_a for byte in starts_a if 0 <= byte - from_a <= length}
            inside_b = {byte - from_b for byte in starts_b if 0 <= byte - from_b <= length}
            common = sorted(inside_a & inside_b)
            for low, high in pairwise(common):
                ends_a = starts_a.index(from_a + low), starts_a.index(from_a + high)
                ends_b = starts_b.index(from_b + low), starts_b.index(from_b + high)
                chunks.append([*ends_a, *ends_b])
                is_reply.append(number == len(turns) - 1)
        at_a += len((shown_a + piece_a[2]).encode())
        at_b += len((shown_b + piece_b[2]).encode())
    return chunks, is_reply


TEMPLATES = st.sampled_from(list(EXPECTED_TEXT))


@settings(deadline=None, max_examples=200)
@given(template_a=TEMPLATES, template_b=TEMPLATES, turns=conversations())
def test_chunks_are_all_common_boundaries_inside_contents(template_a, template_b, turns) -> None:
    tokenizer_a = byte_level(template_a, 420, nfc=True)
    tokenizer_b = byte_level(template_b, 300)
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        alignment = align_messages(messages, tokenizer_a, tokenizer_b)
    except DataError as error:
        # "]" of the template and a combining mark: NFC makes another text of the rendering.
        assert error.reason == "bytes_differ"
        text = render_chat(messages, byte_level(template_a, 300)).text
        assert not unicodedata.is_normalized("NFC", text)
        return
    normal = [(role, unicodedata.normalize("NFC", text)) for role, text in turns]
    chunks, is_reply = expected_chunks(normal, tokenizer_a, tokenizer_b, alignment)
    assert alignment.chunks.tolist() == chunks
    labelled = [
        a_start >= alignment.chat_a.prompt_length and b_start >= alignment.chat_b.prompt_length
        for a_start, _, b_start, _ in chunks
    ]
    assert alignment.in_response.tolist() == [
        reply and part for reply, part in zip(is_reply, labelled, strict=True)
    ]
    check_chunks(alignment.chunks, len(alignment.ids_a), len(alignment.ids_b), where="test")


def chunk_texts(alignment, tokenizer_a, tokenizer_b, *, reply_only=False):
    """The bytes of every chunk, checked to be the same on both sides."""
    pieces_a, pieces_b = token_bytes(tokenizer_a), token_bytes(tokenizer_b)
    texts = []
    for (a0, a1, b0, b1), in_response in zip(
        alignment.chunks.tolist(), alignment.in_response.tolist(), strict=True
    ):
        text = pieces_a.spell(alignment.ids_a[a0:a1].tolist())
        assert text == pieces_b.spell(alignment.ids_b[b0:b1].tolist())
        if in_response or not reply_only:
            texts.append(text)
    return texts


def aligned(messages, template_a=CHATML, template_b=PLAIN_TAGS):
    tokenizer_a, tokenizer_b = byte_level(template_a, 420, nfc=True), byte_level(template_b, 300)
    alignment = align_messages(messages, tokenizer_a, tokenizer_b)
    reply = b"".join(chunk_texts(alignment, tokenizer_a, tokenizer_b, reply_only=True)).decode()
    everything = b"".join(chunk_texts(alignment, tokenizer_a, tokenizer_b)).decode()
    return alignment, reply, everything


class TestInputsThatSearchingGetsWrong:
    def test_short_answer_that_occurs_earlier(self) -> None:
        messages = [system("Say 1, 2 or 3."), user("1 + 1 - 1"), assistant("1")]
        alignment, reply, everything = aligned(messages)
        assert (reply, everything) == ("1", "Say 1, 2 or 3.1 + 1 - 11")
        a_start, a_end, b_start, b_end = alignment.chunks[alignment.in_response][0]
        # Behind the answer come the end of turn and a line feed, or the line feed alone.
        assert (len(alignment.ids_a) - a_end, a_end - a_start) == (2, 1)
        assert (len(alignment.ids_b) - b_end, b_end - b_start) == (1, 1)

    def test_repeated_texts(self) -> None:
        messages = [user("The answer is 1."), assistant("The answer is 1.")] * 2
        alignment, reply, everything = aligned(messages)
        assert reply == "The answer is 1." and everything == reply * 4
        assert (alignment.chunks[alignment.in_response, 0] >= alignment.chat_a.prompt_length).all()

    def test_merged_line_feeds_are_left_out_on_both_sides(self) -> None:
        # "\n\nSu" is a token of the larger vocabulary, so "assistant\n" + "\nSure" merges.
        alignment, reply, _ = aligned([user("hi"), assistant("\nSure!\n\nOK")])
        assert reply == "OK"
        assert alignment.edge_bytes == (0, len("\nSure!\n\n"))
        assert alignment.num_edge_bytes_left_out == 8

    def test_combining_characters(self) -> None:
        messages = [user("cafe\u0301"), assistant("\u1112\u1161\u11ab e\u0301")]
        _, reply, everything = aligned(messages)
        assert (reply, everything) == ("한 é", "café한 é")

    def test_template_that_trims_on_one_side(self) -> None:
        messages = [user("  hi \n"), assistant("\n q z \n")]
        alignment, reply, everything = aligned(messages, CHATML, TRIMMING)
        assert (reply, everything) == ("q z", "hiq z")
        assert alignment.trimmed_bytes == (4, 4)
        alignment, reply, _ = aligned(messages, TRIMMING, PLAIN_TAGS)
        assert (reply, alignment.trimmed_bytes) == ("q z", (4, 4))

    def test_character_split_over_tokens(self) -> None:
        tokenizer_a, tokenizer_b = byte_level(CHATML, 420), byte_level(CHATML, 300)
        alignment = align_messages([assistant("x🙂🦊")], tokenizer_a, tokenizer_b)
        assert chunk_texts(alignment, tokenizer_a, tokenizer_b) == [
            b"x", b"\xf0\x9f\x99\x82", b"\xf0\x9f", b"\xa6", b"\x8a"
        ]  # fmt: skip

    def test_carriage_returns(self) -> None:
        _, reply, everything = aligned(
            [user("a\r\nb\r"), assistant("Yes.\r\n2\r\n")], CHATML, CHATML
        )
        assert (reply, everything) == ("Yes.\r\n2\r\n", "a\r\nb\rYes.\r\n2\r\n")

    def test_empty_and_blank_messages(self) -> None:
        messages = [system(""), user(" \n"), assistant("1")]
        for template in (CHATML, TRIMMING):
            _, reply, everything = aligned(messages, template, TRIMMING)
            assert (reply, everything) == ("1", "1")

    def test_control_tokens_typed_by_a_user_are_aligned_by_their_bytes(self) -> None:
        tokenizer_a, tokenizer_b = byte_level(CHATML), letters("[user]asitn<|_m>end\n1", PLAIN_TAGS)
        tokenizer_b.add_tokens(["<|im_"])
        alignment = align_messages([user("1<|im_end|>"), assistant("1")], tokenizer_a, tokenizer_b)
        assert chunk_texts(alignment, tokenizer_a, tokenizer_b) == [b"1", b"<|im_end|>", b"1"]

    def test_think_block_that_only_one_side_shows(self) -> None:
        think = "<think>\n1\n</think>\n\n1 1"
        messages = [user("1"), assistant(think), user("1"), assistant("1")]
        alignment, reply, everything = aligned(messages, THINKING, PLAIN_TAGS)
        assert (reply, everything) == ("1", "1" + "1 1" + "1" + "1")
        assert alignment.trimmed_bytes == (0, think.index("1 1"), 0, 0)

    def test_reply_that_is_partly_prompt(self) -> None:
        template = CHATML.replace("assistant\n'", "assistant\n<think>'")
        _, reply, everything = aligned([user("hi"), assistant("<think>1</think>2")], template)
        assert everything == "hi<think>1</think>2"
        assert reply == "1</think>2"
        _, reply, _ = aligned([user("hi"), assistant("<think>1</think>2")], CHATML, template)
        assert reply == "1</think>2"

    def test_parts_that_do_not_meet(self) -> None:
        # One template shows the line feed's place only, the other all but the line feed.
        messages = [assistant("<think>1</think>\n"), user("1"), assistant("1")]
        alignment, _, everything = aligned(messages, THINKING, TRIMMING)
        assert everything == "11"
        assert alignment.trimmed_bytes == (len("<think>1</think>\n"), 0, 0)
        assert alignment.num_edge_bytes_left_out == 0


@pytest.mark.parametrize("prepend", ["first", "always"])
def test_sentencepiece_against_byte_level(prepend: str) -> None:
    tokenizer_a, tokenizer_b = meta_space(CHATML, prepend=prepend), byte_level(PLAIN_TAGS, 300)
    messages = [user("The 🙂"), assistant("The The\n  é")]
    alignment = align_messages(messages, tokenizer_a, tokenizer_b)
    text_a, bounds_a = alignment.chat_a.text.encode(), alignment.chat_a.bounds_M
    texts = []
    for a0, a1, b0, b1 in alignment.chunks.tolist():
        texts.append(token_bytes(tokenizer_b).spell(alignment.ids_b[b0:b1].tolist()))
        assert text_a[bounds_a[a0] : bounds_a[a1]] == texts[-1]
    assert b"".join(texts).decode() == "The 🙂The The\n  é"
    assert texts[-3:] == [b"\n  ", b"\xc3", b"\xa9"]


class TestRefusals:
    def test_a_tokenizer_that_rewrites(self) -> None:
        with pytest.raises(DataError, match="does not spell the text") as caught:
            align_messages([user("Hi"), assistant("1")], byte_level(CHATML), lower_casing(CHATML))
        assert caught.value.reason == "bytes_differ"

    def test_renderings_of_other_texts(self) -> None:
        one = render_chat([user("a"), assistant("same")], byte_level(CHATML))
        other = render_chat([user("b"), assistant("same")], byte_level(PLAIN_TAGS))
        with pytest.raises(DataError, match="message 1 of 2: expected the same content") as caught:
            align_chats(one, other)
        assert caught.value.reason == "bytes_differ"

    def test_renderings_of_different_lengths(self) -> None:
        one = render_chat([user("a"), assistant("same")], byte_level(CHATML))
        other = render_chat([assistant("same")], byte_level(CHATML))
        with pytest.raises(DataError, match="expected as many messages, got 2 and 1") as caught:
            align_chats(one, other)
        assert caught.value.reason in REFUSALS


class TestBenchmark:
    def test_prints_one_json_object(self, monkeypatch, capsys) -> None:
        arguments = ["align.py", "--json", "--samples", "20", "--repeats", "1"]
        monkeypatch.setattr("sys.argv", arguments)
        benchmark.main()
        figures = json.loads(capsys.readouterr().out)
        assert figures["num_samples"] == 20
        assert figures["num_chunks"] > 20 * 50
        assert min(figures["fast_chunks_per_s"], figures["reference_chunks_per_s"]) > 0

    def test_generated_samples_spell_the_same_number_of_bytes(self) -> None:
        for lengths_a, lengths_b in benchmark.generated_samples(5, seed=1):
            assert lengths_a.sum() == lengths_b.sum() and min(lengths_a.min(), lengths_b.min()) > 0

    def test_reads_the_strings_of_a_file(self, tmp_path) -> None:
        folder = tmp_path / "tokenizer"
        byte_level(CHATML, 300).save_pretrained(folder)
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"q": "1 + 1", "a": ["2", ""]}) + "\n", encoding="utf-8")
        samples = benchmark.read_samples(rows, str(folder), str(folder), 10)
        assert [int(a.sum()) for a, _ in samples] == [5, 1]
        assert benchmark.measure(samples, 1)["num_chunks"] == sum(len(a) for a, _ in samples)
