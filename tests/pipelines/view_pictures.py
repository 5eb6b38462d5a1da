"""Small images for the tests of this folder: smooth like photographs, noisy like sensors, encoded and broken."""

import io

import numpy as np
from PIL import Image


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: soft blobs of colour under a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 24 + 2, width // 24 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options: object) -> np.ndarray:
    """uint8 [bytes] of the image in a format and colour mode."""
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def jpeg(height: int, width: int, seed: int = 0) -> np.ndarray:
    """The bytes of a JPEG of `pixels`."""
    return encoded(pixels(height, width, seed), quality=90)


def truncated(data: np.ndarray) -> np.ndarray:
    """The first half of a JPEG."""
    return data[: len(data) // 2]
