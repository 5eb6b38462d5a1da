"""Indexing tars of others in place."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from image_folders import LOCAL, build_at, contents, imagefolder, photo, write_tar
from PIL import Image
from wds2idx import IndexCreator

from shards.errors import InputError
from shards.index import index
from shards.manifest import open_manifest
from shards.verify import verify


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars by webdataset's own writer, with members that we do not know."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%04d.tar", maxcount=4, verbose=0) as writer:
        for seed in range(7):
            writer.write({"__key__": f"a/{seed}", "txt": "caption", "jpg": photo(seed), "cls": seed % 3})
    return folder


def test_foreign_tars_become_a_data_set(tars: Path) -> None:
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    manifest = index(tars, "web", LOCAL, classes=("ant", "bee", "cow"))
    assert {name: (tars / name).read_bytes() for name in before} == before
    assert manifest.shards == ("0000.tar", "0001.tar")
    assert manifest.counts.tolist() == [4, 3]
    assert manifest.class_counts.tolist() == [3, 2, 2]
    columns = manifest.columns(np.arange(7))
    assert columns.key == [f"a/{seed}" for seed in range(7)]
    for row in range(7):
        content = before[manifest.shards[columns.shard[row]]]
        assert content[columns.offset[row] : columns.offset[row] + columns.size[row]] == photo(row)
    assert [damage for _, found in verify(manifest, LOCAL) for damage in found] == []


def test_the_index_is_that_of_dalis_own_tool(tars: Path, tmp_path: Path) -> None:
    index(tars, "web", LOCAL)
    with IndexCreator(str(tars / "0001.tar"), str(tmp_path / "own.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tars / "0001.idx").read_bytes() == (tmp_path / "own.idx").read_bytes()


def test_a_label_that_is_damaged_in_place_is_found(tars: Path) -> None:
    manifest = index(tars, "web", LOCAL)
    with tarfile.open(tars / "0000.tar") as tar:
        place = tar.getmember("a/2.cls").offset_data
    content = bytearray((tars / "0000.tar").read_bytes())
    content[place] = ord("1")
    (tars / "0000.tar").write_bytes(content)
    keys = [damage.key for _, found in verify(manifest, LOCAL) for damage in found]
    assert keys == ["", "a/2"]


def test_images_that_need_a_change_are_left_out_with_the_remedy(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(sink, "JPEG")
    members = [("a.jpg", photo(0)), ("b.jpg", sink.getvalue()), ("c.jpg", photo(1)[:90]), ("d.txt", b"text")]
    write_tar(tmp_path / "x.tar", [*members, ("e.jpg", photo(2) + b"padding")])
    manifest = index(tmp_path, "web", LOCAL)
    columns = manifest.columns(np.arange(2))
    assert (columns.key, columns.size.tolist()) == (["a", "e"], [len(photo(0)), len(photo(2))])
    reasons = {
        line["key"]: line["reason"]
        for line in map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    }
    assert list(reasons) == ["b", "c", "d"]
    assert "hardviews build tars:" in reasons["b"]


def test_a_rerun_keeps_and_an_overwrite_reads_anew(tars: Path) -> None:
    index(tars, "web", LOCAL)
    first = contents(tars)
    seen = []
    index(tars, "web", LOCAL, on_shard=seen.append)
    assert contents(tars) == first
    assert len(seen) == 2
    content = (tars / "0001.tar").read_bytes()
    (tars / "0001.tar").write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert index(tars, "web", LOCAL).counts.tolist() == [4, 3]
    assert len(index(tars, "web", LOCAL, overwrite=True)) < 7
    assert len(open_manifest(tars)) < 7


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        index(tmp_path / "missing", "web", LOCAL)
    with pytest.raises(InputError, match=r"there are no \.tar files in it"):
        index(tmp_path, "web", LOCAL)
    build_at(f"imagefolder:{imagefolder(tmp_path / 'images', 3)}", tmp_path / "built")
    with pytest.raises(InputError, match="have a manifest from their making; pass --overwrite"):
        index(tmp_path / "built", "web", LOCAL)


def test_a_folder_that_cannot_be_written_is_named_without_a_flag(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", photo(0))])
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=rf"^{tmp_path}: Is a directory; choose a folder that can be written"):
        index(tmp_path, "real", LOCAL)
