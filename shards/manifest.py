"""What a folder of shards holds: a manifest of all shards, and one column file per shard with a row for each sample.

    manifest.json           data set: schema version, source, classes, provenance; per shard: name, count, bytes, hashes
    shard-000000.tar        WebDataset: KEY.jpg and, where labelled, KEY.cls (the class index as text)
    shard-000000.arrow      Arrow IPC file, a row per sample: key, offset, size, height, width, label, crc32[, seed]
    shard-000000.idx        DALI's index of the tar
    quarantine.jsonl        what the build left out, and why

The manifest starts with the SHA-256 of its own remaining bytes and holds the hashes of tars, columns and indexes, so a
flipped byte is found wherever it is. Column files are read when their rows are asked for; memory grows with the number
of shards.
Letters: n rows asked for, S shards, C classes.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.errors import InputError
from shards.files import Fetch, fetcher, join, write_whole

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.jsonl"
HEADS = (b'{"sha256":"', b'",\n')  # what stands before and after the manifest's hash of everything that follows
CACHED_ROWS = 1 << 20  # rows of column files kept in memory: about 80 bytes each

TYPES: dict[str, Any] = {
    "offset": np.int64,
    "size": np.int64,
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
    "crc32": np.uint32,
}


@dataclass(frozen=True)
class Columns:
    """Facts about n samples, one array element each."""

    key: list[str]
    """Name of the sample in its tar, without extension."""
    shard: np.ndarray
    """int32[n]: number of the shard in the data set."""
    offset: np.ndarray
    """int64[n]: where the image's bytes start in the tar."""
    size: np.ndarray
    """int64[n]: length of the image's bytes."""
    height: np.ndarray
    """int32[n]: pixels."""
    width: np.ndarray
    """int32[n]: pixels."""
    label: np.ndarray
    """int32[n]: class index, −1 where unknown."""
    crc32: np.ndarray
    """uint32[n]: zlib.crc32 of the image's bytes."""
    seed: np.ndarray | None = None
    """int64[n] for synthetic data: the seed that a generator gave the image for."""

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the manifest keeps of one shard."""

    name: str
    """File name of the tar."""
    count: int
    """Samples."""
    size: int
    """Bytes of the tar."""
    sha256: str
    """Hex digest of the tar."""
    columns_sha256: str
    """Hex digest of the column file."""
    index_sha256: str
    """Hex digest of DALI's index."""


