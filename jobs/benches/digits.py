"""The demo's images: scikit-learn's scanned digits as files, or a split of a folder of one's own."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import InputError

HELD_OUT = 0.2  # share of each class
PIXELS = 32  # a side; the scans have 8
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def write_digits(folder: Path, pixels: int = PIXELS) -> None:
    """Writes the 1,797 scanned digits as `train/<digit>/NNNN.png` and `test/<digit>/NNNN.png`, RGB.

    One in five of each digit is held out. What is there already stays.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    scans = np.round(data["images"] * 255 / 16).astype(np.uint8)
    labels = np.asarray(data["target"])
    held_out = held_out_rows(labels, HELD_OUT, seed=0)
    for number, (scan, label) in enumerate(zip(scans, labels, strict=True)):
        path = folder / ("test" if held_out[number] else "train") / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(scan).resize((pixels, pixels), Image.Resampling.BICUBIC)
            image.convert("RGB").save(path)


def split_folder(images: Path, out: Path, share: float = HELD_OUT, seed: int = 0) -> None:
    """Splits an ImageFolder into `out/train/<class>/` and `out/test/<class>/` by symbolic links; no image is copied.

    Args:
        images: a folder per class.
        share: of each class that is held out, at least one image of it.
        seed: of the choice.

    Raises:
        InputError: there is no such folder, it holds no classes, or a class has fewer than two images.
    """
    if not 0 < share < 1:
        raise InputError(f"share {share}: has to lie between 0 and 1")
    if not images.is_dir():
        raise InputError(f"--images {images}: no such folder")
    classes = sorted(path for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise InputError(f"--images {images}: has no folders of classes; it needs one folder of images per class")
    for folder in classes:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
        if len(files) < 2:
            raise InputError(f"--images {images}: class {folder.name} has {len(files)} images; it needs at least 2")
        held_out = held_out_rows(np.zeros(len(files), np.int64), share, seed)
        for number, path in enumerate(files):
            link = out / ("test" if held_out[number] else "train") / folder.name / f"{number:06d}-{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(path.resolve(), link.parent.resolve()))


def held_out_rows(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [n]: the rows held out, the same share of each label but at least one; a function of the arguments alone."""
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(share * len(rows)))
        held_out[np.random.default_rng([seed, int(label)]).permutation(rows)[:count]] = True
    return held_out
