"""What every source gives: records, parts of them, one for each output shard, and the names of classes."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "avif", "img"}
    | {"heic", "heif", "jxl", "jp2"}  # not read, but named for what they are
)
LARGEST_CLASS = (
    1_000_000  # class numbers end here: what is larger is an id, and the manifest has a name for each number
)
READ_AHEAD = 64  # remote files fetched at a time, rows of Parquet decoded at a time
Runner = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@dataclass(frozen=True)
class Record:
    """One image as it comes."""

    name: str
    """Where it comes from, relative to the source."""
    label: int
    """Class index, −1 where unknown."""
    content: bytes
    problem: str = ""
    """Why there are no bytes; empty where there are."""
    unlabelled: str = ""
    """Why there is no label, the same words for all images of which it is true; empty where there is one."""


class Part(Protocol):
    """What goes into one output shard; picklable."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A hash of what is listed: names, sizes, labels."""
        ...

    def records(self) -> Iterator[Record]:
        """As many records as the part is long, in order."""
        ...


@dataclass(frozen=True)
class Options:
    """How a source is listed."""

    part_size: int
    """Images of a part; the last has fewer."""
    keep_order: bool = False
    """The files of a folder in the order of their names rather than spread."""
    image: str | None = None
    """The column, or the extension in a tar, that is the image where several could be."""
    label: str | None = None
    """The column of labels of a Parquet file, or of the file with labels."""
    label_from: str | None = None
    """Where the labels of a tar stand: `cls`, `json:FIELD` or `folder`."""
    labels: str | None = None
    """A file of labels beside the images."""
    split: str | None = None
    """The split to take, where files or folders are named by splits."""


@dataclass(frozen=True)
class Source:
    """A listed source."""

    classes: tuple[str, ...]
    """Names by label, empty where the source has none."""
    parts: tuple[Part, ...]


def digest(listed: object) -> str:
    """SHA-256 of a listing."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def cut_short(path: str, got: int, size: int) -> OSError:
    """The error for an answer that has fewer bytes than the file."""
    return OSError(f"{path}: {got} bytes came instead of {size}")
