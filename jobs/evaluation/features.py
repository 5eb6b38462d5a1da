"""Frozen features of images: extracted once per backbone, image set and transform, and kept.

Suffixes: n images, B of a batch, D width.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from jobs.evaluation.frozen import Frozen
from jobs.evaluation.images import ImageSet, open_images
from jobs.evaluation.loading import Loader, Transform, centre_crop
from jobs.run.terminal import progress, warn
from jobs.run.world import World
from shards.errors import InputError

# Crops below this side (pixels) keep the whole centre square: cutting 1/8 off a 32-pixel image costs accuracy.
SMALL = 96


def default_crop(size: int) -> float:
    """Share of the shorter side in the centre crop: 7/8 as for ImageNet, the whole square for small images."""
    return 0.875 if size >= SMALL else 1.0


def extract_features(
    backbone: nn.Module | Frozen,
    images: ImageSet | str | Path,
    size: int,
    device: torch.device,
    batch: int = 256,
    *,
    world: World | None = None,
    cache: Path | None = None,
    advance: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features float32 [n, D] and labels int64 [n] of an image set, in its order, on the CPU.

    Images that cannot be read are left out and named in a warning. `world` splits the work over ranks, each of which
    gets all rows. With `cache`, a folder, features of the same weights, images and transform are read from there.

    Raises:
        InputError: no image could be read.
    """
    frozen = backbone if isinstance(backbone, Frozen) else Frozen(backbone, type(backbone).__name__, size)
    opened = open_images(images) if isinstance(images, str | Path) else images
    place = None if cache is None else cache / f"{_key(frozen, opened)}.safetensors"
    try:
        found = _stored(place)
        if found is not None and advance:
            advance(len(opened.labels))
        if found is None:
            found = _run(frozen, opened, np.arange(len(opened.labels)), device, batch, world, advance)
            if place is not None and (world is None or world.leads):
                place.parent.mkdir(parents=True, exist_ok=True)
                partial = place.with_suffix(".partial")
                safetensors.torch.save_file({"features": found[0], "rows": found[1]}, partial)
                partial.replace(place)
    finally:
        if opened is not images:
            opened.close()
    features_nD, rows_n = found
    return features_nD, torch.from_numpy(opened.labels)[rows_n]


def _key(frozen: Frozen, images: ImageSet) -> str:
    facts = f"{frozen.identity()} {images.identity} {default_crop(frozen.size)}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


def _stored(place: Path | None) -> tuple[Tensor, Tensor] | None:
    if place is None or not place.is_file():
        return None
    held = safetensors.torch.load_file(place)
    return held["features"], held["rows"]


@torch.inference_mode()
def _run(
    frozen: Frozen,
    images: ImageSet,
    rows: np.ndarray,
    device: torch.device,
    batch: int,
    world: World | None,
    advance: Callable[[int], object] | None,
) -> tuple[Tensor, Tensor]:
    """Features of `rows` and the rows that could be read, sorted by row, gathered from all ranks."""
    mine = rows if world is None else rows[world.rank :: world.size]
    loader = Loader(images, frozen.size, batch, frozen.mean, frozen.std)
    training = frozen.model.training
    model = frozen.model.to(device).eval()
    features, kept, broken = [], [], {}
    transform: Transform = centre_crop(default_crop(frozen.size))
    try:
        for got in loader.batches(mine, transform, device):
            broken |= got.broken
            if len(got.rows):
                features.append(frozen.features(got.crops_B3SS).cpu())
                kept.append(torch.from_numpy(got.rows))
            if advance:
                advance(len(got.rows) + len(got.broken))
    finally:
        loader.close()
        model.train(training)
    _warn_broken(images, broken)
    parts = gather((torch.cat(features), torch.cat(kept)) if features else None, world)
    if not parts:
        raise InputError(f"images: no image of {images.name} could be read; `hardviews verify` says why")
    features_nD, rows_n = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = rows_n.argsort()
    return features_nD[order], rows_n[order]


def gather(part: tuple[Tensor, Tensor] | None, world: World | None) -> list[tuple[Tensor, Tensor]]:
    """What every rank holds, in the order of ranks; ranks without anything are left out."""
    if world is None or world.size == 1:
        return [part] if part is not None else []
    held: list[tuple[Tensor, Tensor] | None] = [None] * world.size
    torch.distributed.all_gather_object(held, part)
    return [p for p in held if p is not None]


def _warn_broken(images: ImageSet, broken: dict[int, str]) -> None:
    for row, reason in list(broken.items())[:5]:
        warn(f"{images.where(row)} is left out: {reason}")
    if len(broken) > 5:
        warn(f"{len(broken) - 5} more images of {images.name} cannot be read and are left out")


def features_of(
    frozen: Frozen, images: ImageSet, role: str, device: torch.device, batch: int, world: World, cache: Path | None
) -> tuple[Tensor, Tensor]:
    """`extract_features` with a progress bar on the leading rank."""
    if not world.leads:
        return extract_features(frozen, images, frozen.size, device, batch, world=world, cache=cache)
    share = len(range(world.rank, len(images.labels), world.size))
    with progress(f"features of {role}", share, "images") as bar:
        return extract_features(
            frozen, images, frozen.size, device, batch, world=world, cache=cache, advance=bar.advance
        )
