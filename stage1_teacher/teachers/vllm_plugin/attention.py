"""Attention block by block, as causal-free attention of more, shorter requests.

vLLM's kernels take, per request, a run of queries and how many keys they may see, all of them when
not causal. A block's queries see everything up to the block's end: so a request of n tokens is
handed over as n / B requests that share its pages, the first with B keys, the next with 2 B, and so
on. Keys are written before attention reads them, and a step holds whole prompts (chunked prefill
is off), so one forward is enough.
"""

import functools
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    subclass_attention_backend,
)


@functools.cache
def blockwise(backend: type[AttentionBackend], block_size: int | None) -> Any:
    """Return the backend (a class) with attention by blocks; None: one block, all see all."""
    builder: Any = backend.get_builder_cls()

    class BlockwiseBuilder(builder):
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            metadata = cut_into_blocks(common_attn_metadata, block_size)
            return super().build(0, metadata, fast_build)

    return subclass_attention_backend("TideBlockwise", backend, BlockwiseBuilder)


def cut_into_blocks(
    metadata: CommonAttentionMetadata, block_size: int | None
) -> CommonAttentionMetadata:
    """Rewrite a step of whole prompts: a request per block, none of them causal."""
    cut = copy(metadata)
    cut.causal = False
    if block_size is None:
        return cut
    starts_R = metadata.query_start_loc_cpu[: metadata.num_reqs + 1].tolist()
    stops, visible, owners = [0], [], []
    for owner, (start, stop) in enumerate(pairwise(starts_R)):
        length = stop - start
        for end in range(block_size, length + block_size, block_size):
            stops.append(start + min(end, length))
            visible.append(min(end, length))
            owners.append(owner)
    device = metadata.query_start_loc.device
    starts = torch.tensor(stops, dtype=torch.int32)
    lengths = torch.tensor(visible, dtype=torch.int32)
    cut.query_start_loc_cpu, cut.query_start_loc = starts, starts.to(device)
    cut.seq_lens, cut.seq_lens_cpu_upper_bound = lengths.to(device), lengths
    cut.num_reqs = len(owners)
    cut.max_query_len = int(starts.diff().max())
    cut.max_seq_len = max(visible)
    rows = torch.tensor(owners, device=metadata.block_table_tensor.device)
    cut.block_table_tensor = metadata.block_table_tensor[rows]
    # Facts by request that no longer hold; backends compute them anew where they need them.
    cut.is_prefilling = cut.req_idx = None
    cut._num_computed_tokens_cache = cut._token_to_req_indices_cache = None
    return cut
