"""The proof, once per engine, that its attention is the layout's.

Another kernel or release of vLLM might ignore that attention is not causal, or hand out pages of
another prompt, in silence. So a few short prompts are asked when an engine is loaded: a change that
a position may see must move its answer, one that it may not see must leave it (to 1% of the other:
batches of other shapes round differently).
"""

import dataclasses

import numpy as np

from stage1_teacher.teachers.base import FloatArray, ScoreSpec
from stage1_teacher.teachers.layouts import Layout, LayoutSpec
from stage1_teacher.teachers.vllm_engine import Engine
from stage1_teacher.teachers.vllm_prompts import Prompt
from tide_cache.errors import CompatibilityError

_NUM_OTHER_IDS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A prompt read at `row`, what may be changed to move the answer, and what may not."""

    ids: tuple[int, ...]
    row: int
    seen: tuple[tuple[int, ...], ...]
    unseen: tuple[tuple[int, ...], ...]


def plan_probes(layout: LayoutSpec, vocab_size: int, max_tokens: int) -> list[Probe]:
    """Choose prompts that tell the layout from others; a pure function."""
    others = sorted({vocab_size * n // (_NUM_OTHER_IDS + 1) for n in range(1, _NUM_OTHER_IDS + 1)})
    others = [other for other in others if other not in (0, layout.mask_token_id)]
    if layout.layout is Layout.OBSERVED_FIRST:
        masked = vocab_size
        # A mask sees the observed token behind it, and no later mask.
        behind = tuple((masked, other) for other in others)
        return [Probe(ids=(masked, 0), row=0, seen=behind, unseen=((masked, 0, masked),))]
    block = layout.block_size if layout.layout.has_blocks else max_tokens
    ahead = min(block, 4) - 1
    probes = []
    if ahead:
        plain = (0,) * (ahead + 1)
        seen = tuple((*plain[:-1], other) for other in others)
        probes.append(Probe(ids=plain, row=0, seen=seen, unseen=()))
    if block < max_tokens:
        plain = (0,) * (block + 1)
        within = tuple((*plain[: block - 1], other, 0) for other in others)
        beyond = tuple((*plain[:block], other) for other in others)
        probes.append(Probe(ids=plain, row=block - 1, seen=within, unseen=beyond))
        back = tuple((other, *plain[1:]) for other in others)
        probes.append(Probe(ids=plain, row=block, seen=back, unseen=()))
    return probes


def check_layout_is_obeyed(engine: Engine, layout: LayoutSpec, vocab_size: int) -> None:
    """Ask all probes in one call. Raises CompatibilityError where an answer is not the layout's."""
    probes = plan_probes(layout, vocab_size, engine.max_prompt_tokens)
    spec = ScoreSpec(k=min(16, vocab_size), temperatures=(1.0,), vocab_size=vocab_size)
    asked = [(ids, p.row) for p in probes for ids in (p.ids, *p.seen, *p.unseen)]
    prompts = [
        Prompt(
            request_index=index,
            stream_index=0,
            start=0,
            ids_N=np.array(ids, np.int32),
            rows_P=np.array([row]),
        )
        for index, (ids, row) in enumerate(asked)
    ]
    answers = iter(engine.answer(prompts, [np.zeros(1, np.int64)] * len(prompts), spec))
    for probe in probes:
        plain = _values(next(answers), spec)
        seen = [_change(plain, _values(next(answers), spec)) for _ in probe.seen]
        unseen = [_change(plain, _values(next(answers), spec)) for _ in probe.unseen]
        moved = max(seen, default=0.0)
        if not np.isfinite([*plain, *seen, *unseen]).all():
            return  # broken weights: scoring names the request that meets them
        if moved == 0 or max(unseen, default=0.0) > 1e-2 * moved:
            import vllm

            raise CompatibilityError(
                f"vllm {vllm.__version__}: its attention does not obey layout "
                f"{layout.layout}: position {probe.row} of {len(probe.ids)} moved by {moved:.2g} "
                f"with what it sees and by {max(unseen, default=0.0):.2g} with what it does not",
                hint="set teacher.backend: hf, or install vllm 0.32 and its default attention",
            )


def _values(rows_PC: FloatArray, spec: ScoreSpec) -> FloatArray:
    """Return what moves with the logits: candidates' logits, logsumexp, label's log-prob."""
    row_C = rows_PC[0]
    values: FloatArray = np.concatenate([row_C[: spec.k], row_C[2 * spec.k : -1]])
    if row_C[-1] < 0.5:
        return np.full_like(values, np.nan)
    return values


def _change(plain: FloatArray, other: FloatArray) -> float:
    return float(np.abs(plain - other).max())
