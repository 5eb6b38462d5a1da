"""Real shards of small images for the tests of this folder, whole and damaged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from view_pictures import jpeg

from pipelines.batch import Order, Reader
from shards.manifest import Manifest
from shards.order import SampleOrder
from shards.reader import SampleReader
from shards.writer import Sample, finish, shard_name, write_shard


def size_of(number: int) -> tuple[int, int]:
    """Height and width of image `number`: all kinds of shapes."""
    return 36 + 11 * number % 40, 30 + 17 * number % 61


def write_shards(
    folder: Path,
    count: int = 40,
    per_shard: int = 10,
    source: str = "real",
    contents: Mapping[int, bytes] | None = None,
) -> Manifest:
    """A data set of `count` JPEGs; `contents` replaces the bytes of some images, checksums included."""
    folder.mkdir(parents=True)
    first_seed = 1000 * (source != "real")
    samples = [
        Sample(
            f"{number:04d}",
            (contents or {}).get(number) or jpeg(*size_of(number), first_seed + number).tobytes(),
            "jpg",
            *size_of(number),
            label=number % 3,
        )
        for number in range(count)
    ]
    results = [
        write_shard(folder, shard_name(shard), samples[start : start + per_shard], {})
        for shard, start in enumerate(range(0, count, per_shard))
    ]
    return finish(folder, results, source=source, classes=("a", "b", "c"), provenance={})


def damage(manifest: Manifest, row: int) -> None:
    """Flips a byte in the middle of a sample's image: its checksum no longer holds."""
    columns = manifest.columns(np.array([row]))
    path = Path(manifest.root) / manifest.entries[int(columns.shard[0])].name
    content = bytearray(path.read_bytes())
    content[int(columns.offset[0]) + int(columns.size[0]) // 2] ^= 0xFF
    path.write_bytes(content)


def opened(manifests: Sequence[Manifest], shares: Sequence[float] = (1.0,)) -> tuple[Reader, Order]:
    """A reader and an order over data sets."""
    return SampleReader(manifests), SampleOrder([manifest.counts for manifest in manifests], shares, seed=1, block=2)
