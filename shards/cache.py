"""Local copies of shards that lie behind an address: fetched once, checked, and dropped when others need the room.

A copy is named by the SHA-256 that the manifest gives its shard, and gets that name only when its content has it. So
several data sets and processes share a folder, a cut download is never read, and a kill leaves nothing to repair.
"""

import fcntl
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import InputError
from shards.files import filesystem, join, local_path, publish, settle
from shards.manifest import Manifest, ShardEntry
from shards.retry import ATTEMPTS, PAUSE, retry

PART = 16 << 20  # bytes asked for at once: what a cut connection can cost
DEFAULT_LIMIT = 50_000_000_000


class DamagedShardError(OSError):
    """A shard that is not in the store as its manifest says. It stays so: no network is to blame."""


def default_folder() -> Path:
    """A folder below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hardviews" / "shards"


class ShardCache:
    """Finds the local file of a shard, fetching it if need be; safe to share between threads and processes.

    Args:
        folder: of the copies; by default one below the user's cache folder.
        limit: bytes that all copies may take together; the least recently used go first. One shard always fits.
        attempts: at each part of a file, with pauses that double from `pause` seconds.
    """

    def __init__(
        self, folder: str | Path = "", limit: int = DEFAULT_LIMIT, attempts: int = ATTEMPTS, pause: float = PAUSE
    ) -> None:
        self.folder = Path(folder) if folder else default_folder()
        self.limit = limit
        self._attempts, self._pause = attempts, pause
        self._lost: dict[str, OSError] = {}
        self._room = threading.Lock()
        self._ended = threading.Event()

    def close(self) -> None:
        """Ends what is being fetched; nothing can be fetched after."""
        self._ended.set()

    def locate(self, manifest: Manifest, shard: int) -> Path:
        """The shard's file on this machine.

        Raises:
            OSError: it is missing, or not what the manifest says.
            InputError: it cannot be fetched, after all attempts.
        """
        entry = manifest.entries[shard]
        root = local_path(manifest.root)
        if root is not None:
            return root / entry.name
        copy = self.folder / f"{entry.sha256}.tar"
        while not touched(copy):
            if entry.sha256 in self._lost:
                raise self._lost[entry.sha256]
            self._try(join(manifest.root, entry.name), entry, copy)
        return copy

    def _try(self, address: str, entry: ShardEntry, copy: Path) -> None:
        """Fetches a shard, or waits while another thread or process does; `copy` is to be looked for again.

        Whoever holds the lock on the partial file fetches. The kernel frees it when its holder dies. A file locked too
        late has got its final name, or is gone, and must not be touched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{entry.sha256}.partial"
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not same_file(file, partial):
                return
            try:
                if copy.exists():
                    return
                self._make_room(file, entry.size)
                # Again as a whole, should what came not have the right hash.
                retry(lambda: self._download(address, entry, file), 2, self._pause, self._ended)
                settle(file.fileno())
                publish(partial, copy)
            except (DamagedShardError, FileNotFoundError) as error:
                self._lost[entry.sha256] = error
            except Exception as error:
                raise InputError(
                    f"{address}: cannot be fetched, tried again and again ({error}); check the network and the rights, "
                    "then resume"
                ) from error
            finally:
                if same_file(file, partial):
                    partial.unlink()

    def _download(self, address: str, entry: ShardEntry, file: BinaryIO) -> None:
        system, path = filesystem(address)
        digest = hashlib.sha256()
        file.seek(0)
        for start in range(0, entry.size, PART):
            end = min(start + PART, entry.size)
            part = retry(lambda s=start, e=end: read_part(system, path, s, e), self._attempts, self._pause, self._ended)
            if self._ended.is_set():
                raise InterruptedError("closed")
            file.write(part)
            digest.update(part)
        file.flush()
        if digest.hexdigest() != entry.sha256:
            raise DamagedShardError(None, "the store's file differs from the manifest's hash")

    def _make_room(self, file: BinaryIO, size: int) -> None:
        """Drops copies until `size` more bytes fit, and takes that room by the partial file's length."""
        with self._room:
            copies, taken = [], 0
            for path in self.folder.iterdir():
                try:
                    state = path.stat()
                except FileNotFoundError:  # another process made room too
                    continue
                taken += state.st_size
                if path.suffix == ".tar":
                    copies.append((state.st_mtime_ns, state.st_size, path))
            for _, length, path in sorted(copies):
                if taken + size <= self.limit:
                    break
                path.unlink(missing_ok=True)  # whoever reads it now has it open and goes on
                taken -= length
            os.truncate(file.fileno(), size)


def touched(path: Path) -> bool:
    """Whether a file exists; if so, it now counts as used last."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def same_file(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is (still) the one under a name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def read_part(system: Any, path: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file in a store.

    Raises:
        DamagedShardError: the file ends before.
    """
    part = bytes(system.cat_file(path, start=start, end=end))
    if len(part) != end - start:
        raise DamagedShardError(None, f"cut short in the store: {start + len(part)} bytes, {end} are needed")
    return part


class FetchAhead:
    """Fetches, in the background, the shards that will be needed next.

    Args:
        upcoming: shards in the order of need, without end.
        fetch: makes one of them local.
        size: of one of them, bytes.
        ahead: shards kept fetched beyond the furthest that was used.
        limit: bytes of these.
        threads: fetching at a time.
    """

    def __init__(
        self,
        upcoming: Iterator[tuple[int, int]],
        fetch: Callable[[int, int], object],
        size: Callable[[int, int], int],
        *,
        ahead: int,
        limit: int,
        threads: int = 4,
    ) -> None:
        self._upcoming, self._fetch, self._size = upcoming, fetch, size
        self._ahead, self._limit = ahead, limit
        self._waiting: deque[tuple[int, int]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="hardviews-fetch")
        self._fill()

    def used(self, source: int, shard: int) -> None:
        """Says that a shard is being read: it and all that were to come before it are no longer ahead."""
        with self._lock:
            if (source, shard) in self._waiting:
                while self._forget() != (source, shard):
                    pass
                self._fill()

    def close(self) -> None:
        """Begins nothing more, and waits for what has begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _forget(self) -> tuple[int, int]:
        key = self._waiting.popleft()
        self._bytes -= self._size(*key)
        return key

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead and (not self._waiting or self._bytes < self._limit):
            key = next(self._upcoming)
            self._waiting.append(key)
            self._bytes += self._size(*key)
            # What fails here is tried again, and reported, when it is needed.
            self._pool.submit(self._fetch, *key)
