"""The memory that one call needs on top of what is there: an upper bound, from the kernel's own count.

Peak RSS can't show it: a call that needs 30 KB reuses pages that the process already has. So first every
free page of the heap is given back (``malloc_trim``). From then on each page that the call writes for the
first time is one minor fault, whoever asked for it: torch's allocator, C++ containers or Python's arenas.
Faults times the page size is therefore at least what the call needed at any one time. What still
fits into the rest of a page that is in use stays unseen, so allocations below two pages are missed
in part; the Python objects among them are what ``tracemalloc`` counts, and its peak is added.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

PR_SET_THP_DISABLE = 41
TRIES = 5


def can_measure() -> bool:
    """Only with glibc on Linux."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


def extra_bytes(call: Callable[[], Any], before: Callable[[], None] = lambda: None) -> int:
    """Upper bound of what ``call`` needs beyond its arguments; the lowest of several, each of which is one.

    ``before`` runs uncounted before each call.
    """
    process = ctypes.CDLL(None)
    process.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a fault must be one page
    try:
        before()
        call()  # what is made once stays out: threads and their stacks, caches
        gc.collect()
        pages = min(_pages_touched(process, call, before) for _ in range(TRIES))
        return pages * mmap.PAGESIZE + _python_bytes(call, before)
    finally:
        process.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def _pages_touched(process: ctypes.CDLL, call: Callable[[], Any], before: Callable[[], None]) -> int:
    import resource  # Unix only

    before()
    process.malloc_trim(0)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    result = call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
    del result
    return faults


def _python_bytes(call: Callable[[], Any], before: Callable[[], None]) -> int:
    before()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
