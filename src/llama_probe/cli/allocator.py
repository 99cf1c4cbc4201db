"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import os


# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has this process keep what it frees, for the next allocation, where its C library is glibc.

    glibc asks the system for each large block anew and gives it back when it is freed, and the system fills every page of it with
    zeros: with batches of hidden states, on a CPU, that is half of the time of a training step. The process stays as
    large as it was at most.

    Returns:
        Whether it does. Not where another C library is in use, or the environment says how memory is to be had.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, -1))
