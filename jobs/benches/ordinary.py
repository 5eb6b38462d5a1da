"""The loader that people use: image files, torchvision's transforms, torch's DataLoader with worker processes.

Its policy is the same as ours, view by view; everything else is as in the published repositories, on Pillow images
throughout: torchvision's transforms on uint8 tensors come to a fifth of that speed on a CPU (its float HSV and blur).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision.transforms.v2 as v2
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pipelines.colour import MEAN, SOLARIZE_FROM, STD
from pipelines.policies import Policy, ViewPolicy

PREFETCH = 2  # batches that each process makes ahead, torch's default


@dataclass(frozen=True)
class PillowBlur:
    """Gaussian blur by Pillow, as in the code of MoBY, MoCo v3, DINO and HVP."""

    sigma: tuple[float, float]

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def transform(view: ViewPolicy, size: int) -> v2.Compose:
    """One view's policy in torchvision's transforms, for Pillow images."""
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    steps = [
        v2.RandomResizedCrop(size, view.scale, view.ratio, antialias=True),
        v2.RandomHorizontalFlip(view.flip),
        v2.RandomApply([jitter], view.jitter),
        v2.RandomGrayscale(view.gray),
        v2.RandomApply([PillowBlur(view.blur_sigma)], view.blur),
        v2.RandomSolarize(SOLARIZE_FROM, view.solarize),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    return v2.Compose([step for step in steps if not _never(step)])


def _never(step: object) -> bool:
    return getattr(step, "p", 1) == 0


class ViewsOfFiles(Dataset[list[Tensor]]):
    """Item i: the views of image file i, each decoded once and transformed view by view."""

    def __init__(self, files: Sequence[Path], policy: Policy) -> None:
        self.files = files
        groups = [(group.view(v), group.size) for group in policy.groups for v in range(group.count)]
        self.transforms = [transform(view, size) for view, size in groups]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.files[index]) as opened:
            image = opened.convert("RGB")
        return [transform(image) for transform in self.transforms]


def ordinary_batches(files: Sequence[Path], policy: Policy, batch: int, workers: int) -> Iterator[list[Tensor]]:
    """Batches for ever, in random order: one tensor [batch, 3, S, S] a view, from `workers` processes."""
    loader = DataLoader(
        ViewsOfFiles(files, policy),
        batch_size=batch,
        sampler=RandomSampler(files, replacement=True, num_samples=1 << 40),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        # Not a fork: this process has threads of DALI, OpenCV and torch.
        multiprocessing_context="spawn",
    )
    return iter(loader)
