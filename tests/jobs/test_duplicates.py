"""Planted copies are found, and few others; `build --exclude` leaves them out."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from jobs import cli
from shards.manifest import open_manifest

ORIGINALS = 40


def scene(seed: int) -> Image.Image:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards `train` of originals with near copies of some, and `test` with an exact copy of one of train's."""
    root = tmp_path_factory.mktemp("planted")
    for part in ("train", "test"):
        (root / part / "one").mkdir(parents=True)
    for number in range(ORIGINALS):
        scene(number).save(root / "train" / "one" / f"{number:02d}.png")
    near = {"recompressed": scene(0), "resized": scene(1).resize((48, 48)), "mirrored": ImageOps.mirror(scene(2))}
    for name, image in near.items():
        options = {"quality": 60} if name == "recompressed" else {}
        image.save(root / "train" / "one" / f"{name}.jpg", **options)
    (root / "train" / "one" / "copy.png").write_bytes((root / "train" / "one" / "03.png").read_bytes())
    for number in range(3):
        scene(100 + number).save(root / "test" / "one" / f"{number}.png")
    (root / "test" / "one" / "leak.png").write_bytes((root / "train" / "one" / "04.png").read_bytes())
    for part in ("train", "test"):
        build(root, part, root / f"{part}-shards")
    return root


def build(root: Path, part: str, out: Path, *flags: str) -> int:
    words = ["build", f"imagefolder:{root / part}", "--out", str(out), "--shard-samples", "20", "--workers", "1"]
    return cli.run([*words, "--source", part, *flags])


def names(rows: list[dict[str, str]]) -> set[frozenset[str]]:
    """Each group's original names."""
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(row["group"], set()).add(row["key"].split("-", 1)[1])
    return {frozenset(group) for group in groups.values()}


def test_planted_copies_are_grouped_and_left_out(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [str(planted / "train-shards"), str(planted / "test-shards")]
    assert cli.run(["duplicates", *sets, "--out", str(tmp_path)]) == 0
    with (tmp_path / "duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {("00", "recompressed"), ("01", "resized"), ("02", "mirrored"), ("03", "copy"), ("04", "leak")}
    assert names(rows) == {frozenset(pair) for pair in expected}  # recall and precision 1
    assert {row["key"].split("-", 1)[1] for row in rows if row["same_bytes"] == "yes"} <= {"03", "copy", "leak"}
    facts = json.loads((tmp_path / "duplicates.json").read_text())
    assert (facts["groups"], facts["exact_copies"], facts["groups_across_sets"], facts["left_out"]) == (5, 2, 1, 5)
    to_train = next(one for one in facts["nearest"] if "test" in one["from"] and "train" in one["to"])
    assert sum(to_train["counts"]) == 4 and to_train["counts"][0] == 1
    assert cv2.imread(str(tmp_path / "duplicates.png")).std() > 10
    assert "5 groups, 1 of them across sets; 2 exact copies" in capsys.readouterr().out
    for part, left in (("train", 4), ("test", 1)):
        before = open_manifest(planted / f"{part}-shards")
        assert build(planted, part, tmp_path / part, "--exclude", str(tmp_path / "duplicates.csv")) == 0
        after = open_manifest(tmp_path / part)
        gone = {*before.columns(np.arange(len(before))).key} - {*after.columns(np.arange(len(after))).key}
        assert gone == {row["key"] for row in rows if row["keep"] == "no" and row["source"] == part}
        assert len(gone) == left == len(before) - len(after)


def test_exact_copies_need_no_decoding(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("jobs.duplicates._draw", lambda *_: None)
    assert cli.run(["duplicates", str(planted / "train-shards"), "--no-near", "--out", str(tmp_path)]) == 0
    with (tmp_path / "duplicates.csv").open() as file:
        assert names(list(csv.DictReader(file))) == {frozenset(("03", "copy"))}


def test_mistakes_are_one_line(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = str(planted / "test-shards")
    (tmp_path / "file.csv").write_text("a,b\n1,2\n")
    (tmp_path / "other.csv").write_text("key,crc32,keep\n999999999-x,00000000,no\n")
    for words, message in (
        (["duplicates", "nowhere"], "nowhere"),
        (["duplicates", shards, "--distance", "20"], "distance: 20 must lie between 0 and 16"),
        (["build", f"imagefolder:{planted / 'test'}", "--exclude", "nowhere.csv"], "--exclude nowhere.csv: "),
        (
            ["build", f"imagefolder:{planted / 'test'}", "--exclude", str(tmp_path / "file.csv")],
            "give a duplicates.csv",
        ),
        (["build", f"imagefolder:{planted / 'test'}", "--exclude", str(tmp_path / "other.csv")], "names none of these"),
    ):
        assert cli.run([*words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
        assert not (tmp_path / "out").exists()
