"""Labelled images for evaluation, from shards or from an ImageFolder, behind one small interface."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jobs.run.terminal import warn
from shards.errors import InputError
from shards.images import BadImageError, Rules, prepare
from shards.manifest import Columns, open_manifest
from shards.reader import SampleError, SampleReader
from shards.sources.folders import classed_files, read_file

# Files of an ImageFolder whose content is in its fingerprint.
FINGERPRINTED = 256


class ImageSet(Protocol):
    """n encoded images with labels.

    name: for people; source: tag such as real, empty where there is none; labels: int64 [n], −1 where unknown;
    classes: names by label; identity: changes with the content and, of files, with when and where they were written;
    fingerprint: is the same of a copy on another machine.
    """

    name: str
    source: str
    labels: np.ndarray
    classes: tuple[str, ...]
    identity: str
    fingerprint: str

    def read(self, rows: Sequence[int]) -> list[np.ndarray | str]:
        """Encoded bytes, uint8 1-D, that every decoder shows alike, or why an image cannot be used."""
        ...

    def names(self, rows: np.ndarray) -> list[tuple[str, str]]:
        """Shard and key of each image; of a folder's, nothing and its path in the folder."""
        ...

    def where(self, row: int) -> str:
        """Path or shard and key of one image."""
        ...

    def close(self) -> None: ...


class FolderImages:
    """An ImageFolder: one folder per class, sorted by name; images directly in the root have no label.

    Files are listed and looked at as `hardviews build` does: links are followed, what systems leave behind is passed
    over, broken images are found, and all are shown as viewers show them.
    """

    def __init__(self, root: Path) -> None:
        self.classes, files = classed_files(str(root))
        if not files:
            raise InputError(f"images: {root} holds no images; give shards or an ImageFolder")
        self._root, self._files = root, sorted(files)
        self.labels = np.array([label for _, _, label in self._files], dtype=np.int64)
        self.name, self.source = "/".join(root.resolve().parts[-2:]), ""
        digest = hashlib.sha256(b"as built, colours too")  # features of images looked at in another way don't count
        for name, _, _ in self._files:
            digest.update(os.fsencode(name) + _stamp(root / name).encode())
        self.identity = digest.hexdigest()
        self.fingerprint = _fingerprint(root, [(name, size) for name, size, _ in self._files])

    def read(self, rows: Sequence[int]) -> list[np.ndarray | str]:
        return [_file_bytes(self._root / name, size) for name, size, _ in (self._files[row] for row in rows)]

    def names(self, rows: np.ndarray) -> list[tuple[str, str]]:
        return [("", printable(Path(self._files[row][0]))) for row in rows]

    def where(self, row: int) -> str:
        return printable(self._root / self._files[row][0])

    def close(self) -> None:
        """Nothing is held open."""


def _fingerprint(root: Path, files: Sequence[tuple[str, int]]) -> str:
    """SHA-256 over names and sizes of all files and the content of some, spread over all: images by the same name and
    of the same size are nearly always the same. What cannot be read is named when it is to be read as an image."""
    digest = hashlib.sha256()
    for number, (name, size) in enumerate(files):
        digest.update(os.fsencode(name) + f" {size}\n".encode())
        if number % -(-len(files) // FINGERPRINTED) == 0:
            digest.update(read_file(root / name, size)[0])
    return digest.hexdigest()


def printable(path: Path) -> str:
    """The path as text for any terminal and file: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _stamp(path: Path) -> str:
    """What tells a file from one that takes its place: that may have its size and time, but not the entry's change."""
    try:
        facts = path.stat()
    except OSError:  # a link that leads nowhere, as reading it will say
        return " gone\n"
    return f" {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}\n"


def _file_bytes(path: Path, size: int) -> np.ndarray | str:
    content, problem = read_file(path, size)
    try:
        return problem or np.frombuffer(prepare(content, Rules()).content, dtype=np.uint8)
    except BadImageError as error:
        return str(error)


class ShardImages:
    """Shards with a manifest, read with every check that training makes."""

    def __init__(self, address: str) -> None:
        manifest = open_manifest(address)
        self._reader = SampleReader([manifest])
        self.labels = manifest.columns(np.arange(len(manifest))).label.astype(np.int64)
        self.classes = tuple(manifest.classes)
        self.name = "/".join(Path(address).resolve().parts[-2:]) if "://" not in address else address
        self._manifest, self.source = manifest, manifest.source
        self.identity = self.fingerprint = manifest.fingerprint

    def read(self, rows: Sequence[int]) -> list[np.ndarray | str]:
        items = self._reader.read(np.asarray(rows, dtype=np.int64))
        return [item.reason if isinstance(item, SampleError) else item for item in items]

    def columns(self) -> Columns:
        """What the shards say of every image."""
        return self._manifest.columns(np.arange(len(self._manifest)))

    def names(self, rows: np.ndarray) -> list[tuple[str, str]]:
        columns = self._manifest.columns(rows)
        return [(self._manifest.shards[shard], key) for shard, key in zip(columns.shard, columns.key, strict=True)]

    def where(self, row: int) -> str:
        shard, key = self._reader.name(row)
        return f"{shard}:{key}"

    def close(self) -> None:
        self._reader.close()


def open_images(address: str | Path) -> ImageSet:
    """Shards where there is a manifest, else an ImageFolder.

    Raises:
        InputError: neither is there.
    """
    text = str(address)
    if "://" in text or (Path(text) / "manifest.json").is_file():
        return ShardImages(text)
    if not Path(text).is_dir():
        raise InputError(f"images: {text} does not exist; give a folder of shards or an ImageFolder")
    return FolderImages(Path(text))


def align_labels(train: ImageSet, test: ImageSet) -> np.ndarray:
    """The test labels, int64 [n], in the numbering of the training classes; −1 where the class is not among them.

    Raises:
        InputError: one of the two has no labels, or they share no class.
    """
    for role, images in (("train", train), ("test", test)):
        if not (images.labels >= 0).any():
            raise InputError(f"{role}: {images.name} has no labels; give labelled shards or an ImageFolder")
    table = label_table(train, test)
    if (table < 0).all():
        raise InputError(
            f"test: {test.name} shares no class with {train.name} "
            f"({', '.join(test.classes[:3])}… and {', '.join(train.classes[:3])}…); give images of the same classes"
        )
    return table[test.labels]


def label_table(train: ImageSet, test: ImageSet) -> np.ndarray:
    """int64 [test classes + 1]: label among the training classes by the test set's own label, matched by name; −1 for
    classes that the training set lacks and, as the last entry, for images without a label.

    Names match that differ in their Unicode form alone: macOS writes é as two characters, most others as one."""
    exact = {name: i for i, name in enumerate(train.classes)}
    index = {_composed(name): i for name, i in exact.items()}
    return np.array([exact.get(name, index.get(_composed(name), -1)) for name in test.classes] + [-1], dtype=np.int64)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def warn_unscored(train: ImageSet, test: ImageSet) -> None:
    """Says which test images have no label among the training classes, and so are not scored."""
    table = label_table(train, test)
    counts = np.bincount(test.labels[test.labels >= 0], minlength=len(test.classes))
    unknown = [name for name, label, count in zip(test.classes, table, counts, strict=False) if label < 0 and count]
    images = int(counts[table[:-1] < 0].sum())
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        names = f"{', '.join(unknown[:5])}{more}"
        warn(f"{images} images of {test.name} are not scored: {train.name} has no class {names}")
    unlabelled = int((test.labels < 0).sum())
    if unlabelled:
        warn(f"{unlabelled} images of {test.name} are not scored: they have no label")
