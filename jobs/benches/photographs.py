"""JPEGs that weigh as photographs of ImageNet do, made from a seed: what the benchmarks run on.

ImageNet's training images are on average about 470×400 pixels and 110 KB. Decoding costs by the byte and by the pixel,
so images of other weight would flatter or punish a loader.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 470, 400
_QUALITY = 95


def photograph(seed: int) -> NDArray[np.uint8]:
    """[H, W, 3] RGB: clouds of colour at all scales (the 1/f spectrum of natural images), shapes with edges, grain."""
    rng = np.random.default_rng(seed)
    height, width = HEIGHT + int(rng.integers(-40, 41)), WIDTH + int(rng.integers(-40, 41))
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(7):
        coarse = rng.normal(0, 40 / 1.45**octave, (4 << octave, 4 << octave, 3)).astype(np.float32)
        gray = coarse.mean(2, keepdims=True) * 1.7  # octaves share most of their light: real colours are muted
        image += cv2.resize(0.3 * coarse + 0.7 * gray, (width, height), interpolation=cv2.INTER_CUBIC)
    image += rng.uniform(100, 140)
    for _ in range(12):
        corners = rng.uniform((0, 0), (width, height), (3, 2)).astype(np.int32)
        mask = cv2.fillPoly(np.zeros((height, width), np.uint8), [corners], 1)
        image[mask > 0] += rng.normal(0, 20) + rng.normal(0, 12, 3)
    image += rng.normal(0, 7, (height, width, 1)) + rng.normal(0, 2, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(seed: int) -> bytes:
    """The photograph of this seed as a JPEG file."""
    done, data = cv2.imencode(".jpg", photograph(seed)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert done
    return data.tobytes()
