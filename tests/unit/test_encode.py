"""Conversations as ids: cutting, filling, labels and what survives of the alignment."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage1_teacher.align import align_messages
from stage1_teacher.encode import Encoder, load_sides
from stage1_teacher.prepare_config import PrepareConfig, SideConfig
from tests.builders import chat, make_tokenizer
from tests.small_tokenizers import CHATML, PLAIN_TAGS, TRIMMING, letters
from tide_cache.alignment import check_chunks, check_runs, teacher_partners
from tide_cache.config import parse_config
from tide_cache.errors import ConfigError, DataError

BLOCK = 8
LONG = "The answer is 12. " * 50


def make_encoder(
    folder: Path,
    *,
    template: str = CHATML,
    teacher_template: str | None = None,
    teacher_vocab_size: int | None = None,
    max_length: int = 64,
    teacher_max_length: int | None = None,
    **changes: Any,
) -> Encoder:
    student = {
        "tokenizer": str(make_tokenizer(folder, template=template)),
        "max_length": max_length,
    }
    values: dict[str, Any] = {"sources": "unused.jsonl", "student": student, "block_size": BLOCK}
    if teacher_template or teacher_vocab_size or teacher_max_length:
        name = make_tokenizer(
            folder,
            template=teacher_template or template,
            vocab_size=teacher_vocab_size or 420,
            name="teacher",
        )
        values["teacher"] = {
            "tokenizer": str(name),
            "max_length": teacher_max_length or max_length,
        }
    config = parse_config({**values, **changes}, PrepareConfig, where="test")
    return Encoder(config, *load_sides(config))


def encode(encoder: Encoder, *contents: str) -> Any:
    return encoder.encode(chat(*contents), sample_id="s", source="made")


class TestOneTemplate:
    def test_labels_are_the_last_reply_and_the_fill(self, tmp_path: Path) -> None:
        encoder = make_encoder(tmp_path, max_length=128)
        sample = encode(encoder, "Question?", "First.", "And?", "Sure! 1 + 1 = 2").sample
        decode = encoder.student.tokenizer.decode
        eos = encoder.student.eos_token_id
        labelled_L = sample.student_ids_L[sample.prompt_length :]
        text = decode(labelled_L)
        assert text.startswith("Sure! 1 + 1 = 2<|im_end|>\n")
        assert set(text.removeprefix("Sure! 1 + 1 = 2<|im_end|>\n").split("<|im_end|>")) == {""}
        assert decode(sample.student_ids_L[: sample.prompt_length]).endswith(
            "<|im_start|>assistant\n"
        )
        assert len(sample.student_ids_L) % BLOCK == 0
        assert labelled_L[-1] == eos or decode(labelled_L[-1:]) == "\n"

    def test_one_identity_run(self, tmp_path: Path) -> None:
        sample = encode(make_encoder(tmp_path), "Question?", "Sure!").sample
        np.testing.assert_array_equal(sample.teacher_ids_L, sample.student_ids_L)
        assert sample.alignment_RX.tolist() == [[0, 0, len(sample.student_ids_L)]]

    @pytest.mark.parametrize("num_letters", range(1, 20))
    def test_fill_to_whole_blocks(self, num_letters: int, tmp_path: Path) -> None:
        encoder = make_encoder(tmp_path)
        sample = encode(encoder, "?", "x" * num_letters).sample
        prompt = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
        text = f"{prompt}{'x' * num_letters}<|im_end|>\n"
        num_tokens = len(encoder.student.tokenizer(text)["input_ids"])
        assert len(sample.student_ids_L) == -(-num_tokens // BLOCK) * BLOCK
        assert (sample.student_ids_L[num_tokens:] == encoder.student.eos_token_id).all()

    def test_long_reply_is_cut_and_counted(self, tmp_path: Path) -> None:
        encoder = make_encoder(tmp_path, max_length=64)
        encoded = encode(encoder, "Question?", LONG)
        whole = encode(make_encoder(tmp_path, max_length=512), "Question?", LONG)
        assert encoded.counts == {"num_truncated": 1, "num_teacher_truncated": 1}
        assert len(encoded.sample.student_ids_L) == 64
        np.testing.assert_array_equal(encoded.sample.student_ids_L, whole.sample.student_ids_L[:64])
        assert not whole.counts

    def test_prompt_as_long_as_the_limit_is_dropped(self, tmp_path: Path) -> None:
        encoder = make_encoder(tmp_path, max_length=512)
        lengths = []
        for num_letters in range(40):
            sample = encode(encoder, LONG + "~" * num_letters, "Yes.").sample
            lengths.append(sample.prompt_length)
        at_limit = next(n for n, length in enumerate(lengths) if length % BLOCK == 0)
        limit = lengths[at_limit]
        small = make_encoder(tmp_path, max_length=limit)
        with pytest.raises(DataError, match=f"expected fewer than max_length = {limit}") as caught:
            encode(small, LONG + "~" * at_limit, "Yes.")
        assert caught.value.reason == "prompt_too_long"
        one_less = next(n for n, length in enumerate(lengths) if length == limit - 1)
        kept = encode(small, LONG + "~" * one_less, "Yes.")
        assert kept.counts["num_truncated"] == 1
        assert len(kept.sample.student_ids_L) == kept.sample.prompt_length + 1 == limit

    def test_only_the_limits_differ(self, tmp_path: Path) -> None:
        """The teacher may see more of a reply than the student learns, in one rendering."""
        student = {"tokenizer": str(make_tokenizer(tmp_path)), "max_length": 64}
        config = parse_config(
            {
                "sources": "x.jsonl",
                "student": student,
                "teacher": {**student, "max_length": 128},
                "block_size": BLOCK,
            },
            PrepareConfig,
            where="test",
        )
        sides = load_sides(config)
        assert sides[0].tokenizer is sides[1].tokenizer
        encoded = encode(Encoder(config, *sides), "Question?", LONG)
        assert len(encoded.sample.student_ids_L) == 64
        assert len(encoded.sample.teacher_ids_L) == 128
        assert encoded.sample.alignment_RX.tolist() == [[0, 0, 64]]


class TestTwoTemplates:
    def encoder(self, folder: Path, **changes: Any) -> Encoder:
        return make_encoder(folder, template=CHATML, teacher_template=PLAIN_TAGS, **changes)

    def test_reply_is_paired_token_by_token(self, tmp_path: Path) -> None:
        encoder = self.encoder(tmp_path)
        sample = encode(encoder, "Question?", "The answer is 12.").sample
        check_runs(sample.alignment_RX, sample.student_ids_L, sample.teacher_ids_L, where="test")
        partner_L = teacher_partners(sample.alignment_RX, len(sample.student_ids_L))
        paired = np.flatnonzero(partner_L >= 0)
        paired = paired[paired >= sample.prompt_length]
        text = encoder.student.tokenizer.decode(sample.student_ids_L[paired])
        assert text.replace("<|im_end|>", "") == "The answer is 12."
        assert len(sample.teacher_ids_L) % BLOCK == 0

    def test_fill_is_paired_in_order(self, tmp_path: Path) -> None:
        encoder = self.encoder(tmp_path)
        for num_letters in range(1, 12):
            sample = encode(encoder, "?", "ab " * num_letters).sample
            eos = encoder.student.eos_token_id
            fills = []
            for ids_L, template_eos in ((sample.student_ids_L, 2), (sample.teacher_ids_L, 0)):
                eos_places = np.flatnonzero(ids_L == eos)
                fills.append(eos_places[template_eos:])
            num_pairs = min(map(len, fills))
            partner_L = teacher_partners(sample.alignment_RX, len(sample.student_ids_L))
            assert partner_L[fills[0][:num_pairs]].tolist() == fills[1][:num_pairs].tolist()
            assert (partner_L[fills[0][num_pairs:]] == -1).all()

    def test_cut_on_the_teachers_side_leaves_ce_only(self, tmp_path: Path) -> None:
        encoder = self.encoder(tmp_path, max_length=256, teacher_max_length=64)
        sample = encode(encoder, "Question?", LONG).sample
        assert len(sample.teacher_ids_L) == 64
        check_runs(sample.alignment_RX, sample.student_ids_L, sample.teacher_ids_L, where="test")
        partner_L = teacher_partners(sample.alignment_RX, len(sample.student_ids_L))
        assert partner_L.max() == 63
        assert (partner_L[-10:] == -1).all(), "a cut side has no fill to pair with"

    def test_prompt_fills_the_teachers_limit(self, tmp_path: Path) -> None:
        encoder = self.encoder(tmp_path, max_length=512, teacher_max_length=BLOCK)
        with pytest.raises(DataError) as caught:
            encode(encoder, LONG, "Yes.")
        assert caught.value.reason == "teacher_prompt_too_long"

    def test_equal_ids_beyond_the_shared_ones_are_no_partners(self, tmp_path: Path) -> None:
        """Two control tokens at one id, as in checkpoints that grew apart."""
        folders = [make_tokenizer(tmp_path, name=name) for name in ("student", "teacher")]
        for folder, token in zip(folders, ("<x>", "<y>"), strict=True):
            tokenizer = _load(folder)
            tokenizer.add_tokens([token])
            tokenizer.add_tokens(["<both>"])
            tokenizer.save_pretrained(folder)
        config = parse_config(
            {
                "sources": "x.jsonl",
                "student": {"tokenizer": str(folders[0]), "max_length": 64},
                "teacher": {"tokenizer": str(folders[1]), "max_length": 64},
                "block_size": BLOCK,
            },
            PrepareConfig,
            where="test",
        )
        encoder = Encoder(config, *load_sides(config))
        sample = encode(encoder, "?", "Yes. <both> Yes.").sample
        assert encoder.shared_vocab_size is not None
        beyond = np.flatnonzero(sample.student_ids_L >= encoder.shared_vocab_size)
        assert len(beyond) == 1
        partner_L = teacher_partners(sample.alignment_RX, len(sample.student_ids_L))
        assert partner_L[beyond[0]] == -1
        assert (np.delete(partner_L, beyond) >= 0).all()

    def test_two_vocabularies_are_refused(self, tmp_path: Path) -> None:
        teacher = tmp_path / "letters"
        letters("abcdefgh ?.", CHATML).save_pretrained(teacher)
        config = _side_config(tmp_path).model_copy(
            update={"teacher": SideConfig(tokenizer=str(teacher), max_length=64)}
        )
        with pytest.raises(ConfigError, match="share only the first 0 of ") as caught:
            Encoder(config, *load_sides(config))
        assert caught.value.hint == "set alignment: chunks"


class TestTwoTokenizers:
    def encoder(self, folder: Path, **changes: Any) -> Encoder:
        return make_encoder(
            folder,
            template=CHATML,
            teacher_template=TRIMMING,
            teacher_vocab_size=300,
            alignment="chunks",
            **changes,
        )

    def test_chunks_spell_the_reply(self, tmp_path: Path) -> None:
        encoder = self.encoder(tmp_path, max_length=512)
        reply = "The answer is 12. naïve 🙂"
        sample = encode(encoder, "The answer is 12.", reply).sample
        check_chunks(
            sample.alignment_RX, len(sample.student_ids_L), len(sample.teacher_ids_L), where="test"
        )
        sides = []
        for side, ids_L, start, end in (
            (encoder.student, sample.student_ids_L, 0, 1),
            (encoder.teacher, sample.teacher_ids_L, 2, 3),
        ):
            first, last = sample.alignment_RX[0, start], sample.alignment_RX[-1, end]
            sides.append(side.tokenizer.decode(ids_L[first:last]))
        assert sides == [reply, reply]
        assert encoder.shared_vocab_size is None

    def test_fill_is_in_no_chunk_and_the_teacher_has_none(self, tmp_path: Path) -> None:
        encoder = self.encoder(tmp_path, max_length=512)
        contents = ("Question?", "Yes, 12.")
        sample = encode(encoder, *contents).sample
        whole = align_messages(
            chat(*contents), encoder.student.tokenizer, encoder.teacher.tokenizer
        )
        assert len(sample.student_ids_L) == -(-len(whole.ids_a) // BLOCK) * BLOCK
        np.testing.assert_array_equal(sample.teacher_ids_L, whole.ids_b)
        np.testing.assert_array_equal(sample.alignment_RX, whole.chunks[whole.in_response])

    @pytest.mark.parametrize("teacher_max_length", [40, 41, 42, 43, 44, 64])
    def test_chunks_that_were_cut_on_either_side_are_gone(
        self, teacher_max_length: int, tmp_path: Path
    ) -> None:
        encoder = self.encoder(tmp_path, max_length=48, teacher_max_length=teacher_max_length)
        encoded = encode(encoder, "Q?", LONG)
        whole = align_messages(
            chat("Q?", LONG), encoder.student.tokenizer, encoder.teacher.tokenizer
        )
        reply = whole.chunks[whole.in_response]
        kept = [c for c in reply.tolist() if c[1] <= 48 and c[3] <= teacher_max_length]
        assert 0 < len(kept) < len(reply)
        assert encoded.sample.alignment_RX.tolist() == kept
        assert len(encoded.sample.teacher_ids_L) == teacher_max_length
        assert encoded.counts["num_teacher_truncated"] == 1

    def test_no_chunk_left(self, tmp_path: Path) -> None:
        probe = self.encoder(tmp_path, max_length=512)
        for reply in ("Sure!", "한국어", "assistant", "naïve"):
            chunk = encode(probe, "Q?", reply).sample.alignment_RX[0].tolist()
            if chunk[3] - chunk[2] > 1:
                break
        else:
            pytest.fail("no reply begins with a chunk of several teacher tokens")
        limit = chunk[2] + 1
        encoder = self.encoder(tmp_path, max_length=512, teacher_max_length=limit)
        with pytest.raises(DataError) as caught:
            encode(encoder, "Q?", reply)
        assert caught.value.reason == "nothing_aligned"


class TestSides:
    def test_template_from_a_file_wins(self, tmp_path: Path) -> None:
        path = tmp_path / "chat.jinja"
        path.write_text(PLAIN_TAGS)
        config = _side_config(tmp_path, chat_template=str(path))
        student, teacher = load_sides(config)
        assert student.chat_template == teacher.chat_template == PLAIN_TAGS
        sample = encode(Encoder(config, student, teacher), "Q?", "A.").sample
        assert student.tokenizer.decode(sample.student_ids_L).startswith(
            "[user]Q?\n[assistant]A.\n"
        )

    def test_template_kwargs_reach_the_template(self, tmp_path: Path) -> None:
        template = "{{ greeting }}" + PLAIN_TAGS
        config = _side_config(
            tmp_path, chat_template=template, template_kwargs={"greeting": "Welcome!"}
        )
        sample = encode(Encoder(config, *load_sides(config)), "Q?", "A.").sample
        assert (
            _load(Path(config.student.tokenizer))
            .decode(sample.student_ids_L)
            .startswith("Welcome![user]")
        )

    def test_no_template(self, tmp_path: Path) -> None:
        config = _side_config(tmp_path)
        tokenizer = _load(tmp_path / "tokenizer")
        tokenizer.chat_template = None
        (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(ConfigError, match=r"student\.tokenizer: .* has no chat template") as e:
            load_sides(config)
        assert e.value.hint == "name one in student.chat_template"

    def test_no_eos(self, tmp_path: Path) -> None:
        config = _side_config(tmp_path)
        tokenizer = _load(tmp_path / "tokenizer")
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(ConfigError, match=r"student\.tokenizer: .* has no EOS token"):
            load_sides(config)


def _side_config(folder: Path, **student: Any) -> PrepareConfig:
    side = {"tokenizer": str(make_tokenizer(folder)), "max_length": 64, **student}
    values = {"sources": "x.jsonl", "student": side, "block_size": BLOCK}
    return parse_config(values, PrepareConfig, where="test")


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("contents", [("a <|mask|> b", "fine"), ("fine", "so <|mask|> it is")])
def test_a_mask_token_typed_in_the_text_drops_the_row(
    tmp_path: Path, contents: tuple[str, str]
) -> None:
    encoder = make_encoder(tmp_path, max_length=128)
    with pytest.raises(DataError, match="the clean text holds the mask token") as caught:
        encode(encoder, *contents)
    assert caught.value.reason == "mask_token_in_text"
