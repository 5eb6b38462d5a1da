"""Frozen features of images: extracted once per backbone, image set and transform, and kept.

Suffixes: n images, B of a batch, D width.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from jobs.evaluation.frozen import Frozen
from jobs.evaluation.images import ImageSet, open_images
from jobs.evaluation.loading import Loader, Transform, centre_crop
from jobs.run.folder import whole_file
from jobs.run.terminal import progress, warn
from jobs.run.world import World
from shards.errors import InputError

Part = TypeVar("Part")

# Crops below this side (pixels) keep the whole centre square: cutting 1/8 off a 32-pixel image costs accuracy.
SMALL = 96


class Features(NamedTuple):
    """Features float32 [n, D] of the n images that could be read, their labels and rows in the image set, int64 [n]."""

    features_nD: Tensor
    labels_n: Tensor
    rows_n: Tensor


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
) -> Features:
    """Features of an image set, in its order, on the CPU.

    Images that cannot be read are left out and named in a warning. `world` splits the work over ranks, each of which
    gets all rows. With `cache`, a folder, features of the same weights, images and transform are read from there.

    Raises:
        InputError: no image could be read.
    """
    frozen = backbone if isinstance(backbone, Frozen) else Frozen(backbone, type(backbone).__name__, size)
    opened = open_images(images) if isinstance(images, str | Path) else images
    place = None if cache is None else cache / f"{_key(frozen, opened)}.safetensors"
    try:
        scored = _stored(place, len(opened.labels))
        if scored is not None and advance:
            advance(len(opened.labels))
        if scored is None:
            scored = _run(frozen, opened, np.arange(len(opened.labels)), device, batch, world, advance)
            if place is not None and (world is None or world.leads):
                _keep(place, *scored)
        features_nD, rows_n, broken = scored
        warn_broken(opened, broken)
    finally:
        if opened is not images:
            opened.close()
    return Features(features_nD, torch.from_numpy(opened.labels)[rows_n], rows_n)


def _key(frozen: Frozen, images: ImageSet) -> str:
    facts = f"{frozen.identity()} {images.identity} {default_crop(frozen.size)}"
    return hashlib.sha256(facts.encode()).hexdigest()[:32]


# Features, their rows, and why other rows have none.
Found = tuple[Tensor, Tensor, dict[int, str]]


def _stored(place: Path | None, images: int) -> Found | None:
    """What is kept; None where nothing is, or, with a warning, where the file is damaged."""
    if place is None or not place.is_file():
        return None
    try:
        with safe_open(place, "pt") as held:
            features_nD, rows_n = held.get_tensor("features"), held.get_tensor("rows")
            broken = {int(row): reason for row, reason in json.loads((held.metadata() or {})["broken"]).items()}
        rows = {*rows_n.tolist(), *broken}
        if len(rows_n) != len(features_nD) or rows != set(range(images)) or not len(rows_n):
            raise ValueError("its rows are not those of the images")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        warn(f"{place} is damaged ({error}); its features are computed again")
        return None
    return features_nD, rows_n, broken


def _keep(place: Path, features_nD: Tensor, rows_n: Tensor, broken: dict[int, str]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    content = {"features": features_nD.contiguous(), "rows": rows_n.contiguous()}
    with whole_file(place) as temporary:
        temporary.write_bytes(safetensors.torch.save(content, {"broken": json.dumps(broken)}))


@torch.inference_mode()
def _run(
    frozen: Frozen,
    images: ImageSet,
    rows: np.ndarray,
    device: torch.device,
    batch: int,
    world: World | None,
    advance: Callable[[int], object] | None,
) -> Found:
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
    for others in gather(broken, world):
        broken |= others
    parts = gather((torch.cat(features), torch.cat(kept)) if features else None, world)
    if not parts:
        warn_broken(images, broken)
        raise InputError(f"images: no image of {images.name} could be read; `hardviews verify` says why")
    features_nD, rows_n = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = rows_n.argsort()
    return features_nD[order], rows_n[order], dict(sorted(broken.items()))


def gather(part: Part | None, world: World | None) -> list[Part]:
    """What every rank holds, in the order of ranks; ranks without anything are left out."""
    if world is None or world.size == 1:
        return [part] if part is not None else []
    held: list[Part | None] = [None] * world.size
    torch.distributed.all_gather_object(held, part)
    return [p for p in held if p is not None]


def warn_broken(images: ImageSet, broken: dict[int, str]) -> None:
    for row, reason in list(broken.items())[:5]:
        warn(f"{images.where(row)} is left out: {reason}")
    if len(broken) > 5:
        warn(f"{len(broken) - 5} more images of {images.name} cannot be read and are left out")


def features_of(
    frozen: Frozen, images: ImageSet, role: str, device: torch.device, batch: int, world: World, cache: Path | None
) -> Features:
    """`extract_features` with a progress bar on the leading rank."""
    if not world.leads:
        return extract_features(frozen, images, frozen.size, device, batch, world=world, cache=cache)
    share = len(range(world.rank, len(images.labels), world.size))
    with progress(f"features of {role}", share, "images") as bar:
        return extract_features(
            frozen, images, frozen.size, device, batch, world=world, cache=cache, advance=bar.advance
        )
