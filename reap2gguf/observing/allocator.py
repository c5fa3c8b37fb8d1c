"""How glibc's allocator treats what a limited sweep frees.

glibc keeps freed blocks of up to 32 MiB for later, in the heap of the thread that took them, and
holes between blocks in use cannot be given back. In a sweep, whose tensors have sizes of that kind
in many threads, this grows with every batch, up to half of what the layers and batches take. No
estimate can tell how far. Blocks that come straight from the system go back to it at once, which
costs about a tenth of the time; so this is done only for a sweep that has a limit to keep.

Other allocators (macOS) are left as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE = 2**20  # bytes: the tensors of a batch have more; what is smaller is quick to take again
_USUAL = 2**25  # the most that glibc raises its own threshold to, which a sweep does at once


def return_free_memory() -> None:
    """Return what is free now to the system, once; some milliseconds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


@contextmanager
def frees_at_once() -> Iterator[None]:
    """Return what is free to the system now, and large blocks as soon as they are freed.

    It holds for the whole process. Afterwards large blocks are kept again.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.malloc_trim(ctypes.c_size_t(0))
    libc.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)  # as glibc itself pairs them
