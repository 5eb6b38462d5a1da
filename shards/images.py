"""One image's bytes on their way into a shard: checked, passed through where any decoder shows them right.

"Right" is what an image viewer shows: EXIF orientation applied, palette resolved, alpha over white, 16 bits scaled to
8, CMYK turned into RGB through its profile, the first frame of an animation.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

Extension = Literal["jpg", "png", "webp"]

FORMATS: dict[Extension, str] = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
EXTENSIONS: dict[str | None, Extension] = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")  # converted to JPEG unless told otherwise; all others to PNG
ORIENTATION = 0x0112  # EXIF tag
END_OF_JPEG = b"\xff\xd9"
END_OF_PNG = b"IEND\xaeB`\x82"
DEFAULT_QUALITY = 95


class BadImageError(Exception):
    """Why an image cannot be used, in a few words."""


@dataclass(frozen=True)
class Rules:
    """How images are checked and written."""

    check: Literal["full", "header"] = "full"
    """Decode every image whole, or read its header and end alone."""
    resize_short: int | None = None
    """Reduce images whose shorter side is longer than this, in pixels; none is enlarged."""
    quality: int | None = None
    """Encode every image anew as lossy JPEG or WebP of this quality, 1 to 100."""
    format: Extension | None = None
    """Encode images of any other format anew in this one."""
    max_pixels: int = 100_000_000
    """Images of more pixels are left out (decompression bombs)."""


@dataclass(frozen=True)
class Picture:
    """Encoded bytes that every decoder shows alike."""

    content: bytes
    extension: Extension
    height: int
    width: int
    converted: str = ""
    """From what to what, in a few words that are the same for all images of a kind; empty where the bytes are as they
    came."""


def prepare(content: bytes, rules: Rules) -> Picture:
    """Bytes as they come → bytes as they go into a shard; the same ones wherever possible.

    Raises:
        BadImageError: zero bytes, not an image, truncated, damaged, too large, or of a kind that has no agreed look.
    """
    if not content:
        raise BadImageError("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files: what matters of them is decided here
            with Image.open(io.BytesIO(content)) as image:
                return _prepare(content, image, rules)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("not an image, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"more than {rules.max_pixels} pixels (max_pixels)") from error
    except Exception as error:
        # Decoders of damaged input raise anything (struct.error, SyntaxError, MemoryError, …); none may end a build.
        raise BadImageError(f"cannot be decoded: {error or type(error).__name__}") from error


def _prepare(content: bytes, image: Image.Image, rules: Rules) -> Picture:
    width, height = image.size
    if width * height > rules.max_pixels:
        raise BadImageError(f"{width}x{height}: more than {rules.max_pixels} pixels (max_pixels)")
    extension = plain_extension(content, image)
    smaller = rules.resize_short is not None and min(width, height) > rules.resize_short
    if extension and not smaller and rules.quality is None and rules.format in (None, extension):
        whole = trimmed(content, extension)
        if whole is not None and (rules.check == "header" or decodes(whole, image, extension)):
            return Picture(whole, extension, height, width)
    target = rules.format or ("jpg" if rules.quality or image.format in LOSSY else "png")
    changes = [*(["turned"] if orientation(image) != 1 else []), *(["reduced"] if smaller else [])]
    converted = f"{image.format} {image.mode} to {' '.join([*changes, target])}"
    shown = as_shown(image, rules.resize_short if smaller else None)
    return Picture(encode(shown, target, rules.quality), target, shown.height, shown.width, converted)


def plain_extension(content: bytes, image: Image.Image) -> Extension | None:
    """The extension for bytes that any decoder turns into the RGB that a viewer shows; None for all others."""
    extension = EXTENSIONS.get(image.format)
    if extension is None or image.mode not in ("RGB", "L") or orientation(image) != 1:
        return None
    if extension == "jpg":
        return extension
    deep = extension == "png" and content[24] != 8  # IHDR's bit depth: 16 is cut, 1, 2 and 4 are stretched by readers
    if deep or getattr(image, "is_animated", False) or "transparency" in image.info:
        return None
    return extension


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where there is none or it cannot be read."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises whatever broken EXIF data provokes; viewers then show the image as it lies
        return 1
    return value if value in range(2, 9) else 1


def trimmed(content: bytes, extension: Extension) -> bytes | None:
    """The bytes without what follows the image's end (padding, appended files); None where the end is missing."""
    if extension == "webp":
        size = 8 + int.from_bytes(content[4:8], "little")
        return content[:size] if size <= len(content) else None
    mark = END_OF_JPEG if extension == "jpg" else END_OF_PNG
    if content.endswith(mark):
        return content
    end = content.rfind(mark)
    return content[: end + len(mark)] if end >= 0 else None


def decodes(content: bytes, image: Image.Image, extension: Extension) -> bool:
    """Whether the image decodes whole. OpenCV does JPEG a little faster than Pillow."""
    if extension == "jpg":
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        return pixels is not None and pixels.shape[:2] == (image.height, image.width)
    image.load()
    return True


def as_shown(image: Image.Image, short: int | None = None) -> Image.Image:
    """RGB as a viewer shows it, reduced to `short` pixels on the shorter side if given.

    Raises:
        BadImageError: for 32-bit integers and floats, whose black and white are nowhere agreed.
    """
    size = None
    if short is not None and image.format in ("JPEG", "MPO"):
        size = reduced(image.size, short)
        image.draft(None, size)  # decodes straight to the smallest eighth that is not below the wanted size
    image.load()
    if short is not None and size is None:
        size = reduced(image.size, short)
    if image.mode in ("I", "F"):
        raise BadImageError("32-bit pixels: no agreed black and white; scale them to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = with_exif(Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)), image)
    if image.mode == "CMYK":
        image = with_exif(cmyk_to_rgb(image), image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        paper.alpha_composite(layer)
        image = with_exif(paper, image)
    image = image.convert("RGB")
    if size is not None and size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return ImageOps.exif_transpose(image)


def reduced(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height in pixels → those with a shorter side of `short`, in proportion."""
    width, height = size
    if width <= height:
        return short, max(1, round(height * short / width))
    return max(1, round(width * short / height)), short


def with_exif(image: Image.Image, origin: Image.Image) -> Image.Image:
    """The image, turned as `origin` is to be turned."""
    if "exif" in origin.info:
        image.info["exif"] = origin.info["exif"]
    return image


def cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """CMYK → sRGB through the embedded profile; by plain subtraction where there is none or it is broken."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            made = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError):
            made = None
        if made is not None:
            return made
    return image.convert("RGB")


def encode(image: Image.Image | np.ndarray, extension: Extension, quality: int | None = None) -> bytes:
    """RGB image, or uint8 [H, W, 3], → bytes without metadata.

    Args:
        quality: of JPEG and WebP; by default 95, JPEG then with full chroma.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.info.clear()  # profiles and EXIF of the original would be written along and shown a second time
    sink = io.BytesIO()
    options: dict[str, int] = {} if extension == "png" else {"quality": quality or DEFAULT_QUALITY}
    if extension == "jpg" and quality is None:
        options["subsampling"] = 0  # most originals have halved chroma: halving it twice would show
    image.save(sink, FORMATS[extension], **options)
    return sink.getvalue()
