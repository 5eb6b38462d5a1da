"""Memory for batches that is used again: the kernel clearing fresh pages cost a quarter of a batch's time."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Buffers:
    """Hands out float32 tensors and takes their memory back once no tensor, view or graph uses it any more.

    `pinned`: in memory that a CUDA device reads by itself while the host goes on.

    The tensor's storage owns a numpy view of the memory; when the last user lets go of the storage, the view dies, and
    only then the memory is free again. So nobody can see a buffer change under them.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: dict[int, list[NDArray[np.float32]]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor, from memory that was given back where there is any of this size."""
        size = int(np.prod(shape))
        with self._lock:
            free = self._free.setdefault(size, [])
            memory = free.pop() if free else self._new(size)
        lease = memory[:]
        weakref.finalize(lease, self._give_back, memory).atexit = False
        return torch.from_numpy(lease).view(shape)

    def _new(self, size: int) -> NDArray[np.float32]:
        return torch.empty(size, pin_memory=True).numpy() if self._pinned else np.empty(size, np.float32)

    def _give_back(self, memory: NDArray[np.float32]) -> None:
        # May run wherever a tensor dies, in a collection within `take` too: appending needs no lock of ours.
        self._free[len(memory)].append(memory)
