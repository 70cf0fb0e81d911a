"""The fast sampler against the plain reference, and what it does and does not do on the way.

The model is tiny and random, so tokens vary and most of a tie is luck; 200 prompts of 1 to 60
tokens in ragged batches, half of which stop early.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3ForCausalLM

from stage2_student.sampler import DenoisingStep, Generation, GenerationSettings, Sampler
from stage2_student.sampling.blocks import BlockOrigin, first_block_start, staircase_mask
from stage2_student.sampling.forward import spans_of
from stage2_student.sampling.graphs import call_again
from stage2_student.sampling.kv_cache import BlockCache
from stage2_student.sampling.layout import lay_out
from stage2_student.sampling.reference import generate_reference
from tests.sampling_models import EOS, MASK, random_prompts, tiny_model
from tide_cache.errors import ConfigError, DataError

LENGTHS = torch.randint(1, 61, (200,), generator=torch.Generator().manual_seed(7)).tolist()
SETTINGS: dict[str, dict[str, Any]] = {
    "one token a forward": {"max_new_tokens": 24, "block_size": 8},
    "a short last block": {"max_new_tokens": 19, "block_size": 8},
    "few steps": {"max_new_tokens": 24, "block_size": 8, "num_steps": 7},
    "one step a block": {"max_new_tokens": 20, "block_size": 4, "num_steps": 5},
    "published block size": {"max_new_tokens": 40, "num_steps": 13},
    "training's blocks": {
        "max_new_tokens": 21,
        "block_size": 8,
        "num_steps": 12,
        "block_origin": "sequence_start",
    },
    "threshold": {"max_new_tokens": 24, "block_size": 8, "threshold": 0.3},
    "threshold, training's blocks": {
        "max_new_tokens": 21,
        "block_size": 8,
        "threshold": 0.3,
        "block_origin": "sequence_start",
    },
    "guidance": {"max_new_tokens": 16, "block_size": 8, "cfg_scale": 1.5, "num_steps": 8},
    "guidance, training's blocks": {
        "max_new_tokens": 13,
        "block_size": 8,
        "cfg_scale": 0.5,
        "num_steps": 8,
        "block_origin": "sequence_start",
    },
    "temperature": {"max_new_tokens": 16, "block_size": 8, "temperature": 1.3, "seed": 3},
    "everything": {
        "max_new_tokens": 13,
        "block_size": 8,
        "threshold": 0.2,
        "temperature": 0.7,
        "cfg_scale": 1.0,
        "block_origin": "sequence_start",
    },
}


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model()


def _sampler(model: Qwen3ForCausalLM, settings: dict[str, Any], **others: Any) -> Sampler:
    return Sampler(
        model,
        **({"mask_token_id": MASK, "eos_token_id": EOS} | others),
        settings=GenerationSettings(**settings),
    )


def _reference(
    model: Qwen3ForCausalLM, prompts: list[list[int]], settings: dict[str, Any], eos: int = EOS
) -> list[list[int]]:
    return generate_reference(
        model,
        prompts,
        mask_token_id=MASK,
        eos_token_id=eos,
        settings=GenerationSettings(**settings),
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_reference_on_200_prompts(model: Qwen3ForCausalLM, name: str) -> None:
    prompts = random_prompts(LENGTHS)
    expected = _reference(model, prompts, SETTINGS[name])
    found = _sampler(model, SETTINGS[name]).generate(prompts, batch_size=23)
    assert [answer.ids for answer in found] == expected
    assert len({len(ids) for ids in expected}) > 1  # some stopped early, others did not
    assert len({tuple(ids) for ids in expected}) > 150


@pytest.mark.parametrize("batch_size", [1, 200])
def test_the_company_in_a_batch_does_not_matter(model: Qwen3ForCausalLM, batch_size: int) -> None:
    prompts = random_prompts(LENGTHS)
    settings = SETTINGS["training's blocks"] | {"temperature": 0.9}
    found = _sampler(model, settings).generate(prompts, batch_size=batch_size)
    assert [answer.ids for answer in found] == _reference(model, prompts, settings)


def test_a_prompt_may_hold_the_mask_token_and_eos(model: Qwen3ForCausalLM) -> None:
    # Not masks alone: positions that differ in nothing are tied, and rounding decides.
    prompts = [[MASK, 3, EOS, MASK], [7, MASK, EOS, 2, MASK, MASK], [EOS]]
    for name in ("one token a forward", "training's blocks", "guidance"):
        found = _sampler(model, SETTINGS[name]).generate(prompts)
        assert [answer.ids for answer in found] == _reference(model, prompts, SETTINGS[name])


def test_a_committed_mask_token_stays_a_mask(model: Qwen3ForCausalLM) -> None:
    prompts = random_prompts((9, 13, 2))
    settings = SETTINGS["one token a forward"]
    favourite = max(_reference(model, prompts, settings)[0])
    for changed in ({}, {"threshold": 0.05}):
        found = _sampler(model, settings | changed, mask_token_id=favourite).generate(prompts)
        expected = generate_reference(
            model,
            prompts,
            mask_token_id=favourite,
            eos_token_id=EOS,
            settings=GenerationSettings(**settings, **changed),
        )
        assert [answer.ids for answer in found] == expected
        assert favourite in expected[0]


class _Counted:
    """Counts forwards, rows and positions of the transformer while it is open."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.num_head_rows = 0
        self._hooks = [
            model.model.register_forward_pre_hook(self._body, with_kwargs=True),
            model.lm_head.register_forward_pre_hook(self._head),
        ]

    def _body(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def _head(self, module: Any, args: tuple[torch.Tensor]) -> None:
        self.num_head_rows += args[0].shape[:-1].numel()

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def test_a_block_costs_its_steps_and_no_forward_more(model: Qwen3ForCausalLM) -> None:
    settings = {"max_new_tokens": 24, "block_size": 8, "num_steps": 12}
    (prompt,) = random_prompts((13,))
    with _Counted(model) as counted:
        (answer,) = _sampler(model, settings, eos_token_id=None).generate([prompt])
    # The prompt with the first block, each finished block with the next, else the block alone.
    first, fused, plain = (1, 13 + 8), (1, 16), (1, 8)
    assert counted.shapes == [first, *[plain] * 3, fused, *[plain] * 3, fused, *[plain] * 3]
    assert (answer.num_forwards, answer.num_positions) == (12, 21 + 2 * 16 + 9 * 8)
    # The head is asked about masks alone: 8, 6, 4, 2 of each block.
    assert counted.num_head_rows == 3 * (8 + 6 + 4 + 2)


@pytest.mark.parametrize("name", ["few steps", "threshold", "guidance", "training's blocks"])
def test_costs_are_those_of_the_forwards_that_were_run(model: Qwen3ForCausalLM, name: str) -> None:
    prompts = random_prompts([16] * 40)  # of one length, at a block's end: no padding anywhere
    with _Counted(model) as counted:
        found = _sampler(model, SETTINGS[name]).generate(prompts, batch_size=40)
    computed = sum(rows * positions for rows, positions in counted.shapes)
    assert sum(answer.num_positions for answer in found) == computed
    assert max(answer.num_forwards for answer in found) <= len(counted.shapes)
    rows = [rows for rows, _ in counted.shapes]
    assert rows[0] > rows[-1]  # those that stopped are not computed any more


def test_costs_do_not_depend_on_the_company(model: Qwen3ForCausalLM) -> None:
    prompts = random_prompts(LENGTHS[:30])
    sampler = _sampler(model, SETTINGS["training's blocks"])
    assert sampler.generate(prompts, batch_size=30) == sampler.generate(prompts, batch_size=1)


class _KeyReaders(TorchDispatchMode):
    """Records which operations take a tensor in a cache's buffers, and what they write."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self.readers: set[str] = set()
        self.written: list[tuple[int, int]] = []  # storage, elements

    def watch(self, cache: BlockCache) -> None:
        self.storages |= {t.untyped_storage().data_ptr() for t in (*cache.keys, *cache.values)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inside = [self._is_inside(argument) for argument in args]
        if any(inside) and not func.is_view:
            self.readers.add(func.overloadpacket.__name__)
            if func.overloadpacket.__name__ == "copy_":
                assert inside == [True, False]  # written, never read
                self.written.append((args[0].untyped_storage().data_ptr(), args[0].numel()))
        return func(*args, **(kwargs or {}))

    def _is_inside(self, argument: Any) -> bool:
        tensors = argument if isinstance(argument, list | tuple) else [argument]
        return any(
            isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in self.storages
            for t in tensors
        )


@pytest.mark.parametrize("lengths", [[13], LENGTHS[:20]])
def test_keys_are_written_in_place_and_never_copied(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    watch = _KeyReaders()
    caches: list[BlockCache] = []
    whole = BlockCache.__init__

    def watched(cache: BlockCache, *args: Any, **kwargs: Any) -> None:
        whole(cache, *args, **kwargs)
        caches.append(cache)
        watch.watch(cache)

    monkeypatch.setattr(BlockCache, "__init__", watched)
    with _Counted(model) as counted, watch:
        _sampler(model, SETTINGS["few steps"]).generate(random_prompts(lengths))
    (cache,) = caches
    assert {t.untyped_storage().data_ptr() for t in (*cache.keys, *cache.values)} == watch.storages
    assert len(watch.storages) == 4  # keys and values of two layers, one buffer each
    # Attention reads views of the buffers; new keys are copied into their slots. Nothing else.
    (attention,) = watch.readers - {"copy_"}
    assert attention.startswith("_scaled_dot_product")
    # What is written is what was computed: nothing is shifted, compacted or appended again.
    num_layers, width = 2, cache.keys[0].shape[1] * cache.keys[0].shape[3]
    num_elements = sum(size for _, size in watch.written)
    num_computed = sum(rows * positions for rows, positions in counted.shapes)
    assert num_elements == 2 * num_layers * width * num_computed


def test_draws_depend_on_seed_and_number_alone(model: Qwen3ForCausalLM) -> None:
    prompts = random_prompts((9, 9, 30, 2))
    settings = SETTINGS["temperature"] | {"max_new_tokens": 8}
    whole = _sampler(model, settings).generate(prompts)
    part = _sampler(model, settings).generate(
        [prompts[2], prompts[1]], prompt_numbers=[2, 1], batch_size=1
    )
    assert [part[1].ids, part[0].ids] == [whole[1].ids, whole[2].ids]
    twice = _sampler(model, settings).generate([prompts[0], prompts[0]])
    assert twice[0].ids == whole[0].ids != twice[1].ids  # the same prompt, another number
    other = _sampler(model, settings | {"seed": 4}).generate(prompts)
    assert other[0].ids != whole[0].ids


def test_a_lower_threshold_takes_fewer_forwards(model: Qwen3ForCausalLM) -> None:
    prompts = random_prompts(LENGTHS[:50])
    settings = {"max_new_tokens": 24, "block_size": 8}

    def run(**changed: Any) -> list[Generation]:
        return _sampler(model, settings | changed, eos_token_id=None).generate(prompts)

    one_a_forward = run()
    for answer in one_a_forward:
        assert answer.num_forwards == 24
    assert [a.ids for a in run(threshold=1.0)] == [a.ids for a in one_a_forward]
    forwards = [sum(a.num_forwards for a in run(threshold=t)) for t in (1.0, 0.6, 0.3, 0.0)]
    assert forwards == sorted(forwards, reverse=True)
    assert forwards[0] == 24 * 50
    # Every mask is above 0: one forward a block, and one more where the mask token itself won.
    assert 3 * 50 <= forwards[-1] < 3 * 50 + 10


def test_watching_sees_masks_become_tokens(model: Qwen3ForCausalLM) -> None:
    prompts = random_prompts((9, 14, 30))
    seen: dict[int, list[DenoisingStep]] = {0: [], 1: [], 2: []}
    found = _sampler(model, SETTINGS["training's blocks"]).generate(
        prompts, on_step=lambda step: seen[step.prompt_index].append(step)
    )
    for index, steps in seen.items():
        assert len(steps) == found[index].num_forwards
        assert steps[-1].ids == found[index].ids
        assert steps[-1].is_block_finished
        for before, after in pairwise(steps):
            assert before.is_block_finished == (after.block_start > before.block_start)
            kept = before.ids[: after.block_start]
            assert after.ids[: len(kept)] == kept
            if not before.is_block_finished:
                assert before.ids.count(MASK) > after.ids.count(MASK)


@pytest.mark.parametrize("name", SETTINGS)
def test_static_steps_give_the_same_tokens(model: Qwen3ForCausalLM, name: str) -> None:
    """What a GPU captures is called again here: buffers, masks and slots are on trial."""
    prompts = random_prompts(LENGTHS[:60])
    sampler = _sampler(model, SETTINGS[name], capture=call_again)
    found = sampler.generate(prompts, batch_size=20)
    assert [answer.ids for answer in found] == _reference(model, prompts, SETTINGS[name])


def test_a_shape_is_captured_once_and_kept_for_later_batches(model: Qwen3ForCausalLM) -> None:
    captured: list[Callable[[], None]] = []
    num_replays = 0

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        captured.append(step)

        def replay() -> None:
            nonlocal num_replays
            num_replays += 1
            step()

        return replay

    settings = {"max_new_tokens": 24, "block_size": 8}
    sampler = _sampler(model, settings, eos_token_id=None, capture=capture)
    prompts = random_prompts((120, 13, 45, 90))
    found = sampler.generate(prompts, batch_size=1)
    # By length: 128 slots hold the first three, which share two graphs. The last needs 256: steps
    # of its first block end at slot 128, those of the other two, fused or not, behind it.
    assert len(captured) == 2 + 3
    assert num_replays == 4 * 23  # all forwards but the prompt's
    expected = generate_reference(
        model,
        prompts,
        mask_token_id=MASK,
        eos_token_id=None,
        settings=GenerationSettings(**settings),
    )
    assert [answer.ids for answer in found] == expected


def test_eager_attention_will_do_and_comes_back(model: Qwen3ForCausalLM) -> None:
    eager = tiny_model("eager").train()
    prompts = random_prompts((5, 9))
    found = _sampler(eager, SETTINGS["few steps"]).generate(prompts)
    assert [a.ids for a in found] == _reference(model, prompts, SETTINGS["few steps"])
    assert eager.config._attn_implementation == "eager"
    assert eager.training


def test_text_ids_end_before_eos(model: Qwen3ForCausalLM) -> None:
    found = _sampler(model, SETTINGS["one token a forward"]).generate(random_prompts(LENGTHS))
    stopped = [answer for answer in found if answer.is_stopped]
    assert 50 < len(stopped) < 150
    for answer in stopped:
        assert answer.ids[: len(answer.text_ids) + 1] == [*answer.text_ids, EOS]
    assert all(answer.text_ids == answer.ids for answer in found if not answer.is_stopped)


def test_no_prompts_no_answers(model: Qwen3ForCausalLM) -> None:
    assert _sampler(model, SETTINGS["few steps"]).generate([]) == []


def test_what_cannot_be_followed_is_named(model: Qwen3ForCausalLM) -> None:
    sampler = _sampler(model, SETTINGS["few steps"])
    with pytest.raises(DataError, match=r"prompts\[1\]: expected at least one token, got none"):
        sampler.generate([[1], []])
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, got 0"):
        sampler.generate([[1]], batch_size=0)
    with pytest.raises(ConfigError, match="prompt_numbers: expected 1, one a prompt, got 2"):
        sampler.generate([[1]], prompt_numbers=[4, 5])
    long = _sampler(model, SETTINGS["few steps"] | {"max_new_tokens": 500})
    with pytest.raises(DataError, match=r"prompts\[1\]: 30 tokens and 500 new ones"):
        long.generate([[1], [2] * 30])


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    origin=st.sampled_from(["prompt_end", "sequence_start"]),
    block_size=st.integers(1, 9),
    max_new_tokens=st.integers(1, 20),
)
def test_layout_is_the_staircase_of_each_row(
    lengths: list[int], origin: BlockOrigin, block_size: int, max_new_tokens: int
) -> None:
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, block_size=block_size, block_origin=origin
    )
    layout = lay_out(lengths, settings)
    rows = range(len(lengths))
    end = layout.num_slots
    visible = layout.visible(rows, 0, end, width=end)
    for row, length in enumerate(lengths):
        place = layout.rows[row]
        first = first_block_start(length, block_size, origin)
        assert place.prompt_start + first == layout.first_block
        own = slice(place.prompt_start, place.end)
        staircase = staircase_mask(length + max_new_tokens, block_size, -first % block_size)
        seen = torch.zeros(end, end, dtype=torch.bool)
        seen[:, layout.first_slot(rows) :] = visible[row]
        assert torch.equal(seen[own, own], staircase)
        seen[own, own] = False
        assert not seen[own].any()  # nothing outside the row
        for block, (start, last) in enumerate(place.blocks):
            assert layout.block_start(block) <= start < last
            assert last <= layout.block_start(block) + block_size


def test_rows_as_spans() -> None:
    assert spans_of([0, 1, 2]) == ((0, 3),)
    assert spans_of([1, 4, 5, 7]) == ((1, 2), (4, 6), (7, 8))
    assert spans_of([]) == ()
