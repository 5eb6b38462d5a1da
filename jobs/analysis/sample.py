"""A bounded uniform sample of log rows, and what the forests need of it.

Shape suffixes: B log rows, P candidate pairs, R = B·P rows of a regression, F metrics.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.analysis.pairs import METRICS, pair_metrics, scored_params
from jobs.log.reader import Rows


class RowSample:
    """Keeps `size` rows of a stream, each with the same chance; the same stream and seed keep the same rows."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._rng = np.random.default_rng(seed)
        self._kept: list[tuple[NDArray[np.float64], Rows]] = []

    def add(self, rows: Rows) -> None:
        """Takes part of the stream. Memory stays below two samples and one part."""
        self._kept.append((self._rng.random(len(rows)), rows))
        if sum(len(keys) for keys, _ in self._kept) > 2 * self._size:
            self._shrink()

    def rows(self) -> Rows | None:
        """The sample in the order of the stream; None where there was none."""
        self._shrink()
        return self._kept[0][1] if self._kept and len(self._kept[0][1]) else None

    def _shrink(self) -> None:
        """The rows with the smallest random keys stay."""
        if self._kept:
            keys = np.concatenate([keys for keys, _ in self._kept])
            rows = Rows.concatenate([rows for _, rows in self._kept])
            lowest = np.sort(np.argsort(keys)[: self._size])
            self._kept = [(keys[lowest], rows[lowest])]


@dataclass(frozen=True)
class PairData:
    """Candidate pairs as rows of a regression."""

    metrics_RF: NDArray[np.float32]
    """Columns in the order of METRICS."""
    loss_R: NDArray[np.float64]
    image_R: NDArray[np.int64]
    """Number of the image (0 … images − 1) that the pair was cut from; an image recurs over epochs."""
    step_R: NDArray[np.int64]

    @property
    def images(self) -> int:
        return int(self.image_R.max()) + 1


def pair_data(rows: Rows) -> PairData:
    """Every pair of the rows."""
    metrics = pair_metrics(scored_params(rows), rows.sizes_B2)
    pairs = rows.loss_BP.shape[1]
    _, image_B = np.unique(rows.sample_B, return_inverse=True)
    return PairData(
        np.stack([metrics[name].ravel() for name in METRICS], axis=1),
        rows.loss_BP.ravel().astype(np.float64),
        np.repeat(image_B, pairs),
        np.repeat(rows.step_B, pairs),
    )
