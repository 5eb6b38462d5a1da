"""Images that are there twice: the same bytes by checksums, or nearly the same by a perceptual hash.

Letters: n images of all sets, S sets.
"""

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jobs.evaluation.images import ShardImages

CHUNK = 4_000_000  # distances held at once: 32 MB
BITS = 64


@dataclass(frozen=True)
class Sets:
    """Shards that are searched together; rows count through all of them."""

    images: tuple[ShardImages, ...]

    @property
    def starts(self) -> np.ndarray:
        """int64 [S + 1]: the first row of each set, and the number of rows."""
        return np.cumsum([0, *(len(one.labels) for one in self.images)])

    def place(self, row: int) -> tuple[int, int]:
        """Set, and row in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])

    def read(self, row: int) -> np.ndarray | str:
        """Encoded bytes, or why there are none."""
        number, own = self.place(row)
        return self.images[number].read([own])[0]


def exact_pairs(sets: Sets) -> np.ndarray:
    """int64 [pairs, 2]: rows with the same bytes, each with the first of its kind. Candidates have the same CRC-32 and
    length, which the shards hold; SHA-256 of their bytes decides. Nothing is decoded."""
    columns = [one.columns() for one in sets.images]
    crc32, size = (np.concatenate([getattr(one, name) for one in columns]) for name in ("crc32", "size"))
    order = np.lexsort((size, crc32))
    same = (np.diff(crc32[order].astype(np.int64)) == 0) & (np.diff(size[order]) == 0)
    candidates = np.unique(np.concatenate([order[:-1][same], order[1:][same]]))
    first: dict[bytes, int] = {}
    pairs = []
    for row in candidates.tolist():
        data = sets.read(row)
        if isinstance(data, str):
            continue
        digest = hashlib.sha256(data.tobytes()).digest()
        if digest in first:
            pairs.append((first[digest], row))
        first.setdefault(digest, row)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def hashes(sets: Sets, advance: Callable[[int], object]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Perceptual hash of every image and of its mirror image, uint64 [n] each, and which could be decoded, bool [n].

    ImageHash's phash: signs of the 8 × 8 lowest frequencies of the grey image about their median.
    """
    count = int(sets.starts[-1])
    plain, mirrored, known = np.zeros(count, np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.bool_)

    def work(row: int) -> None:
        data = sets.read(row)
        try:
            if not isinstance(data, str):
                image = Image.open(io.BytesIO(data.tobytes())).convert("L")
                plain[row], mirrored[row] = (_bits(one) for one in (image, ImageOps.mirror(image)))
                known[row] = True
        except (OSError, ValueError):
            pass  # known says so
        advance(1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(count)))
    return plain, mirrored, known


def _bits(image: Image.Image) -> int:
    return int(str(imagehash.phash(image)), 16)


@dataclass(frozen=True)
class Near:
    """pairs: int64 [pairs, 2]; nearest: uint8 [n, S], the distance (bits of 64) of the nearest other image of each set,
    255 where there is none."""

    pairs: np.ndarray
    nearest: np.ndarray


def near_pairs(plain: np.ndarray, mirrored: np.ndarray, known: np.ndarray, starts: np.ndarray, largest: int) -> Near:
    """All pairs of images whose hashes, or one's and the other's mirror image's, differ in at most `largest` bits."""
    count = len(plain)
    pairs = []
    nearest = np.full((count, len(starts) - 1), 255, np.uint8)
    step = max(1, CHUNK // count)
    for first in range(0, count, step):
        rows = np.arange(first, min(first + step, count))
        bits = np.minimum(
            np.bitwise_count(plain[rows, None] ^ plain[None]), np.bitwise_count(mirrored[rows, None] ^ plain[None])
        )
        bits[:, ~known], bits[~known[rows]] = 255, 255
        bits[np.arange(len(rows)), rows] = 255
        for number, (start, end) in enumerate(itertools.pairwise(starts)):
            nearest[rows, number] = bits[:, start:end].min(axis=1, initial=255)
        own, other = np.nonzero(bits <= largest)
        later = other > rows[own]
        pairs.append(np.stack([rows[own[later]], other[later]], 1))
    return Near(np.concatenate(pairs), nearest)


def groups(count: int, pairs: np.ndarray) -> list[np.ndarray]:
    """Rows that pairs connect, groups of 2 and more, in the order of their first rows."""
    if not len(pairs):
        return []
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    rows = np.flatnonzero(np.bincount(labels)[labels] > 1)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(labels[rows])) + 1
    return sorted(np.split(rows, cuts), key=lambda group: int(group[0]))


def thumbnails(sets: Sets, shown: Sequence[np.ndarray]) -> list[list[Image.Image]]:
    """Pictures of groups, RGB; what cannot be decoded is left out."""
    pictures = []
    for group in shown:
        row_images = []
        for row in group.tolist():
            data = sets.read(row)
            if not isinstance(data, str):
                row_images.append(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
        pictures.append(row_images)
    return pictures
