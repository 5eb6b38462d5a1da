"""Re-reading a data set: every file against its hash, and where a tar differs, every sample against its checksum."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shards.files import fetcher, filesystem, join, local_path
from shards.manifest import Columns, Manifest, ShardEntry, columns_name, index_name, open_manifest
from shards.sources.base import Runner
from shards.sources.containers import read_at
from shards.sources.tars import parse_label


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written."""

    file: str
    """Name in the data set's folder."""
    key: str
    """The damaged sample; empty where the damage is none of a sample's."""
    reason: str


@dataclass(frozen=True)
class ShardCheck:
    """What a worker needs to check one shard."""

    root: str
    entry: ShardEntry


def verify(manifest: Manifest, run: Runner) -> Iterator[tuple[ShardEntry, list[Damage]]]:
    """Yields every shard with what is wrong with it, as they are checked.

    The manifest itself was checked when it was opened.
    """
    yield from run(check_shard, [ShardCheck(manifest.root, entry) for entry in manifest.entries])


def check_shard(task: ShardCheck) -> tuple[ShardEntry, list[Damage]]:
    """Reads all files of one shard."""
    entry = task.entry
    fetch = fetcher(task.root)
    damages = []
    hashes = {columns_name(entry.name): entry.columns_sha256, index_name(entry.name): entry.index_sha256}
    for name, sha256 in hashes.items():
        try:
            if hashlib.sha256(fetch(name)).hexdigest() != sha256:
                damages.append(Damage(name, "", "differs from its hash"))
        except OSError as error:
            damages.append(Damage(name, "", reason_of(error)))
    try:
        with open_file(task.root, entry.name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                damages += check_samples(task, file, readable=not damages)
    except OSError as error:
        damages.append(Damage(entry.name, "", reason_of(error)))
    return entry, damages


def open_file(root: str, name: str) -> Any:
    """A file under a root, to be read at any offset."""
    folder = local_path(root)
    if folder is not None:
        return (folder / name).open("rb")
    system, path = filesystem(join(root, name))
    return system.open(path, "rb")


def check_samples(task: ShardCheck, file: Any, readable: bool) -> list[Damage]:
    """Names the samples of a tar that differs from its hash, if columns and index are `readable`."""
    size = file.seek(0, 2)
    shape = "" if size == task.entry.size else f"; it has {size} bytes instead of {task.entry.size}"
    whole = Damage(task.entry.name, "", f"differs from its hash{shape}")
    if not readable:
        return [whole]
    manifest = open_manifest(task.root)
    columns = manifest.shard_columns(manifest.shards.index(task.entry.name))
    members = members_by_image(fetcher(task.root)(index_name(task.entry.name)))
    checks = (
        (columns.key[row], sample_damage(columns, row, members[int(columns.offset[row])], manifest.classes, file))
        for row in range(len(columns))
    )
    return [whole, *(Damage(task.entry.name, key, reason) for key, reason in checks if reason)]


def members_by_image(index: bytes) -> dict[int, list[tuple[str, int, int]]]:
    """Offset of any file of a sample → extension, offset and size of all its files, from DALI's index."""
    by_offset = {}
    for line in index.decode().splitlines()[1:]:
        words = line.split()
        quads = zip(words[::4], words[1::4], words[2::4], strict=True)
        members = [(extension, int(offset), int(size)) for extension, offset, size in quads]
        by_offset |= {offset: members for _, offset, _ in members}
    return by_offset


def sample_damage(
    columns: Columns, row: int, members: list[tuple[str, int, int]], classes: Sequence[str], file: Any
) -> str:
    """What is wrong with one sample's files in the tar; empty where nothing is."""
    label = int(columns.label[row])
    content = read_at(file, int(columns.offset[row]), int(columns.size[row]))
    if len(content) < columns.size[row]:
        return "cut off"
    if zlib.crc32(content) != columns.crc32[row]:
        return "image differs from its checksum"
    for extension, offset, size in members:
        header = read_at(file, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError:
            return f"header of its .{extension} file is damaged"
        text = read_at(file, offset, size) if extension == "cls" else b""
        # An indexed tar's label may be the name of its class.
        if extension == "cls" and parse_label(text) != label and (label < 0 or text.strip() != classes[label].encode()):
            return "label differs"
    return ""


def reason_of(error: OSError) -> str:
    """A few words on why a file cannot be read."""
    return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
