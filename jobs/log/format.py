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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.run.folder import write_json
from pipelines.params import PARAMETERS
from shards.errors import InputError

SCHEMA_VERSION = 2
SHARD_ROWS = 65_536
"""Rows in a file of a column, at most."""
SHARD_BYTES = 64 * 2**20
"""Of all columns' rows in memory until they fill a file, at most."""
CHUNK_ROWS = 8_192
"""Rows that are compressed together."""

Axis = Literal["row", "view", "pair"]


@dataclass(frozen=True)
class Column:
    """A column of the log: one value per row, per row and view, or per row and candidate pair."""

    dtype: type[np.generic]
    axis: Axis
    meaning: str
    unit: str = ""


COLUMNS: dict[str, Column] = {
    "position": Column(np.int64, "row", "global index of the image in the training sequence"),
    "step": Column(np.int64, "row", "training step, from 0"),
    "sample": Column(np.int64, "row", "the image's row in the data sets, one after the other"),
    "source": Column(np.int16, "row", "the image's data set: index into `sources`, exported as its tag"),
    "epoch": Column(np.int32, "row", "how often its source had been gone through before"),
    "label": Column(np.int32, "row", "class index; where unknown −1, exported as null"),
    "image_height": Column(np.int32, "row", "the image's height", "source pixels"),
    "image_width": Column(np.int32, "row", "the image's width", "source pixels"),
    "choice": Column(np.int32, "row", "number of the pair that trained, −1 where none was recorded"),
    "at_random": Column(np.bool_, "row", "the image trained on a random pair, though its step chose pairs by the rule"),
    **{name: Column(p.dtype, "view", p.meaning, p.unit) for name, p in PARAMETERS.items()},
    "chosen": Column(np.bool_, "view", "the view trained"),
    "loss": Column(np.float32, "pair", "the pair's loss at selection; NaN, exported as null, on steps without scores"),
}
"""Every column by its name, which is the same on disk, in tables and, with a suffix (`array_name`), in memory."""


def array_name(name: str) -> str:
    """A column's array in memory: its name and its shape's suffix; view parameters are fields of `ViewParams`."""
    return name if name in PARAMETERS else name + {"row": "_B", "view": "_BN", "pair": "_BP"}[COLUMNS[name].axis]


def shard_rows(views: int, pairs: int) -> int:
    """Rows in a file of a column: a power of two, within SHARD_ROWS and SHARD_BYTES."""
    times = {"row": 1, "view": views, "pair": pairs}
    width = sum(np.dtype(column.dtype).itemsize * times[column.axis] for column in COLUMNS.values())
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
    existing = attributes(path)
    if (existing["views"], existing["scored"]) != (views, scored):
        raise InputError(
            f"views: the log {path} has {existing['views']} views, {existing['scored']} of them scored; "
            f"this run has {views} and {scored}; choose another --run"
        )


def attributes(path: Path) -> dict[str, Any]:
    """What `make_root` has written.

    Raises:
        InputError: there is no log, or one of another schema version.
    """
    try:
        stored = json.loads((path / "zarr.json").read_text())["attributes"]
        version = stored["schema"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"log: {path} holds no augmentation log; give a run that has written one") from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"log: {path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            f"use the version of hardviews that wrote it, or train anew"
        )
    return stored


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
