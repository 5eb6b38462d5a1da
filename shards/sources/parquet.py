"""Parquet as Hugging Face datasets writes it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import InputError
from shards.retry import retry
from shards.sources.base import IMAGE_EXTENSIONS, LARGEST_CLASS, READ_AHEAD, Options, Record, Runner, Source
from shards.sources.containers import Container, container_parts, containers_at, opened
from shards.sources.splits import of_split


@dataclass(frozen=True)
class Table(Container):
    """A Parquet file with what its columns mean. Files of one source may differ in their columns and classes."""

    image: str = ""
    """Column of encoded images."""
    label: str | None = None
    """Column of labels: numbers, or text."""
    own: tuple[str, ...] = ()
    """The file's class names; empty where its labels are mere numbers."""
    text: bool = False
    """Whether labels are the names rather than places in `own`."""
    classes: tuple[str, ...] = field(default=())
    """Class names of the source."""

    @property
    def identity(self) -> list[Any]:
        return [getattr(self, one.name) for one in fields(self) if one.name != "root"]


def open_parquet(path: str, options: Options, run: Runner) -> Source:
    """Parquet with an image column; class names are those of the label's feature, or the texts of its labels.

    Raises:
        InputError: there are several splits and none is chosen, columns that fit alike, or labels that do not agree.
    """
    address = f"parquet:{path}"
    containers = of_split(address, containers_at(address, path, ".parquet"), options.split)
    rows = dict(run(partial(inspect, options), containers))
    tables = [table for table, _ in (rows[container] for container in containers)]
    classes = all_classes(tables)
    counts = {replace(table, classes=classes): count for table, count in rows.values()}
    named = [replace(table, classes=classes) for table in tables]
    return Source(classes, container_parts(address, named, counts, read_parquet, options.part_size))


def inspect(options: Options, container: Container) -> tuple[Container, tuple[Table, int]]:
    """The file, what its columns mean, and its rows.

    Raises:
        InputError: no Parquet, no column of images, several that fit alike, or labels that are no classes.
    """

    def read() -> tuple[Table, int]:
        with opened(container) as file:
            parquet = parquet_file(file, container)
            return table_of(parquet, container, options), parquet.metadata.num_rows

    return container, retry(read)


def table_of(parquet: pq.ParquetFile, container: Container, options: Options) -> Table:
    """Finds the image and the label among a file's columns, by Hugging Face's notes on them or by type and name."""
    schema = parquet.schema_arrow
    notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = notes.get("info", {}).get("features", {})
    image = image_column(schema, features, container.address, options.image)
    label = label_column(schema, features, container.address, options.label)
    table = Table(container.root, container.name, container.size, image, label)
    if label is None:
        return table
    kind = schema.field(label).type
    names = features.get(label, {}).get("names")
    if names and pa.types.is_integer(kind):
        return replace(table, own=tuple(names))
    if is_text(kind):
        texts = parquet.read([label])[label].unique().to_pylist()
        return replace(table, own=tuple(sorted(text for text in texts if text is not None)), text=True)
    if pa.types.is_floating(kind):
        values = parquet.read([label])[label].unique().to_pylist()
        odd = next((value for value in values if value is not None and value == value and not value.is_integer()), None)
        if odd is not None:
            raise InputError(f"{container.address}: column {label} holds {odd}, no class; name another with --label")
    return table


def image_column(schema: pa.Schema, features: dict[str, Any], address: str, chosen: str | None) -> str:
    """The column of images: `image`, else the only one of their type, else the only binary one that is named like one.

    Raises:
        InputError: there is none, there are several that fit alike, or not the one that is wanted.
    """
    structs = [one.name for one in schema if pa.types.is_struct(one.type) and one.type.get_field_index("bytes") >= 0]
    binary = [one.name for one in schema if pa.types.is_binary(one.type) or pa.types.is_large_binary(one.type)]
    every = [*structs, *binary]
    if not every:
        known = ", ".join(schema.names)
        raise InputError(
            f"{address}: no column with encoded images (a struct of bytes and path, or binary) among {known}"
        )
    if chosen is not None:
        if chosen not in every:
            raise InputError(f"--image {chosen}: {address} has {', '.join(every)}")
        return chosen
    typed = [name for name in every if name in structs or features.get(name, {}).get("_type") == "Image"]
    alike = [name for name in binary if name.lower() in IMAGE_EXTENSIONS]
    fitting = typed or alike or binary
    if "image" in every:
        return "image"
    if len(fitting) > 1:
        raise InputError(f"{address}: several columns may be the image ({', '.join(fitting)}); choose one with --image")
    return fitting[0]


