"""Images of shards as small square arrays, and a check of generated ones against them.

Letters: n images, S pixels a side.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from shards.files import fetcher
from shards.manifest import Manifest


def read_images(
    manifest: Manifest, side: int, limit: int | None = None, on_images: Callable[[int], None] = lambda count: None
) -> tuple[np.ndarray, np.ndarray]:
    """Images as uint8 [n, S, S, 3] (centre square, reduced by area) and labels as int32 [n], −1 where unknown.

    Args:
        side: S.
        limit: at most so many images, evenly spread over the data set; None for all.
        on_images: called with the number of images read from each shard.
    """
    count = len(manifest) if limit is None else min(limit, len(manifest))
    rows = np.arange(count) * len(manifest) // max(count, 1)
    columns = manifest.columns(rows)
    images = np.empty((count, side, side, 3), np.uint8)
    fetch = fetcher(manifest.root)
    for shard in np.unique(columns.shard):
        tar = memoryview(fetch(manifest.shards[shard]))
        chosen = np.flatnonzero(columns.shard == shard)
        for row in chosen:
            content = tar[columns.offset[row] : columns.offset[row] + columns.size[row]]
            with Image.open(io.BytesIO(content)) as image:
                image.draft("RGB", (4 * side, 4 * side))  # large JPEGs decode at a reduced scale
                square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BOX)
            images[row] = np.asarray(square)
        on_images(len(chosen))
    return images, columns.label


def confirmed(
    images: np.ndarray, labels: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray, neighbours: int = 1
) -> float:
    """Share of generated images whose class is the one that kNN on the pixels of real images gives them.

    Args:
        images: uint8 [n, S, S, 3] generated; labels: int [n] asked for.
        real_images: uint8 [m, S, S, 3] of the same side, with real_labels int [m].
        neighbours: k.
    """
    from sklearn.neighbors import KNeighborsClassifier

    nearest = KNeighborsClassifier(neighbours, algorithm="brute")
    nearest.fit(real_images.reshape(len(real_images), -1).astype(np.float32), real_labels)
    return float(np.mean(nearest.predict(images.reshape(len(images), -1).astype(np.float32)) == labels))
