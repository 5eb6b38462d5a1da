"""Files that hold many images each: tars and Parquet."""

import io
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem

from shards.errors import InputError
from shards.files import filesystem, is_left_behind, join, local_path
from shards.retry import ATTEMPTS, FINAL, LONGEST_PAUSE, PAUSE, retry
from shards.sources.base import Record, cut_short, digest


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

    @property
    def identity(self) -> list[Any]:
        """What decides which images are read from it, wherever it lies."""
        return [self.name, self.size]


Reader = Callable[[Any, int, int], Iterator[Record]]  # a container, first image and the one after the last


@dataclass(frozen=True)
class ContainerPart:
    """Ranges of containers, read one after the other."""

    read: Reader
    ranges: tuple[tuple[Container, int, int], ...]
    """Container, first image and the one after the last."""

    def __len__(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)

    def fingerprint(self) -> str:
        return digest([(*container.identity, start, stop) for container, start, stop in self.ranges])

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
    address: str, containers: Sequence[Container], counts: Mapping[Any, int], read: Reader, part_size: int
) -> tuple[ContainerPart, ...]:
    """Containers, with so many images each, cut and joined into parts of `part_size` images."""
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
    """The files that a path means: itself or those with the suffix below it, else those that match it; sorted by name.

    Raises:
        InputError: there are none.
    """
    system, base = filesystem(path)
    if retry(lambda: system.isdir(base)):
        root = base
        below: Any = retry(lambda: system.find(base, detail=True))
        infos = {name: info for name, info in below.items() if name.endswith(suffix)}
    elif retry(lambda: system.exists(base)):
        root = base.rpartition("/")[0]
        infos: Any = {base: system.info(base)}
    else:
        root, pattern = pattern_of(system, base)
        infos = retry(lambda: system.glob(pattern, detail=True)) if pattern else {}
    infos = {str(name): info for name, info in infos.items() if not is_left_behind(name.removeprefix(root))}
    if not infos:
        raise InputError(f"{address}: there are no {suffix} files there; name a folder, a file, or a pattern with *")
    for name, info in infos.items():
        if info["type"] == "other":
            raise InputError(f"{name}: no regular file (a named pipe, socket or device); remove it or name others")
    above = system.unstrip_protocol(root)
    names = sorted((name.removeprefix(root).lstrip("/"), int(info["size"] or 0)) for name, info in infos.items())
    return [Container(above, name, size) for name, size in names]


def pattern_of(system: AbstractFileSystem, base: str) -> tuple[str, str]:
    """The folder below which a path with * or ? looks, and the path as a pattern for fsspec, empty without either mark.

    Both are signs of a name too, and [ is nothing else: folders that are there as they are written mean themselves.
    """

    def is_folder(path: str) -> bool:
        return retry(lambda: system.isdir(path))

    root, _, rest = base.rpartition("/")
    while re.search("[*?]", root) and not is_folder(root):
        root, _, more = root.rpartition("/")
        rest = f"{more}/{rest}"
    literal = re.sub(r"[*?[]", r"[\g<0>]", root)
    return root, f"{literal}/{rest.replace('[', '[[]')}" if re.search("[*?]", rest) else ""


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
        expected = min(len(buffer), max(0, self.container.size - start))
        if len(content) < expected:
            raise cut_short(self.container.address, len(content), expected)
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


def read_at(file: Any, offset: int, size: int) -> bytes:
    """Bytes from a seekable file."""
    file.seek(offset)
    return file.read(size)
