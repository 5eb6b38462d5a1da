"""WebDataset tars."""

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shards.errors import InputError
from shards.files import is_left_behind
from shards.retry import retry
from shards.sources.base import IMAGE_EXTENSIONS, LARGEST_CLASS, Options, Record, Runner, Source
from shards.sources.containers import Container, container_parts, containers_at, opened, read_at
from shards.sources.splits import of_split

LONGEST_CHAIN = 40  # links that lead to links
LARGEST_SPARSE = 1 << 30  # bytes of a member with holes, whose header may claim any size
PACKED = {
    rb"\x1f\x8b\x08": "compressed by gzip",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd",
    rb"\xfd7zXZ\0": "compressed by xz",
    rb"BZh[1-9]1AY&SY": "compressed by bzip2",
    rb"PK\x03\x04": "a zip archive",
}
LOOK_AHEAD = 1 << 20  # bytes read at a time where zeros are skipped
WHOLE_NUMBER = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True)
class Tar(Container):
    """A tar, which members of its samples are the images, and where their labels stand."""

    image: str | None = None
    """Extension of the images; None for the only one that fits."""
    label_from: str = "cls"
    """Where labels stand: `cls` (the file), `json:FIELD` or `folder`."""
    classes: tuple[str, ...] = ()
    """Class names of the source where labels are text; empty where they are numbers."""

    @property
    def identity(self) -> list[Any]:
        chosen = {"label_from": self.label_from} if self.label_from != "cls" else {}
        chosen |= {"classes": self.classes} if self.classes else {}
        return [self.name, self.size, *([self.image] if self.image else []), *([chosen] if chosen else [])]


def open_tars(path: str, options: Options, run: Runner) -> Source:
    """WebDataset tars. Labels that are text become classes in sorted order.

    Raises:
        InputError: no tars, several splits and none chosen, no such place of labels, a sample with several images that
            fit alike, or more different labels than there may be classes.
    """
    address = f"tars:{path}"
    label_from = options.label_from or "cls"
    if label_from not in ("cls", "folder") and not re.fullmatch("json:.+", label_from):
        raise InputError(f"--label-from {label_from}: labels come from cls, folder or json:FIELD")
    containers = of_split(address, containers_at(address, path, ".tar"), options.split)
    tars = [Tar(one.root, one.name, one.size, options.image, label_from) for one in containers]
    counted = dict(run(count_tar, tars))
    classes = class_names(address, (labels for _, labels in counted.values()))
    counts = {replace(tar, classes=classes): count for tar, (count, _) in counted.items()}
    tars = [replace(tar, classes=classes) for tar in tars]
    return Source(classes, container_parts(address, tars, counts, read_tar, options.part_size))


def class_names(address: str, labels: Iterable[frozenset[str]]) -> tuple[str, ...]:
    """The names of the classes, sorted, for the labels of all files; empty where all of them are numbers."""
    names = frozenset[str]().union(*labels)
    if all(map(WHOLE_NUMBER.fullmatch, names)):
        return ()
    if len(names) > LARGEST_CLASS:
        raise InputError(f"{address}: has {len(names)} different labels, too many for classes; choose another label")
    return tuple(sorted(names))


class Member(NamedTuple):
    """A file of a sample and where its bytes lie in the tar."""

    extension: str
    offset: int
    size: int
    """Bytes, holes included."""
    pieces: tuple[tuple[int, int], ...] = ()
    """Of a sparse file: place in the file and bytes of each stretch that is stored; zeros lie between them."""
    problem: str = ""
    """Why it has no bytes."""


@dataclass(frozen=True)
class Group:
    """Members of a tar that are one sample."""

    key: str
    members: tuple[Member, ...]


def groups(file: Any, above: str = "", start: int = 0, stop: int | None = None) -> Iterator[Group | str]:
    """Samples of a tar as WebDataset groups them: neighbours whose names agree up to the first dot.

    Where that would join several images whose names are numbered behind that dot (`photo.0001.jpg`), each is a sample.
    A second member of the same name begins a new sample. Links to files of the tar stand for those. Tars that were
    joined by appending are read to the last one. Yields an error message at last where the tar ends too early or its
    headers are damaged. What systems left behind is passed over, and nothing is extracted. A tar in the tar is read
    where it lies, from `start` to `stop`; its name and a slash, `above`, then stand before the keys.
    """
    key, members, problem = "", [], ""
    names: dict[str, Member | str] | None = None
    for info in headers(file, start, stop):
        if isinstance(info, str):
            problem = info
            break
        if info.isreg() and info.name.endswith(".tar") and not is_left_behind(info.name):
            if members:
                yield from samples(key, members)
                members = []
            yield from groups(file, f"{above}{info.name}/", info.offset_data, info.offset_data + info.size)
            continue
        name, extension = split_name(info.name)
        if not name or is_left_behind(info.name) or not (info.isreg() or info.islnk() or info.issym()):
            continue
        name = above + name
        if members and (name != key or any(extension == member.extension for member in members)):
            yield from samples(key, members)
            members = []
        key = name
        if info.isreg():
            members.append(member_of(info, extension))
        else:
            if names is None:
                whole = (one for one in headers(file, start, stop) if not isinstance(one, str))
                names = {posixpath.normpath(one.name): place_of(one) for one in whole}
            members.append(linked(info, names)._replace(extension=extension))
    if members:
        yield from samples(key, members)
    if problem:
        yield problem


