"""Shards whose samples are random bytes between a JPEG's first and last ones: all that reading looks at."""

from pathlib import Path

import numpy as np

from shards.manifest import Manifest
from shards.writer import Sample, finish, shard_name, write_shard


def content(number: int, size: int = 300) -> bytes:
    """The bytes of one sample."""
    inside = np.random.default_rng(number).integers(0, 255, size + number % 7, np.uint8).tobytes()  # never 255
    return b"\xff\xd8" + inside + b"\xff\xd9"


def store(root: Path, counts: list[int], first: int = 0, source: str = "real", size: int = 300) -> Manifest:
    """Writes shards of `counts` samples, numbered on from `first`; sample n has n % 3 as label."""
    root.mkdir(parents=True)
    results = []
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        samples = [Sample(f"s{n:06d}", content(n, size), "jpg", 10 + n, 20 + n, n % 3) for n in numbers]
        results.append(write_shard(root, shard_name(shard), samples, {}))
        first += count
    return finish(root, results, source=source, classes=["a", "b", "c"], provenance={})


def labelled(manifest: Manifest, out: Path) -> dict[bytes, int]:
    """Image → label, −1 without one, in the order of the data set that lies in `out`."""
    columns = manifest.columns(np.arange(len(manifest)))
    tars = [(out / name).read_bytes() for name in manifest.shards]
    places = zip(columns.shard, columns.offset, columns.size, columns.label, strict=True)
    return {tars[shard][offset : offset + size]: int(label) for shard, offset, size, label in places}
