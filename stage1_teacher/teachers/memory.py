"""Out of memory in a teacher: how it is told from other errors, and what is done about it.

A token budget that fits one GPU does not fit another, and a build should not end over that. So a
forward that does not fit halves the budget for the teacher's life, and the call is done again from
its start: each call's answers are then those of one budget, bit for bit. Batches run longest first,
so that little is lost. What cannot be cut (one noised stream with its clean half) is refused.
"""

import dataclasses
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tide_cache.errors import TideError

logger = logging.getLogger(__name__)

# Allocators that have no error class of their own: the CPU's, and CUDA libraries' workspaces.
_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class TeacherMemoryError(TideError):
    """A single stream that does not fit the teacher's memory; `request_index` says whose."""

    is_about_rows = True

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.request_index: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchLoad:
    """What a forward holds; tokens with padding. `longest_*`: of its longest sequence."""

    num_sequences: int
    num_tokens: int
    longest_tokens: int
    longest_streams: int
    longest_request: int

    @property
    def can_be_cut(self) -> bool:
        """Say whether a smaller budget makes smaller forwards of it."""
        return self.num_sequences > 1 or self.longest_streams > 1


class BatchOutOfMemory(Exception):
    """A batch ran out of memory, in the body or (`in_head`) in a slice of the head.

    No error of a user: it never leaves the teacher.
    """

    def __init__(self, load: BatchLoad, *, in_head: bool, reason: str) -> None:
        super().__init__(reason)
        self.load, self.in_head, self.reason = load, in_head, reason


@contextmanager
def out_of_memory_names(load: BatchLoad, *, in_head: bool) -> Iterator[None]:
    """Turn running out of memory into BatchOutOfMemory; every other error passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise BatchOutOfMemory(load, in_head=in_head, reason=reason) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on a GPU or a CPU, from other errors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def free_memory() -> None:
    """Give back what nothing refers to. Call it outside of `except`: a traceback keeps tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_budget(token_budget: int, load: BatchLoad) -> int:
    """Return half the budget, or half the batch where that was smaller than the budget already."""
    return max(1, min(token_budget, load.num_tokens) // 2)