def headers(file: Any, start: int = 0, stop: int | None = None) -> Iterator[tarfile.TarInfo | str]:
    """All headers of a tar, or of several that were joined, and at last what is wrong with it, if anything is.

    Args:
        start, stop: where the tar lies in the file; None for up to the file's end.
    """
    head = read_at(file, start, 10)
    packed = next((kind for magic, kind in PACKED.items() if re.match(magic, head, re.DOTALL)), None)
    if packed:
        yield f"{packed}, whatever its name says: unpack it first"
        return
    last: int = file.seek(0, os.SEEK_END) if stop is None else stop
    while 0 <= start < last:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.offset >= last:  # the tar has no end mark, and what follows is not its own
                        return
                    yield info
                    # tarfile keeps every header it has seen, and grows with the tar
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            yield f"the tar is damaged here: {error}"
            return
        # tarfile takes a damaged header for the end.
        if end < last and any(read_at(file, end, tarfile.BLOCKSIZE)):
            yield "the tar is damaged here: no header and no end mark"
            return
        start = after_zeros(file, end)


def after_zeros(file: Any, offset: int) -> int:
    """The offset of the first block from `offset` on that is not all zeros, −1 where there is none."""
    while block := read_at(file, offset, LOOK_AHEAD):
        padding = len(block) - len(block.lstrip(b"\0"))
        if padding < len(block):
            return offset + padding - padding % tarfile.BLOCKSIZE
        offset += len(block)
    return -1


def member_of(info: tarfile.TarInfo, extension: str) -> Member:
    """The place of a regular file."""
    pieces = tuple(getattr(info, "sparse", None) or ())
    if info.issparse() and info.size > LARGEST_SPARSE:
        return Member(extension, 0, 0, problem=f"a sparse file of {info.size} bytes")
    # A sparse file that is all holes stores one stretch of no bytes.
    return Member(extension, info.offset_data, info.size, pieces or ((0, 0),) if info.issparse() else ())


def place_of(info: tarfile.TarInfo) -> Member | str:
    """What a name of the tar stands for: a file, or for a link the name that it means; no file at all has a problem."""
    if info.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
    if info.islnk():
        return info.linkname
    return member_of(info, "") if info.isreg() else Member("", 0, 0, problem="not a file")


def linked(info: tarfile.TarInfo, names: dict[str, Member | str]) -> Member:
    """The file of the tar that a link means, through other links if need be."""
    place = place_of(info)
    for _ in range(LONGEST_CHAIN):
        if isinstance(place, Member):
            break
        place = names.get(posixpath.normpath(place), Member("", 0, 0, problem="not there"))
    if isinstance(place, str) or place.problem:
        return Member("", 0, 0, problem=f"a link to {info.linkname}, which is no file of this tar")
    return place


def samples(key: str, members: list[Member]) -> Iterator[Group]:
    """Neighbours that agree up to the first dot, as one sample, or one for each of several numbered images."""
    stems = {image.extension.rpartition(".")[0] for image in members if is_image(image.extension)}
    if len(stems) < 2 or not all(any(sign.isdigit() for sign in stem) for stem in stems):
        yield Group(key, tuple(members))
        return
    shared = [member for member in members if "." not in member.extension]
    for stem in dict.fromkeys(member.extension.rpartition(".")[0] for member in members if "." in member.extension):
        own = [
            member._replace(extension=member.extension.rpartition(".")[2])
            for member in members
            if member.extension.rpartition(".")[0] == stem
        ]
        yield Group(f"{key}.{stem}", (*own, *shared))


