"""Broken samples in a batch: each is replaced by another of its source, again and again until one works.

Which one is a function of the sample and the attempt alone, so a resumed or replayed run replaces alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import BatchPlan, Reader
from shards.errors import InputError
from shards.reader import SampleError

MAX_ATTEMPTS = 16  # for one row, before the data set is called broken


def read_rows(
    reader: Reader, rows: BatchPlan, indices: Sequence[int]
) -> tuple[dict[int, NDArray[np.uint8]], dict[int, SampleError]]:
    """Bytes of the rows that can be read, and what is wrong with the others."""
    items = dict(zip(indices, reader.read(rows.sample_B[np.asarray(indices, np.int64)]), strict=True))
    broken = {row: item for row, item in items.items() if isinstance(item, SampleError)}
    return {row: item for row, item in items.items() if not isinstance(item, SampleError)}, broken


def undecodable(reader: Reader, rows: BatchPlan, row: int, reason: str) -> SampleError:
    """The error for a sample with intact bytes that are no image."""
    return SampleError(*reader.name(int(rows.sample_B[row])), reason)


def size_mismatch(image_HW3: Tensor, size_2: NDArray[np.int32]) -> str | None:
    """Why an image cannot be cropped as drawn: boxes come from the manifest's height and width."""
    if tuple(image_HW3.shape[:2]) == tuple(size_2.tolist()):
        return None
    height, width = image_HW3.shape[:2]
    return f"decodes to {height}×{width} pixels where the manifest says {size_2[0]}×{size_2[1]}"


class Replacer:
    """Keeps count of the attempts for each row of a batch, and of what was wrong."""

    def __init__(self, reader: Reader, rows: BatchPlan) -> None:
        self.errors: list[SampleError] = []
        self._reader, self._rows = reader, rows
        self._first_B = rows.sample_B.copy()
        self._attempts_B = np.zeros(len(rows), np.int64)

    def replace(self, broken: dict[int, SampleError]) -> list[int]:
        """Puts other samples into the rows that are broken, draws their parameters, and returns the rows.

        Raises:
            InputError: where sixteen samples in a row were broken.
        """
        todo = sorted(broken)
        if not todo:
            return todo
        self.errors += [broken[row] for row in todo]
        self._attempts_B[todo] += 1
        for row in todo:
            if self._attempts_B[row] > MAX_ATTEMPTS:
                raise InputError(
                    f"data: {MAX_ATTEMPTS} samples in a row cannot be used, the last for this: {broken[row]}; "
                    "run `hardviews verify` on the shards"
                )
        ids = [self._reader.substitute(int(self._first_B[row]), int(self._attempts_B[row])) for row in todo]
        self._rows.substitute(todo, ids, self._reader)
        return todo
