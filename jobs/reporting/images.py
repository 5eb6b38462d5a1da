"""Pictures inside the page: arrays → data URIs, small enough for one file."""

import base64
import io

import numpy as np
from PIL import Image

from jobs.reporting.html import Markup, tag

# Sides up to this many pixels are kept lossless and shown with sharp pixels.
PIXEL_ART = 64


def shrink(image_HWC: np.ndarray, longest: int) -> np.ndarray:
    """uint8 image with its longer side at most `longest` pixels; smaller ones stay as they are."""
    height, width = image_HWC.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS))


def data_uri(image_HWC: np.ndarray) -> str:
    """uint8 [H, W, 3] or [H, W] as a data URI: PNG where small, WebP else."""
    lossless = max(image_HWC.shape[:2]) <= PIXEL_ART
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image_HWC))
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "WEBP", quality=82, method=4)
    kind = "png" if lossless else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def picture(image_HWC: np.ndarray, alt: str, longest: int = 256) -> Markup:
    """An <img> with a text alternative; width and height are set, so that the page does not jump while it loads."""
    small = shrink(image_HWC, longest)
    height, width = small.shape[:2]
    pixels = "pixels" if max(height, width) <= PIXEL_ART else None
    return tag("img", src=data_uri(small), alt=alt, width=width, height=height, class_=pixels, decoding="async")