def label_column(schema: pa.Schema, features: dict[str, Any], address: str, chosen: str | None) -> str | None:
    """The column of labels: `label`, else the only one with class names, else `cls`.

    Raises:
        InputError: there are several that fit alike, or not the one that is wanted.
    """
    fitting = [
        one.name
        for one in schema
        if pa.types.is_integer(one.type) or pa.types.is_floating(one.type) or is_text(one.type)
    ]
    if chosen is not None:
        if chosen not in fitting:
            raise InputError(f"--label {chosen}: {address} has no such column of numbers or text")
        return chosen
    named = [name for name in fitting if features.get(name, {}).get("_type") == "ClassLabel"]
    if "label" in fitting:
        return "label"
    if len(named) > 1:
        raise InputError(f"{address}: several columns may be the label ({', '.join(named)}); choose one with --label")
    return named[0] if named else "cls" if "cls" in fitting else None


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, also as a dictionary."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def all_classes(tables: Sequence[Table]) -> tuple[str, ...]:
    """The classes of all files, by name: in the order of their features, then texts in sorted order.

    Raises:
        InputError: some labels have names and some are mere numbers.
    """
    labelled = [table for table in tables if table.label is not None]
    bare = next((table for table in labelled if not table.own and not table.text), None)
    named = next((table for table in labelled if table.own), None)
    if bare and named:
        raise InputError(
            f"{bare.address}: its labels are numbers without names, those of {named.name} have names; build them apart"
        )
    listed = [name for table in labelled if not table.text for name in table.own]
    texts = sorted({name for table in labelled if table.text for name in table.own})
    return tuple(dict.fromkeys([*listed, *texts]))


def parquet_file(file: Any, container: Container) -> pq.ParquetFile:
    """The container that is open as `file`.

    Raises:
        InputError: it is no Parquet.
    """
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise InputError(f"{container.address}: no Parquet file ({error}); remove it or name others") from error


def read_parquet(table: Table, start: int, stop: int) -> Iterator[Record]:
    """Records of the rows from `start` up to `stop`."""
    numbers = {name: number for number, name in enumerate(table.classes)}
    with opened(table) as file:
        parquet = parquet_file(file, table)
        first = 0
        for number in range(parquet.metadata.num_row_groups):
            after = first + parquet.metadata.row_group(number).num_rows
            if first < stop and after > start:
                for row, image, label in group_rows(parquet, number, first, table):
                    if start <= row < stop:
                        known = class_number(label, table, numbers)
                        yield parquet_record(f"{table.name}/{row}", image.as_py(), known, table.label)
            first = after


def group_rows(parquet: pq.ParquetFile, group: int, first: int, table: Table) -> Iterator[tuple[int, Any, Any]]:
    """Row number, image and label of a row group's rows, not yet decoded."""
    columns = [table.image, table.label] if table.label else [table.image]
    row = first
    for batch in parquet.iter_batches(READ_AHEAD, row_groups=[group], columns=columns):
        labels = batch[table.label] if table.label else [None] * len(batch)
        for image, label in zip(batch[table.image], labels, strict=True):
            yield row, image, label
            row += 1


def class_number(label: Any, table: Table, numbers: dict[str, int]) -> int:
    """The number of a row's class in the source, −1 where it has none."""
    value = None if label is None else label.as_py()
    if table.text:
        return -1 if value is None else numbers[value]
    if value is None or value != value or value < 0:  # NaN is unlike itself
        return -1
    number = int(value)
    if table.own:
        return numbers[table.own[number]] if number < len(table.own) else -1
    return number if number < LARGEST_CLASS else -1


def parquet_record(name: str, image: Any, label: int, column: str | None) -> Record:
    """One row; `image` is bytes or a struct of bytes and path."""
    why = (
        ""
        if label >= 0
        else f"no class, or a number from {LARGEST_CLASS} on, in column {column}"
        if column
        else "no column of labels"
    )
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        return Record(name, label, b"", "no bytes in this row (paths to other files are not followed)")
    return Record(name, label, content, unlabelled=why)
