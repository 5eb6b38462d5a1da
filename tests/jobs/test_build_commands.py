"""build, info, verify and index as people run them: what is printed, and the exit code."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.cli import run
from jobs.index import read_classes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """8 pictures in 2 classes, and a text file."""
    root = tmp_path / "images"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(root / ("ant", "bee")[number % 2] / f"{number}.png")
    (root / "bee" / "notes.txt").write_text("no image")
    return root


def outcome(capsys: pytest.CaptureFixture, *argv: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = run(list(map(str, argv)))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_build_info_verify(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "shards"
    build = (
        "build",
        f"imagefolder:{images}",
        "--out",
        out,
        "--source",
        "photos",
        "--shard-samples",
        "5",
        "--workers",
        "1",
    )
    code, printed, notes = outcome(capsys, *build)
    assert (code, printed) == (0, "")
    assert "1 images left out; the reasons are in" in notes
    assert "8 images in 2 shards" in notes
    assert json.loads((out / "quarantine.jsonl").read_text())["origin"] == "bee/notes.txt"

    code, printed, _ = outcome(capsys, "info", out, "--classes", "5")
    assert code == 0
    for text in ("photos", "8 in 2 shards", "ant", "bee", "12 to 12 px", "16 to 16 px", "imagefolder:", "quarantined"):
        assert text in printed

    code, printed, _ = outcome(capsys, "verify", out, "--workers", "1")
    assert (code, printed.endswith("8 images: all is as it was written\n")) == (0, True)

    content = bytearray((out / "shard-000001.tar").read_bytes())
    content[600] ^= 1
    (out / "shard-000001.tar").write_bytes(content)
    code, printed, _ = outcome(capsys, "verify", out, "--workers", "1")
    lines = printed.splitlines()
    assert code == 1
    assert lines[0] == "shard-000001.tar: differs from its hash"
    assert lines[1].startswith("shard-000001.tar 00000000")
    assert lines[2].endswith("1 files and 1 samples are damaged")

    code, _, notes = outcome(capsys, *build, "--quality", "80")
    assert code == 2
    assert "was written with quality None, not 80; pass --overwrite" in notes


def test_index(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "shards"
    outcome(capsys, "build", f"imagefolder:{images}", "--out", out, "--workers", "1")
    for path in out.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    (tmp_path / "classes.txt").write_text("Ameise\nBiene\n")
    code, _, notes = outcome(capsys, "index", out, "--classes", tmp_path / "classes.txt", "--workers", "1")
    assert (code, "8 images in 1 shards" in notes) == (0, True)
    _, printed, _ = outcome(capsys, "info", out)
    assert "Ameise" in printed
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")  # a BOM
    assert read_classes(tmp_path / "classes.txt") == ("cat", "dog")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    code, _, notes = outcome(capsys, "index", out, "--classes", tmp_path / "classes.txt")
    assert (code, "classes.txt: is no UTF-8 (byte 3)" in notes) == (2, True)
    code, _, notes = outcome(capsys, "index", out, "--classes", tmp_path / "none.txt")
    assert (code, "--classes" in notes) == (2, True)


def test_images_without_label_are_said_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = tmp_path / "images"
    (images / "ant").mkdir(parents=True)
    for number, name in enumerate(("ant/a.png", "top.png")):
        Image.new("RGB", (4, 4 + number)).save(images / name)
    code, _, notes = outcome(capsys, "build", f"imagefolder:{images}", "--out", tmp_path / "out", "--workers", "1")
    assert (code, "1 images have no label; 1 of them: in no class folder" in notes) == (0, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("build", "imagefolder:/no/such", "--out", "{}/o"), "/no/such: there is no such folder"),
        (("build", "imagefolder:{}", "--out", "{}/o"), "no class folders in it"),
        (("build", "photos", "--out", "{}/o"), "a source is KIND:PATH"),
        (("info", "{}"), "there is no manifest.json; build it with `hardviews build`"),
        (("verify", "{}"), "there is no manifest.json"),
        (("index", "{}"), "there are no .tar files in it"),
        (("index", "s3://bucket/tars"), "copy them to one"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, argv: tuple[str, ...], message: str
) -> None:
    code, printed, notes = outcome(capsys, *(word.format(tmp_path) for word in argv))
    assert (code, printed) == (2, "")
    line = notes.strip().splitlines()[-1]
    assert line.startswith("hardviews: ")
    assert message in line


def test_interrupted_output_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "PNG")
    (tmp_path / "shard-000000.tar").write_bytes(sink.getvalue())
    code, _, notes = outcome(capsys, "info", tmp_path)
    assert (code, "there is no manifest.json" in notes) == (2, True)
