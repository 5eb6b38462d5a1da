"""Where images come from. A source lists what it holds in a fixed order, cut into parts, one for each output shard.

    imagefolder:PATH    a folder per class; all files below it, whatever they are called
    folder:PATH         a folder of images without classes
    tars:PATH           WebDataset tars: a folder, one tar, or a pattern with * (also `webdataset:`)
    parquet:PATH        Parquet as Hugging Face datasets writes it: `image` (bytes, path) and `label`

PATH may be an fsspec address (`s3://bucket/images`). Files of folders are spread over the shards in the order of a hash
of their names, so that every shard holds all classes; tars and Parquet are read in their own order. What a source does
not know how to read becomes a record with a problem, never an exception.
"""

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from shards.errors import InputError
from shards.files import filesystem, join, local_path
from shards.retry import ATTEMPTS, FINAL, LONGEST_PAUSE, PAUSE, retry

READ_AHEAD = 64  # remote files fetched at a time, rows of Parquet decoded at a time
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "avif", "img")
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
class Source:
    """A listed source."""

    classes: tuple[str, ...]
    """Names by label, empty where the source has none."""
    parts: tuple[Part, ...]


def open_source(address: str, part_size: int, run: Runner, keep_order: bool = False) -> Source:
    """Lists a source.

    Args:
        address: KIND:PATH, see above.
        part_size: images of a part; the last has fewer.
        run: runs a function over tasks, for counting what large files hold.
        keep_order: the files of a folder in the order of their names rather than spread.

    Raises:
        InputError: unknown kind, nothing there, or nothing in it.
    """
    kind, _, path = address.partition(":")
    if kind not in SOURCES or not path:
        raise InputError(f"{address!r}: a source is KIND:PATH, and the kinds are {', '.join(SOURCES)}")
    return SOURCES[kind](path, part_size, run, keep_order)


# Folders of image files


@dataclass(frozen=True)
class FilePart:
    """Files under a root."""

    root: str
    files: tuple[tuple[str, int, int], ...]
    """Name relative to the root, size in bytes, label."""

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        return digest(self.files)

    def records(self) -> Iterator[Record]:
        folder = local_path(self.root)
        if folder is None:
            system, base = filesystem(self.root)
            yield from self._fetched(system, base)
            return
        for name, _, label in self.files:
            try:
                yield Record(name, label, (folder / name).read_bytes())
            except OSError as error:
                yield Record(name, label, b"", f"cannot be read: {error.strerror}")

    def _fetched(self, system: AbstractFileSystem, base: str) -> Iterator[Record]:
        for start in range(0, len(self.files), READ_AHEAD):
            files = self.files[start : start + READ_AHEAD]
            paths = [join(base, name) for name, _, _ in files]
            found = fetch_many(system, {path: size for path, (_, size, _) in zip(paths, files, strict=True)})
            for path, (name, _, label) in zip(paths, files, strict=True):
                content = found[path]
                problem = "" if content is not None else "gone since the source was listed"
                yield Record(name, label, content or b"", problem)


def fetch_many(system: AbstractFileSystem, sizes: Mapping[str, int]) -> dict[str, bytes | None]:
    """Contents of remote files, None for those that are not there; what fails otherwise is tried again.

    Args:
        sizes: bytes of each file, by path.

    Raises:
        Exception: of a file that fails every time: the connection is at fault then, not the image.
    """
    found: dict[str, bytes | None] = {}

    def fetch_missing() -> None:
        missing = [path for path in sizes if path not in found]
        # A list of two at least: for a single path fsspec returns bare bytes.
        answers: Any = system.cat([*missing, missing[0]][: max(2, len(missing))], on_error="return")
        for path in missing:
            answer = answers[path]
            if isinstance(answer, FileNotFoundError):
                found[path] = None
            elif not isinstance(answer, Exception) and len(answer) == sizes[path]:
                found[path] = bytes(answer)
        failed = [path for path in missing if path not in found]
        if failed:
            answer = answers[failed[0]]
            raise answer if isinstance(answer, Exception) else cut_short(failed[0], len(answer), sizes[failed[0]])

    retry(fetch_missing)
    return found


