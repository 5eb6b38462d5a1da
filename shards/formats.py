"""What an image's bytes tell without decoding: where they end, whether parts are damaged, what they are instead."""

import re
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

Extension = Literal["jpg", "png", "webp"]

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
END_OF_JPEG = b"\xff\xd9"
END_OF_PNG = b"IEND\xaeB`\x82"
START_OF_SCAN = 0xDA
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # markers of JPEG's frame headers, one for each process
LONGEST_TEXT = 1 << 20  # bytes of a text or profile unpacked; Pillow opens no PNG with more

MAGIC = (
    (rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", "HEIC: convert it to JPEG first, as by heif-convert"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL: convert it to JPEG or PNG first, as by djxl"),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", "JPEG 2000 that Pillow cannot read: convert it to PNG first"),
    (rb"....ftyp", "a video, or an image in a video's container: extract frames first, as by ffmpeg"),
    (rb"\x1a\x45\xdf\xa3|RIFF....AVI ", "a video: extract frames first, as by ffmpeg"),
    (rb"\x1f\x8b", "compressed by gzip: unpack it first"),
    (rb"PK\x03\x04", "a zip archive: unpack it first"),
    (rb"%PDF", "a PDF: extract or draw its images first, as by pdfimages"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg", "SVG: draw it to PNG first"),
    (rb"\s*<(!doctype html|html|head)", "a web page, perhaps an error that was saved as an image: fetch it again"),
    (rb"version https://git-lfs", "a pointer of Git LFS: fetch the file itself by git lfs pull"),
)


def foreign_kind(content: bytes) -> str:
    """What bytes that are no readable image are, and the remedy."""
    head = content[:4096]
    kind = next((text for magic, text in MAGIC if re.match(magic, head, re.DOTALL | re.IGNORECASE)), "")
    return kind or odd_jpeg(content) or "not an image, or its header is damaged"


def odd_jpeg(content: bytes) -> str:
    """Why no common decoder reads a JPEG's kind, empty where its frame header says nothing of that sort."""
    frame = next((one for one in jpeg_segments(content) if one.marker in FRAMES), None)
    bits = content[frame.start + 4] if frame is not None and len(content) > frame.start + 4 else 8
    if bits != 8:
        return f"JPEG of {bits} bits per sample: convert it to PNG, or to JPEG of 8 bits, first"
    if frame is not None and frame.marker in (0xC3, 0xC7, 0xCB, 0xCF):
        return "lossless JPEG: convert it to PNG first"
    return ""


class Segment(NamedTuple):
    """A segment of a JPEG, or a chunk of a PNG."""

    marker: int | bytes
    start: int
    """Offset of its first byte, its marker or length included."""
    stop: int


def jpeg_segments(content: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to its first scan; none of what is no JPEG."""
    start = 2 if content.startswith(JPEG) else len(content)
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker = content[start + 1]
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        stop = start + 2 + int.from_bytes(content[start + 2 : start + 4])
        yield Segment(marker, start, stop)
        if marker == START_OF_SCAN:
            return
        start = stop


def png_chunks(content: bytes) -> Iterator[Segment]:
    """The chunks of a PNG up to its end, whole ones alone."""
    start = len(PNG)
    while start + 12 <= len(content):
        stop = start + 12 + int.from_bytes(content[start : start + 4])
        kind = content[start + 4 : start + 8]
        if stop > len(content):
            return
        yield Segment(kind, start, stop)
        if kind == b"IEND":
            return
        start = stop


def trimmed(content: bytes, extension: Extension) -> bytes | None:
    """The bytes without what follows the image's end (padding, appended files); None where the end is missing."""
    if extension == "webp":
        size = 8 + int.from_bytes(content[4:8], "little")
        return content[:size] if size <= len(content) else None
    # A thumbnail in the header has an end of its own.
    first = next((one.stop for one in jpeg_segments(content) if one.marker == START_OF_SCAN), len(content))
    mark, first = (END_OF_JPEG, first) if extension == "jpg" else (END_OF_PNG, 0)
    end = content.rfind(mark, first)
    if end < 0:
        return None
    return content if end + len(mark) == len(content) else content[: end + len(mark)]


def without_bad_text(content: bytes) -> bytes:
    """A PNG without the chunks beside its picture that stop some decoders: damaged and very long ones.

    libpng drops what is damaged too, a profile or transparency included. All other bytes stay as they are.
    """
    for one in reversed(list(png_chunks(content))):
        if _is_ancillary(one) and not (_is_intact(content, one) and _is_short(content, one)):
            content = content[: one.start] + content[one.stop :]
    return content


def is_intact_png(content: bytes) -> bool:
    """Whether all chunks have the checksum that they carry: some decoders ignore a wrong one, others stop there."""
    return all(_is_intact(content, one) for one in png_chunks(content))


def _is_ancillary(chunk: Segment) -> bool:
    return isinstance(chunk.marker, bytes) and bool(chunk.marker[0] & 0x20)


def _is_intact(content: bytes, chunk: Segment) -> bool:
    stored = int.from_bytes(content[chunk.stop - 4 : chunk.stop])
    return zlib.crc32(memoryview(content)[chunk.start + 4 : chunk.stop - 4]) == stored


def _is_short(content: bytes, chunk: Segment) -> bool:
    """Whether Pillow takes a chunk: what is compressed in it must not unpack to too much."""
    rest = content[chunk.start + 8 : chunk.stop - 4].partition(b"\0")[2]  # behind the keyword
    if chunk.marker in (b"zTXt", b"iCCP"):
        packed = rest[1:]  # behind the method
    elif chunk.marker == b"iTXt" and rest.startswith(b"\1"):
        packed = rest[2:].split(b"\0", 2)[-1]  # behind flag, method, language and translated keyword
    else:
        return True
    try:
        return len(zlib.decompressobj().decompress(packed, LONGEST_TEXT)) < LONGEST_TEXT
    except zlib.error:
        return True  # Pillow passes over it
