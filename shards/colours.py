"""Colours as a viewer shows them: embedded ICC profiles and the gamma of PNG, turned into sRGB.

Decoders of training ignore both, so an image that would look different is converted once, when it is built. Most
profiles are those of sRGB itself, exactly or nearly, and such an image's bytes stay as they are. PNG's chromaticities
(cHRM) are ignored.
"""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

NOTICEABLE = 2.0  # mean difference, of 255, that is worth encoding an image a second time
SPACES = {"RGB": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK"}  # mode → the colour space that a profile's header names
SRGB = ImageCms.createProfile("sRGB")


def looks_otherwise(image: Image.Image) -> bool:
    """Whether a viewer shows other colours than the stored ones."""
    mode = "L" if image.mode in ("1", "L", "LA") or image.mode.startswith("I;16") else "RGB"
    return _profile(image, mode) is not None or _gamma(image) is not None


def in_srgb(image: Image.Image, origin: Image.Image) -> Image.Image:
    """The image, of mode RGB, L or CMYK, in sRGB as the profile or gamma of `origin` says; CMYK by plain subtraction
    where there is none."""
    transform = _profile(origin, image.mode)
    if transform is not None:
        return ImageCms.applyTransform(image, transform) or image
    image = image.convert("RGB") if image.mode == "CMYK" else image
    curve = _gamma(origin)
    return image if curve is None else image.point(list(curve) * len(image.getbands()))


def _profile(image: Image.Image, mode: str) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    return _transform(profile, mode) if profile else None


@lru_cache(256)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is broken, of another colour space, or makes no noticeable difference."""
    try:
        if profile[16:20] != SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(io.BytesIO(profile), SRGB, mode, "RGB")
        if mode == "CMYK":
            return transform
        sample = _every_colour(mode)
        shown: Any = ImageCms.applyTransform(sample, transform)
    except (ImageCms.PyCMSError, OSError):
        return None
    difference = np.asarray(shown, np.int16) - np.asarray(sample.convert("RGB"), np.int16)
    return transform if np.abs(difference).mean() > NOTICEABLE else None


def _every_colour(mode: str) -> Image.Image:
    """A picture of colours that are evenly spread."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3))


def _gamma(image: Image.Image) -> tuple[int, ...] | None:
    """The curve, 256 values, from stored to shown ones; None where there is none or it makes no noticeable difference.

    Without sRGB and iCCP, PNG's gAMA is the exponent from light to stored values, and 1 / 2.2 that of screens (PNG
    specification, 3rd edition, section 13.13).
    """
    gamma = image.info.get("gamma")
    if image.format != "PNG" or not gamma or gamma <= 0 or "srgb" in image.info or "icc_profile" in image.info:
        return None
    stored = np.arange(256)
    shown = 255 * (stored / 255) ** (1 / (2.2 * gamma))
    return tuple(shown.round().astype(int).tolist()) if np.abs(shown - stored).mean() > NOTICEABLE else None
