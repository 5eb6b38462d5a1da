"""Parquet as Hugging Face datasets writes it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import InputError
from shards.retry import retry
from shards.sources.base import READ_AHEAD, Record, Runner, Source
from shards.sources.containers import Container, container_parts, containers_at, opened


def open_parquet(path: str, part_size: int, run: Runner, keep_order: bool) -> Source:
    """Parquet with an image column; class names are those of the label's feature."""
    address = f"parquet:{path}"
    containers = containers_at(address, path, ".parquet")

    def first_layout() -> Layout:
        with opened(containers[0]) as file:
            return parquet_layout(parquet_file(file, containers[0]), containers[0].address)

    layout = retry(first_layout)
    read = partial(read_parquet, layout)
    return Source(layout.classes, container_parts(address, containers, count_parquet, read, part_size, run))


@dataclass(frozen=True)
class Layout:
    """Which columns of a Parquet table are what."""

    image: str
    label: str | None
    classes: tuple[str, ...]


def parquet_layout(table: pq.ParquetFile, address: str) -> Layout:
    """Finds the image and the label among a table's columns, by Hugging Face's notes on them or by type and name.

    Raises:
        InputError: no column holds encoded images.
    """
    schema = table.schema_arrow
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = notes.get("info", {}).get("features", {})
    encoded = [
        field.name
        for field in schema
        if (str(field.type).startswith("struct<") and field.type.get_field_index("bytes") >= 0)
        or str(field.type) in ("binary", "large_binary")
    ]
    if not encoded:
        known = ", ".join(schema.names)
        raise InputError(
            f"{address}: no column with encoded images (a struct of bytes and path, or binary) among {known}"
        )
    image = "image" if "image" in encoded else encoded[0]
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    label = "label" if "label" in schema.names else (labels[0] if labels else None)
    return Layout(image, label, tuple(features.get(label, {}).get("names", ())) if label else ())


def count_parquet(container: Container) -> tuple[Container, int]:
    """The container and its rows."""

    def count() -> int:
        with opened(container) as file:
            return parquet_file(file, container).metadata.num_rows

    return container, retry(count)


def parquet_file(file: Any, container: Container) -> pq.ParquetFile:
    """The container that is open as `file`.

    Raises:
        InputError: it is no Parquet.
    """
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{container.address}: no Parquet file ({error}); remove it or name others") from error


def read_parquet(layout: Layout, container: Container, start: int, stop: int) -> Iterator[Record]:
    """Records of the rows from `start` up to `stop`."""
    columns = [layout.image, layout.label] if layout.label else [layout.image]
    with opened(container) as file:
        table = parquet_file(file, container)
        first = 0
        for number in range(table.metadata.num_row_groups):
            after = first + table.metadata.row_group(number).num_rows
            if first < stop and after > start:
                yield from _group_records(table, number, first, columns, container, start, stop)
            first = after


def _group_records(
    table: pq.ParquetFile, group: int, first: int, columns: list[str], container: Container, start: int, stop: int
) -> Iterator[Record]:
    row = first
    for batch in table.iter_batches(READ_AHEAD, row_groups=[group], columns=columns):
        for values in zip(*(batch[name] for name in columns), strict=True):
            if start <= row < stop:
                yield parquet_record(f"{container.name}/{row}", *(value.as_py() for value in values))
            row += 1


def parquet_record(name: str, image: Any, label: Any = None) -> Record:
    """One row; `image` is bytes or a struct of bytes and path."""
    content = image.get("bytes") if isinstance(image, dict) else image
    known = label if isinstance(label, int) and 0 <= label < 1 << 31 else -1
    if not isinstance(content, bytes):
        return Record(name, known, b"", "no bytes in this row (paths to other files are not followed)")
    return Record(name, known, content)
