"""Encoded images → batches of crops, in threads, while the model works on the batch before.

Suffixes: B images, S side in pixels, 3 channels.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jobs.evaluation.frozen import IMAGENET_MEAN, IMAGENET_STD
from jobs.evaluation.images import ImageSet
from pipelines.crop import crop_views
from pipelines.decode import open_decoder
from pipelines.draw import draw
from pipelines.params import ViewParams
from pipelines.policies import Policy, ViewGroup, ViewPolicy
from shards.errors import InputError

# Rows and sizes (height, width) int64 [B, 2] → one crop box and flip per image, [B, 1].
Transform = Callable[[np.ndarray, np.ndarray], ViewParams]


@dataclass(frozen=True)
class Batch:
    """crops_B3SS: normalised float32; rows: int64 [B] of those that could be decoded; broken: row → reason."""

    crops_B3SS: Tensor
    rows: np.ndarray
    broken: dict[int, str]


def centre_crop(share: float) -> Transform:
    """The evaluation transform: the centre square with `share` of the shorter side.

    Equal to resizing the shorter side to size / share and cropping size × size, without the detour.
    """

    def boxes(rows: np.ndarray, sizes_B2: np.ndarray) -> ViewParams:
        side = np.maximum(1, np.round(sizes_B2.min(axis=1) * share)).astype(np.int32)
        top, left = ((sizes_B2[:, i] - side) // 2 for i in (0, 1))
        return ViewParams.identity(top[:, None], left[:, None], side[:, None], side[:, None])

    return boxes


def check_crops(scale: tuple[float, float]) -> None:
    """Raises InputError for areas that random crops cannot have."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"crop_scale: {scale} is out of range; give 0 < least ≤ greatest ≤ 1")


def crop_and_flip(seed: int, epoch: int, size: int, scale: tuple[float, float]) -> Transform:
    """The linear probe's augmentation: a random resized crop and a flip, a pure function of (seed, epoch, row)."""
    view = ViewPolicy(scale=scale, flip=0.5, jitter=0, gray=0)
    policy = Policy((ViewGroup((view,), count=2, size=size),))  # a policy has a pair; the first of it is used

    def boxes(rows: np.ndarray, sizes_B2: np.ndarray) -> ViewParams:
        return draw(policy, rows, np.full(len(rows), epoch), seed, sizes_B2)[:, :1]

    return boxes


class Loader:
    """Decodes and crops batches of an image set; holds one decoder, so one iteration at a time."""

    def __init__(
        self,
        images: ImageSet,
        size: int,
        batch: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        threads: int = 0,
    ) -> None:
        self._images, self._size = images, size
        threads = threads or os.cpu_count() or 1
        self._batch = min(batch, max(len(images.labels), 1))
        self._decoder = open_decoder(self._batch, threads)
        self._pool = ThreadPoolExecutor(threads)
        self._mean = torch.tensor(mean)[:, None, None] * 255
        self._scale = 1 / (torch.tensor(std)[:, None, None] * 255)

    def batches(self, rows: np.ndarray, transform: Transform, device: torch.device) -> Iterator[Batch]:
        """Batches of the images `rows`, in that order; the next one is prepared while the caller uses this one."""
        chunks = [rows[i : i + self._batch] for i in range(0, len(rows), self._batch)]
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self._prepare, chunks[0], transform) if chunks else None
            for i in range(len(chunks)):
                assert pending is not None
                crops_BSS3, kept, broken = pending.result()
                if i + 1 < len(chunks):
                    pending = ahead.submit(self._prepare, chunks[i + 1], transform)
                crops = crops_BSS3.to(device).permute(0, 3, 1, 2).float()
                yield Batch((crops - self._mean.to(device)) * self._scale.to(device), kept, broken)

    def _prepare(self, rows: np.ndarray, transform: Transform) -> tuple[Tensor, np.ndarray, dict[int, str]]:
        data = self._images.read(rows.tolist())
        broken = {int(row): item for row, item in zip(rows, data, strict=True) if isinstance(item, str)}
        good = [(int(row), item) for row, item in zip(rows, data, strict=True) if not isinstance(item, str)]
        decoded = self._decoder.decode([item for _, item in good])
        pixels = []
        for (row, _), image in zip(good, decoded, strict=True):
            if isinstance(image, str):
                broken[row] = image
            else:
                pixels.append((row, image))
        kept = np.array([row for row, _ in pixels], dtype=np.int64)
        out_BSS3 = torch.empty(len(pixels), self._size, self._size, 3, dtype=torch.uint8)
        if pixels:
            sizes_B2 = np.array([image.shape[:2] for _, image in pixels])
            params = transform(kept, sizes_B2)
            crops = [(image, params[i], out_BSS3[i : i + 1]) for i, (_, image) in enumerate(pixels)]
            list(self._pool.map(lambda work: crop_views(*work), crops))
        return out_BSS3, kept, broken

    def close(self) -> None:
        self._pool.shutdown()
