"""Tars that others packed: names with dots, joined tars, links, the same name twice, holes; no image is lost unsaid."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_folders import LOCAL, build_at, photo, write_tar
from PIL import Image
from stored_samples import labelled

from shards.errors import InputError
from shards.index import index
from shards.manifest import Manifest, open_manifest
from shards.verify import verify


def images(out: Path) -> dict[bytes, int]:
    """Image → label of a data set."""
    return labelled(open_manifest(str(out)), out)


def left_out(out: Path) -> dict[str, str]:
    """Origin → reason of what was left out."""
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return {line["origin"]: line["reason"] for line in lines}


def links(path: Path, members: list[tuple[str, bytes | str, bytes]]) -> None:
    """A tar of files and of links: name, content or what it leads to, kind."""
    with tarfile.open(path, "w") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def both_ways(folder: Path) -> tuple[Manifest, Manifest]:
    """The tars of a folder built into `out`, and indexed in place; the two must hold the same images."""
    built = build_at(f"tars:{folder}", folder / "out")
    indexed = index(folder, "real", LOCAL)
    assert images(folder) == images(folder / "out")
    assert not [damage for _, damages in verify(indexed, LOCAL) for damage in damages]
    return built, indexed


def test_numbered_names_are_samples_of_their_own(tmp_path: Path) -> None:
    members = [
        (f"photo.{i:04d}.{kind}", data) for i in range(4) for kind, data in (("jpg", photo(i)), ("cls", b"%d" % i))
    ]
    write_tar(tmp_path / "a.tar", [*members, ("x.cls", b"5"), ("x.v1.jpg", photo(8)), ("x.v2.jpg", photo(9))])
    both_ways(tmp_path)
    assert images(tmp_path / "out") == {**{photo(i): i for i in range(4)}, photo(8): 5, photo(9): 5}
    assert left_out(tmp_path / "out") == {}


def test_joined_tars_are_read_to_the_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", photo(0)), ("a.cls", b"1")])
    write_tar(tmp_path / "b.tar", [("b.jpg", photo(1)), ("c.jpg", photo(2))])
    joined = (tmp_path / "a.tar").read_bytes() + bytes(3 << 20) + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(joined)
    (tmp_path / "b.tar").write_bytes(joined[: 1 << 20] + b"what was appended is no tar".ljust(600, b"."))
    both_ways(tmp_path)
    assert images(tmp_path / "out") == {photo(0): 1, photo(1): -1, photo(2): -1}
    assert list(left_out(tmp_path / "out")) == ["b.tar"]
    assert "damaged" in left_out(tmp_path / "out")["b.tar"]


def test_links_stand_for_files_of_the_tar(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(photo(9))
    links(
        tmp_path / "a.tar",
        [
            ("./d/early.jpg", "../late.jpg", tarfile.SYMTYPE),
            ("d/a.jpg", photo(0), tarfile.REGTYPE),
            ("d/a.cls", b"3", tarfile.REGTYPE),
            ("hard.jpg", "d/a.jpg", tarfile.LNKTYPE),
            ("hard.cls", "d/a.cls", tarfile.LNKTYPE),
            ("out.jpg", "../secret.jpg", tarfile.SYMTYPE),
            ("round.jpg", "round.jpg", tarfile.SYMTYPE),
            ("late.jpg", photo(1), tarfile.REGTYPE),
            ("twice.jpg", "d/early.jpg", tarfile.SYMTYPE),
        ],
    )
    built, _ = both_ways(tmp_path)
    assert images(tmp_path / "out") == {photo(0): 3, photo(1): -1}
    assert len(built) == 5
    assert built.class_counts.tolist() == [0, 0, 0, 2]
    assert left_out(tmp_path / "out") == {
        "a.tar/out.jpg": "a link to ../secret.jpg, which is no file of this tar",
        "a.tar/round.jpg": "a link to round.jpg, which is no file of this tar",
    }


@pytest.mark.parametrize("end_mark", [True, False])
def test_tars_in_a_tar_are_read_where_they_lie(tmp_path: Path, end_mark: bool) -> None:
    """ImageNet as it is distributed: a tar of tars, one for each class."""
    inner = []
    for name, seeds in (("n01", (0, 1)), ("n02", (2,))):
        write_tar(tmp_path / "inner.tar", [(f"{name}_{seed}.JPEG", photo(seed)) for seed in seeds])
        content = (tmp_path / "inner.tar").read_bytes()
        stored = len(content.rstrip(b"\0"))
        inner.append((f"{name}.tar", content if end_mark else content[: -(-stored // 512) * 512]))
    (tmp_path / "inner.tar").unlink()
    write_tar(tmp_path / "all.tar", [("a.jpg", photo(3)), inner[0], ("b.jpg", photo(4)), inner[1]])
    built = build_at(f"tars:{tmp_path / 'all.tar'}", tmp_path / "out", label_from="folder")
    assert built.classes == ("all", "n01", "n02")
    expected = {photo(3): 0, photo(0): 1, photo(1): 1, photo(4): 0, photo(2): 2}
    assert images(tmp_path / "out") == expected
    assert left_out(tmp_path / "out") == {}
    whole = (tmp_path / "all.tar").read_bytes()
    cut = whole.index(inner[1][1][512:700]) + 20
    (tmp_path / "all.tar").write_bytes(whole[:cut])
    build_at(f"tars:{tmp_path / 'all.tar'}", tmp_path / "cut", label_from="folder")
    assert list(images(tmp_path / "cut")) == [photo(3), photo(0), photo(1), photo(4)]
    assert "the tar ends inside this image" in left_out(tmp_path / "cut").values()


def test_a_name_that_comes_twice_is_two_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", photo(0)), ("a.cls", b"0"), ("a.jpg", photo(1)), ("a.cls", b"1")])
    both_ways(tmp_path)
    assert images(tmp_path / "out") == {photo(0): 0, photo(1): 1}


def test_members_apart_from_their_image_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", photo(0)), ("b.jpg", photo(1)), ("a.cls", b"1")])
    built, _ = both_ways(tmp_path)
    assert built.unlabelled == 2
    assert built.provenance["unlabelled"] == {"no .cls file": 2}
    assert left_out(tmp_path / "out") == {"a.tar/a": "no image among its files (cls)"}


def test_labels_beside_names_with_dots_and_reasons_for_those_that_are_none(tmp_path: Path) -> None:
    members = [
        ("a.v1.jpg", photo(0)),
        ("a.v1.cls", b"1"),
        ("b.jfif", photo(1)),
        ("b.cls", b"-1"),
        ("id.jpg", photo(3)),
        ("id.cls", b"999999999"),
    ]
    write_tar(tmp_path / "a.tar", [*members, ("c.jpe", photo(2)), ("c.json", b'{"label": 1}')])
    built, indexed = both_ways(tmp_path)
    assert images(tmp_path) == {photo(0): 1, photo(1): -1, photo(2): -1, photo(3): -1}
    for manifest in (built, indexed):
        assert manifest.provenance["unlabelled"] == {
            "a label that is no class number below 1000000": 2,
            "no .cls file; take a field of the .json file with --label-from json:FIELD": 1,
        }


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("caf\udce9.jpg", photo(0)), ("caf\udce9.cls", b"1"), ("b.jpg", b"no image")])
    _, indexed = both_ways(tmp_path)
    assert images(tmp_path) == {photo(0): 1}
    assert indexed.shard_columns(0).key == ["caf\\udce9"]


def test_the_image_with_a_bare_extension_is_taken(tmp_path: Path) -> None:
    beside = [
        ("0.depth.png", photo(7, "PNG")),
        ("0.jpg", photo(0)),
        ("1.seg.png", photo(8, "PNG")),
        ("1.jpg", photo(1)),
    ]
    write_tar(tmp_path / "a.tar", beside)
    both_ways(tmp_path)
    assert list(images(tmp_path)) == [photo(0), photo(1)]


def test_images_that_fit_alike_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", photo(7, "PNG")), ("0.jpg", photo(0)), ("1.png", photo(8, "PNG"))])
    for attempt in (lambda: build_at(f"tars:{tmp_path}", tmp_path / "out"), lambda: index(tmp_path, "real", LOCAL)):
        with pytest.raises(InputError, match=r"files of 0 may be the image \(png, jpg\); choose one with --image"):
            attempt()
    build_at(f"tars:{tmp_path}", tmp_path / "out", image="jpg")
    index(tmp_path, "real", LOCAL, image="JPG")
    assert list(images(tmp_path)) == list(images(tmp_path / "out")) == [photo(0)]
    assert left_out(tmp_path / "out") == {"a.tar/1": "no jpg among its files (png)"}


def sparse_tar(path: Path, form: str, content: bytes, stretches: list[tuple[int, int]]) -> None:
    """A tar of a file with holes, as GNU tar writes it in its own format or in version 1.0 of the pax one."""
    stored = b"".join(content[start : start + size] for start, size in stretches)
    if form == "gnu":
        info = tarfile.TarInfo("a.bmp")
        info.type, info.size = tarfile.GNUTYPE_SPARSE, len(stored)
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        for number, (start, size) in enumerate(stretches):
            header[386 + 24 * number : 410 + 24 * number] = b"%011o\0%011o\0" % (start, size)
        header[483:495] = b"%011o\0" % len(content)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        body = bytes(header) + stored
    else:
        lines = "".join(f"{number}\n" for number in (len(stretches), *(x for pair in stretches for x in pair))).encode()
        stored = lines.ljust(tarfile.BLOCKSIZE, b"\0") + stored
        info = tarfile.TarInfo("GNUSparseFile.0/a.bmp")
        info.size = len(stored)
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "a.bmp",
            "GNU.sparse.realsize": str(len(content)),
        }
        body = info.tobuf(tarfile.PAX_FORMAT) + stored
    write_tar(path, [("b.jpg", photo(1))])
    path.write_bytes(body.ljust(-(-len(body) // 512) * 512, b"\0") + path.read_bytes())


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_files_with_holes_are_read_right(tmp_path: Path, form: str) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:4], pixels[60:] = 200, 90
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "BMP")
    content = sink.getvalue()
    sparse_tar(tmp_path / "a.tar", form, content, [(0, 1024), (11264, len(content) - 11264)])
    build_at(f"tars:{tmp_path}", tmp_path / "out")
    first, second = images(tmp_path / "out")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first))), pixels)
    assert second == photo(1)
    index(tmp_path, "real", LOCAL)
    assert list(images(tmp_path)) == [photo(1)]
    assert "sparse" in left_out(tmp_path)["a.tar/a"]


@pytest.mark.parametrize(("pack", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_packed_tar_is_named_for_what_it_is(tmp_path: Path, pack, kind: str) -> None:
    inner = tmp_path / "inner.tar"
    write_tar(inner, [("a.jpg", photo(0))])
    inner.write_bytes(pack(inner.read_bytes()))
    with pytest.raises(InputError, match=rf"none of 1 images can be read \(inner\.tar: compressed by {kind}.*unpack"):
        build_at(f"tars:{inner}", tmp_path / "packed")