def cut_short(path: str, got: int, size: int) -> OSError:
    """The error for an answer that has fewer bytes than the file."""
    return OSError(f"{path}: {got} bytes came instead of {size}")


def open_imagefolder(path: str, part_size: int, run: Runner, keep_order: bool) -> Source:
    """A folder per class. Files beside the class folders have no label."""
    folders, files = listing(path)
    classes = tuple(sorted({folder.split("/", 1)[0] for folder in folders}))
    if not classes:
        raise InputError(
            f"imagefolder:{path}: there are no class folders in it; pass folder:{path} for images without classes"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    labelled = [(name, size, numbers[name.split("/", 1)[0]] if "/" in name else -1) for name, size in files]
    return Source(classes, file_parts(f"imagefolder:{path}", path, labelled, part_size, keep_order))


def open_folder(path: str, part_size: int, run: Runner, keep_order: bool) -> Source:
    """All files of a folder, without labels."""
    _, files = listing(path)
    unlabelled = [(name, size, -1) for name, size in files]
    return Source((), file_parts(f"folder:{path}", path, unlabelled, part_size, keep_order))


def file_parts(
    address: str, root: str, files: list[tuple[str, int, int]], part_size: int, keep_order: bool
) -> tuple[FilePart, ...]:
    """The files in order, cut into parts."""
    if not files:
        raise InputError(f"{address}: there are no files in it; name a folder that holds images")
    # The order of a hash, not a shuffle: it depends on names alone, and a file more leaves the others' order as it is.
    files.sort(
        key=lambda file: file[0] if keep_order else hashlib.blake2b(file[0].encode(), digest_size=16).hexdigest()
    )
    return tuple(FilePart(root, tuple(files[i : i + part_size])) for i in range(0, len(files), part_size))


def listing(path: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Folders, and files with their sizes in bytes, below a path: names relative to it, hidden ones left out.

    Raises:
        InputError: there is no such folder.
    """
    folder = local_path(path)
    if folder is None:
        return remote_listing(path)
    if not folder.is_dir():
        raise InputError(f"{path}: there is no such folder; name an existing one")
    folders: list[str] = []
    files: list[tuple[str, int]] = []
    walk(folder, "", {identity(folder.stat())}, folders, files)
    return folders, files


def walk(
    root: Path, prefix: str, above: set[tuple[int, int]], folders: list[str], files: list[tuple[str, int]]
) -> None:
    """Collects what is below `root / prefix`; links are followed, but for those to a folder they lie in (`above`)."""
    try:
        entries = list(os.scandir(root / prefix))
    except OSError as error:
        raise InputError(f"{root / prefix}: cannot be listed ({error.strerror}); check its rights") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name = prefix + entry.name
        try:
            status = entry.stat()
        except OSError:
            files.append((name, 0))  # a dangling link: reading it gives the reason
            continue
        if not entry.is_dir():
            files.append((name, status.st_size))
        elif identity(status) not in above:
            folders.append(name)
            walk(root, f"{name}/", above | {identity(status)}, folders, files)


def identity(status: os.stat_result) -> tuple[int, int]:
    """What makes a folder the same whatever links lead to it."""
    return status.st_dev, status.st_ino


def remote_listing(address: str) -> tuple[list[str], list[tuple[str, int]]]:
    """As `listing`, behind an fsspec address."""
    system, base = filesystem(address)
    found: Any = retry(lambda: system.find(base, withdirs=True, detail=True))
    folders: set[str] = set()
    files: list[tuple[str, int]] = []
    for path, info in found.items():
        name = path.removeprefix(base).strip("/")
        if not name or any(part.startswith(".") for part in name.split("/")):
            continue
        if info["type"] == "directory":
            folders.add(name)
        else:
            files.append((name, int(info["size"] or 0)))
            folders |= {name.rsplit("/", 1)[0]} if "/" in name else set()
    if not files and not folders:
        raise InputError(f"{address}: there is nothing there; name an existing folder")
    return sorted(folders), files


# Files that hold many images each


@dataclass(frozen=True)
class Container:
    """A tar or Parquet file."""

    root: str
    name: str
    """Relative to the root."""
    size: int
    """Bytes."""

    @property
    def address(self) -> str:
        return join(self.root, self.name)


Reader = Callable[[Container, int, int], Iterator[Record]]


@dataclass(frozen=True)
class ContainerPart:
    """Ranges of containers, read one after the other."""

    read: Reader
    ranges: tuple[tuple[Container, int, int], ...]
    """Container, first image and the one after the last."""

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)

    def fingerprint(self) -> str:
        return digest([(container.name, container.size, start, stop) for container, start, stop in self.ranges])

    def records(self) -> Iterator[Record]:
        for container, start, stop in self.ranges:
            yield from steadily(self.read, container, start, stop)


def steadily(read: Reader, container: Container, start: int, stop: int) -> Iterator[Record]:
    """Reads a range, and where the connection breaks goes on behind the last image that came."""
    for attempt in range(ATTEMPTS):
        try:
            for record in read(container, start, stop):
                yield record
                start += 1
        except FINAL:
            raise
        except Exception:
            if attempt == ATTEMPTS - 1 or local_path(container.root) is not None:
                raise
            time.sleep(min(PAUSE * 2**attempt, LONGEST_PAUSE))
        else:
            return


def container_parts(
    address: str,
    containers: list[Container],
    count: Callable[[Container], tuple[Container, int]],
    read: Reader,
    part_size: int,
    run: Runner,
) -> tuple[ContainerPart, ...]:
    """Containers cut and joined into parts of `part_size` images."""
    counts = dict(run(count, containers))
    parts: list[ContainerPart] = []
    ranges: list[tuple[Container, int, int]] = []
    room = part_size
    for container in containers:
        start = 0
        while start < counts[container]:
            stop = min(counts[container], start + room)
            ranges.append((container, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                parts.append(ContainerPart(read, tuple(ranges)))
                ranges, room = [], part_size
    if ranges:
        parts.append(ContainerPart(read, tuple(ranges)))
    if not parts:
        raise InputError(f"{address}: there are no samples in it; name files that hold images")
    return tuple(parts)


def containers_at(address: str, path: str, suffix: str) -> list[Container]:
    """The files that a path means: itself, those that match it, or those with the suffix below it; sorted by name.

    Raises:
        InputError: there are none.
    """
    system, base = filesystem(path)
    if "*" in base or "?" in base:
        root = base[: base.index(next(mark for mark in base if mark in "*?"))].rpartition("/")[0]
        found: Any = retry(lambda: system.glob(base, detail=True))
    elif retry(lambda: system.isdir(base)):
        root = base
        below: Any = retry(lambda: system.find(base, detail=True))
        found = {name: info for name, info in below.items() if name.endswith(suffix)}
    else:
        root = base.rpartition("/")[0]
        found = {base: system.info(base)} if system.exists(base) else {}
    if not found:
        raise InputError(f"{address}: there are no {suffix} files there; name a folder, a file, or a pattern with *")
    above = system.unstrip_protocol(root)
    names = sorted((name.removeprefix(root).lstrip("/"), int(info["size"] or 0)) for name, info in found.items())
    return [Container(above, name, size) for name, size in names]


def open_tars(path: str, part_size: int, run: Runner, keep_order: bool) -> Source:
    """WebDataset tars; the label is that of the `.cls` file."""
    address = f"tars:{path}"
    containers = containers_at(address, path, ".tar")
    return Source((), container_parts(address, containers, count_tar, read_tar, part_size, run))


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


def opened(container: Container) -> Any:
    """The container as a seekable file."""
    system, path = filesystem(container.address)
    file = system.open(path, "rb")
    return file if local_path(container.root) is not None else WholeReads(file, container)


class WholeReads(io.RawIOBase):
    """A remote file whose reads give all that was asked for, or raise OSError: a short answer is no end of the file."""

    def __init__(self, file: Any, container: Container) -> None:
        self.file = file
        self.container = container

    def readinto(self, buffer: Any) -> int:
        start = self.file.tell()
        content = self.file.read(len(buffer))
        wanted = min(len(buffer), max(0, self.container.size - start))
        if len(content) < wanted:
            raise cut_short(self.container.address, len(content), wanted)
        buffer[: len(content)] = content
        return len(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
        super().close()


# WebDataset tars


@dataclass(frozen=True)
class Group:
    """Members of a tar that are one sample."""

    key: str
    members: tuple[tuple[str, int, int], ...]
    """Extension, offset and size of each file."""


def groups(file: Any) -> Iterator[Group | str]:
    """Samples of a tar as WebDataset groups them: neighbours whose names agree up to the first dot.

    Yields an error message at last where the tar ends too early or its headers are damaged. Nothing is extracted.
    """
    key, members = "", []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if not info.isreg():
                    continue
                name, extension = split_name(info.name)
                if not name:
                    continue
                if name != key and members:
                    yield Group(key, tuple(members))
                    members = []
                key = name
                members.append((extension, info.offset_data, info.size))
                # tarfile keeps every header it has seen, and grows with the tar
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            problem = end_of(file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        problem = f"the tar is damaged here: {error}"
    if members:
        yield Group(key, tuple(members))
    if problem:
        yield problem


def end_of(file: Any, offset: int) -> str:
    """Why a tar does not end at this offset; empty where it does. (tarfile takes a damaged header for the end.)"""
    block = read_at(file, offset, tarfile.BLOCKSIZE)
    return "the tar is damaged here: no header and no end mark" if any(block) else ""


def split_name(name: str) -> tuple[str, str]:
    """Member name → key and extension; the key is empty for hidden files and those without extension."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}", extension) if stem and extension else ("", "")


def count_tar(container: Container) -> tuple[Container, int]:
    """The container and its samples; damage counts as one, so that it is named."""

    def count() -> int:
        with opened(container) as file:
            return sum(1 for _ in groups(file))

    return container, retry(count)


def read_tar(container: Container, start: int, stop: int) -> Iterator[Record]:
    """Records of the samples from `start` up to `stop`."""
    with opened(container) as headers, opened(container) as file:
        for number, group in enumerate(groups(headers)):
            if number >= stop:
                break
            if number >= start:
                yield tar_record(container.name, group, file)


def tar_record(tar: str, group: Group | str, file: Any) -> Record:
    """One sample of the tar that is open as `file`."""
    if isinstance(group, str):
        return Record(tar, -1, b"", group)
    name = f"{tar}/{group.key}"
    image = image_member(group)
    if image is None:
        kinds = ", ".join(extension for extension, _, _ in group.members)
        return Record(name, -1, b"", f"no image among its files ({kinds})")
    content = read_at(file, image[1], image[2])
    if len(content) < image[2]:
        return Record(name, -1, b"", "the tar ends inside this image")
    return Record(name, label_of(group, file), content)


def image_member(group: Group) -> tuple[str, int, int] | None:
    """Extension, offset and size of the first image of a sample."""
    return next((one for one in group.members if one[0].rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS), None)


def label_of(group: Group, file: Any) -> int:
    """The class index in the `.cls` file, −1 where there is none or it is no number."""
    place = next(((offset, size) for extension, offset, size in group.members if extension == "cls"), None)
    return parse_label(read_at(file, *place)) if place else -1


def parse_label(text: bytes) -> int:
    """Content of a `.cls` file → class index, −1 where it is no number."""
    text = text.strip()
    return int(text) if text.isdigit() and len(text) < 10 else -1


def read_at(file: Any, offset: int, size: int) -> bytes:
    """Bytes from a seekable file."""
    file.seek(offset)
    return file.read(size)


# Parquet


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


def digest(listed: object) -> str:
    """SHA-256 of a listing."""
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


SOURCES: dict[str, Callable[[str, int, Runner, bool], Source]] = {
    "imagefolder": open_imagefolder,
    "folder": open_folder,
    "tars": open_tars,
    "webdataset": open_tars,
    "parquet": open_parquet,
}
