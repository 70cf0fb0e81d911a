"""Our chunks beside those of the genuine tokenkit, where it is installed (extra `[tokenkit]`).

Genuine is the package of github.com/bminixhofer/tokenkit, known by its modules `align` and
`byteify`: its name on PyPI belongs to a package about fertility and parity, which has neither.
The genuine one was not at hand when this was written: the calls follow its public sources (keyword
arguments that all versions share), so the comparison has NEVER RUN against an installation of it.

Compared are the tokens of one content at a time, under its kind `GPT2`, whose only special token is
`<|endoftext|>`. Kinds with a template treat ordinary tokens ("user", a line feed) as markers and
drop chunks where a content has them, and whole renderings are located by searching their text.
"""

import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stage1_teacher.align import align_bytes, align_messages
from stage1_teacher.token_bytes import token_bytes
from tests.integration.test_align_real import OTHERS, SOURCES, conversations
from tests.small_tokenizers import CHATML, PLAIN_TAGS, byte_level

INSTALL = "pip install 'tide-cache[tokenkit]' (github.com/bminixhofer/tokenkit)"
KIND = "GPT2"
Chunks = list[tuple[int, ...]]


def reason_to_skip(path: list[str] | None = None) -> str | None:
    """Say why the comparison cannot run, or None; looks at files and imports nothing."""
    spec = PathFinder.find_spec("tokenkit", path)
    if spec is None:
        return f"tokenkit is not installed: {INSTALL}"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if all(any((f / f"{name}.py").is_file() for f in folders) for name in ("align", "byteify")):
        return None
    found = metadata.distributions(name="tokenkit", path=sys.path if path is None else path)
    about = next((f" ({dist.metadata['Summary']})" for dist in found), "")
    return (
        f"the tokenkit at {spec.origin} is another package of that name{about}, as PyPI has it: "
        f"pip uninstall tokenkit, then {INSTALL}"
    )


@pytest.fixture(scope="session")
def genuine() -> None:
    """Skip unless the genuine tokenkit is there. One that is there but broken fails."""
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)


@cache
def byteified(folder: Path) -> Any:
    return import_module("tokenkit.byteify").load_byteify_tokenizer(f"{folder}:source={KIND}")


def their_chunks(ids_a: list[int], ids_b: list[int], folder_a: Path, folder_b: Path) -> Chunks:
    """Align two token lists of one text by tokenkit, which may change the lists it is given."""
    tokenizer_a, tokenizer_b = byteified(folder_a), byteified(folder_b)
    chunks, *_ = import_module("tokenkit.align").get_alignment_indices(
        tokens_teacher=tokenizer_a.convert_ids_to_tokens(ids_a),
        tokens_student=tokenizer_b.convert_ids_to_tokens(ids_b),
        tokenizer_teacher=tokenizer_a,
        tokenizer_student=tokenizer_b,
        attention_mask_teacher=np.ones(len(ids_a), dtype=bool),
        attention_mask_student=np.ones(len(ids_b), dtype=bool),
    )
    return [tuple(int(bound) for bound in chunk) for chunk in chunks]


def check_text(text: str, folder_a: Path, folder_b: Path) -> int:
    """Compare `align_bytes` on one text; return how many chunks it has."""
    ids, lengths = [], []
    for folder in (folder_a, folder_b):
        tokenizer = load(folder)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        lengths.append(np.diff(token_bytes(tokenizer).bounds(ids[-1], text.encode())))
    ours = [tuple(chunk) for chunk in align_bytes(*lengths).tolist()]
    assert ours == their_chunks(ids[0], ids[1], folder_a, folder_b), text
    return len(ours)


def check_conversation(messages: list[dict[str, str]], folder_a: Path, folder_b: Path) -> int:
    """Compare `align_messages` on each content; return how many chunks they have."""
    alignment = align_messages(messages, load(folder_a), load(folder_b))
    num_chunks = 0
    for span in alignment.chat_a.messages:
        start_L = alignment.chat_a.bounds_M[alignment.chunks[:, 0]]
        inside = (start_L >= span.byte_start) & (start_L < span.byte_end)
        if not inside.any():
            continue  # the content has no token of its own on one of the sides
        chunks_C4 = alignment.chunks[inside]
        (a0, _, b0, _), (_, a1, _, b1) = chunks_C4[0].tolist(), chunks_C4[-1].tolist()
        ids_a, ids_b = alignment.ids_a[a0:a1].tolist(), alignment.ids_b[b0:b1].tolist()
        ours = [tuple(chunk) for chunk in (chunks_C4 - [a0, a0, b0, b0]).tolist()]
        assert ours == their_chunks(ids_a, ids_b, folder_a, folder_b), messages
        num_chunks += len(ours)
    return num_chunks


@cache
def load(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def small_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folders = (tmp_path_factory.mktemp("coarse"), tmp_path_factory.mktemp("fine"))
    byte_level(CHATML, 420).save_pretrained(folders[0])
    byte_level(PLAIN_TAGS, 300).save_pretrained(folders[1])
    return folders


contents = st.text(st.characters(codec="utf-8", exclude_categories=["Co", "Cc"]), min_size=1).map(
    lambda text: unicodedata.normalize("NFC", text)
)
likely = st.lists(
    st.sampled_from(["The answer", " is 12", ".\n\n", "user", "한국어", "🙂", " café", "  x"]),
    min_size=1,
).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=contents | likely)
def test_generated_texts(genuine: None, small_folders: tuple[Path, Path], text: str) -> None:
    assert check_text(text, *small_folders) > 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(question=likely, answer=likely | contents)
def test_generated_conversations(
    genuine: None, small_folders: tuple[Path, Path], question: str, answer: str
) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    check_conversation(messages, *small_folders)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("source", list(SOURCES))
def test_real_conversations(genuine: None, shared_dir: Path, source: str, other: str) -> None:
    folders = (shared_dir / "tokenizers/qwen3", shared_dir / "tokenizers" / other)
    some = conversations(source, shared_dir / "data")[:40]
    assert sum(check_conversation(messages, *folders) for messages in some) > len(some)


def write_package(folder: Path, names: Sequence[str], summary: str) -> list[str]:
    (folder / "tokenkit").mkdir()
    for name in names:
        # An import would end the test: telling them apart must not run them.
        (folder / f"tokenkit/{name}.py").write_text("raise SystemExit\n")
    about = folder / "tokenkit-0.1.3.dist-info"
    about.mkdir()
    text = f"Metadata-Version: 2.4\nName: tokenkit\nVersion: 0.1.3\nSummary: {summary}\n"
    (about / "METADATA").write_text(text)
    return [str(folder)]


def test_nothing_installed_names_the_extra(tmp_path: Path) -> None:
    reason = reason_to_skip([str(tmp_path)])
    assert reason is not None
    assert reason.startswith("tokenkit is not installed: pip install 'tide-cache[tokenkit]'")


def test_the_package_of_pypi_is_not_taken_for_it(tmp_path: Path) -> None:
    """The files of tokenkit 0.1.3 on PyPI."""
    path = write_package(tmp_path, ["__init__", "tokenkit"], "Calculate fertility and parity")
    reason = reason_to_skip(path)
    assert reason is not None
    assert "is another package of that name (Calculate fertility and parity)" in reason
    assert "pip uninstall tokenkit, then pip install 'tide-cache[tokenkit]'" in reason


def test_the_genuine_one_is_known_by_its_modules(tmp_path: Path) -> None:
    path = write_package(tmp_path, ["__init__", "align", "byteify"], "Tokenization transfer")
    assert reason_to_skip(path) is None
