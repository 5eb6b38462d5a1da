"""One image's bytes on their way into a shard: checked, passed through where any decoder shows them right.

"Right" is what an image viewer shows: EXIF orientation applied, palette resolved, alpha over white, 16 bits scaled to
8, colours turned into sRGB by profile or gamma, the first frame of an animation.
"""

import io
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shards.colours import in_srgb, looks_otherwise
from shards.formats import PNG, Extension, foreign_kind, is_intact_png, odd_jpeg, trimmed, without_bad_text

FORMATS: dict[Extension, str] = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
EXTENSIONS: dict[str | None, Extension] = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")  # converted to JPEG unless told otherwise; all others to PNG
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEFAULT_QUALITY = 95
PADDING = 64  # bytes before a JPEG's end mark that are taken for padding rather than for a damaged picture

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; `Rules.max_pixels` is ours


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
    if content.startswith(PNG):
        content = without_bad_text(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files: what matters of them is decided here
            with Image.open(io.BytesIO(content)) as image:
                return _prepare(content, image, rules)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(foreign_kind(content)) from error
    except Exception as error:
        # Decoders of damaged input raise anything (struct.error, SyntaxError, MemoryError, …); none may end a build.
        raise BadImageError(f"cannot be decoded: {error or type(error).__name__}") from error


def _prepare(content: bytes, image: Image.Image, rules: Rules) -> Picture:
    width, height = image.size
    if width * height > rules.max_pixels:
        raise BadImageError(f"{width}x{height}: more than {rules.max_pixels} pixels (max_pixels)")
    odd = odd_jpeg(content)
    if odd:
        raise BadImageError(odd)
    extension = plain_extension(content, image)
    smaller = rules.resize_short is not None and min(width, height) > rules.resize_short
    if extension and not smaller and rules.quality is None and rules.format in (None, extension):
        whole = trimmed(content, extension)
        if whole is not None and (rules.check == "header" or decodes(whole, image, extension)):
            return Picture(whole, extension, height, width)
    target = rules.format or ("jpg" if rules.quality or image.format in LOSSY else "png")
    changes = [*(["turned"] if orientation(image) != 1 else []), *(["reduced"] if smaller else [])]
    converted = f"{image.format} {image.mode} to {' '.join([*changes, target])}"
    shown = as_shown(content, image, rules.resize_short if smaller else None)
    return Picture(encode(shown, target, rules.quality), target, shown.height, shown.width, converted)


def plain_extension(content: bytes, image: Image.Image) -> Extension | None:
    """The extension for bytes that any decoder turns into the RGB that a viewer shows; None for all others."""
    extension = EXTENSIONS.get(image.format)
    if extension is None or image.mode not in ("RGB", "L") or orientation(image) != 1:
        return None
    if looks_otherwise(image):
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


def decodes(content: bytes, image: Image.Image, extension: Extension) -> bool:
    """Whether any decoder makes the image whole."""
    if extension == "jpg" and jpeg_pixels(content, image) is not None:
        return True
    image.load()
    return extension != "png" or is_intact_png(content)


def jpeg_pixels(content: bytes, image: Image.Image, size: tuple[int, int] = (0, 0)) -> np.ndarray | None:
    """uint8 [H, W, 1, 3 or 4] of a JPEG, None where this decoder does not know its kind, such as odd subsampling.

    Unlike others this decoder tells of damage that libjpeg mends with gray or shifted blocks.

    Args:
        image: the same JPEG, not decoded.
        size: width and height in pixels; decodes straight to the smallest eighth that is not below both.

    Raises:
        BadImageError: it is damaged.
    """
    kind = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[image.mode]

    def decode(strict: bool) -> np.ndarray:
        return simplejpeg.decode_jpeg(content, kind, min_width=size[0], min_height=size[1], strict=strict)

    try:
        return decode(strict=True)
    except ValueError as error:
        reason = str(error)
        padding = re.search(r"(\d+) extraneous bytes before marker 0xd9", reason)
        if padding and int(padding[1]) <= PADDING:
            return decode(strict=False)
        if "Corrupt JPEG data" in reason or "Premature end" in reason:
            raise BadImageError(f"truncated or damaged: {reason}") from error
        return None


def as_shown(content: bytes, image: Image.Image, short: int | None = None) -> Image.Image:
    """RGB as a viewer shows it, reduced to `short` pixels on the shorter side if given.

    Raises:
        BadImageError: it is damaged, or of 32-bit integers or floats, whose black and white are nowhere agreed.
    """
    turn = TURNS.get(orientation(image))
    if image.info.get("default_image"):
        image.seek(1)  # a PNG's own picture for readers without animations
    size = image.size if short is None else reduced(image.size, short)
    if image.mode in ("I", "F"):
        raise BadImageError("32-bit pixels: no agreed black and white; scale them to 8 or 16 bits")
    pixels = jpeg_pixels(content, image, size if short else (0, 0)) if image.format in ("JPEG", "MPO") else None
    if pixels is None or image.mode == "CMYK":
        image.load()
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        flat = opaque(image)
    else:
        alpha, flat = None, Image.fromarray(pixels.squeeze(-1) if image.mode == "L" else pixels)
    shown = in_srgb(flat, image).convert("RGB")
    if alpha is not None:
        paper = Image.new("RGBA", shown.size, "white")
        shown.putalpha(alpha)
        paper.alpha_composite(shown)
        shown = paper.convert("RGB")
    if size != shown.size:
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    return shown if turn is None else shown.transpose(turn)


def opaque(image: Image.Image) -> Image.Image:
    """The image in 8 bits without its transparency, in mode L, RGB or CMYK."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image if image.mode in ("L", "CMYK") else image.convert("RGB")


def reduced(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height in pixels → those with a shorter side of `short`, in proportion."""
    width, height = size
    if width <= height:
        return short, max(1, round(height * short / width))
    return max(1, round(width * short / height)), short


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
