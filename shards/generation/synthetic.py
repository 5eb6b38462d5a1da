"""A synthetic clone of a data set: which images it holds, each with its own seed, and shards of them.

One idempotent task per output shard, as in building. What an image looks like follows from the request and its number
in the data set alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.build import clear_surplus
from shards.errors import InputError
from shards.generation.request import Request
from shards.images import encode
from shards.manifest import MANIFEST_NAME, Manifest
from shards.writer import (
    Rejected,
    Sample,
    ShardResult,
    finish,
    output_folder,
    sample_key,
    shard_name,
    split_done,
    write_shard,
)

Runner = Callable[[Callable[["Task"], ShardResult], list["Task"]], Iterable[ShardResult]]
# Labels and seeds of a batch → uint8 [n, H, W, 3], and which images the pipeline itself blanked.
Sampler = Callable[[Sequence[int], Sequence[int]], tuple[np.ndarray, list[bool]]]
GOLDEN = 0x9E3779B97F4A7C15  # step between the counters of splitmix64 (Steele et al. 2014)


@dataclass(frozen=True)
class Task:
    """What a worker needs to write one shard."""

    folder: str
    number: int
    first: int
    """Number of the shard's first image in the data set."""
    labels: tuple[int, ...]
    """Of the shard's images."""
    request: Request

    @property
    def name(self) -> str:
        """File name of the tar."""
        return shard_name(self.number)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the shard's content. Where the pipeline lies does not."""
        facts = dataclasses.asdict(self.request)
        facts["pipeline"] = facts.pop("fingerprint")
        classes = json.dumps([facts.pop("names"), self.labels]).encode()
        return {**facts, "first": self.first, "count and classes": hashlib.sha256(classes).hexdigest()}


