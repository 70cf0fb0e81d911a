"""Loading tokenizers, the hash that names them, and what two of them share."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stage1_teacher.tokenizers import (
    load_tokenizer,
    num_ids,
    read_chat_template,
    shared_vocab_size,
    tokenizer_facts,
)
from tests.builders import make_tokenizer
from tests.small_tokenizers import CHATML, PLAIN_TAGS, byte_level, letters, lower_casing
from tide_cache.errors import ConfigError


class TestLoad:
    def test_loads_what_was_saved(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(str(make_tokenizer(tmp_path)))
        assert tokenizer.is_fast
        assert tokenizer.chat_template == CHATML
        assert tokenizer.decode(tokenizer("Hello 🙂")["input_ids"]) == "Hello 🙂"

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot load it") as caught:
            load_tokenizer(str(tmp_path / "nowhere"))
        assert "nowhere" in caught.value.message
        assert "tokenizer.json" in str(caught.value.hint)

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot load it"):
            load_tokenizer(str(tmp_path))

    def test_slow_tokenizer_is_refused(self, tmp_path: Path) -> None:
        ByT5Tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(str(tmp_path))
        assert "expected a fast tokenizer (tokenizer.json), got the slow ByT5Tokenizer" in str(
            caught.value
        )
        assert "use_fast=True" in str(caught.value.hint)

    def test_remote_code_never_runs(self, tmp_path: Path) -> None:
        folder = make_tokenizer(tmp_path)
        trace = tmp_path / "code-ran"
        (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        config["tokenizer_class"] = "Evil"
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        try:
            assert load_tokenizer(str(folder)).is_fast
        except ConfigError as error:
            assert "cannot load it" in error.message
        assert not trace.exists()


class TestFacts:
    def test_templates_have_no_part_in_the_hash(self) -> None:
        a = tokenizer_facts(byte_level(CHATML), "a")
        b = tokenizer_facts(byte_level(PLAIN_TAGS), "b")
        assert (a.sha256, a.vocab_size) == (b.sha256, b.vocab_size)

    def test_what_decides_ids_has(self) -> None:
        plain = byte_level(CHATML)
        more_tokens = byte_level(CHATML)
        more_tokens.add_tokens(["<tool>"])
        others = [byte_level(CHATML, 400), lower_casing(CHATML), more_tokens]
        hashes = {tokenizer_facts(other, "x").sha256 for other in [plain, *others]}
        assert len(hashes) == 4

    def test_a_mask_token_gained_later_has_no_part(self) -> None:
        without, with_mask = byte_level(CHATML), byte_level(CHATML)
        with_mask.add_special_tokens({"mask_token": "<|later|>"})
        a, b = tokenizer_facts(without, "x"), tokenizer_facts(with_mask, "x")
        assert a.sha256 == b.sha256
        assert a.mask_token_id is None
        assert b.mask_token_id == b.vocab_size - 1 == a.vocab_size

    def test_control_ids(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(str(make_tokenizer(tmp_path)))
        facts = tokenizer_facts(tokenizer, "small")
        assert facts.name == "small"
        assert facts.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert facts.mask_token_id == tokenizer.convert_tokens_to_ids("<|mask|>")
        assert facts.pad_token_id == tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert facts.vocab_size == len(tokenizer)

    def test_ids_left_out_count(self) -> None:
        backend = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        assert (len(tokenizer), num_ids(tokenizer)) == (2, 8)

    def test_real_qwen3(self, shared_dir: Path) -> None:
        facts = tokenizer_facts(load_tokenizer(str(shared_dir / "tokenizers" / "qwen3")), "qwen3")
        assert facts.eos_token_id == 151645
        assert facts.pad_token_id == 151643
        assert (facts.mask_token_id, facts.vocab_size) == (151669, 151670)


class TestSharedVocabulary:
    def test_identical(self) -> None:
        a = byte_level(CHATML)
        assert shared_vocab_size(a, byte_level(PLAIN_TAGS)) == len(a)

    def test_control_tokens_at_the_end_differ(self) -> None:
        a, b = byte_level(CHATML), byte_level(CHATML)
        num_before = len(a)
        a.add_tokens(["<x>", "<y>"])
        b.add_tokens(["<z>", "<y>", "<w>"])
        assert shared_vocab_size(a, b) == shared_vocab_size(b, a) == num_before

    def test_one_is_a_prefix_of_the_other(self) -> None:
        a, b = byte_level(CHATML), byte_level(CHATML)
        b.add_tokens(["<x>"])
        assert shared_vocab_size(a, b) == len(a)

    def test_nothing(self) -> None:
        assert shared_vocab_size(letters("abc", CHATML), byte_level(CHATML)) == 0


class TestChatTemplate:
    def test_text_or_file(self, tmp_path: Path) -> None:
        path = tmp_path / "chat.jinja"
        path.write_text(PLAIN_TAGS, encoding="utf-8")
        assert read_chat_template(str(path)) == read_chat_template(PLAIN_TAGS) == PLAIN_TAGS

    def test_neither(self) -> None:
        with pytest.raises(ConfigError, match=r"chat_template: .*'no/such\.jinja'.*No such file"):
            read_chat_template("no/such.jinja")
