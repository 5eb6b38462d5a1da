"""Writing one shard: tar, DALI index, column file. All three appear whole or not at all, the column file last.

The column file is the mark of a finished shard. It also keeps the settings that the shard was made with and what was
left out of it, so that a build or a generation that was killed anywhere goes on by asking `finished` for each shard.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from shards.errors import InputError
from shards.files import clear_partials, is_left_behind, partial_name, publish, settle, write_whole
from shards.formats import Extension
from shards.manifest import (
    QUARANTINE_NAME,
    Manifest,
    ShardEntry,
    columns_name,
    format_columns,
    index_name,
    open_manifest,
    parse_columns,
    write_manifest,
)

LONGEST_NAME = 60  # characters of an original name kept in a key; ustar allows 100 with the rest
LOCK_NAME = ".lock"
MOST_REASONS = 20  # kept by name in the manifest; the quarantine file has them all


@dataclass(frozen=True)
class Sample:
    """One image to be written."""

    key: str
    content: bytes
    extension: Extension
    height: int
    width: int
    label: int = -1
    seed: int | None = None
    unlabelled: str = ""
    """Why there is no label."""
    converted: str = ""
    """From what to what the image was converted; empty where it was not."""


@dataclass(frozen=True)
class Rejected:
    """One image that is left out."""

    key: str
    """The key it would have had."""
    origin: str
    """Where it comes from: a file, or a container and a place in it."""
    reason: str


@dataclass(frozen=True)
class ShardResult:
    """What is known of a finished shard."""

    entry: ShardEntry
    labels: Mapping[int, int]
    """Samples by label; −1 counts the unlabelled."""
    rejected: tuple[Rejected, ...]
    unlabelled: Mapping[str, int]
    """Samples without a label, by the reason."""
    converted: Mapping[str, int]
    """Samples that were converted, by their kind."""
    marks: np.ndarray = field(compare=False)
    """uint64 per sample: CRC-32 and size of its image, the same for images that are the same."""


def shard_name(number: int) -> str:
    """File name of the tar with this number."""
    return f"shard-{number:06d}.tar"


def sample_key(number: int, name: str = "") -> str:
    """A key that is unique by its number and safe as a file name anywhere: no path, no dot, ASCII alone."""
    stem = re.sub(r"[^0-9A-Za-z_-]+", "_", name.rsplit("/", 1)[-1].split(".")[0]).strip("_")[:LONGEST_NAME]
    return f"{number:09d}-{stem}" if stem else f"{number:09d}"


class TarWriter:
    """Appends members to a tar and hashes it on the way; headers hold names and sizes, no times, owners or rights."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.hash = hashlib.sha256()

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def add(self, name: str, content: bytes) -> int:
        """Appends one file and returns the offset of its first byte."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        start = self.size
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return start

    def close(self) -> None:
        """Appends the end of the archive."""
        self._write(bytes(-(self.size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE))


@dataclass(frozen=True)
class Row:
    """What the column file and the index keep of one sample."""

    key: str
    members: tuple[tuple[str, int, int], ...]
    """Extension, offset and size of each file of the sample, the image first."""
    height: int
    width: int
    label: int
    crc32: int
    seed: int | None = None
    unlabelled: str = ""
    converted: str = ""


def write_shard(
    folder: Path, name: str, samples: Iterable[Sample | Rejected], settings: Mapping[str, Any]
) -> ShardResult:
    """Writes one shard; the same samples and settings give the same bytes.

    Args:
        folder: an existing folder.
        name: file name of the tar, from `shard_name`.
        samples: in the order of the tar, keys unique; either all have a seed or none.
        settings: all that decides the shard's content, as JSON; `finished` compares it.
    """
    rows: list[Row] = []
    rejected: list[Rejected] = []
    partial = partial_name(folder / name)
    with partial.open("wb") as file:
        tar = TarWriter(file)
        for sample in samples:
            if isinstance(sample, Rejected):
                rejected.append(sample)
            else:
                rows.append(add_sample(tar, sample))
        tar.close()
        file.flush()
        settle(file.fileno())
    publish(partial, folder / name)
    return write_columns(folder, name, rows, rejected, settings, tar.size, tar.hash.hexdigest())


def add_sample(tar: TarWriter, sample: Sample) -> Row:
    """Appends a sample's files to the tar."""
    members = [(sample.extension, tar.add(f"{sample.key}.{sample.extension}", sample.content), len(sample.content))]
    if sample.label >= 0:
        text = b"%d" % sample.label
        members.append(("cls", tar.add(f"{sample.key}.cls", text), len(text)))
    return Row(
        key=sample.key,
        members=tuple(members),
        height=sample.height,
        width=sample.width,
        label=sample.label,
        crc32=zlib.crc32(sample.content),
        seed=sample.seed,
        unlabelled=sample.unlabelled,
        converted=sample.converted,
    )


