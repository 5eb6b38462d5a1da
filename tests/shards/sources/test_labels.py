"""Labels as text, in .json files, in the names of folders, and in a file beside the images."""

import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import LOCAL, build_at, photo, write_tar
from stored_samples import labelled

from shards.errors import InputError
from shards.index import index
from shards.manifest import Manifest, open_manifest
from shards.verify import verify


def names(manifest: Manifest) -> dict[bytes, str | None]:
    """Image → name of its class, None without one."""
    found = labelled(manifest, Path(manifest.root))
    return {image: manifest.classes[label] if label >= 0 else None for image, label in found.items()}


def flat_folder(root: Path, files: dict[str, int]) -> Path:
    for name, seed in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo(seed))
    return root


def test_text_in_cls_files_becomes_classes_in_sorted_order_over_all_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", photo(0)), ("a.cls", b"owl\n"), ("b.jpg", photo(1)), ("b.cls", b"12")])
    write_tar(tmp_path / "b.tar", [("c.jpg", photo(2)), ("c.cls", b"cat"), ("d.jpg", photo(3)), ("d.cls", b" \xff")])
    built = build_at(f"tars:{tmp_path}", tmp_path / "out")
    assert built.classes == ("12", "cat", "owl")
    assert names(built) == {photo(0): "owl", photo(1): "12", photo(2): "cat", photo(3): None}
    assert built.provenance["unlabelled"] == {"what the .cls file holds is no text": 1}


def test_indexed_tars_take_names_from_the_list_of_classes(tmp_path: Path) -> None:
    members = [("a.jpg", photo(0)), ("a.cls", b"owl\n"), ("b.jpg", photo(1)), ("b.cls", b"0"), ("c.jpg", photo(2))]
    write_tar(tmp_path / "a.tar", [*members, ("c.cls", b"ant")])
    assert names(index(tmp_path, "real", LOCAL)) == {photo(0): None, photo(1): "0", photo(2): None}
    indexed = index(tmp_path, "real", LOCAL, classes=("cat", "owl"), overwrite=True)
    assert names(indexed) == {photo(0): "owl", photo(1): "cat", photo(2): None}
    assert indexed.provenance["unlabelled"] == {
        "a label that is text and no class (index: list the classes with --classes)": 1
    }
    tar = bytearray((tmp_path / "a.tar").read_bytes())
    tar[-1] ^= 1  # behind the end: no sample is damaged, so each is looked at and found well
    (tmp_path / "a.tar").write_bytes(tar)
    damages = [damage.key for _, damages in verify(open_manifest(tmp_path), LOCAL) for damage in damages]
    assert damages == [""]
    tar[tar.index(b"owl\n")] ^= 1
    (tmp_path / "a.tar").write_bytes(tar)
    reasons = {damage.key: damage.reason for _, damages in verify(open_manifest(tmp_path), LOCAL) for damage in damages}
    assert reasons["a"] == "label differs"


@pytest.mark.parametrize(
    ("field", "classes", "labels"),
    [
        ("y", ("0", "1", "2", "3"), ["3", "0", None, None]),
        ("kind", ("cat", "owl"), ["owl", "cat", None, None]),
    ],
)
def test_labels_in_json_files(tmp_path: Path, field: str, classes: tuple[str, ...], labels: list[str | None]) -> None:
    notes = (b'{"y": 3, "kind": "owl"}', b'{"y": 0.0, "kind": "cat"}', b'{"other": 1}', b"[1")
    members = [
        (f"{i}.{kind}", data) for i, note in enumerate(notes) for kind, data in (("jpg", photo(i)), ("json", note))
    ]
    write_tar(tmp_path / "a.tar", members)
    built = build_at(f"tars:{tmp_path}", tmp_path / "out", label_from=f"json:{field}")
    assert built.classes == classes
    assert list(names(built).values()) == labels
    assert built.provenance["unlabelled"] == {
        f"no field {field} in the .json file": 1,
        "what the .json file holds is no JSON object": 1,
    }


