"""Two small tokenizers for the demo, real ones: built by `tokenizers`, saved and loaded like any.

The first has one token per character, 43 in all, and serves teacher and student of the
shared-tokenizer demo. The second has another template, other special tokens and 13 merges (`ab`,
`cd`, ... `yz`), and serves the teacher of the cross-tokenizer demo: enough that some chunks hold
two tokens, few enough that a small teacher still learns letters one by one.

Both are byte-level BPE, the family of Qwen and of most teachers (the space is `Ġ` inside), so that
what the project does with byte lengths and spans meets the real thing. A role token opens each
turn and the end token closes a reply, so `sort dbca` and its answer take 16 tokens.
"""

import string
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHARACTERS = (*string.ascii_lowercase, *string.digits, " ")
_LETTER_PAIRS = tuple(zip(string.ascii_lowercase[::2], string.ascii_lowercase[1::2], strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSpec:
    """What distinguishes the demo's tokenizers: special tokens and merges."""

    user: str
    assistant: str
    end: str
    mask: str
    pad: str = "<|pad|>"
    unknown: str = "<|unknown|>"
    merges: tuple[tuple[str, str], ...] = ()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens in the order of their ids, which begin at 0."""
        return (self.pad, self.end, self.mask, self.unknown, self.user, self.assistant)

    @property
    def chat_template(self) -> str:
        """The Jinja template: a role token before each turn, the end token after a reply."""
        return (
            "{%- for message in messages -%}"
            "{%- if message.role == 'user' -%}" + _put(self.user) + "{{- message.content -}}"
            "{%- elif message.role == 'assistant' -%}"
            + _put(self.assistant) + "{{- message.content -}}" + _put(self.end)
            + "{%- else -%}{{- raise_exception('the demo has no role ' + message.role) -}}"
            "{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}" + _put(self.assistant) + "{%- endif -%}"
        )  # fmt: skip


CHARACTERS = TokenizerSpec(
    user="<|user|>", assistant="<|assistant|>", end="<|end|>", mask="<|mask|>"
)
PAIRS = TokenizerSpec(
    user="<|question|>",
    assistant="<|answer|>",
    end="<|stop|>",
    mask="<|hidden|>",
    merges=_LETTER_PAIRS,
)


def build_tokenizer(spec: TokenizerSpec) -> PreTrainedTokenizerFast:
    """Build a tokenizer that encodes lower-case letters, digits and spaces, and chat.

    Anything else becomes the unknown token, one for each byte.
    """
    bytes_as_text = [_byte_level(character) for character in _CHARACTERS]
    merged = [first + second for first, second in spec.merges]
    entries = (*spec.special_tokens, *bytes_as_text, *merged)
    core = Tokenizer(
        models.BPE(
            vocab={text: token_id for token_id, text in enumerate(entries)},
            merges=list(spec.merges),
            unk_token=spec.unknown,
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=spec.pad,
        eos_token=spec.end,
        mask_token=spec.mask,
        unk_token=spec.unknown,
        additional_special_tokens=[spec.user, spec.assistant],
        chat_template=spec.chat_template,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(spec: TokenizerSpec, folder: Path) -> None:
    """Write the tokenizer to a folder that `AutoTokenizer.from_pretrained` loads."""
    build_tokenizer(spec).save_pretrained(folder)


def _put(text: str) -> str:
    return "{{- '" + text + "' -}}"


def _byte_level(character: str) -> str:
    """Return how byte-level BPE writes an ASCII character: itself, and `Ġ` for the space."""
    return "Ġ" if character == " " else character