def write_columns(
    folder: Path,
    name: str,
    rows: Sequence[Row],
    rejected: Sequence[Rejected],
    settings: Mapping[str, Any],
    size: int,
    sha256: str,
    index: bytes | None = None,
) -> ShardResult:
    """Writes index and column file of a tar that stands already, with `size` bytes of the hash `sha256`.

    `index` replaces the index of the rows' own members, where a tar holds more than those.
    """
    index = format_index([(row.key, row.members) for row in rows]) if index is None else index
    write_whole(folder / index_name(name), index)
    labels = Counter(row.label for row in rows)
    note = {
        "settings": settings,
        "tar": {"size": size, "sha256": sha256},
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "labels": sorted(labels.items()),
        "rejected": [asdict(one) for one in rejected],
        "unlabelled": Counter(row.unlabelled for row in rows if row.unlabelled),
        "converted": Counter(row.converted for row in rows if row.converted),
    }
    arrays = {name: [getattr(row, name) for row in rows] for name in ("height", "width", "label", "crc32")}
    arrays["offset"] = [row.members[0][1] for row in rows]
    arrays["size"] = [row.members[0][2] for row in rows]
    seeds = [row.seed for row in rows if row.seed is not None]
    assert len(seeds) in (0, len(rows)), "either all samples of a shard have a seed or none"
    columns = format_columns([utf8(row.key).decode() for row in rows], arrays, seeds or None, note)
    write_whole(folder / columns_name(name), columns)
    return result_of(name, note, columns, arrays["crc32"], arrays["size"])


def format_index(samples: Iterable[tuple[str, Sequence[tuple[str, int, int]]]]) -> bytes:
    """DALI's index (v1.2, as its wds2idx writes it) of samples given as key and members (extension, offset, size)."""

    def fields(key: str, extension: str, offset: int, size: int) -> str:
        names = (extension, f"{key}.{extension}")
        # Fields are parted by blanks; the name serves DALI's messages alone.
        kind, name = (re.sub(r"\s", "_", text) for text in names)
        return f"{kind} {offset} {size} {name}"

    lines = [" ".join(fields(key, *member) for member in members) for key, members in samples]
    return utf8("\n".join([f"v1.2 {len(lines)}", *lines, ""]))


def utf8(text: str) -> bytes:
    """The text in UTF-8, with escapes for bytes of file names that are none."""
    return text.encode(errors="backslashreplace")


def result_of(name: str, note: Mapping[str, Any], columns: bytes, crc32: Any, size: Any) -> ShardResult:
    """The result that a column file with this note, and with these columns, stands for."""
    marks = np.asarray(crc32, np.uint64) << np.uint64(32) | np.asarray(size, np.uint64) & np.uint64((1 << 32) - 1)
    entry = ShardEntry(
        name=name,
        count=len(marks),
        size=note["tar"]["size"],
        sha256=note["tar"]["sha256"],
        columns_sha256=hashlib.sha256(columns).hexdigest(),
        index_sha256=note["index_sha256"],
    )
    rejected = tuple(Rejected(**one) for one in note["rejected"])
    counts = (note.get("unlabelled", {}), note.get("converted", {}))
    return ShardResult(entry, dict(note["labels"]), rejected, *counts, marks)


def finished(folder: Path, name: str, settings: Mapping[str, Any]) -> ShardResult | None:
    """The shard's result if it was written whole with these settings; None if it is still to be written.

    Raises:
        InputError: it was written with other settings; the message names the first that differs.
    """
    try:
        content = (folder / columns_name(name)).read_bytes()
        table, note = parse_columns(content)
        complete = (folder / name).stat().st_size == note["tar"]["size"] and (folder / index_name(name)).exists()
    except (OSError, pa.ArrowInvalid, ValueError, KeyError):
        return None  # absent, or damaged: written again
    if not complete:
        return None
    if note["settings"] != json.loads(json.dumps(settings)):
        raise InputError(
            f"{folder / name}: {difference(note['settings'], settings)}; pass --overwrite or another --out"
        )
    return result_of(name, note, content, table["crc32"], table["size"])


class ShardTask(Protocol):
    """What a shard is to be made of."""

    @property
    def name(self) -> str:
        """File name of the tar."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides the shard's content, as JSON."""
        ...


AnyTask = TypeVar("AnyTask", bound=ShardTask)


