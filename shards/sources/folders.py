"""Folders of image files."""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from shards.errors import InputError
from shards.files import filesystem, is_left_behind, join, local_path
from shards.retry import retry
from shards.sources.base import READ_AHEAD, Options, Record, Runner, Source, cut_short, digest
from shards.sources.splits import split_folder

IRREGULAR = -1  # size of what must not be opened: reading a named pipe waits for ever


@dataclass(frozen=True)
class FilePart:
    """Files under a root."""

    root: str
    files: tuple[tuple[str, int, int], ...]
    """Name relative to the root, size in bytes, label."""
    unlabelled: str = ""
    """Why files have no label."""

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
        for name, size, label in self.files:
            content, problem = read_file(folder / name, size)
            yield Record(name, label, content, problem, self._why(label))

    def _why(self, label: int) -> str:
        return self.unlabelled if label < 0 else ""

    def _fetched(self, system: AbstractFileSystem, base: str) -> Iterator[Record]:
        for start in range(0, len(self.files), READ_AHEAD):
            files = self.files[start : start + READ_AHEAD]
            paths = [join(base, name) for name, _, _ in files]
            contents = fetch_many(system, {path: size for path, (_, size, _) in zip(paths, files, strict=True)})
            for path, (name, _, label) in zip(paths, files, strict=True):
                content = contents[path]
                problem = "" if content is not None else "gone since the source was listed"
                yield Record(name, label, content or b"", problem, self._why(label))


def read_file(path: Path, size: int) -> tuple[bytes, str]:
    """The content of a file that was listed with this size, or none and why it cannot be read."""
    if size == IRREGULAR:
        return b"", "no regular file (a named pipe, socket or device)"
    try:
        return path.read_bytes(), ""
    except OSError as error:
        return b"", f"cannot be read: {error.strerror}"


def fetch_many(system: AbstractFileSystem, sizes: Mapping[str, int]) -> dict[str, bytes | None]:
    """Contents of remote files, None for those that are not there; what fails otherwise is tried again.

    Args:
        sizes: bytes of each file, by path.

    Raises:
        Exception: of a file that fails every time: the connection is at fault then, not the image.
    """
    contents: dict[str, bytes | None] = {}

    def fetch_missing() -> None:
        missing = [path for path in sizes if path not in contents]
        # Not `cat`, which takes signs in a name, such as [1], for a pattern.
        answers = dict(zip(missing, system.cat_ranges(missing, None, None, on_error="return"), strict=True))
        for path, answer in answers.items():
            if isinstance(answer, FileNotFoundError):
                contents[path] = None
            elif not isinstance(answer, Exception) and len(answer) == sizes[path]:
                contents[path] = bytes(answer)
        failed = [path for path in missing if path not in contents]
        if failed:
            answer = answers[failed[0]]
            raise answer if isinstance(answer, Exception) else cut_short(failed[0], len(answer), sizes[failed[0]])

    retry(fetch_missing)
    return contents


def open_imagefolder(path: str, options: Options, run: Runner) -> Source:
    """A folder per class, or folders of splits with these. Files beside the class folders have no label."""
    path = split_folder(f"imagefolder:{path}", path, options.split)
    classes, labelled = classed_files(path)
    if not classes:
        raise InputError(
            f"imagefolder:{path}: there are no class folders in it; pass folder:{path} for images without classes"
        )
    return Source(classes, file_parts(f"imagefolder:{path}", path, labelled, options, "in no class folder"))


def classed_files(path: str) -> tuple[tuple[str, ...], list[tuple[str, int, int]]]:
    """Class names, which are those of the folders at `path`, and all files with name, size and label as in `FilePart`.

    Raises:
        InputError: there is no such folder, or a class whose name is no UTF-8.
    """
    folders, files = listing(path)
    classes = tuple(sorted({folder.split("/", 1)[0] for folder in folders}))
    for name in classes:
        if any("\udc80" <= sign <= "\udcff" for sign in name):  # Python's stand-ins for such bytes
            raise InputError(f"{path}: the name of class {name!r} is no UTF-8; rename the folder")
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [(name, size, numbers[name.split("/", 1)[0]] if "/" in name else -1) for name, size in files]


def open_folder(path: str, options: Options, run: Runner) -> Source:
    """All files of a folder, or of one of its splits, without labels."""
    path = split_folder(f"folder:{path}", path, options.split)
    _, files = listing(path)
    unlabelled = [(name, size, -1) for name, size in files]
    return Source((), file_parts(f"folder:{path}", path, unlabelled, options, "folder: takes no classes"))


def file_parts(
    address: str, root: str, files: list[tuple[str, int, int]], options: Options, why: str
) -> tuple[FilePart, ...]:
    """The files in order, cut into parts; `why` some have no label."""
    if not files:
        raise InputError(f"{address}: there are no files in it; name a folder that holds images")
    # The order of a hash, not a shuffle: it depends on names alone, and a file more leaves the others' order as it is.
    files.sort(
        key=lambda file: (
            file[0] if options.keep_order else hashlib.blake2b(os.fsencode(file[0]), digest_size=16).hexdigest()
        )
    )
    size = options.part_size
    return tuple(FilePart(root, tuple(files[i : i + size]), why) for i in range(0, len(files), size))


def listing(path: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Folders, and files with their sizes in bytes, below a path: names relative to it, without what systems left.

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
        if is_left_behind(entry.name):
            continue
        name = prefix + entry.name
        try:
            status = entry.stat()
        except OSError:
            files.append((name, 0))  # a dangling link: reading it gives the reason
            continue
        if not entry.is_dir():
            files.append((name, status.st_size if stat.S_ISREG(status.st_mode) else IRREGULAR))
        elif identity(status) not in above:
            folders.append(name)
            walk(root, f"{name}/", above | {identity(status)}, folders, files)


def identity(status: os.stat_result) -> tuple[int, int]:
    """What makes a folder the same whatever links lead to it."""
    return status.st_dev, status.st_ino


def remote_listing(address: str) -> tuple[list[str], list[tuple[str, int]]]:
    """As `listing`, behind an fsspec address."""
    system, base = filesystem(address)
    contents: Any = retry(lambda: system.find(base, withdirs=True, detail=True))
    folders: set[str] = set()
    files: list[tuple[str, int]] = []
    for path, info in contents.items():
        name = path.removeprefix(base).strip("/")
        # An object whose name ends in a slash is how browsers of a store show a folder.
        if not name or is_left_behind(name) or path.endswith("/"):
            continue
        if info["type"] == "directory":
            folders.add(name)
        else:
            files.append((name, int(info["size"] or 0)))
            folders |= {name.rsplit("/", 1)[0]} if "/" in name else set()
    if not files and not folders:
        raise InputError(f"{address}: there is nothing there; name an existing folder")
    return sorted(folders), files