def test_labels_from_the_folders_in_a_tar(tmp_path: Path) -> None:
    members = [("train/owl/a.jpg", photo(0)), ("./train/cat/b.jpg", photo(1)), ("c.jpg", photo(2)), ("c.cls", b"7")]
    write_tar(tmp_path / "ant.tar", members)
    built = build_at(f"tars:{tmp_path}", tmp_path / "out", label_from="folder")
    assert names(built) == {photo(0): "owl", photo(1): "cat", photo(2): "ant"}
    with pytest.raises(InputError, match="was written with another list of images"):
        build_at(f"tars:{tmp_path}", tmp_path / "out")
    with pytest.raises(InputError, match="--label-from text: labels come from cls, folder or json:FIELD"):
        build_at(f"tars:{tmp_path}", tmp_path / "out", label_from="text")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("labels.csv", "id,breed\na/1,owl\nb/1,cat\ncafe\u0301,owl\nunknown,dog\n"),
        ("labels.csv", "\ufefflabel;name;size\r\nowl;a/1.jpg;3\r\ncat;b/1.jpg;3\r\nowl;caf\u00e9.jpg;1\r\ndog;x;1\r\n"),
        ("labels.tsv", "a/1.jpg\towl\nb/1.jpg\tcat\nsub/caf\u00e9.jpg\towl\nx.jpg\tdog\n"),
    ],
)
def test_labels_in_a_file_beside_a_folder(tmp_path: Path, file: str, content: str) -> None:
    files = {"a/1.jpg": 0, "b/1.jpg": 1, unicodedata.normalize("NFD", "sub/caf\u00e9.jpg"): 2, "none.jpg": 3}
    images = flat_folder(tmp_path / "images", files)
    (tmp_path / file).write_text(content)
    built = build_at(f"folder:{images}", tmp_path / "out", labels=str(tmp_path / file))
    assert built.classes == ("cat", "dog", "owl")
    assert names(built) == {photo(0): "owl", photo(1): "cat", photo(2): "owl", photo(3): None}
    assert built.provenance["unlabelled"] == {"the file of labels has none for it": 1}
    (tmp_path / file).write_text(content.replace("dog", "fox"))
    with pytest.raises(InputError, match="was written with another list of images"):
        build_at(f"folder:{images}", tmp_path / "out", labels=str(tmp_path / file))


def test_labels_in_parquet_beside_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("d/0.jpg", photo(0)), ("1.jpg", photo(1)), ("1.cls", b"9"), ("2.jpg", photo(2))])
    table = {"key": ["d/0", "1", "2", "3"], "label": [2.0, 0.0, None, 5.0], "fine": ["x", "y", "z", "x"]}
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    built = build_at(f"tars:{tmp_path}/a.tar", tmp_path / "out", labels=str(tmp_path / "labels.parquet"))
    assert list(labelled(built, tmp_path / "out").values()) == [2, 0, -1]
    fine = build_at(f"tars:{tmp_path}/a.tar", tmp_path / "fine", labels=str(tmp_path / "labels.parquet"), label="fine")
    assert list(names(fine).values()) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1.jpg,owl\n", r"'1\.jpg' may be [ab]/1\.jpg or [ab]/1\.jpg; write their paths into it"),
        ("x.jpg,owl\n", r"names none of the images; it has 'x\.jpg', not '"),
        ("a/1.jpg,owl\na/1.jpg,cat\n", "'a/1.jpg' has several labels"),
        ("1,owl\n2,cat\n", r"which of its columns \(1, owl\) names the images is not clear; call one `name`"),
        ("name,breed,size\n1,owl,3\n", r"\(name, breed, size\) is the label is not clear; choose one with --label"),
        ("name,label\na/1.jpg\n", "row 1 has 1 columns, not 2"),
        ("name,label\na/1.jpg,5000000\n", "label 5000000 is no class number below 1000000"),
        ("name,label\na/1.jpg,\n", "is no class number"),
        ("", "is empty"),
        ("name,label\n", "holds no labels"),
    ],
)
def test_files_of_labels_that_are_not_clear_are_refused(tmp_path: Path, content: str, message: str) -> None:
    images = flat_folder(tmp_path / "images", {"a/1.jpg": 0, "b/1.jpg": 1})
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        build_at(f"folder:{images}", tmp_path / "out", labels=str(tmp_path / "labels.csv"))


def test_options_of_labels_that_a_source_does_not_have(tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", {"a/1.jpg": 0})
    write_tar(tmp_path / "a.tar", [("0.jpg", photo(0))])
    (tmp_path / "labels.csv").write_text("name,label\nx,1\n")
    for address, options, message in (
        (
            f"imagefolder:{images}",
            {"labels": "x.csv"},
            "--labels: imagefolder: has no choice of it; leave it out; ",
        ),
        (f"folder:{images}", {"label_from": "cls"}, "--label-from: folder: has no choice of it"),
        (f"folder:{images}", {"label": "x"}, "--label: folder: has no choice of it"),
        (f"folder:{images}", {"labels": "/none.csv"}, "--labels /none.csv: cannot be read"),
        (f"tars:{tmp_path}", {"labels": "x", "label_from": "cls"}, "--label-from cls is given too"),
        (f"tars:{tmp_path}", {"labels": str(tmp_path / "labels.csv")}, "names none of the images; compare its names"),
    ):
        with pytest.raises(InputError, match=message):
            build_at(address, tmp_path / "out", **options)
