"""Odd images: each comes out as a viewer shows it, or with a reason. The pictures are made here, with Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from shards.images import BadImageError, Rules, encode, prepare

HEIGHT, WIDTH = 24, 40
RULES = Rules()


def picture() -> np.ndarray:
    """uint8 [24, 40, 3]: four flat quarters, so that lossy formats and turns can be told by eye and by number."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:12, :20], pixels[:12, 20:] = (200, 30, 40), (20, 180, 60)
    pixels[12:, :20], pixels[12:, 20:] = (40, 60, 220), (240, 240, 80)
    return pixels


def file(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    """Pixels as a plain decoder gives them: no EXIF, no profile."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def jpeg(**options) -> bytes:
    return file(Image.fromarray(picture()), "JPEG", quality=95, subsampling=0, **options)


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return jpeg(exif=exif)


def close(left: np.ndarray, right: np.ndarray, by: float = 3) -> bool:
    return left.shape == right.shape and np.abs(left.astype(int) - right.astype(int)).mean() < by


PLAIN = {
    "jpeg": (jpeg(), "jpg"),
    "progressive jpeg": (jpeg(progressive=True), "jpg"),
    "gray jpeg": (file(Image.fromarray(picture()).convert("L"), "JPEG"), "jpg"),
    "upright by exif": (with_orientation(1), "jpg"),
    "exif out of range": (with_orientation(9), "jpg"),
    "png": (file(Image.fromarray(picture()), "PNG"), "png"),
    "gray png": (file(Image.fromarray(picture()).convert("L"), "PNG"), "png"),
    "webp": (file(Image.fromarray(picture()), "WEBP", quality=95), "webp"),
    "1 pixel wide": (file(Image.fromarray(picture()[:, :1]), "JPEG"), "jpg"),
    "1 pixel high": (file(Image.fromarray(picture()[:1]), "PNG"), "png"),
    "1 pixel": (file(Image.fromarray(picture()[:1, :1]), "PNG"), "png"),
}


@pytest.mark.parametrize("check", ["full", "header"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_images_pass_through(name: str, check) -> None:
    content, extension = PLAIN[name]
    made = prepare(content, Rules(check=check))
    shown = pixels_of(content)
    assert (made.content, made.extension) == (content, extension)
    assert (made.height, made.width) == shown.shape[:2]


@pytest.mark.parametrize("value", range(2, 9))
def test_exif_orientation_is_baked_in(value: int) -> None:
    # What EXIF means by 2 to 8, in numpy: how stored pixels are turned to be shown.
    turns = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90,
    }
    made = prepare(with_orientation(value), RULES)
    shown = turns[value](picture())
    assert made.extension == "jpg"
    assert (made.height, made.width) == shown.shape[:2]
    assert close(pixels_of(made.content), shown)
    assert "exif" not in Image.open(io.BytesIO(made.content)).info


def test_alpha_lies_over_white() -> None:
    alpha = np.dstack([picture(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    alpha[:12, :20, 3], alpha[:12, 20:, 3] = 0, 128
    made = prepare(file(Image.fromarray(alpha), "PNG"), RULES)
    expected = picture().astype(float)
    expected[:12, :20] = 255
    expected[:12, 20:] += (255 - expected[:12, 20:]) * (127 / 255)
    assert made.extension == "png"
    assert close(pixels_of(made.content), expected, 0.6)


def test_palette_with_a_transparent_colour() -> None:
    image = Image.fromarray(picture()).quantize(4)
    hidden = image.getpixel((0, 0))
    made = prepare(file(image, "PNG", transparency=hidden), RULES)
    expected = picture()
    expected[:12, :20] = 255
    assert np.array_equal(pixels_of(made.content), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(kind: str) -> None:
    deep = (np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 65535 // 959).astype(np.uint16)
    made = prepare(file(Image.fromarray(deep), kind), RULES)
    assert close(pixels_of(made.content)[:, :, 0], np.round(deep / 257), 0.01)


def test_16_bit_rgb_is_scaled() -> None:
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in picture())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    made = prepare(content, RULES)
    assert made.content != content
    assert np.array_equal(pixels_of(made.content), picture())


def test_bitmap_png_of_1_bit() -> None:
    image = Image.fromarray(picture()).convert("1")
    made = prepare(file(image, "PNG"), RULES)
    assert made.content[24] == 8
    assert np.array_equal(pixels_of(made.content), np.asarray(image.convert("RGB")))


def test_cmyk_without_a_profile() -> None:
    made = prepare(file(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95, subsampling=0), RULES)
    assert Image.open(io.BytesIO(made.content)).mode == "RGB"
    assert close(pixels_of(made.content), picture(), 6)


def test_cmyk_with_a_broken_profile() -> None:
    image = Image.fromarray(picture()).convert("CMYK")
    made = prepare(file(image, "JPEG", quality=95, subsampling=0, icc_profile=b"no profile"), RULES)
    assert close(pixels_of(made.content), picture(), 6)


def test_a_profile_of_the_original_is_not_written_along() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 3
    made = prepare(jpeg(icc_profile=profile, exif=exif), RULES)
    assert "icc_profile" not in Image.open(io.BytesIO(made.content)).info


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    content = file(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    made = prepare(content, RULES)
    assert close(pixels_of(made.content), picture())
    assert getattr(Image.open(io.BytesIO(made.content)), "n_frames", 1) == 1


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "PPM"])
def test_other_formats_become_png(kind: str) -> None:
    made = prepare(file(Image.fromarray(picture()), kind), RULES)
    assert made.extension == "png"
    assert np.array_equal(pixels_of(made.content), picture())


def test_bytes_after_the_end_are_cut_off() -> None:
    for content in (jpeg(), PLAIN["png"][0]):
        assert prepare(content + b"\0" * 100, RULES).content == content


BROKEN = {
    "zero bytes": (b"", "zero bytes"),
    "text": (b"<html>404</html>", "not an image"),
    "truncated jpeg": (jpeg()[:-300], "truncated"),
    "jpeg without its end": (jpeg()[:-2], "truncated"),
    "half a header": (jpeg()[:15], "truncated|not an image|cannot be decoded"),
    "truncated png": (PLAIN["png"][0][:-40], "cannot be decoded"),
    "truncated webp": (PLAIN["webp"][0][:-40], "cannot be decoded"),
    "floats": (file(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"), "32-bit"),
    "bomb": (file(Image.new("1", (12_000, 9_000)), "PNG"), "more than 100000000 pixels"),
    "great bomb": (file(Image.new("1", (20_000, 18_000)), "PNG"), "more than 100000000 pixels"),
}


@pytest.mark.parametrize("check", ["full", "header"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_have_a_reason(name: str, check) -> None:
    content, reason = BROKEN[name]
    with pytest.raises(BadImageError, match=reason):
        prepare(content, Rules(check=check))


def test_full_check_finds_what_a_header_hides() -> None:
    content = bytearray(PLAIN["png"][0])
    start = content.index(b"IDAT") + 8
    content[start : start + 20] = bytes(20)
    assert prepare(bytes(content), Rules(check="header")).content == content
    with pytest.raises(BadImageError, match="cannot be decoded"):
        prepare(bytes(content), Rules(check="full"))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([jpeg(), PLAIN["png"][0], PLAIN["webp"][0]]), st.data())
def test_damage_never_raises_anything_else(content: bytes, data) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(1, len(content)))]
    try:
        made = prepare(bytes(damaged), RULES)
    except BadImageError as error:
        assert str(error)
    else:
        assert pixels_of(made.content).shape == (made.height, made.width, 3)


@pytest.mark.parametrize("short", [6, 12, 23])
@pytest.mark.parametrize("name", ["jpeg", "png", "webp"])
def test_resize_short_reduces_in_proportion(name: str, short: int) -> None:
    made = prepare(PLAIN[name][0], Rules(resize_short=short))
    assert (made.height, made.width) == (short, round(WIDTH * short / HEIGHT))
    assert made.extension == ("png" if name == "png" else "jpg")
    quarter = pixels_of(made.content)[short // 4, made.width // 4].astype(int)
    assert np.abs(quarter - picture()[6, 10]).max() < 12


def test_resize_short_turns_first() -> None:
    made = prepare(with_orientation(6), Rules(resize_short=12))
    assert (made.height, made.width) == (20, 12)


@pytest.mark.parametrize("short", [HEIGHT, 100])
def test_resize_short_enlarges_none(short: int) -> None:
    assert prepare(jpeg(), Rules(resize_short=short)).content == jpeg()


def test_quality_encodes_anew() -> None:
    small, large = (prepare(jpeg(), Rules(quality=quality)) for quality in (10, 90))
    assert len(small.content) < len(large.content)
    assert prepare(PLAIN["png"][0], Rules(quality=90)).extension == "jpg"


@pytest.mark.parametrize("target", ["jpg", "png", "webp"])
def test_format_encodes_the_others_alone(target) -> None:
    for name, (content, extension) in PLAIN.items():
        made = prepare(content, Rules(format=target))
        assert made.extension == target, name
        assert (made.content == content) == (extension == target), name


def test_encode_takes_arrays() -> None:
    assert np.array_equal(pixels_of(encode(picture(), "png")), picture())
