"""Shards as arrays, and the share of generated images that kNN confirms."""

from pathlib import Path

import numpy as np
from image_folders import build_at
from PIL import Image

from shards.generation.pixels import confirmed, read_images


def write(root: Path, label: str, number: int, colour: tuple[int, int, int], size: tuple[int, int]) -> None:
    (root / label).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(root / label / f"{number}.png")


def test_images_are_read_square_in_the_order_of_rows(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / "images", "ab"[number % 2], number, (number * 40, 0, 9), (10 + number, 16 - number))
    manifest = build_at(f"imagefolder:{tmp_path / 'images'}", tmp_path / "real", shard_samples=4)
    images, labels = read_images(manifest, 5)
    columns = manifest.columns(np.arange(6))
    numbers = [int(key.rsplit("-", 1)[1]) for key in columns.key]
    assert images.shape == (6, 5, 5, 3)
    assert labels.tolist() == columns.label.tolist()
    for image, number in zip(images, numbers, strict=True):
        assert (image == np.array([number * 40, 0, 9])).all()
    seen: list[int] = []
    some, _ = read_images(manifest, 5, limit=3, on_images=seen.append)
    assert seen == [2, 1]
    assert np.array_equal(some, images[[0, 2, 4]])
    assert len(read_images(manifest, 5, limit=99)[0]) == 6


def test_area_reduction_averages(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a" / "0.png")
    images, _ = read_images(build_at(f"imagefolder:{tmp_path / 'images'}", tmp_path / "real"), 2)
    means = pixels.reshape(2, 4, 2, 4, 3).mean((1, 3))
    assert np.abs(images[0] - means).max() <= 1


def test_confirmed_counts_the_nearest_class() -> None:
    real = np.zeros((4, 2, 2, 3), np.uint8)
    real[2:] = 200
    labels = np.array([0, 0, 1, 1])
    made = np.full((4, 2, 2, 3), 10, np.uint8)
    made[1:] = 190
    assert confirmed(made, np.array([0, 1, 1, 0]), real, labels) == 0.75
    assert confirmed(made, np.array([0, 1, 1, 1]), real, labels, neighbours=2) == 1.0


def test_large_jpegs_keep_their_look(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    y, x = np.mgrid[0:400, 0:400]
    pixels = np.stack([x * 0.6, y * 0.6, (x + y) * 0.3], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a" / "0.jpg", quality=95)
    images, _ = read_images(build_at(f"imagefolder:{tmp_path / 'images'}", tmp_path / "real"), 4)
    means = pixels.reshape(4, 100, 4, 100, 3).mean((1, 3))
    assert np.abs(images[0] - means).max() <= 3
