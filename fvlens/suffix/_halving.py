"""What to do when memory runs out although a plan kept inside its bound: the same work in smaller slices."""

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

_T = TypeVar("_T")

_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",  # Linux, macOS
    "DefaultCPUAllocator: not enough memory",  # Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def slices_of(n: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` that cover ``n`` things."""
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


def halving(work: Callable[[slice, int], _T], slices: Iterable[slice], *, variants: int = 1, what: str) -> Iterator[_T]:
    """Results of ``work`` for slices of prompts; smaller slices from where memory runs out.

    First the number of prompts is halved, then the number of variants. What did not fit is done again from its start,
    so ``work`` must leave nothing behind that counts unless it returns. On Linux the CPU's memory seldom runs out by an
    error (the kernel ends the process instead): there, what helps is the plan.

    Args:
        work: called with a slice of prompts and the number of variants that may go through together.
        slices: slices of prompts, one behind the other.
        variants: patched copies of each prompt that go through together.
        what: the function that the user called, for messages.

    Raises:
        MemoryError: a single prompt with a single variant is too much.
    """
    waiting = deque(slices)
    most: int | None = None
    while waiting:
        rows = waiting.popleft()
        n = rows.stop - rows.start
        if most is not None and n > most:
            waiting.appendleft(slice(rows.start + most, rows.stop))
            rows, n = slice(rows.start, rows.start + most), most
        try:
            result = work(rows, variants)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if n == 1 and variants == 1:
                raise MemoryError(
                    f"{what}: out of memory with a single prompt; use shorter prompts (fewer demonstrations), a "
                    "smaller dtype, or a device with more memory."
                ) from error
        else:
            yield result
            continue
        # only here, behind the except clause, nothing holds what the failed attempt had made
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        waiting.appendleft(rows)
        if n > 1:
            most = n // 2
            text = f"{n} prompts together; going on with {most}"
        else:
            text = f"{variants} edited copies of a prompt together; going on with {variants // 2}"
            variants //= 2
        warnings.warn(f"{what}: out of memory with {text}.", stacklevel=2)


def in_batches(work: Callable[[slice], _T], n: int, size: int, *, what: str) -> Iterator[_T]:
    """:func:`halving` over ``n`` prompts in batches of ``size``."""
    return halving(lambda rows, _: work(rows), slices_of(n, size), what=what)
