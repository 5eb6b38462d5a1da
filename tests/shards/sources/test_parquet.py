"""Parquet of many shapes: splits, columns and classes that differ by file, labels of any type."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_folders import LOCAL, build_at, photo
from stored_samples import labelled

from shards.build import plan
from shards.errors import InputError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def column(seeds: range) -> pa.Array:
    """Images as Hugging Face writes them."""
    return pa.array([{"bytes": photo(seed), "path": None} for seed in seeds], STRUCT)


def write(path: Path, columns: dict, **classes: list[str]) -> None:
    """A table; `classes` are the names of label columns."""
    table = pa.table(columns)
    if classes:
        notes = {name: {"_type": "ClassLabel", "names": names} for name, names in classes.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": notes}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def classes_of(out: Path, folder: Path, **options) -> dict[bytes, str | None]:
    """Image → class name, None without a label."""
    manifest = build_at(f"parquet:{folder}", out, **options)
    return {image: manifest.classes[label] if label >= 0 else None for image, label in labelled(manifest, out).items()}


def test_classes_are_aligned_by_name_and_files_may_lack_the_label(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.parquet", {"image": column(range(2)), "label": [0, 1]}, label=["cat", "dog"])
    write(folder / "b.parquet", {"label": [0, 1], "image": column(range(2, 4))}, label=["dog", "cow"])
    write(folder / "c.parquet", {"image": column(range(4, 5))})
    assert classes_of(tmp_path / "out", folder) == {
        photo(0): "cat",
        photo(1): "dog",
        photo(2): "dog",
        photo(3): "cow",
        photo(4): None,
    }
    write(folder / "d.parquet", {"image": column(range(5, 6)), "label": [0]})
    with pytest.raises(InputError, match=r"d\.parquet: its labels are numbers without names"):
        plan(f"parquet:{folder}", tmp_path / "other", LOCAL)


@pytest.mark.parametrize(
    "name", ["train-00000-of-00002.parquet", "data/train-00000-of-00002.parquet", "train/0.parquet"]
)
def test_one_split_is_taken_by_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    write(folder / name, {"image": column(range(2)), "label": [1, 0]}, label=["cat", "dog"])
    other = name.replace("train", "test")
    write(folder / other, {"image": column(range(2, 3))})
    with pytest.raises(InputError, match=r"has several splits \(test, train\); choose one with --split"):
        plan(f"parquet:{folder}", tmp_path / "out", LOCAL)
    with pytest.raises(InputError, match=r"--split val: .* has test, train"):
        plan(f"parquet:{folder}", tmp_path / "out", LOCAL, split="val")
    assert classes_of(tmp_path / "out", folder, split="train") == {photo(0): "dog", photo(1): "cat"}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"label": ["dog", "cat", None]}, ["dog", "cat", None]),
        ({"label": pa.array(["dog", "cat", None]).dictionary_encode()}, ["dog", "cat", None]),
        ({"label": pa.array([1.0, None, float("nan")])}, ["1", None, None]),
        ({"cls": [2, 0, -1]}, ["2", "0", None]),
        ({"label": [1, 0, 1_500_000_001]}, ["1", "0", None]),
        ({"caption": ["a dog", "a cat", "a cow"]}, [None, None, None]),
    ],
)
def test_labels_of_any_type(tmp_path: Path, columns: dict, expected: list[str | None]) -> None:
    write(tmp_path / "in" / "a.parquet", {"image": column(range(3)), **columns})
    found = classes_of(tmp_path / "out", tmp_path / "in")
    assert [found[photo(seed)] for seed in range(3)] == expected


def test_labels_that_are_no_classes_or_several_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "half" / "a.parquet", {"image": column(range(1)), "label": [0.5]})
    with pytest.raises(InputError, match=r"a\.parquet: column label holds 0\.5, no class; name another with --label"):
        plan(f"parquet:{tmp_path / 'half'}", tmp_path / "out", LOCAL)
    columns = {"img": column(range(2)), "coarse_label": [0, 0], "fine_label": [0, 1]}
    write(tmp_path / "two" / "a.parquet", columns, coarse_label=["animal"], fine_label=["cat", "dog"])
    with pytest.raises(InputError, match=r"may be the label \(coarse_label, fine_label\); choose one with --label"):
        plan(f"parquet:{tmp_path / 'two'}", tmp_path / "out", LOCAL)
    with pytest.raises(InputError, match=r"--label name: .* no such column"):
        plan(f"parquet:{tmp_path / 'two'}", tmp_path / "out", LOCAL, label="name")
    found = classes_of(tmp_path / "out", tmp_path / "two", label="fine_label")
    assert found == {photo(0): "cat", photo(1): "dog"}


def test_the_image_is_the_column_of_its_type(tmp_path: Path) -> None:
    write(tmp_path / "typed" / "a.parquet", {"phash": [b"y" * 8], "picture": column(range(1))})
    write(tmp_path / "hash" / "a.parquet", {"sha256": [b"x" * 32], "jpg": [photo(0)]})
    for name in ("typed", "hash"):
        assert list(classes_of(tmp_path / f"out-{name}", tmp_path / name)) == [photo(0)]
    write(tmp_path / "two" / "a.parquet", {"condition": column(range(1, 2)), "target": column(range(1))})
    with pytest.raises(InputError, match=r"may be the image \(condition, target\); choose one with --image"):
        plan(f"parquet:{tmp_path / 'two'}", tmp_path / "out", LOCAL)
    with pytest.raises(InputError, match=r"--image other: .* has condition, target"):
        plan(f"parquet:{tmp_path / 'two'}", tmp_path / "out", LOCAL, image="other")
    assert list(classes_of(tmp_path / "out", tmp_path / "two", image="target")) == [photo(0)]
