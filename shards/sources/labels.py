"""Labels in a file of their own beside the images: CSV, TSV or Parquet with a column of names and one of labels."""

import csv
import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import InputError
from shards.sources.base import IMAGE_EXTENSIONS, LARGEST_CLASS, Part, Record, Source
from shards.sources.folders import FilePart

FILE_COLUMNS = ("name", "file", "filename", "file_name", "path", "filepath", "file_path")
KEY_COLUMNS = ("key", "__key__", "id", "image", "image_id", "imageid", "image_name", "img")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "classname", "class_id", "target", "category", "cls", "y")


@dataclass(frozen=True)
class LabelFile:
    """A file of labels, small enough to hand to workers, which read it themselves."""

    path: str
    sha256: str
    """Of its content."""
    column: str | None
    """The column of labels; None for the one that is named like it."""


@dataclass(frozen=True)
class LabelledPart:
    """A part whose labels stand in a file."""

    part: Part
    file: LabelFile

    def __len__(self) -> int:
        return len(self.part)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.part.fingerprint()} {self.file.sha256} {self.file.column}".encode()).hexdigest()

    def records(self) -> Iterator[Record]:
        labels, _ = read_labels(self.file)
        for record in self.part.records():
            label = labels.get(name_in(labels, record.name), -1)
            yield replace(record, label=label, unlabelled="" if label >= 0 else "the file of labels has none for it")


def with_labels(source: Source, path: str, column: str | None) -> Source:
    """The source with the labels of a file instead of its own.

    Raises:
        InputError: the file cannot be read, its columns have no clear meaning, it has two labels for a name, or a name
            for two files of a folder, or for none.
    """
    try:
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"--labels {path}: cannot be read ({error.strerror}); name a file") from error
    file = LabelFile(str(Path(path).resolve()), sha256, column)
    labels, classes = read_labels(file)
    check_names(
        file, labels, [name for part in source.parts if isinstance(part, FilePart) for name, _, _ in part.files]
    )
    return Source(classes, tuple(LabelledPart(part, file) for part in source.parts))


def check_names(file: LabelFile, labels: Mapping[str, int], names: Sequence[str]) -> None:
    """Raises InputError where a name of the file means two of these files, or none of its names means any."""
    files: dict[str, str] = {}
    for name in names:
        key = name_in(labels, name)
        if key and files.setdefault(key, name) != name:
            raise InputError(f"--labels {file.path}: {key!r} may be {files[key]} or {name}; write their paths into it")
    if names and not files:
        raise InputError(
            f"--labels {file.path}: names none of the images; it has {next(iter(labels))!r}, not {names[0]!r}"
        )


def name_in(labels: Mapping[str, int], name: str) -> str:
    """What an image is called in a file of labels: its path below the source, or a shorter one that still has its file
    name, with extension or without. Empty where it is not there."""
    *folders, last = normal(name).split("/")
    ends = dict.fromkeys((last, last.rpartition(".")[0], last.partition(".")[0]))
    below = (["/".join([*folders[start:], end]) for end in ends if end] for start in range(len(folders) + 1))
    return next((path for paths in below for path in paths if path in labels), "")


def normal(name: str) -> str:
    """A name in the one form of those that look alike: composed letters, forward slashes, no `./`."""
    return unicodedata.normalize("NFC", name.strip()).replace("\\", "/").removeprefix("./")


@lru_cache(1)
def read_labels(file: LabelFile) -> tuple[dict[str, int], tuple[str, ...]]:
    """Class numbers by name, and the names of the classes, none where the labels are numbers.

    Raises:
        InputError: see `with_labels`.
    """
    read = parquet_pairs if file.path.endswith(".parquet") else text_pairs
    pairs = [(normal(name), label) for name, label in read(file)]
    texts = {label for _, label in pairs if label}
    by_number = all(text.isascii() and text.removeprefix("-").isdigit() for text in texts)
    classes = () if by_number else tuple(sorted(texts))
    numbers = {name: number for number, name in enumerate(classes)}
    labels: dict[str, int] = {}
    for name, label in pairs:
        number = numbers.get(label, -1) if classes else int(label or -1)
        if labels.setdefault(name, number) != number:
            raise InputError(f"--labels {file.path}: {name!r} has several labels; name its image by its path")
    largest = max(labels.values(), default=-1)
    if largest < 0 or largest >= LARGEST_CLASS:
        fault = f"label {largest} is no class number below {LARGEST_CLASS}" if labels else "holds no labels"
        raise InputError(f"--labels {file.path}: {fault}; choose the column with --label")
    return labels, classes


def text_pairs(file: LabelFile) -> list[tuple[str, str]]:
    """Name and label of each line of a CSV or TSV file."""
    try:
        with Path(file.path).open(encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            delimiter = next((sign for sign in "\t;," if sign in first), ",")
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--labels {file.path}: cannot be read ({error}); save it as CSV in UTF-8") from error
    if not rows:
        raise InputError(f"--labels {file.path}: is empty")
    header = rows[0]
    if header[0].rpartition(".")[2].lower() in IMAGE_EXTENSIONS and len(header) == 2 and not file.column:
        header = ["name", "label"]  # a list without a first line of names
    else:
        rows = rows[1:]
    name, label = (header.index(column) for column in columns_of(file, header))
    wrong = next((number for number, row in enumerate(rows) if len(row) <= max(name, label)), None)
    if wrong is not None:
        raise InputError(f"--labels {file.path}: row {wrong + 1} has {len(rows[wrong])} columns, not {len(header)}")
    return [(row[name], row[label]) for row in rows]


def parquet_pairs(file: LabelFile) -> list[tuple[str, str]]:
    """Name and label of each row of a Parquet file."""
    try:
        names = pq.read_schema(file.path).names
        table = pq.read_table(file.path, columns=list(columns_of(file, names)))
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"--labels {file.path}: cannot be read ({error}); name a Parquet file") from error
    columns: Any = [table[column].to_pylist() for column in columns_of(file, names)]
    return [(str(name), text_of(label)) for name, label in zip(*columns, strict=True) if name is not None]


def text_of(label: Any) -> str:
    """A label as text: whole numbers without a fraction, empty for none."""
    if label is None or label != label:  # NaN is unlike itself
        return ""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()


def columns_of(file: LabelFile, header: list[str]) -> tuple[str, str]:
    """The columns of names and of labels.

    Raises:
        InputError: they cannot be told from their names.
    """
    known = ", ".join(header)
    names = [column for column in header if column.lower() in (*FILE_COLUMNS, *KEY_COLUMNS) and column != file.column]
    labels = [column for column in header if column.lower() in LABEL_COLUMNS and column not in names]
    if file.column is not None:
        if file.column not in header:
            raise InputError(f"--label {file.column}: {file.path} has {known}")
        labels = [file.column]
    elif not labels and len(header) == 2 and len(names) == 1:
        labels = [column for column in header if column not in names]
    if not names and len(header) == 2 and len(labels) == 1:
        names = [column for column in header if column not in labels]
    if len(names) != 1:
        raise InputError(
            f"--labels {file.path}: which of its columns ({known}) names the images is not clear; call one `name`"
        )
    if len(labels) != 1:
        raise InputError(
            f"--labels {file.path}: which of its columns ({known}) is the label is not clear; choose one with --label"
        )
    return names[0], labels[0]
