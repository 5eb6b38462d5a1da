"""How the augmentation log lies on disk: its columns, and the metadata that says how many rows count.

    log.zarr/zarr.json               schema version, views, sources, facts
    log.zarr/rank-00000/zarr.json    `committed`: the rows that count, and every array's shape to match
    log.zarr/rank-00000/COLUMN/      a zarr 3 array: one row per image and step

A rank's zarr.json carries consolidated metadata, which zarr and xarray read instead of the arrays' own. It is one
file, replaced by a rename: number of rows and all shapes change at once, or not at all.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.run.folder import write_json
from pipelines.params import DTYPES
from shards.errors import InputError

SCHEMA_VERSION = 1
SHARD_ROWS = 65_536
"""Rows in a file of a column, at most."""
SHARD_BYTES = 64 * 2**20
"""Of all columns' rows in memory until they fill a file, at most."""
CHUNK_ROWS = 8_192
"""Rows that are compressed together."""

ROW_COLUMNS: dict[str, type[np.generic]] = {
    "position": np.int64,
    "step": np.int64,
    "sample": np.int64,
    "source": np.int16,
    "epoch": np.int32,
    "label": np.int32,
    "image_height": np.int32,
    "image_width": np.int32,
    "choice": np.int32,
}
VIEW_COLUMNS: dict[str, type[np.generic]] = {**DTYPES, "chosen": np.bool_}
PAIR_COLUMNS: dict[str, type[np.generic]] = {"loss": np.float32}
COLUMNS = (*ROW_COLUMNS, *VIEW_COLUMNS, *PAIR_COLUMNS)


def shard_rows(views: int, pairs: int) -> int:
    """Rows in a file of a column: a power of two, within SHARD_ROWS and SHARD_BYTES."""
    width = sum(
        np.dtype(kind).itemsize * times
        for columns, times in ((ROW_COLUMNS, 1), (VIEW_COLUMNS, views), (PAIR_COLUMNS, pairs))
        for kind in columns.values()
    )
    return min(SHARD_ROWS, 2 ** int(np.log2(SHARD_BYTES / width)))


def make_root(path: Path, views: int, scored: int, sources: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Writes the log's own metadata where it has none; every rank would write the same.

    Raises:
        InputError: the log that lies there has another number of views.
    """
    if not (path / "zarr.json").is_file():
        kept = {"schema": SCHEMA_VERSION, "views": views, "scored": scored, "sources": [*sources], "facts": {**facts}}
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": kept})
    there = attributes(path)
    if (there["views"], there["scored"]) != (views, scored):
        raise InputError(
            f"views: the log {path} has {there['views']} views, {there['scored']} of them scored; "
            f"this run has {views} and {scored}; choose another --run"
        )


def attributes(path: Path) -> dict[str, Any]:
    """What `make_root` has written.

    Raises:
        InputError: there is no log, or one of another schema version.
    """
    try:
        found = json.loads((path / "zarr.json").read_text())["attributes"]
        version = found["schema"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"log: {path} holds no augmentation log; give a run that has written one") from error
    if version != SCHEMA_VERSION:
        raise InputError(f"log: {path} has schema version {version}, this program reads {SCHEMA_VERSION}")
    return found


def ranks(path: Path) -> list[Path]:
    """The ranks' groups, in order."""
    return sorted(path.glob("rank-*"))


def rank_group(path: Path, rank: int) -> Path:
    """The folder of a rank's group."""
    return path / f"rank-{rank:05d}"


def committed(group: Path) -> int:
    """Rows of a rank that count; 0 where it has written none."""
    metadata = group / "zarr.json"
    return json.loads(metadata.read_text())["attributes"]["committed"] if metadata.is_file() else 0


def set_committed(group: Path, rows: int, arrays: Mapping[str, Any]) -> None:
    """Replaces a rank's metadata in one rename: from now on `rows` rows count, in `arrays` (name → zarr array)."""
    shapes = {name: {**array.metadata.to_dict(), "shape": [rows, *array.shape[1:]]} for name, array in arrays.items()}
    content = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"committed": rows},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": shapes},
    }
    group.mkdir(parents=True, exist_ok=True)
    write_json(group / "zarr.json", content)
    sync(group)


def sync(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
