"""The queue of negatives: a ring of unit keys. K rows, n new ones, D width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """The newest K keys and, where known, their labels (−1 = unknown). Starts with random unit rows.

    Raises:
        ValueError: fewer than one row.
    """

    rows_KD: Tensor
    labels_K: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"queue: {size} rows; give at least 1")
        self.register_buffer("rows_KD", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("labels_K", torch.full((size,), -1, dtype=torch.int64))
        self.position = 0

    @torch.no_grad()
    def push(self, keys_nD: Tensor, labels_n: Tensor | None = None) -> None:
        """Puts unit keys in place of the oldest rows; n need not divide K, and of n > K the last K stay."""
        size = len(self.rows_KD)
        kept = min(len(keys_nD), size)
        first = self.position + len(keys_nD) - kept
        slots = (torch.arange(kept, device=self.rows_KD.device) + first) % size
        self.rows_KD[slots] = keys_nD[-kept:].to(self.rows_KD.dtype)
        self.labels_K[slots] = -1 if labels_n is None else labels_n[-kept:]
        self.position = (self.position + len(keys_nD)) % size

    def get_extra_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
