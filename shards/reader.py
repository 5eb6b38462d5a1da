"""From sample ids to checked bytes and facts.

A sample id is a row in the concatenation of all manifests. Errors of single samples are values, not exceptions: a
batch with a torn image is still a batch.
"""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from shards.files import join, local_path
from shards.manifest import Columns, Manifest

OPEN_FILES = 64


class SampleError(Exception):
    """One sample that cannot be used: its shard (path or address), its key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str, str]]:
        return SampleError, (self.shard, self.key, self.reason)


class SampleReader:
    """Reads images of several data sets; safe to share between threads."""

    def __init__(self, manifests: Sequence[Manifest], locate: Callable[[Manifest, int], Path] | None = None) -> None:
        """`locate` gives the local file of a data set's shard; by default the one in its folder."""
        self.manifests = tuple(manifests)
        self._offsets = np.concatenate([[0], np.cumsum([len(manifest) for manifest in manifests])]).astype(np.int64)
        self._locate = locate or local_shard
        self._files: OrderedDict[tuple[int, int], _File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def sources(self, ids: np.ndarray) -> np.ndarray:
        """int16[n]: number of the data set of each id."""
        return (np.searchsorted(self._offsets, ids, side="right") - 1).astype(np.int16)

    def columns(self, ids: np.ndarray) -> Columns:
        """Facts about samples int64[n], in their order. Labels are those of each data set."""
        ids = np.asarray(ids, np.int64)
        sources = self.sources(ids)
        groups = [(np.flatnonzero(sources == number), number) for number in np.unique(sources)]
        if len(groups) == 1:
            return self.manifests[groups[0][1]].columns(ids - self._offsets[groups[0][1]])
        parts = [self.manifests[number].columns(ids[places] - self._offsets[number]) for places, number in groups]
        back = np.argsort(np.concatenate([places for places, _ in groups]), kind="stable")
        keys = [key for part in parts for key in part.key]
        merged = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])[back]
            for field in fields(Columns)
            if field.name not in ("key", "seed")
        }
        return Columns([keys[place] for place in back], **merged)

    def sizes(self, ids: np.ndarray) -> np.ndarray:
        """int32[n, 2]: height and width, pixels."""
        columns = self.columns(ids)
        return np.stack([columns.height, columns.width], 1)

    def read(self, ids: np.ndarray) -> list[np.ndarray | SampleError]:
        """Each sample's encoded image, uint8[size], or what is wrong with it."""
        ids = np.asarray(ids, np.int64)
        columns, sources = self.columns(ids), self.sources(ids)
        found: list[np.ndarray | SampleError] = [_UNREAD] * len(ids)
        # In the order of the files, which spares the disk seeks.
        for place in np.lexsort((columns.offset, columns.shard, sources)):
            found[place] = self._read(int(sources[place]), columns, int(place))
        return found

    def substitute(self, sample_id: int, attempt: int) -> int:
        """The id to take instead of a broken one at the given attempt (from 1): a fixed other one of its source."""
        source = int(self.sources(np.array([sample_id]))[0])
        start, count = int(self._offsets[source]), len(self.manifests[source])
        return start + (sample_id - start + attempt) % count

    def name(self, sample_id: int) -> tuple[str, str]:
        """Shard (path or address) and key."""
        ids = np.array([sample_id])
        columns = self.columns(ids)
        return self._shard_name(int(self.sources(ids)[0]), int(columns.shard[0])), columns.key[0]

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].retire()

    def _read(self, source: int, columns: Columns, place: int) -> np.ndarray | SampleError:
        shard, size = int(columns.shard[place]), int(columns.size[place])

        def wrong(reason: str) -> SampleError:
            return SampleError(self._shard_name(source, shard), columns.key[place], reason)

        try:
            with self._file(source, shard) as descriptor:
                data = os.pread(descriptor, size, int(columns.offset[place]))
        except OSError as error:
            return wrong(f"cannot be read ({error.strerror or error})")
        if len(data) != size:
            return wrong(f"cut short: {len(data)} of {size} bytes")
        if zlib.crc32(data) != int(columns.crc32[place]):
            return wrong("damaged: its CRC-32 is not the manifest's")
        return np.frombuffer(data, np.uint8)

    def _shard_name(self, source: int, shard: int) -> str:
        return join(self.manifests[source].root, self.manifests[source].entries[shard].name)

    def _file(self, source: int, shard: int) -> "_File":
        key = source, shard
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
                return file.lend()
        path = self._locate(self.manifests[source], shard)  # may fetch: not under the lock
        with self._lock:
            file = self._files.get(key)
            if file is None:
                file = self._files[key] = _File(path)
                while len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)[1].retire()
            return file.lend()


class _File:
    """An open file that is closed when it has been retired and nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._users, self._retired = 0, False
        self._lock = threading.Lock()

    def lend(self) -> "_File":
        with self._lock:
            self._users += 1
        return self

    def retire(self) -> None:
        with self._lock:
            self._retired = True
            self._close_if_unused()

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and self._users == 0:
            os.close(self._descriptor)


_UNREAD = SampleError("", "", "not read")


def local_shard(manifest: Manifest, shard: int) -> Path:
    """The file of a shard in a local data set."""
    root = local_path(manifest.root)
    if root is None:
        raise OSError(f"{manifest.root} is not local; its shards have to be fetched")
    return root / manifest.entries[shard].name
