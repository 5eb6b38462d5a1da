"""From sample ids to checked bytes and facts.

A sample id is a row in the concatenation of all manifests. Errors of single samples are values, not exceptions: a
batch with a torn image is still a batch.
"""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np

from shards.cache import FetchAhead, ShardCache
from shards.files import join, local_path
from shards.manifest import Columns, Manifest
from shards.order import SampleOrder

OPEN_FILES = 128
FEW = 32  # images that one thread reads at least: half a millisecond's work each way is not worth a thread's wake-up
TRIES_PER_SHARD = 4  # substitutes from one shard, before the next is tried
SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # a JPEG's first and last bytes
START_OF_SCAN = 0xDA


class SampleError(Exception):
    """One sample that cannot be used: its shard (path or address), its key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str, str]]:
        return SampleError, (self.shard, self.key, self.reason)


class SampleReader:
    """Reads images of several data sets; safe to share between threads."""

    def __init__(self, manifests: Sequence[Manifest], cache: ShardCache | None = None, threads: int = 2) -> None:
        """
        Args:
            manifests: their rows, one after the other, are the sample ids.
            cache: for shards behind an address; by default one below the user's cache folder.
            threads: that read and check a large batch together; a small one is the caller's own work.
        """
        self.manifests = tuple(manifests)
        self._offsets = np.concatenate([[0], np.cumsum([len(manifest) for manifest in manifests])]).astype(np.int64)
        self._cache = cache or ShardCache()
        self._ahead: FetchAhead | None = None
        self._files: OrderedDict[tuple[int, int], _File] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hardviews-bytes")

    def follow(self, order: SampleOrder, position: int) -> None:
        """Fetches shards behind an address ahead, as reading goes through the order from `position` on.

        Two blocks of each source are kept fetched, as far as half the cache holds them.
        """
        if self._ahead:
            self._ahead.close()
        if all(local_path(manifest.root) is not None for manifest in self.manifests):
            return
        self._ahead = FetchAhead(
            order.shards(position),
            self._fetch,
            lambda source, shard: self.manifests[source].entries[shard].size,
            ahead=2 * order.block * len(self.manifests),
            limit=self._cache.limit // 2,
        )

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
        groups = groups or [(np.arange(0), 0)]
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
        # In the order of the files, which spares the disk seeks.
        places = np.lexsort((columns.offset, columns.shard, sources))
        parts = np.array_split(places, max(1, min(self._threads, len(ids) // FEW)))

        def read(part: np.ndarray) -> list[np.ndarray | SampleError]:
            return [self._read(int(sources[place]), columns, int(place)) for place in part]

        results = self._pool.map(read, parts) if len(parts) > 1 else map(read, parts)
        by_place = dict(zip(places.tolist(), (item for result in results for item in result), strict=True))
        return [by_place[place] for place in range(len(ids))]

    def substitute(self, sample_id: int, attempt: int) -> int:
        """The id to take instead of a broken one at the given attempt (from 1): a fixed other one of its source.

        Samples of the same shard, which is open already, come first; then those of the shards after it.
        """
        source = int(self.sources(np.array([sample_id]))[0])
        manifest = self.manifests[source]
        row = sample_id - int(self._offsets[source])
        shard = int(manifest.shard_of(np.array([row]))[0]) + (attempt - 1) // TRIES_PER_SHARD
        shard %= len(manifest.counts)
        # Knuth's multiplicative hash: neighbours that are broken together get substitutes far from each other.
        place = (row * 2654435761 + attempt * 40503) % 2**32 % int(manifest.counts[shard])
        other = int(manifest.starts[shard]) + place
        return int(self._offsets[source]) + (other if other != row else (row + 1) % len(manifest))

    def name(self, sample_id: int) -> tuple[str, str]:
        """Shard (path or address) and key."""
        ids = np.array([sample_id])
        columns = self.columns(ids)
        return self._shard_name(int(self.sources(ids)[0]), int(columns.shard[0])), columns.key[0]

    def close(self) -> None:
        """Ends all threads and closes all files."""
        self._cache.close()
        if self._ahead:
            self._ahead.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            while self._files:
                self._files.popitem()[1].retire()

    def _read(self, source: int, columns: Columns, place: int) -> np.ndarray | SampleError:
        shard, size = int(columns.shard[place]), int(columns.size[place])

        def wrong(reason: str) -> SampleError:
            return SampleError(self._shard_name(source, shard), columns.key[place], reason)

        data = np.empty(size, np.uint8)
        try:
            with self._file(source, shard) as descriptor:
                length = os.preadv(descriptor, [data.data], int(columns.offset[place])) if size else 0
        except OSError as error:
            return wrong(f"cannot be read ({error.strerror or error})")
        if length != size:
            return wrong(f"cut short: {length} of {size} bytes")
        if zlib.crc32(data.data) != int(columns.crc32[place]):
            return wrong("damaged: its CRC-32 is not the manifest's")
        if not complete(data):
            return wrong("empty" if not size else "a JPEG without its end")
        return data

    def _fetch(self, source: int, shard: int) -> None:
        """Makes a shard and its columns local."""
        manifest = self.manifests[source]
        if manifest.counts[shard]:
            manifest.columns(manifest.starts[shard : shard + 1])
        self._cache.locate(manifest, shard)

    def _shard_name(self, source: int, shard: int) -> str:
        return join(self.manifests[source].root, self.manifests[source].entries[shard].name)

    def _file(self, source: int, shard: int) -> "_File":
        key = source, shard
        with self._lock:
            file = self._files.get(key)
            if file is not None:
                self._files.move_to_end(key)
                return file.lend()
        path = self._cache.locate(self.manifests[source], shard)  # may fetch: not under the lock
        if self._ahead:
            self._ahead.used(source, shard)
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


def complete(data: np.ndarray) -> bool:
    """Whether bytes, uint8[n], can be an image: not empty, and if a JPEG, with an end behind its pixels."""
    if bytes(data[:2]) != SOI or bytes(data[-2:]) == EOI:
        return len(data) > 0
    # Cameras append files of their own to a JPEG, and put others into its head. Between the start of the pixels and
    # the end, no other end can occur: ITU-T T.81, B.1.1.5 stuffs every FF with a zero.
    content = data.tobytes()
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != START_OF_SCAN:
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return content.find(EOI, place) >= 0