def split_name(name: str) -> tuple[str, str]:
    """Member name → key and extension; the key is empty for hidden files and those without extension."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}", extension) if stem and extension else ("", "")


def is_image(extension: str) -> bool:
    """Whether files of this extension, which may have dots, are images."""
    return extension.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def count_tar(tar: Tar) -> tuple[Tar, tuple[int, frozenset[str]]]:
    """The tar, its samples, and their different labels; damage counts as a sample, so that it is named.

    Raises:
        InputError: a sample has several images that fit alike.
    """

    def count() -> tuple[int, frozenset[str]]:
        number, labels = 0, set[str]()
        with opened(tar) as listed, opened(tar) as file:
            for group in groups(listed):
                number += 1
                if isinstance(group, Group) and (image := image_member(tar.address, group, tar.image)):
                    labels.add(label_text(tar, group, image, file)[0])
        return number, frozenset(labels - {""})

    return tar, retry(count)


def read_tar(tar: Tar, start: int, stop: int) -> Iterator[Record]:
    """Records of the samples from `start` up to `stop`."""
    numbers = {name: number for number, name in enumerate(tar.classes)}
    with opened(tar) as listed, opened(tar) as file:
        for number, group in enumerate(groups(listed)):
            if number >= stop:
                break
            if number >= start:
                yield tar_record(tar, group, file, numbers)


def tar_record(tar: Tar, group: Group | str, file: Any, numbers: Mapping[str, int]) -> Record:
    """One sample of the tar that is open as `file`; `numbers` are those of class names."""
    if isinstance(group, str):
        return Record(tar.name, -1, b"", group)
    name = f"{tar.name}/{group.key}"
    image = image_member(tar.name, group, tar.image)
    if image is None:
        kinds = ", ".join(member.extension for member in group.members)
        return Record(name, -1, b"", f"no {tar.image or 'image'} among its files ({kinds})")
    if image.problem:
        return Record(f"{name}.{image.extension}", -1, b"", image.problem)
    content = content_of(image, file)
    if len(content) < image.size:
        return Record(name, -1, b"", "the tar ends inside this image")
    text, why = label_text(tar, group, image, file)
    label = numbers.get(text, parse_label(text.encode()))
    if text and label < 0:
        why = f"a label that is no class number below {LARGEST_CLASS}"
        if not WHOLE_NUMBER.fullmatch(text):
            why = "a label that is text and no class (index: list the classes with --classes)"
    return Record(name, label, content, unlabelled=why)


def image_member(tar: str, group: Group, asked: str | None) -> Member | None:
    """The image of a sample: the wanted one, else the only one with a bare extension (`jpg` beside `seg.png`), else the
    only one.

    Raises:
        InputError: several fit alike.
    """
    if asked is not None:
        return next((member for member in group.members if member.extension.lower() == asked.lower()), None)
    images = [member for member in group.members if is_image(member.extension)]
    fitting = [member for member in images if "." not in member.extension] or images
    if len(fitting) > 1:
        kinds = ", ".join(member.extension for member in fitting)
        raise InputError(f"{tar}: several files of {group.key} may be the image ({kinds}); choose one with --image")
    return fitting[0] if fitting else None


def content_of(member: Member, file: Any) -> bytes:
    """The bytes of a member; fewer than its size where the tar ends too early."""
    if not member.pieces:
        return read_at(file, member.offset, member.size)
    content = bytearray(member.size)
    offset = member.offset
    for place, size in member.pieces:
        piece = read_at(file, offset, size)
        if len(piece) < size or place + size > member.size:
            return b""
        content[place : place + size] = piece
        offset += size
    return bytes(content)


def label_text(tar: Tar, group: Group, image: Member, file: Any) -> tuple[str, str]:
    """The label as text, or an empty one and why; `v1.jpg` may have a `v1.cls` or `v1.json` of its own."""
    if tar.label_from == "folder":
        folder = posixpath.dirname(posixpath.normpath(f"{tar.name}/{group.key}"))
        return posixpath.basename(folder).removesuffix(".tar"), ""
    kind, _, field = tar.label_from.partition(":")
    stem = image.extension.rpartition(".")[0]
    places = {member.extension: member for member in group.members if not member.problem}
    member = places.get(f"{stem}.{kind}") or places.get(kind)
    if member is None:
        hint = "; take a field of the .json file with --label-from json:FIELD" if "json" in places else ""
        return "", f"no .{kind} file{hint}"
    content = content_of(member, file)
    try:
        value = content.decode("utf-8-sig") if kind == "cls" else json.loads(content)[field]
    except KeyError:
        return "", f"no field {field} in the .json file"
    except (ValueError, TypeError):
        return "", f"what the .{kind} file holds is no {'text' if kind == 'cls' else 'JSON object'}"
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, str | int):
        return "", f"field {field} of the .json file is neither a number nor text"
    text = str(value).strip()
    return text, "" if text else f"an empty label in the .{kind} file"


def parse_label(text: bytes) -> int:
    """Content of a `.cls` file → class index, −1 where it is none."""
    text = text.strip()
    label = int(text) if text.isdigit() and len(text) < 10 else -1
    return label if label < LARGEST_CLASS else -1
