"""Log rows whose every value follows from the global position, so that a test can tell a wrong row from a right one."""

from pathlib import Path

import numpy as np

from jobs.log.writer import AugmentationLog, batch_rows
from pipelines.batch import ViewBatch
from pipelines.params import PARAMETERS, ViewParams, pair_iou, pairs

RANGES = {"top": (0, 45), "left": (0, 50), "height": (20, 55), "width": (20, 70), "hue": (-0.5, 0.5), "order": (0, 24)}


def params_at(positions_B, views, seed=0):
    """Crop boxes in a 100×120 image and colour factors, drawn by position."""
    values = {}
    for number, (name, (dtype, *_)) in enumerate(PARAMETERS.items()):
        draws = _uniform(positions_B, views, seed * 100 + number)
        low, high = RANGES.get(name, (0.6, 1.4))
        values[name] = draws < 0.3 if dtype is np.bool_ else (low + draws * (high - low)).astype(dtype)
    return ViewParams(**values)


def losses_at(positions_B, views, params, noise=0.3, seed=0):
    """Pair losses that fall with the IoU, plus noise by position."""
    return (1 - pair_iou(params) + noise * _uniform(positions_B, len(pairs(views)), 7_000 + seed)).astype(np.float32)


def append(
    log: AugmentationLog, step, position, batch, views, every=1, images=1_000, sources=2, labelled=True, at_random=0
):
    """Appends one batch; losses are there on every `every`-th step, where one image in `at_random` (0: none) trains on
    the pair that its position numbers."""
    at = np.arange(position, position + batch)
    params = params_at(at, views)
    losses = losses_at(at, views, params)
    scored = step % every == 0
    made = batch_at(position, params, at % images, at % sources, at // images, at % 10 if labelled else at * 0 - 1)
    drawn = (at % at_random == 3 % at_random) if at_random and scored else np.zeros(batch, bool)
    choice = np.where(drawn | (not scored), at % len(pairs(views)), losses.argmax(1))
    log.append(batch_rows(made, step, log.scored, losses if scored else None, choice, drawn))


def batch_at(position, params, ids, sources, epochs, labels):
    """A batch without crops, of 100×120 images."""
    sizes = np.tile([100, 120], (len(params), 1))
    return ViewBatch((), params, ids, sources, epochs, labels, sizes, position, (), None)


def write_log(path: Path, steps=20, batch=64, views=4, world=1, first=0, **how):
    """A log of `steps` steps by `world` ranks of `batch` rows each."""
    for rank in range(world):
        log = AugmentationLog(path, rank, views, sources=("real", "synthetic"), shard_rows=512)
        for step in range(first, first + steps):
            append(log, step, (step * world + rank) * batch, batch, views, **how)
        log.close()
    return path


def _uniform(positions_B, count, seed):
    """[B, count] in [0, 1): a hash of position, column and seed (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.asarray(positions_B, np.uint64)[:, None] * np.uint64(1_000_003) + np.arange(count, dtype=np.uint64)
        x = (x + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(29))) >> np.uint64(11)).astype(np.float64) / 2**53
