"""Writing the augmentation log: every view's parameters, every pair's loss, every choice, at every step.

Rows are gathered in memory; a background thread writes them, a whole shard of chunks at a time, and only when the data
are on the disk changes the number of rows that count. So `append` costs a copy, and a kill at any moment leaves a log
that ends with a whole row. `log_format` has the layout, `log_reader` reads it, docs/log.md explains every column.

Shape suffixes: B images of a batch, N views, P candidate pairs of the views that compete, 2 (height, width).
"""

import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from jobs.log import format as log_format
from jobs.log.format import COLUMNS
from jobs.log.reader import Log, Rows, open_log
from pipelines.batch import ViewBatch
from pipelines.params import pairs
from shards.errors import InputError

__all__ = ["AugmentationLog", "Log", "Rows", "batch_rows", "open_log", "truncate_log"]


class AugmentationLog:
    """Writes one rank's rows. Ranks write at the same time, each in its own group, in the order of positions."""

    def __init__(
        self,
        path: str | Path,
        rank: int = 0,
        views: int = 2,
        *,
        scored: int | None = None,
        sources: Sequence[str] = ("real",),
        facts: Mapping[str, Any] | None = None,
        shard_rows: int | None = None,
    ) -> None:
        """Opens the rank's group behind its last committed row, or makes it.

        `scored` is the number of leading views whose pairs have losses and compete (default: all; in multi-crop the
        global crops). `sources` are the data sources' tags in the order of their numbers, `facts` whatever else (JSON)
        should be known without the run. `shard_rows` holds for a new group: rows in a file, and in memory (65,536, but
        no more than 64 MiB).

        Raises:
            InputError: the log there has another number of views, or another schema version.
        """
        self.path = Path(path)
        self._views, self.scored = views, views if scored is None else scored
        log_format.make_root(self.path, self._views, self.scored, sources, facts or {})
        self._group = log_format.rank_group(self.path, rank)
        new_rows = shard_rows or log_format.shard_rows(self._views, len(pairs(self.scored)))
        self._arrays = {name: self._array(name, new_rows) for name in COLUMNS}
        self._shard_rows = int(self._arrays["position"].shards[0])
        self._pending: deque[Future[None]] = deque()
        self._error: Exception | None = None
        rows = log_format.committed(self._group)
        if not rows:
            log_format.set_committed(self._group, 0, self._arrays)
        self._resize(rows)
        self._load_tail()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="augmentation-log")

    @property
    def rows(self) -> int:
        """Rows of this rank since the start of training, on the disk or not yet."""
        return self._start + self._filled

    @property
    def first(self) -> int:
        """Global position of this rank's first row on the disk."""
        return int(self._arrays["position"][0])

    def append(self, rows: Rows) -> None:
        """Takes rows whose positions follow one another; returns before they are written.

        Raises:
            ValueError: the first position does not lie behind the last one.
            OSError and others: what the background thread met with, on a later call.
        """
        self._surface()
        position = int(rows.position_B[0])
        if position <= self._last:
            raise ValueError(f"position {position} is not behind the log's last one, {self._last}; truncate first")
        columns = rows.columns()
        for start in range(0, len(rows), self._shard_rows):
            self._take({name: column[start : start + self._shard_rows] for name, column in columns.items()})
        self._last = position + len(rows) - 1

    def commit(self) -> None:
        """Returns when all rows so far are on the disk and count. Raises as `append`."""
        if self.rows > self._submitted:
            self._submit()
        while self._pending:
            self._pending.popleft().result()

    def truncate(self, position: int) -> None:
        """Forgets this rank's rows from global position `position` on. Raises as `append`."""
        self.commit()
        column = self._arrays["position"]
        kept = bisect.bisect_left(range(self.rows), position, key=lambda row: int(column[row]))
        log_format.set_committed(self._group, kept, self._arrays)
        self._resize(kept)
        self._load_tail()

    def close(self) -> None:
        """Commits and ends the background thread. Raises as `append`."""
        try:
            self.commit()
        finally:
            self._writer.shutdown()

    def _array(self, name: str, shard_rows: int) -> Any:
        """The column of that name, made empty where there is none."""
        if (self._group / name / "zarr.json").is_file():
            return zarr.open_array(self._group / name, mode="r+")
        column = COLUMNS[name]
        width = {"row": (), "view": (self._views,), "pair": (len(pairs(self.scored)),)}[column.axis]
        return zarr.create_array(
            self._group / name,
            shape=(0, *width),
            dtype=column.dtype,
            chunks=(min(log_format.CHUNK_ROWS, shard_rows), *width),
            shards=(shard_rows, *width),
            compressors=BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"),
            fill_value=np.nan if column.axis == "pair" else 0,
            dimension_names=("row",) if column.axis == "row" else ("row", column.axis),
        )

    def _resize(self, rows: int) -> None:
        for array in self._arrays.values():
            if array.shape[0] != rows:
                array.resize((rows, *array.shape[1:]))

    def _new_block(self) -> dict[str, NDArray[Any]]:
        return {name: np.empty((self._shard_rows, *a.shape[1:]), a.dtype) for name, a in self._arrays.items()}

    def _load_tail(self) -> None:
        """Reads back the rows of the unfinished last shard, so that every write is a whole shard from its start."""
        rows = log_format.committed(self._group)
        self._start, self._filled = rows - rows % self._shard_rows, rows % self._shard_rows
        self._submitted = rows
        self._block = self._new_block()
        for name, array in self._arrays.items():
            self._block[name][: self._filled] = array[self._start : rows]
        self._last = int(self._arrays["position"][rows - 1]) if rows else -1

    def _take(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Copies at most a shard's worth of rows behind those in memory; hands on the block when it is full."""
        count = len(values["position"])
        fitting = min(count, self._shard_rows - self._filled)
        for name, block in self._block.items():
            block[self._filled : self._filled + fitting] = values[name][:fitting]
        self._filled += fitting
        if self._filled == self._shard_rows:
            self._submit()
            self._start, self._filled, self._block = self.rows, 0, self._new_block()
        if fitting < count:
            self._take({name: value[fitting:] for name, value in values.items()})

    def _submit(self) -> None:
        """Gives the block to the background thread; waits where that is two blocks behind, which bounds memory."""
        self._pending.append(self._writer.submit(self._write, self._block, self._start, self._filled))
        self._submitted = self.rows
        while len(self._pending) > 2:
            self._pending.popleft().result()

    def _surface(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _write(self, block: Mapping[str, NDArray[Any]], start: int, rows: int) -> None:
        """On the background thread. After a failure nothing is written any more: a later block would leave a hole."""
        if self._error is not None:
            raise self._error
        try:
            self._write_block(block, start, rows)
        except Exception as error:
            self._error = error
            raise

    def _write_block(self, block: Mapping[str, NDArray[Any]], start: int, rows: int) -> None:
        """The data, onto the disk, and only then the number of rows that count."""
        self._resize(start + rows)
        for name, array in self._arrays.items():
            array[start : start + rows] = block[name][:rows]
        shard = start // self._shard_rows
        for name, array in self._arrays.items():
            file = self._group / name / array.metadata.encode_chunk_key((shard, *(0,) * (array.ndim - 1)))
            if file.is_file():  # zarr writes no file where all values are the fill value
                log_format.sync(file)
                log_format.sync(file.parent)
        log_format.set_committed(self._group, start + rows, self._arrays)


def batch_rows(
    batch: ViewBatch,
    step: int,
    scored: int,
    loss_BP: NDArray[np.float32] | None = None,
    choice_B: NDArray[Any] | None = None,
    at_random_B: NDArray[np.bool_] | None = None,
    chosen_BN: NDArray[np.bool_] | None = None,
) -> Rows:
    """The rows of a batch at a step; the pairs of its first `scored` views compete.

    Without `loss_BP` (a step on which nothing was scored) the losses are NaN, without `choice_B` the choice is −1,
    without `at_random_B` no choice was replaced. `chosen_BN` marks the views that trained; by default those of the
    chosen pair.
    """
    count, table_P2 = len(batch.params), pairs(scored)
    choice_B = np.full(count, -1) if choice_B is None else choice_B
    if chosen_BN is None:
        chosen_BN = np.zeros(batch.params.shape, np.bool_)
        known = np.flatnonzero(choice_B >= 0)
        chosen_BN[known[:, None], table_P2[choice_B[known]]] = True
    return Rows(
        position_B=np.arange(batch.position, batch.position + count),
        step_B=np.full(count, step),
        sample_B=batch.sample_B,
        source_B=batch.source_B,
        epoch_B=batch.epoch_B,
        label_B=batch.label_B,
        image_height_B=batch.sizes_B2[:, 0],
        image_width_B=batch.sizes_B2[:, 1],
        choice_B=choice_B,
        at_random_B=np.zeros(count, np.bool_) if at_random_B is None else at_random_B,
        params=batch.params,
        chosen_BN=chosen_BN,
        loss_BP=np.full((count, len(table_P2)), np.nan, np.float32) if loss_BP is None else loss_BP,
    )


def truncate_log(path: str | Path, position: int) -> None:
    """Forgets every rank's rows from global position `position` on: one process, before any rank writes again.

    Ranks of an earlier, larger world keep their rows, so a run can go on at another world size.

    Raises:
        InputError: there is no log, or rows are missing between its first one and `position`.
    """
    path = Path(path)
    if position == 0 and not (path / "zarr.json").is_file():
        return  # killed before the log was made
    stored, kept, first = log_format.attributes(path), 0, position
    for group in log_format.ranks(path):
        log = AugmentationLog(path, int(group.name.removeprefix("rank-")), stored["views"], scored=stored["scored"])
        log.truncate(position)
        kept += log.rows
        first = min(first, log.first if log.rows else position)
        log.close()
    if kept != position - first:
        raise InputError(
            f"log: {path} has {kept} rows from position {first} to {position}, the checkpoint's, where "
            f"{position - first} belong; take an earlier checkpoint or start anew with --overwrite"
        )
