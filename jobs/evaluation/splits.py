"""Which labelled images a probe may learn from: a share of each class, or some shots per class."""

import numpy as np

from shards.errors import InputError


def subset(labels: np.ndarray, *, share: float = 1.0, shots: int = 0, seed: int = 0) -> np.ndarray:
    """Sorted rows (int64) of a stratified draw: `shots` per class where above 0, else `share` of each class.

    At least one image per class is drawn; rows without a label are left out. Equal seeds give nested shares: the 1 %
    rows are among the 10 % rows.

    Raises:
        InputError: a share outside (0, 1], negative shots, fewer images in a class than shots.
    """
    if not 0 < share <= 1:
        raise InputError(f"labels: {share} is no share of the labels; give above 0 and at most 1")
    if shots < 0:
        raise InputError(f"shots: {shots} is negative; give 0 for all or images per class")
    rng = np.random.default_rng(seed)
    picked = []
    for label in np.unique(labels[labels >= 0]):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if shots > len(rows):
            raise InputError(f"shots: {shots} per class, but class {label} has {len(rows)} images; give fewer")
        picked.append(rows[: shots or max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(picked)) if picked else np.zeros(0, dtype=np.int64)