def split_done(folder: Path, tasks: Iterable[AnyTask], overwrite: bool) -> tuple[list[ShardResult], list[AnyTask]]:
    """Results of the shards that stand already, and the tasks of the others.

    Args:
        overwrite: a shard that stands with other settings is one to be written.

    Raises:
        InputError: a shard stands with other settings, and it is not to be overwritten.
    """
    results: list[ShardResult] = []
    missing: list[AnyTask] = []
    for task in tasks:
        try:
            result = finished(folder, task.name, task.settings)
        except InputError:
            if not overwrite:
                raise
            result = None
        if result is None:
            missing.append(task)
        else:
            results.append(result)
    return results, missing


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Names the first setting in which a shard on disk differs from the one asked for."""
    field = next((field for field in [*new, *old] if old.get(field) != new.get(field)), "order of settings")
    before, after = old.get(field), new.get(field)
    if isinstance(before, str) and isinstance(after, str) and len(before) == len(after) == 64:  # hashes say nothing
        return f"was written with another {field}"
    return f"was written with {field} {before!r}, not {after!r}"


def finish(
    folder: Path, results: Iterable[ShardResult], *, source: str, classes: Sequence[str], provenance: Mapping[str, Any]
) -> Manifest:
    """Writes the quarantine file, then the manifest, which makes the folder a data set.

    Args:
        results: of all shards, in any order.
        source: tag, e.g. "real" or "synthetic".
        classes: names by label; labels beyond them are named by their number.
        provenance: JSON about where the images come from.

    Raises:
        InputError: there is not one sample.
    """
    ordered = sorted(results, key=lambda result: result.entry.name)
    rejected = [one for result in ordered for one in result.rejected]
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in rejected]
    write_whole(folder / QUARANTINE_NAME, utf8("".join(lines)))
    labels = sum((Counter(result.labels) for result in ordered), Counter[int]())
    if not labels:
        where = folder / QUARANTINE_NAME
        raise InputError(f"{folder}: none of {len(rejected)} images can be read; the reasons are in {where}")
    names = [*classes, *map(str, range(len(classes), max(labels) + 1))]
    write_manifest(
        folder,
        source=source,
        classes=names,
        class_counts=[labels[label] for label in range(len(names))],
        unlabelled=labels[-1],
        entries=[result.entry for result in ordered if result.entry.count],
        provenance={**provenance, **summary(ordered)},
    )
    return open_manifest(folder)


def summary(results: Sequence[ShardResult]) -> dict[str, Any]:
    """What became of the images, for the manifest: counts, and counts by reason or kind where there are any."""
    left_out = [one.reason for result in results for one in result.rejected]
    marks = np.concatenate([result.marks for result in results])
    unlabelled = sum((Counter(result.unlabelled) for result in results), Counter[str]())
    converted = sum((Counter(result.converted) for result in results), Counter[str]())
    counts = {"reasons": by_kind(left_out), "converted": converted, "unlabelled": unlabelled}
    return {
        "quarantined": len(left_out),
        "duplicates": len(marks) - len(np.unique(marks)),
        **{name: dict(count.most_common()) for name, count in counts.items() if count},
    }


def by_kind(reasons: Iterable[str]) -> Counter[str]:
    """Reasons that differ in numbers alone counted as one, under the first of them; the rarest together."""
    examples: dict[str, str] = {}
    counts = Counter(examples.setdefault(re.sub(r"\d+", "#", reason), reason) for reason in reasons)
    common = Counter(dict(counts.most_common(MOST_REASONS)))
    rest = counts.total() - common.total()
    return common + Counter({"other reasons": rest})


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Makes the folder, keeps other processes from writing it meanwhile, clears what a killed one left half-written.

    Raises:
        InputError: it cannot be made, or another process is writing it.
    """
    if re.fullmatch(r"\w+:", next(iter(folder.parts), "")):  # what a Path makes of s3://…
        raise InputError(f"--out {folder}: shards are written to a local folder; copy them to the address from there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_NAME).open("w")
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}; choose a folder that can be written") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the process ends, however
        except OSError as error:
            raise InputError(f"--out {folder}: another process is writing it; wait, or choose another") from error
        clear_partials(folder)
        yield


def remove_shards(folder: Path, names: Iterable[str]) -> None:
    """Removes shards, the mark that they are finished first."""
    for name in names:
        for file in (columns_name(name), index_name(name), name):
            (folder / file).unlink(missing_ok=True)


def shards_in(folder: Path) -> list[str]:
    """Names of the tars in a folder, in order."""
    return sorted(path.name for path in folder.glob("*.tar") if not is_left_behind(path.name))