class Manifest:
    """A data set on disk or behind an address; cheap to open, safe to share between threads.

    Attributes:
        root: path or fsspec address.
        source: tag such as "real" or "synthetic".
        classes: class names by label.
        class_counts: int64[C], samples by label.
        unlabelled: samples without a label.
        entries: one `ShardEntry` per shard.
        counts: int64[S], samples per shard.
        starts: int64[S + 1], row of each shard's first sample, and the number of rows at the end.
        provenance: where the images come from and with which settings they were written.
    """

    def __init__(self, root: str, content: Mapping[str, Any], fetch: Fetch) -> None:
        self.root = root
        self.source: str = content["source"]
        self.classes = tuple(content["classes"])
        self.class_counts = np.asarray(content["class_counts"], np.int64)
        self.unlabelled = int(content["unlabelled"])
        self.provenance: dict[str, Any] = content["provenance"]
        shards = content["shards"]
        self.entries = tuple(
            ShardEntry(*row) for row in zip(*(shards[name] for name in ShardEntry.__annotations__), strict=True)
        )
        self.counts = np.asarray(shards["count"], np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
        self._fetch = fetch
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def shards(self) -> tuple[str, ...]:
        """File names of the tars."""
        return tuple(entry.name for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the hashes of all shards: the same for the same images in the same order, wherever they lie."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.entries).encode()).hexdigest()

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """int64[n] row numbers → int32[n] shard numbers."""
        return (np.searchsorted(self.starts, rows, side="right") - 1).astype(np.int32)

    def shard_columns(self, shard: int) -> Columns:
        """All rows of one shard, in the order of the tar."""
        return self.columns(np.arange(self.starts[shard], self.starts[shard + 1]))

    def columns(self, rows: np.ndarray) -> Columns:
        """Facts about the samples of the given row numbers, int64[n] in any order.

        Raises:
            IndexError: for a row outside the data set.
            InputError: where a shard's column file is missing or damaged.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a data set of {len(self)}")
        shard = self.shard_of(rows)
        local = rows - self.starts[shard]
        arrays = {name: np.zeros(rows.size, kind) for name, kind in TYPES.items()}
        keys: list[str] = [""] * rows.size
        seed = None
        for number in np.unique(shard):
            table = self._table(int(number))
            where = np.flatnonzero(shard == number)
            for name, array in arrays.items():
                array[where] = table[name].to_numpy()[local[where]]
            for place, key in zip(where, table["key"].take(local[where]).to_pylist(), strict=True):
                keys[place] = key
            if "seed" in table.column_names:
                seed = np.zeros(rows.size, np.int64) if seed is None else seed
                seed[where] = table["seed"].to_numpy()[local[where]]
        return Columns(keys, shard, **arrays, seed=seed)

    def _table(self, shard: int) -> pa.Table:
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
        entry = self.entries[shard]
        name = columns_name(entry.name)
        content = fetch_file(self._fetch, self.root, name)
        if hashlib.sha256(content).hexdigest() != entry.columns_sha256:
            raise InputError(f"{join(self.root, name)}: damaged (its hash is not the manifest's); {mend(self.root)}")
        table, _ = parse_columns(content)
        with self._lock:
            self._tables[shard] = table
            while len(self._tables) > 1 and sum(map(len, self._tables.values())) > CACHED_ROWS:
                self._tables.popitem(last=False)
        return table


def open_manifest(address: str | Path, fetch: Fetch | None = None) -> Manifest:
    """Opens the data set at a path or fsspec address.

    Args:
        address: folder that `hardviews build`, `generate` or `index` wrote.
        fetch: reads a file under it by name; by default from the address itself.

    Raises:
        InputError: nothing there, no manifest, another schema version, or a damaged manifest.
    """
    root = str(address)
    fetch = fetch or fetcher(root)
    content = parse_manifest(fetch_file(fetch, root, MANIFEST_NAME), join(root, MANIFEST_NAME))
    return Manifest(root, content, fetch)


def fetch_file(fetch: Fetch, root: str, name: str) -> bytes:
    """A file of a data set.

    Raises:
        InputError: where it is missing or cannot be read.
    """
    try:
        return fetch(name)
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "build it with `hardviews build`, or index foreign tars with `hardviews index`"
        raise InputError(f"{root}: there is no {name}; {remedy if name == MANIFEST_NAME else mend(root)}") from error
    except OSError as error:
        raise InputError(f"{join(root, name)}: cannot be read ({error}); check the address and the rights") from error


def mend(root: str) -> str:
    """The remedy for a damaged data set."""
    return f"see `hardviews verify {root}`, then run the build again or restore the file"


def parse_manifest(raw: bytes, name: str) -> dict[str, Any]:
    """The content of manifest.json.

    Raises:
        InputError: for damage and for another schema version.
    """
    before, after = HEADS
    body = raw[len(before) + 64 + len(after) :]
    head = before + hashlib.sha256(body).hexdigest().encode() + after
    damaged = InputError(f"{name}: damaged (its content is not that of its own hash); {mend(name.rsplit('/', 1)[0])}")
    if not raw.startswith(head):
        # Other versions may hash otherwise, so a manifest that says so is not damage.
        version = _version(raw)
        if version is None or version == SCHEMA_VERSION:
            raise damaged
    else:
        content = json.loads(b"{" + body)
        version = content["schema_version"]
        if version == SCHEMA_VERSION:
            if not all(map(stays_inside, content["shards"]["name"])):
                raise InputError(f"{name}: a shard's name leads out of the folder; build the shards again")
            return content
    raise InputError(f"{name}: schema_version {version}, this program reads {SCHEMA_VERSION}; build the shards again")


def stays_inside(name: str) -> bool:
    """Whether a file name under a root means a file under that root."""
    return not name.startswith("/") and ".." not in name.split("/")


def _version(raw: bytes) -> int | None:
    try:
        version = json.loads(raw)["schema_version"]
    except (ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def write_manifest(
    root: Path,
    *,
    source: str,
    classes: Sequence[str],
    class_counts: Sequence[int],
    unlabelled: int,
    entries: Sequence[ShardEntry],
    provenance: Mapping[str, Any],
) -> None:
    """Writes manifest.json whole or not at all; the same content gives the same bytes."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "classes": list(classes),
        "class_counts": [int(count) for count in class_counts],
        "unlabelled": int(unlabelled),
        "provenance": provenance,
        "shards": {name: [getattr(entry, name) for entry in entries] for name in ShardEntry.__annotations__},
    }
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()[1:] + b"\n"
    before, after = HEADS
    write_whole(root / MANIFEST_NAME, before + hashlib.sha256(body).hexdigest().encode() + after + body)


def columns_name(shard: str) -> str:
    """File name of a tar → that of its column file."""
    return f"{shard.removesuffix('.tar')}.arrow"


def index_name(shard: str) -> str:
    """File name of a tar → that of DALI's index."""
    return f"{shard.removesuffix('.tar')}.idx"


def format_columns(
    keys: Sequence[str], arrays: Mapping[str, Any], seed: Sequence[int] | None, note: Mapping[str, Any]
) -> bytes:
    """A column file: `arrays` has an entry per name in `TYPES`; `note` is kept beside the rows as JSON."""
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    columns |= {name: pa.array(np.asarray(arrays[name], kind)) for name, kind in TYPES.items()}
    if seed is not None:
        columns["seed"] = pa.array(np.asarray(seed, np.int64))
    text = json.dumps(note, ensure_ascii=False).encode(errors="backslashreplace")  # file names that are no UTF-8
    table = pa.table(columns).replace_schema_metadata({"hardviews": text})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parse_columns(content: bytes) -> tuple[pa.Table, dict[str, Any]]:
    """Rows and note of a column file.

    Raises:
        pyarrow.ArrowInvalid: where it is none.
    """
    table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    return table, json.loads((table.schema.metadata or {})[b"hardviews"])
