"""Layouts with splits: one is taken by name, and several are never mixed unsaid."""

from pathlib import Path

import fsspec
import pytest
from image_folders import build_at, photo, write_tar
from stored_samples import labelled

from shards.errors import InputError
from shards.sources.splits import split_of


def put(root: Path, name: str, seed: int) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(photo(seed))


@pytest.mark.parametrize("where", ["", "memory://splits"])
@pytest.mark.parametrize("kind", ["imagefolder", "folder"])
def test_a_split_of_folders_is_that_folder(tmp_path: Path, kind: str, where: str) -> None:
    root = tmp_path / "in"
    for seed, name in enumerate(("train/ant/a.jpg", "train/bee/b.jpg", "val/ant/c.jpg", "meta/notes/d.jpg")):
        put(root, name, seed)
    address = f"{kind}:{where}{root}"
    if where:
        fsspec.filesystem("memory").put(str(root), f"/splits{root}", recursive=True)
    with pytest.raises(InputError, match=r"has several splits \(train, val\); choose one with --split"):
        build_at(address, tmp_path / "out")
    with pytest.raises(InputError, match=r"--split test: .* has train, val"):
        build_at(address, tmp_path / "out", split="test")
    built = build_at(address, tmp_path / "out", split="train")
    same = build_at(f"{kind}:{root}/train", tmp_path / "same")
    assert [entry.sha256 for entry in built.entries] == [entry.sha256 for entry in same.entries]
    assert built.classes == same.classes == (("ant", "bee") if kind == "imagefolder" else ())


def test_a_single_folder_that_is_called_like_a_split(tmp_path: Path) -> None:
    for seed, name in enumerate(("splits/train/ant/a.jpg", "splits/train/bee/b.jpg", "classes/train/c.jpg")):
        put(tmp_path, name, seed)
    put(tmp_path, "classes/boat/d.jpg", 3)
    put(tmp_path, "single/train/e.jpg", 4)
    assert build_at(f"imagefolder:{tmp_path}/splits", tmp_path / "1").classes == ("ant", "bee")
    assert build_at(f"imagefolder:{tmp_path}/classes", tmp_path / "2").classes == ("boat", "train")
    assert build_at(f"imagefolder:{tmp_path}/single", tmp_path / "3").classes == ("train",)


@pytest.mark.parametrize(
    "name", ["imagenet1k-train-0000.tar", "train/0000.tar", "train-00000-of-00002.tar", "train.tar"]
)
def test_a_split_of_tars(tmp_path: Path, name: str) -> None:
    for seed, tar in enumerate((name, name.replace("train", "validation"))):
        (tmp_path / tar).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / tar, [(f"{seed}.jpg", photo(seed))])
    with pytest.raises(InputError, match=r"has several splits \(train, validation\); choose one with --split"):
        build_at(f"tars:{tmp_path}", tmp_path / "out")
    assert list(labelled(build_at(f"tars:{tmp_path}", tmp_path / "out", split="train"), tmp_path / "out")) == [photo(0)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00012.parquet", "train"),
        ("data/unsupervised-00000-of-00012-0123456789abcdef.parquet", "unsupervised"),
        ("Test/part-1.parquet", "Test"),
        ("val_images.tar", "val"),
        ("n01440764.tar", ""),
        ("trains.tar", ""),
        ("shard-000000.tar", ""),
    ],
)
def test_splits_in_names(name: str, split: str) -> None:
    assert split_of(name) == split
