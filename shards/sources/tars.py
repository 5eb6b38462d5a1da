"""WebDataset tars."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shards.retry import retry
from shards.sources.base import Record, Runner, Source
from shards.sources.containers import Container, container_parts, containers_at, opened, read_at

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "avif", "img")


def open_tars(path: str, part_size: int, run: Runner, keep_order: bool) -> Source:
    """WebDataset tars; the label is that of the `.cls` file."""
    address = f"tars:{path}"
    containers = containers_at(address, path, ".tar")
    return Source((), container_parts(address, containers, count_tar, read_tar, part_size, run))


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