def image_seeds(seed: int, numbers: np.ndarray) -> np.ndarray:
    """int64 [n] numbers of images in a data set → int64 [n] seeds below 2³², no two alike among the first 2³² images.

    Torch's CPU generator reads 32 bits of a seed, so hashes of 64 bits would collide from some 50,000 images on. The
    finaliser of MurmurHash3 is a bijection of 32 bits.
    """
    start = int(mixed(seed, np.zeros(1, np.uint64))[0]) & 0xFFFFFFFF
    state = (np.asarray(numbers, np.uint64) + np.uint64(start)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state ^= state >> np.uint64(shift)
        state = (state * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return (state ^ (state >> np.uint64(16))).astype(np.int64)


def mixed(seed: int, numbers: np.ndarray) -> np.ndarray:
    """uint64 [n] hashes of numbers under a seed, by splitmix64."""
    state = np.asarray(numbers, np.uint64) * np.uint64(GOLDEN) + np.array([seed % (1 << 63)], np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))


def match_counts(like: Manifest, count: int | None = None, per_class: int | None = None) -> list[int]:
    """Images to generate by label, and last those without label.

    Args:
        like: data set whose counts are matched.
        count: images in all, in the proportions of `like`; None for as many as it has.
        per_class: instead, so many of each class, and none without label.

    Raises:
        InputError: both, or a number below 1.
    """
    if count is not None and per_class is not None:
        raise InputError("--count and --per-class exclude each other; take one")
    if (count is not None and count < 1) or (per_class is not None and per_class < 1):
        raise InputError(f"--count {count} --per-class {per_class}: at least 1 is needed")
    if per_class is not None:
        if not like.classes:
            raise InputError(f"--per-class {per_class}: {like.root} has no classes; use --count")
        return [per_class] * len(like.classes) + [0]
    sizes = np.array([*like.class_counts, like.unlabelled], np.int64)
    if count is None:
        return sizes.tolist()
    whole, rest = np.divmod(sizes * count, sizes.sum())
    # Largest remainders take what rounding down left over.
    whole[np.argsort(-rest, kind="stable")[: count - whole.sum()]] += 1
    return whole.tolist()


def spread_labels(counts: Sequence[int], seed: int) -> np.ndarray:
    """Counts by label, and last those without → int32 [n] labels in an order in which every shard holds all classes."""
    labels = np.repeat(np.array([*range(len(counts) - 1), -1], np.int32), counts)
    return labels[np.argsort(mixed(seed, np.arange(len(labels))), kind="stable")]


def plan(request: Request, out: Path, counts: Sequence[int], shard_samples: int = 1000) -> list[Task]:
    """The tasks of a data set with `counts` images by label, and last those without.

    Raises:
        InputError: a number that is out of range.
    """
    for flag, value in (("steps", request.steps), ("batch", request.batch), ("shard-samples", shard_samples)):
        if value < 1:
            raise InputError(f"--{flag} {value}: at least 1 is needed")
    if request.size is not None and request.size < 1:
        raise InputError(f"--size {request.size}: at least 1 pixel is needed")
    if request.quality is not None and (not 1 <= request.quality <= 100 or request.format == "png"):
        raise InputError(f"--quality {request.quality}: 1 to 100, with --format jpg or webp")
    labels = spread_labels(counts, request.seed).tolist()
    starts = range(0, len(labels), shard_samples)
    folder = str(out.resolve())
    return [
        Task(folder, number, first, tuple(labels[first : first + shard_samples]), request)
        for number, first in enumerate(starts)
    ]


@lru_cache(maxsize=1)
def sampler_of(request: Request) -> Sampler:
    """The request's sampler, kept for the next shard of this process."""
    from shards.generation.diffusion import open_sampler

    return open_sampler(request)


def generate_shard(task: Task, on_images: Callable[[int], None] = lambda count: None) -> ShardResult:
    """Writes the shard of one task; running it again gives the same images.

    Args:
        on_images: called with the size of each batch that is done.
    """
    return write_shard(Path(task.folder), task.name, draw(task, on_images), task.settings)


def draw(task: Task, on_images: Callable[[int], None]) -> Iterator[Sample | Rejected]:
    """The images of a task, encoded."""
    request, sampler = task.request, sampler_of(task.request)
    seeds = image_seeds(request.seed, np.arange(task.first, task.first + len(task.labels))).tolist()
    for start in range(0, len(task.labels), request.batch):
        labels = task.labels[start : start + request.batch]
        images, blanked = sampler(labels, seeds[start : start + request.batch])
        for place, (label, image, blank) in enumerate(zip(labels, images, blanked, strict=True), start):
            key = sample_key(task.first + place)
            if blank:
                yield Rejected(key, f"seed {seeds[place]}", "blanked by the pipeline's own safety checker")
                continue
            content = encode(resized(image, request.size), request.format, request.quality)
            height, width = (request.size, request.size) if request.size else image.shape[:2]
            yield Sample(key, content, request.format, height, width, label, seeds[place])
        on_images(len(labels))


def resized(image: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 [H, W, 3] → [size, size, 3]; as it is where size is None."""
    if size is None or image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def generate(
    tasks: Sequence[Task],
    out: Path,
    run: Runner,
    *,
    source: str,
    classes: Sequence[str],
    provenance: dict[str, Any],
    overwrite: bool = False,
    on_finished: Callable[[ShardResult], None] = lambda result: None,
) -> Manifest:
    """Writes the shards that the folder does not hold yet, then the manifest.

    Args:
        run: takes `generate_shard` and tasks, gives the results as they come.
        source: tag for the manifest.
        classes: names by label.
        provenance: for the manifest.
        overwrite: write shards anew that the folder holds from another request, and remove surplus ones.
        on_finished: called for each shard that stood already.

    Raises:
        InputError: the folder holds other shards.
    """
    with output_folder(out):
        results, missing = split_done(out, tasks, overwrite)
        clear_surplus(out, {task.name for task in tasks}, overwrite)
        if missing:
            (out / MANIFEST_NAME).unlink(missing_ok=True)  # it would speak of shards that are about to change
        for result in results:
            on_finished(result)
        results.extend(run(generate_shard, missing))
        return finish(out, results, source=source, classes=classes, provenance=provenance)
