"""`hardviews export RUN`: the augmentation log as two tables, views and pairs, in Parquet or CSV."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import tyro

from jobs.analysis.steps import parse_steps, selected_steps
from jobs.analysis.tables import SCHEMAS, pair_batch, view_batch
from jobs.log.reader import Rows, open_log
from jobs.run.folder import RunFolder, whole_file
from jobs.run.terminal import parse, progress
from shards.errors import InputError

CHUNK_ROWS = 65_536
"""Log rows held at a time; times views, or pairs, the rows of a Parquet row group."""
REPEATING = ["step", "source", "epoch", "label", "image_height", "image_width", "at_random", "order", "view"]
REPEATING += ["pair", "first", "second"]
"""Columns whose values repeat enough for Parquet to list them once."""


@dataclass(frozen=True)
class ExportConfig:
    """Writes the augmentation log of a run as two tables: `views` (a row per image, step and view: all parameters) and
    `pairs` (a row per candidate pair: loss, choice, overlap, distances). docs/log.md describes every column."""

    run: tyro.conf.Positional[Path]
    """Run folder, as given to `pretrain --run`."""
    out: Path | None = None
    """Folder for views.parquet and pairs.parquet (or .csv), which are replaced; RUN/export by default."""
    steps: str | None = None
    """Steps to export, FIRST:BEHIND_LAST; either may be left out (100: or :100). All by default."""
    source: str | None = None
    """Only images of the source with this tag, e.g. real. All by default."""
    format: Literal["parquet", "csv"] = "parquet"
    """File format of both tables."""


@dataclass(frozen=True)
class Exported:
    """Where the tables lie, and their numbers of rows."""

    views: Path
    pairs: Path
    view_rows: int
    pair_rows: int


def export(
    run: Path,
    out: Path | None = None,
    steps: str | None = None,
    source: str | None = None,
    format: Literal["parquet", "csv"] = "parquet",
) -> Exported:
    """Streams the log into both tables; memory does not grow with it. A kill leaves no half table under its name.

    Raises:
        InputError: no log, unknown source, no rows in those steps.
    """
    log = open_log(RunFolder(run).log)
    if source is not None and source not in log.sources:
        raise InputError(f"source: {source} is not in the log; it has {', '.join(log.sources)}")
    window = selected_steps(log, parse_steps(steps))
    out = RunFolder(run).path / "export" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    paths = {name: out / f"{name}.{format}" for name in SCHEMAS}
    counts = dict.fromkeys(SCHEMAS, 0)
    with ExitStack() as stack:
        bar = stack.enter_context(progress("export", log.count(window), "images"))
        writers = {name: stack.enter_context(_writer(paths[name], SCHEMAS[name], format)) for name in SCHEMAS}
        pool = stack.enter_context(ThreadPoolExecutor(len(SCHEMAS)))

        def write(name: str, rows: Rows) -> None:
            batch = (view_batch if name == "views" else pair_batch)(rows, log.sources)
            writers[name](batch)
            counts[name] += batch.num_rows

        pending: list[Future[None]] = []
        for rows in log.chunks(CHUNK_ROWS, window):
            kept = rows if source is None else rows[np.flatnonzero(rows.source_B == log.sources.index(source))]
            # The next chunk is read while both tables of this one are written.
            _finish(pending)
            pending = [pool.submit(write, name, kept) for name in SCHEMAS]
            bar.advance(len(rows))
        _finish(pending)
    return Exported(paths["views"], paths["pairs"], counts["views"], counts["pairs"])


def _finish(pending: list[Future[None]]) -> None:
    wait(pending)
    for future in pending:
        future.result()


@contextmanager
def _writer(path: Path, schema: pa.Schema, format: str) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """A function that appends record batches to a file, which gets its name when all are written."""
    with whole_file(path) as temporary:
        if format == "parquet":
            how: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "use_dictionary": REPEATING}
            with pyarrow.parquet.ParquetWriter(temporary, schema, **how) as writer:
                yield lambda batch: writer.write_batch(batch, row_group_size=max(batch.num_rows, 1))
        else:
            plain = pa.schema([field.with_type(_plain(field.type)) for field in schema])
            with pyarrow.csv.CSVWriter(temporary, plain) as writer:
                yield lambda batch: writer.write_batch(batch.cast(plain))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def main(argv: list[str]) -> None:
    """Runs `hardviews export`."""
    config = parse(ExportConfig, argv, prog="hardviews export")
    done = export(config.run, config.out, config.steps, config.source, config.format)
    for path, rows in ((done.views, done.view_rows), (done.pairs, done.pair_rows)):
        print(f"{path}: {rows:,} rows, {path.stat().st_size / 1e6:,.1f} MB")
