"""Text that every machine has: the Python standard library, as chats, and tokenizers for it.

Nothing is downloaded and nothing is shipped: sources and docstrings come from the interpreter that
runs, so figures differ a little between Python versions.
"""

import pkgutil
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Chat = dict[str, str]

_DOCSTRING_MODULES = ("json", "email", "logging", "unittest", "xml", "http", "importlib")
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages"})
_PROMPT_LINES, _REPLY_LINES = 3, 6
_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def docstring_chats() -> list[Chat]:
    """Collect (name, docstring) pairs of the standard library as prompts and replies."""
    rows = {}
    for package_name in (*_DOCSTRING_MODULES, "concurrent"):
        package = import_module(package_name)
        names = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package_name}.")]
        for name in [package_name, *names]:
            if "__main__" in name or ".test" in name:
                continue
            try:
                module = import_module(name)
            except ImportError:
                continue
            for label, value in sorted(vars(module).items()):
                text = getattr(value, "__doc__", None)
                if callable(value) and isinstance(text, str) and len(text) > 80:
                    prompt = f"What does {name}.{label} do?"
                    rows[prompt] = {"prompt": prompt, "response": text.strip()}
    return list(rows.values())


def source_chats() -> list[Chat]:
    """Cut the standard library's sources into chats: a few lines, and the lines that follow."""
    return [chat for path in _source_files() for chat in _cut(path)]


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> Path:
    """Train a byte-level BPE tokenizer and save it with its template; returns the folder."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|start|>", "<|end|>", "<|mask|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|start|>", mask_token="<|mask|>"
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def _source_files() -> Iterator[Path]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(folder).parts):
            yield path


def _cut(path: Path) -> Iterator[Chat]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        return
    step = _PROMPT_LINES + _REPLY_LINES
    for start in range(0, len(lines) - step + 1, step):
        prompt = "\n".join(lines[start : start + _PROMPT_LINES])
        reply = "\n".join(lines[start + _PROMPT_LINES : start + step])
        yield {"prompt": f"{path.name}\n{prompt}", "response": reply}
