"""How this process waits and keeps its memory; free of torch, for threads' waiting is set before torch is imported."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

# Parameters of glibc's mallopt(3), from <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4

# Some 10 µs, then sleep. On shared cores threads that spin for long made a training step 4 to 8 times slower; threads
# that sleep at once, a fifth slower even where the cores are free, and short operations three times.
SPINS = "10000"


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Tells GNU's OpenMP, which torch's Linux wheels carry, to spin briefly; others (which know only the policy) not at
    all. Where the environment says either itself, nothing changes."""
    if "OMP_WAIT_POLICY" not in environment and "GOMP_SPINCOUNT" not in environment:
        environment.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT=SPINS)


def keep_freed_memory() -> bool:
    """Tells glibc's allocator to give nothing back to the kernel; returns whether it does.

    By default every large tensor is mapped afresh, and the kernel clears it page by page: with hard views on a CPU that
    was a tenth of a step. What the process holds is then what it held at most. Elsewhere than on glibc nothing
    happens, nor where the environment sets the allocator (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_MAX_, GLIBC_TUNABLES).
    """
    settings = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in settings):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))


@contextmanager
def collecting_by_hand() -> Iterator[None]:
    """Inside, Python looks for garbage in cycles only where `gc.collect()` is called, and never among what was there
    before. A collection amid a step keeps the host from feeding the device; one rank's keeps all ranks waiting."""
    automatic = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if automatic:
            gc.enable()
