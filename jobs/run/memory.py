"""Memory that a training step frees stays with the process, so that the next step need not have it cleared again."""

import ctypes
import os
import sys

# Parameters of glibc's mallopt(3), from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to give nothing back to the kernel; returns whether it does.

    By default every large tensor is mapped afresh, and the kernel clears it page by page: with hard views on a CPU that
    was a tenth of a step. What the process holds is then what it held at most. Elsewhere than on glibc nothing
    happens, nor where the environment sets the allocator (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_, GLIBC_TUNABLES).
    """
    told = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in told):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
