"""The demo's images as files, and splits of a folder of one's own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jobs.benches.digits import held_out_rows, split_folder, write_digits
from shards.errors import InputError


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def test_every_digit_is_written_once_and_one_in_five_is_held_out(digits: Path) -> None:
    labels = load_digits().target
    for label in range(10):
        train = sorted((digits / "train" / str(label)).iterdir())
        test = sorted((digits / "test" / str(label)).iterdir())
        count = int((labels == label).sum())
        assert len(train) + len(test) == count
        assert abs(len(test) - 0.2 * count) <= 0.5
        assert {int(path.stem) for path in train + test} == set(np.flatnonzero(labels == label).tolist())


def test_the_files_show_the_scans(digits: Path) -> None:
    scans = load_digits().images
    for path in list(digits.rglob("*.png"))[::200]:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
            small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).astype(float)
        scan = scans[int(path.stem)]
        assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.95


def test_digits_are_written_the_same_again_and_stay(digits: Path, tmp_path: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in digits.rglob("*.png")}
    write_digits(digits)
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*.png")} == times
    write_digits(tmp_path)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert names == sorted(path.relative_to(digits) for path in times)
    assert all((tmp_path / name).read_bytes() == (digits / name).read_bytes() for name in names[::50])


def folder_of(root: Path, counts: dict[str, int]) -> Path:
    for label, count in counts.items():
        (root / label / "deeper").mkdir(parents=True)
        for number in range(count):
            place = root / label / "deeper" if number % 2 else root / label
            Image.new("RGB", (2, 2)).save(place / f"{number % 3}{'x' * number}.png")
        (root / label / "notes.txt").write_text("no image")
    return root


def test_a_split_links_every_image_once(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "images", {"a": 10, "b": 2})
    split_folder(images, tmp_path / "out", share=0.3, seed=1)
    links = [path for path in (tmp_path / "out").rglob("*") if not path.is_dir()]
    assert all(path.is_symlink() and path.exists() for path in links)
    assert sorted(path.resolve() for path in links) == sorted(path.resolve() for path in images.rglob("*.png"))
    assert len(list((tmp_path / "out" / "test" / "a").iterdir())) == 3
    assert len(list((tmp_path / "out" / "test" / "b").iterdir())) == 1
    assert len(list((tmp_path / "out" / "train" / "b").iterdir())) == 1
    names = {path.relative_to(tmp_path / "out") for path in links}
    split_folder(images, tmp_path / "out", share=0.3, seed=1)
    split_folder(images, tmp_path / "other", share=0.3, seed=2)
    again = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if not path.is_dir()}
    other = {path.relative_to(tmp_path / "other") for path in (tmp_path / "other").rglob("*") if not path.is_dir()}
    assert again == names
    assert other != names


def test_what_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        split_folder(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="one folder of images per class"):
        split_folder(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(InputError, match="class a has 1 images"):
        split_folder(folder_of(tmp_path / "few", {"a": 1}), tmp_path / "out")
    with pytest.raises(InputError, match="share 1"):
        split_folder(tmp_path / "few", tmp_path / "out", share=1.0)


def test_held_out_rows_keep_proportions() -> None:
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    rows = held_out_rows(labels, 0.1, seed=3)
    assert np.bincount(labels[rows]).tolist() == [10, 1, 1]
    assert np.array_equal(rows, held_out_rows(labels, 0.1, seed=3))
