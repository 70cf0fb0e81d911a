"""Tokenizers small enough to train inside a test, and chat templates with known habits.

`EXPECTED_TEXT` says in Python what each template does to a conversation, piece by piece, so that
tests know the spans without asking the code under test.
"""

from collections.abc import Callable, Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|mask|>"]
_CORPUS = [
    "The answer is 1. The answer is 12.\n\nuser\nassistant\nsystem\n",
    "assistant\n\nSure!\n\n1 + 1 = 2\r\nYes.\r\n",
    "naïve café Ångström \u1112\u1161\u11ab 한국어 日本語 日本 🙂🙂 👩‍👩‍👧 🙃",
    "def f(x):\n    return x\n\n\n    # user assistant\n",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")
PLAIN_TAGS = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# What Qwen3 does with think blocks: every reply but the last loses its own; the last one gets an
# empty one if it has none; line feeds in front of an answer go.
THINKING = """
{%- set seen = namespace(last_user=-1) -%}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}{%- set seen.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\n' -}}
    {%- if m.role != 'assistant' -%}
        {{- m.content -}}
    {%- else -%}
        {%- set thought, answer = '', m.content -%}
        {%- if '</think>' in m.content -%}
            {%- set head = m.content.split('</think>')[0].rstrip('\n') -%}
            {%- set thought = head.split('<think>')[-1].lstrip('\n') -%}
            {%- set answer = m.content.split('</think>')[-1].lstrip('\n') -%}
        {%- endif -%}
        {%- if loop.last or (thought and loop.index0 > seen.last_user) -%}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer.lstrip('\n') -}}
        {%- else -%}
            {{- answer -}}
        {%- endif -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
"""

Pieces = list[tuple[str, str, str]]
Turns = Sequence[tuple[str, str]]


def _chatml(turns: Turns) -> Pieces:
    return [(f"<|im_start|>{role}\n", text, "<|im_end|>\n") for role, text in turns]


def _trimming(turns: Turns) -> Pieces:
    return [(before, text.strip(), after) for before, text, after in _chatml(turns)]


def _plain_tags(turns: Turns) -> Pieces:
    return [(f"[{role}]", text, "\n") for role, text in turns]


def _thinking(turns: Turns) -> Pieces:
    pieces = _chatml(turns)
    before, text, after = pieces[-1]
    pieces[-1] = (before + "<think>\n\n</think>\n\n", text.lstrip("\n"), after)
    return pieces


EXPECTED_TEXT: dict[str, Callable[[Turns], Pieces]] = {
    CHATML: _chatml,
    TRIMMING: _trimming,
    PLAIN_TAGS: _plain_tags,
    THINKING: _thinking,
}


def byte_level(
    template: str, vocab_size: int = 420, *, nfc: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries with control tokens and a chat template."""
    return _wrap(_train_byte_level(vocab_size, nfc), template)


def meta_space(template: str, *, prepend: str = "first") -> PreTrainedTokenizerFast:
    """A sentencepiece-like BPE: `▁` for spaces, an invented leading space, byte fallback."""
    letters = {letter for text in _CORPUS[:1] for letter in text if letter.isascii()}
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted((letters - {" "}) | {"\u2581"})
    pieces += ["\u2581T", "\u2581Th", "\u2581The", "\u2581\u2581"]
    merges = [("\u2581", "T"), ("\u2581T", "h"), ("\u2581Th", "e"), ("\u2581", "\u2581")]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(CONTROL_TOKENS)
    return _wrap(tokenizer, template)


def letters(alphabet: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per character and nothing else."""
    vocab = {letter: index for index, letter in enumerate(["<unk>", *sorted(set(alphabet))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(CONTROL_TOKENS)
    return _wrap(tokenizer, template)


def lower_casing(template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose normaliser rewrites the text."""
    tokenizer = Tokenizer.from_str(_train_byte_level(420, False).to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    return _wrap(tokenizer, template)


@cache
def _train_byte_level(vocab_size: int, nfc: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 3, trainer)
    return tokenizer


def _wrap(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template
    )
