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
    "text": (b"404 not found", "not an image"),
    "web page": (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC: convert it to JPEG first"),
    "jpeg xl": (b"\xff\x0a" + bytes(99), "JPEG XL: convert it"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "compressed by gzip: unpack"),
    "svg": (b'<?xml version="1.0"?>\n<!-- drawn --><svg xmlns="x"/>', "SVG: draw it"),
    "12-bit jpeg": (
        jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        "JPEG of 12 bits per sample: convert",
    ),
    "lossless jpeg": (jpeg().replace(b"\xff\xc0\0\x11", b"\xff\xc3\0\x11"), "lossless JPEG: convert"),
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


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(extra: bytes = b"", crc: int | None = None) -> bytes:
    """The picture with more chunks before its pixels, or a wrong checksum of these."""
    rows = b"".join(b"\0" + row.tobytes() for row in picture())
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows), crc)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


SIDE_CHUNKS = {
    "bad checksum of text": chunk(b"tEXt", b"Comment\0hello", 1),
    "bad checksum of a profile": chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"x"), 1),
    "long text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1_200_000))),
    "long international text": chunk(b"iTXt", b"workflow\0\1\0en\0\0" + zlib.compress(bytes(1_200_000))),
    "long profile": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1_500_000))),
}


@pytest.mark.parametrize("rules", [RULES, Rules(check="header"), Rules(resize_short=HEIGHT // 2)])
@pytest.mark.parametrize("name", SIDE_CHUNKS)
def test_odd_side_chunks_of_png_are_dropped_and_pixels_kept(name: str, rules: Rules) -> None:
    good = chunk(b"tEXt", b"Comment\0this stays")
    made = prepare(png(SIDE_CHUNKS[name] + good), rules)
    if rules.resize_short is None:
        assert made.content == png(good)
    assert (made.height, made.width) == ((HEIGHT, WIDTH) if rules.resize_short is None else (12, 20))


def test_png_with_a_wrong_checksum_of_its_pixels_is_encoded_anew() -> None:
    """Pillow ignores that checksum, DALI and OpenCV stop at it."""
    made = prepare(png(crc=5), RULES)
    assert made.content != png(crc=5) and np.array_equal(pixels_of(made.content), picture())
    assert [item.shape for item in decoders_of_training(made.content)] == [(HEIGHT, WIDTH, 3)] * 2
    assert prepare(png(), RULES).content == png()


def decoders_of_training(content: bytes) -> list:
    from pipelines.decode import HAS_DALI, open_decoder

    data = [np.frombuffer(content, np.uint8)]
    return [open_decoder(1, 1, kind).decode(data)[0] for kind in ("dali" if HAS_DALI else "pillow", "pillow")]


def damaged_pngs() -> dict[str, bytes]:
    rows = b"".join(b"\0" + row.tobytes() for row in picture())
    packed = zlib.compress(rows)

    def with_pixels(data: bytes) -> bytes:
        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    return {
        "checksum of the stream": with_pixels(packed[:-4] + b"abcd"),
        "stream without its end": with_pixels(packed[:-4]),
        "rows missing": with_pixels(zlib.compress(rows[: len(rows) // 2])),
        "rows too many": with_pixels(zlib.compress(rows + rows)),
        "bytes after the stream": with_pixels(packed + b"abcd" * 9),
        "unknown filter": with_pixels(zlib.compress(b"\7" + rows[1:])),
        "damaged stream": with_pixels(packed[: len(packed) // 2] + bytes(9) + packed[len(packed) // 2 + 9 :]),
        "checksum of the header": png().replace(struct.pack(">I", zlib.crc32(png()[12:29])), b"abcd"),
        "no end": png()[:-12],
    }


@pytest.mark.parametrize("name", damaged_pngs())
def test_what_a_build_takes_training_decodes(name: str) -> None:
    try:
        made = prepare(damaged_pngs()[name], RULES)
    except BadImageError:
        return
    for item in decoders_of_training(made.content):
        assert np.array_equal(item, pixels_of(made.content))


def exif_block(*entries: bytes) -> bytes:
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\0\0" + tiff + struct.pack("<ii", -1, 0)


TURNED = struct.pack("<HHII", 0x112, 3, 1, 6)
ODD_EXIF = {
    "gps that leads nowhere": (exif_block(TURNED, struct.pack("<HHII", 0x8825, 4, 1, 9999)), True),
    "resolution by zero": (exif_block(TURNED, struct.pack("<HHII", 0x11A, 10, 1, 38)), True),
    "no head": (b"Exif\0\0XX*\0\x08\0\0\0", False),
    "empty": (b"Exif\0\0", False),
}


@pytest.mark.parametrize("short", [None, 12])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", ODD_EXIF)
def test_odd_exif_costs_no_image(name: str, mode: str, short: int | None) -> None:
    exif, turns = ODD_EXIF[name]
    image = Image.fromarray(picture()).convert(mode)
    content = file(image, "JPEG", quality=95)
    content = content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]
    made = prepare(content, Rules(resize_short=short))
    expected = image.convert("RGB").transpose(Image.Transpose.ROTATE_270) if turns else image.convert("RGB")
    expected = expected.resize((made.width, made.height), Image.Resampling.BOX)
    assert (made.height > made.width) == turns
    assert close(pixels_of(made.content), np.asarray(expected), 8)


def test_max_pixels_may_be_above_pillow_s_own_limit() -> None:
    content = file(Image.new("1", (16_000, 12_000)), "PNG")
    made = prepare(content, Rules(max_pixels=200_000_000, resize_short=12))
    assert (made.height, made.width) == (12, 16)


def smooth(size: tuple[int, int] = (200, 150)) -> Image.Image:
    small = np.random.default_rng(1).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("rules", [RULES, Rules(check="header"), Rules(quality=80), Rules(resize_short=20)])
def test_a_thumbnail_in_the_header_is_no_end(rules: Rules) -> None:
    inner = file(smooth((40, 30)), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0" + struct.pack("<I", 14) + struct.pack("<H", 2)
    exif += struct.pack("<HHII", 0x201, 4, 1, 44) + struct.pack("<HHII", 0x202, 4, 1, len(inner)) + bytes(4) + inner
    content = file(smooth(), "JPEG", quality=95)
    whole = content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]
    assert prepare(whole, rules).height == (20 if rules.resize_short else 150)
    for length in (len(whole) * 2 // 3, len(exif) + 6):
        with pytest.raises(BadImageError, match=r"truncated|header is damaged"):
            prepare(whole[:length], rules)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("rules", [RULES, Rules(quality=80), Rules(resize_short=20)])
def test_a_jpeg_garbled_in_its_middle_is_damaged(rules: Rules, progressive: bool) -> None:
    content = file(smooth((500, 400)), "JPEG", quality=95, progressive=progressive)
    third = len(content) // 3
    noise = np.random.default_rng(1).integers(0, 255, third, np.uint8).tobytes()
    with pytest.raises(BadImageError, match="damaged"):
        prepare(content[:third] + noise + content[2 * third :], rules)
    with pytest.raises(BadImageError, match="damaged"):
        prepare(content[: 2 * third] + b"\xff\xd9", rules)
    padded = content[:-2] + bytes(20) + content[-2:]  # harmless: all blocks are there
    made = prepare(padded, rules)
    assert made.content == padded if rules is RULES else made.content == prepare(content, rules).content


@pytest.mark.parametrize("sampling", [[(4, 1)], [(1, 4)], [(3, 1)], [(2, 2)], [(1, 2)]])
def test_jpegs_of_odd_sampling_pass(sampling) -> None:
    """Brightness alone with factors of its own: few decoders name such kinds, all of them read them."""
    content = bytearray(file(smooth().convert("L"), "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 11] = sampling[0][0] << 4 | sampling[0][1]
    made = prepare(bytes(content), RULES)
    assert (made.height, made.width) == (150, 200)


# Colours


def profile_of(gamma: float, primaries: tuple[tuple[float, float], ...]) -> bytes:
    """An ICC profile (version 2, matrix and curve) with a white point of D50."""
    x, y = (np.array(column) for column in zip(*primaries, strict=True))
    matrix = np.stack([x / y, np.ones(3), (1 - x - y) / y])
    white = np.array([0.9642, 1.0, 0.8249])
    columns = (matrix * np.linalg.solve(matrix, white)).T

    def fixed(numbers: np.ndarray) -> bytes:
        return b"".join(struct.pack(">i", round(float(number) * 65536)) for number in numbers)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    parts = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(80),
        b"cprt": b"text" + bytes(4) + b"none\0\0\0\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed(white),
    }
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True):
        parts[name] = b"XYZ " + bytes(4) + fixed(column)
    parts |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = b"", b"", 128 + 4 + 12 * len(parts)
    for name, part in parts.items():
        part += bytes(-len(part) % 4)
        table += name + struct.pack(">II", start + len(body), len(part))
        body += part
    size = start + len(body)
    head = (
        struct.pack(">I", size) + bytes(4) + bytes([2, 0x20, 0, 0]) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    )
    head += fixed(white)
    return head.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + body


# Adapted to D50, as profiles store them.
SRGB_PRIMARIES = ((0.6485, 0.3309), (0.3212, 0.5979), (0.1559, 0.0660))
WIDE_PRIMARIES = ((0.6485, 0.3309), (0.2302, 0.7016), (0.1559, 0.0660))  # Adobe RGB (1998)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("TIFF", "RGB")],
)
def test_profiles_of_rgb_are_applied(kind: str, mode: str) -> None:
    profile = profile_of(2.2, WIDE_PRIMARIES)
    image = Image.fromarray(picture())
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    made = prepare(file(image, kind, icc_profile=profile, **options), RULES)
    shown = ImageCms.profileToProfile(
        Image.fromarray(picture()), io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert np.abs(np.asarray(shown).astype(int) - picture()).mean() > 5  # what is to be seen
    assert close(pixels_of(made.content), np.asarray(shown), 2)
    assert "icc_profile" not in Image.open(io.BytesIO(made.content)).info


def test_profiles_like_srgb_leave_the_bytes_as_they_are() -> None:
    for profile in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        profile_of(2.2, SRGB_PRIMARIES),
        b"no profile",
    ):
        content = jpeg(icc_profile=profile)
        assert prepare(content, RULES).content == content


@pytest.mark.parametrize(
    ("gamma", "srgb", "middle"),
    [(1.0, False, 188), (1 / 1.8, False, 147), (1 / 2.2, False, 130), (1.0, True, 130), (0.0, False, 130)],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P"])
def test_gamma_of_png_is_applied_as_browsers_do(gamma: float, srgb: bool, middle: int, mode: str) -> None:
    gray = Image.new("RGB", (6, 5), (130, 130, 130))
    content = file(gray.quantize(4) if mode == "P" else gray.convert(mode), "PNG")
    extra = chunk(b"gAMA", struct.pack(">I", round(1e5 * gamma))) + (chunk(b"sRGB", b"\0") if srgb else b"")
    made = prepare(content[:33] + extra + content[33:], RULES)
    assert set(pixels_of(made.content).ravel().tolist()) == {middle}


def test_an_apng_shows_its_animation_rather_than_its_default_picture() -> None:
    frames = [Image.fromarray(255 - picture()), Image.fromarray(picture()), Image.fromarray(255 - picture())]
    content = file(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    for rules in (RULES, Rules(resize_short=12)):
        made = prepare(content, rules)
        expected = Image.fromarray(picture()).resize((made.width, made.height), Image.Resampling.LANCZOS)
        assert close(pixels_of(made.content), np.asarray(expected), 1)


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
