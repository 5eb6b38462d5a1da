"""Counter-based random numbers: a draw is a function of what it is for, never of a generator's state.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 64-bit key and a 128-bit
counter to four 32-bit words. The key is the seed; the counter is spelled out as (sample id, epoch, view, purpose,
block), so two draws that differ in anything come from two different counters: no hashing, no collisions.

Shape suffixes: B images, N views.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = np.uint64
LOW = U64(0xFFFFFFFF)
HALF = U64(32)
MULTIPLIERS = (U64(0xD2511F53), U64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# The counter's last word: 12 bits of view, 8 of purpose, 12 of block.
MAX_VIEWS, MAX_PURPOSES, MAX_BLOCKS = 1 << 12, 1 << 8, 1 << 12


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of every logged run's meaning: add new ones, never renumber."""

    CROP = 1
    FLIP = 2
    COLOUR = 3
    STATIC_COLOUR = 4
    CHOICE = 5
    SHARE = 6


def philox(counter_4xM: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Philox4x32-10 of M counters, [4, M] 32-bit words held in uint64, under one 64-bit key."""
    a, b, c, d = counter_4xM
    keys = [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b = (second >> HALF) ^ b ^ U64(keys[0]), second & LOW
        c, d = (first >> HALF) ^ d ^ U64(keys[1]), first & LOW
        keys = [(word + step) & 0xFFFFFFFF for word, step in zip(keys, KEY_STEPS, strict=True)]
    return np.stack([a, b, c, d])


def uniform(
    seed: int,
    epoch_B: ArrayLike,
    sample_B: ArrayLike,
    views_N: ArrayLike,
    purpose: Purpose,
    count: int,
    *,
    block: int = 0,
) -> NDArray[np.float64]:
    """[B, N, count] numbers in the open interval (0, 1), 32 bits each, for every image and view.

    Args:
        epoch_B: how often each sample's source has been gone through before.
        views_N: view indices, below 4,096.
        block: where to begin in the draw's own sequence, in blocks of four numbers.
    """
    blocks = -(-count // 4)
    assert block >= 0 and block + blocks <= MAX_BLOCKS, "a purpose has 16,384 numbers"
    ids = np.asarray(sample_B, np.int64).astype(U64)[:, None, None]
    epochs = np.asarray(epoch_B, np.int64).astype(U64)[:, None, None]
    views = np.asarray(views_N, np.int64).astype(U64)[None, :, None]
    last = (views << U64(20)) | U64(int(purpose) << 12) | np.arange(block, block + blocks, dtype=U64)
    words = np.broadcast_arrays(ids & LOW, ids >> HALF, epochs & LOW, last)
    shape = words[0].shape
    drawn = philox(np.stack([word.reshape(-1) for word in words]), seed & 0xFFFFFFFFFFFFFFFF)
    flat = np.moveaxis(drawn, 0, -1).reshape(*shape[:2], blocks * 4)[..., :count]
    return (flat.astype(np.float64) + 0.5) * 2.0**-32
