"""Reading the augmentation log: all ranks merged in the order of training, in memory that does not grow with it.

Shape suffixes: B rows, N views, P candidate pairs, 2 (height, width).
"""

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from jobs.log import format as log_format
from jobs.log.format import COLUMNS, array_name
from pipelines.params import FIELDS, ViewParams


@dataclass(frozen=True)
class Rows:
    """Log rows, one per image and step, in the order of their positions. `jobs.log.format.COLUMNS` explains them."""

    position_B: NDArray[np.int64]
    step_B: NDArray[np.int64]
    sample_B: NDArray[np.int64]
    source_B: NDArray[np.int16]
    epoch_B: NDArray[np.int32]
    label_B: NDArray[np.int32]
    image_height_B: NDArray[np.int32]
    image_width_B: NDArray[np.int32]
    choice_B: NDArray[np.int32]
    at_random_B: NDArray[np.bool_]
    params: ViewParams
    chosen_BN: NDArray[np.bool_]
    loss_BP: NDArray[np.float32]

    @property
    def sizes_B2(self) -> NDArray[np.int32]:
        """Height and width of the images, source pixels."""
        return np.stack([self.image_height_B, self.image_width_B], axis=1)

    def __len__(self) -> int:
        return len(self.position_B)

    def __getitem__(self, index: Any) -> "Rows":
        """The same index of rows (slice, mask, numbers) applied to every array."""
        return Rows(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenate(parts: "list[Rows]") -> "Rows":
        """Parts one after the other."""
        params = ViewParams.concatenate([part.params for part in parts])
        arrays = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Rows) if f.name != "params"}
        return Rows(params=params, **{name: np.concatenate(values) for name, values in arrays.items()})

    @staticmethod
    def of(columns: Mapping[str, NDArray[Any]]) -> "Rows":
        """From the columns of a rank's group, by their names on disk."""
        own = {array_name(name): columns[name] for name in COLUMNS if name not in FIELDS}
        return Rows(params=ViewParams(**{name: columns[name] for name in FIELDS}), **own)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns by their names on disk: what `of` takes."""
        return {name: getattr(self.params if name in FIELDS else self, array_name(name)) for name in COLUMNS}


class Log:
    """A written log, all ranks together; `open_log` makes it. Rows appended after opening are not seen."""

    def __init__(self, path: Path) -> None:
        attributes = log_format.attributes(path)
        self.path = path
        self.views: int = attributes["views"]
        self.scored: int = attributes["scored"]
        self.sources: list[str] = attributes["sources"]
        self.facts: dict[str, Any] = attributes["facts"]
        self._lengths = {group: rows for group in log_format.ranks(path) if (rows := log_format.committed(group))}
        self._arrays: dict[Path, dict[str, Any]] = {
            group: dict(zarr.open_group(group, mode="r").arrays()) for group in self._lengths
        }

    @property
    def rows(self) -> int:
        """Rows of all ranks: images times steps."""
        return sum(self._lengths.values())

    @property
    def step_range(self) -> tuple[int, int]:
        """The first and the last step of a log that is not empty."""
        columns = [(self._arrays[group]["step"], rows) for group, rows in self._lengths.items()]
        return min(int(column[0]) for column, _ in columns), max(int(column[rows - 1]) for column, rows in columns)

    def count(self, steps: tuple[int, int] | None = None) -> int:
        """Rows of all ranks whose step lies in [first, last)."""
        return sum(end - start for start, end in (self._bounds(group, steps) for group in self._lengths))

    def chunks(self, size: int = log_format.SHARD_ROWS, steps: tuple[int, int] | None = None) -> Iterator[Rows]:
        """Rows of all ranks in the order of their positions, a few `size` at most at a time.

        `steps` = [first, last). Memory is bounded by `size` (at least a chunk a rank), whatever the log's length.
        """
        parts = [
            _Part(self._arrays[group], self._bounds(group, steps), max(size // len(self._lengths), 1))
            for group in self._lengths
        ]
        while True:
            for part in parts:
                part.fill()
            held = [part for part in parts if part.rows]
            if not held:
                return
            # Up to the first position at which the rows in memory of some rank end, all ranks are complete.
            horizon = min((part.horizon for part in held if not part.complete), default=None)
            taken = [part.take(horizon) for part in held]
            columns = {name: np.concatenate([one[name] for one in taken]) for name in taken[0]}
            order = np.argsort(columns["position"], kind="stable")
            yield Rows.of({name: column[order] for name, column in columns.items()})

    def _bounds(self, group: Path, steps: tuple[int, int] | None) -> tuple[int, int]:
        """First row and row behind the last of a rank whose step lies in [first, last): steps never fall."""
        rows = self._lengths[group]
        if steps is None:
            return 0, rows
        column = self._arrays[group]["step"]
        start, end = (bisect.bisect_left(range(rows), step, key=lambda row: int(column[row])) for step in steps)
        return start, max(start, end)


class _Part:
    """One rank's rows, read a block at a time."""

    def __init__(self, arrays: Mapping[str, Any], bounds: tuple[int, int], size: int) -> None:
        self._arrays = arrays
        self._next, self._end = bounds
        # Whole chunks, so that none is decoded twice.
        self._size = -(-size // log_format.CHUNK_ROWS) * log_format.CHUNK_ROWS
        self._held = {name: array[:0] for name, array in arrays.items()}

    @property
    def rows(self) -> int:
        return len(self._held["position"])

    @property
    def complete(self) -> bool:
        """Whether all that is left of this rank is in memory."""
        return self._next == self._end

    @property
    def horizon(self) -> int:
        """The position up to which no row of this rank is missing from memory."""
        return int(self._held["position"][-1])

    def fill(self) -> None:
        """Reads blocks until `size` rows are held or none is left."""
        while self.rows < self._size and not self.complete:
            end = min(self._next - self._next % self._size + self._size, self._end)
            for name, array in self._arrays.items():
                self._held[name] = np.concatenate([self._held[name], array[self._next : end]])
            self._next = end

    def take(self, horizon: int | None) -> dict[str, NDArray[Any]]:
        """Removes and returns the rows up to a position, all of them for None."""
        held = self._held
        count = self.rows if horizon is None else int(np.searchsorted(held["position"], horizon, side="right"))
        self._held = {name: column[count:] for name, column in held.items()}
        return {name: column[:count] for name, column in held.items()}


def open_log(path: str | Path) -> Log:
    """The log at `path` (a run's log.zarr), for reading.

    Raises:
        InputError: there is none, or it has another schema version.
    """
    return Log(Path(path))
